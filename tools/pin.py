"""Write or check constraints.txt, the resolution that every environment of noxfile.py is installed with.

    python tools/pin.py           resolve anew and write constraints.txt
    python tools/pin.py --check   resolve anew and fail where constraints.txt differs

The resolution depends on the pyproject.toml files and on `exclude-newer` in the root one, nothing else: it runs in an
empty folder, so that neither an old uv.lock nor the versions that happen to be installed are preferred. To move to
newer releases, raise `exclude-newer` and run this script.
"""

from __future__ import annotations

import argparse
import difflib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from workspace import CONSTRAINTS, ROOT, read_members

HEADER = "# Written by tools/pin.py: the versions that exclude-newer in pyproject.toml selects. Do not edit by hand.\n"
EXPORT = (
    "uv export --quiet --all-packages --all-groups --all-extras "
    "--no-emit-workspace --no-hashes --no-header --no-annotate"
)


def copy_metadata(target: Path) -> None:
    """Copy what a resolution reads of the workspace into `target`."""
    for folder in (ROOT, *(member.folder for member in read_members().values())):
        destination = target / folder.relative_to(ROOT)
        destination.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / "pyproject.toml", destination)


def resolve() -> str:
    """Return the text of constraints.txt for the workspace as it is."""
    with tempfile.TemporaryDirectory() as folder:
        copy_metadata(Path(folder))
        command = [*EXPORT.split(), "--python", sys.executable]
        done = subprocess.run(command, cwd=folder, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"pin: the workspace does not resolve\n{done.stderr}")
    return HEADER + "".join(f"{line}\n" for line in sorted(done.stdout.splitlines()) if line)


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where it is out of date")
    arguments = parser.parse_args()
    resolved = resolve()
    if not arguments.check:
        CONSTRAINTS.write_text(resolved)
        return 0
    tracked = CONSTRAINTS.read_text()
    if tracked == resolved:
        return 0
    before, after = tracked.splitlines(), resolved.splitlines()
    print(*difflib.unified_diff(before, after, "constraints.txt", "resolved", lineterm="", n=0), sep="\n")
    print("constraints.txt is out of date: run `uv run python tools/pin.py` and commit it")
    return 1


if __name__ == "__main__":
    sys.exit(main())
