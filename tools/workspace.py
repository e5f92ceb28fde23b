"""What the workspace holds: its members, their versions and which siblings each of them stands on.

Standard library only, because noxfile.py reads it before anything is installed.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "constraints.txt"


@dataclass(frozen=True, kw_only=True)
class Member:
    """A package or an app of the workspace."""

    name: str
    folder: Path
    pyproject: dict[str, Any] = field(repr=False)

    @property
    def module(self) -> str:
        """Import name: `hjepa-models` is imported as `hjepa_models`."""
        return self.name.replace("-", "_")

    @property
    def version(self) -> str:
        """Static version of the member."""
        return str(self.pyproject["project"]["version"])

    @property
    def source(self) -> Path:
        """Folder of the import package."""
        return self.folder / "src" / self.module

    @property
    def requirements(self) -> list[str]:
        """Requirements as they are written, siblings among them."""
        return list(self.pyproject["project"].get("dependencies", []))

    @property
    def test_requirements(self) -> list[str]:
        """Requirements of the member's own tests."""
        return list(self.pyproject["dependency-groups"]["test"])


def requirement_name(requirement: str) -> str:
    """Return the normalised project name at the head of a requirement."""
    match = re.match(r"[A-Za-z0-9][A-Za-z0-9._-]*", requirement)
    if match is None:
        raise ValueError(f"requirement={requirement!r}: begins with no project name")
    return re.sub(r"[-_.]+", "-", match[0]).lower()


def read_members(root: Path = ROOT) -> dict[str, Member]:
    """Return the members of the workspace by name, packages before apps."""
    members = {}
    for kind in ("packages", "apps"):
        for path in sorted(root.glob(f"{kind}/*/pyproject.toml")):
            pyproject = tomllib.loads(path.read_text())
            name = pyproject["project"]["name"]
            members[name] = Member(name=name, folder=path.parent, pyproject=pyproject)
    return members


def closure(name: str, members: dict[str, Member]) -> list[str]:
    """Return `name` and every sibling that it stands on, directly or not."""
    found: list[str] = []
    todo = [name]
    while todo:
        current = todo.pop()
        if current in members and current not in found:
            found.append(current)
            todo += [requirement_name(each) for each in members[current].requirements]
    return found
