"""Check the wheel and the sdist of every member of the workspace: name, version, licence, typing marker, metadata.

Run it on the folder that they were built into: `python tools/check_dist.py DIST`.
"""

from __future__ import annotations

import sys
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

from workspace import Member, read_members


def metadata_problems(member: Member, metadata: Message) -> list[str]:
    """Return what is wrong with the metadata of one archive."""
    project = member.pyproject["project"]
    expected = {
        "Name": member.name,
        "Version": member.version,
        "Summary": project["description"],
        "License-Expression": "Apache-2.0",
        "License-File": "LICENSE",
        "Requires-Python": ",".join(sorted(project["requires-python"].split(","))),
    }
    found = [
        f"{field}: {metadata[field]!r} instead of {value!r}"
        for field, value in expected.items()
        if ",".join(sorted((metadata[field] or "").split(","))) != ",".join(sorted(value.split(",")))
    ]
    if "# " not in str(metadata.get_payload()):
        found.append("the README is not its long description")
    return found


def wheel_problems(member: Member, path: Path) -> list[str]:
    """Return what is wrong with the wheel of a member."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        metadata = next(name for name in names if name.endswith(".dist-info/METADATA"))
        found = metadata_problems(member, Parser().parsestr(archive.read(metadata).decode()))
    if f"{member.module}/py.typed" not in names:
        found.append("py.typed is missing")
    own = (f"{member.module}/", f"{member.module}-{member.version}.dist-info/")
    foreign = [name for name in names if not name.startswith(own)]
    if foreign:
        found.append(f"holds files outside of {member.module}: {foreign[:3]}")
    return found


def sdist_problems(member: Member, path: Path) -> list[str]:
    """Return what is wrong with the source archive of a member."""
    stem = path.name.removesuffix(".tar.gz")
    with tarfile.open(path) as archive:
        names = archive.getnames()
        file = archive.extractfile(f"{stem}/PKG-INFO")
        assert file is not None, "every sdist has a PKG-INFO"
        found = metadata_problems(member, Parser().parsestr(file.read().decode()))
    wanted = ("LICENSE", "README.md", "CHANGELOG.md", f"src/{member.module}/__init__.py")
    return found + [f"{name} is missing" for name in wanted if f"{stem}/{name}" not in names]


def main() -> int:
    """Run the command line."""
    dist = Path(sys.argv[1])
    found = []
    for member in read_members().values():
        for kind, check, path in (
            ("wheel", wheel_problems, dist / f"{member.module}-{member.version}-py3-none-any.whl"),
            ("sdist", sdist_problems, dist / f"{member.module}-{member.version}.tar.gz"),
        ):
            lines = check(member, path) if path.exists() else ["was not built"]
            found += [f"{member.name} {kind}: {line}" for line in lines]
    print(*found, sep="\n", end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
