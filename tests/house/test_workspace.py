"""Each package and app is complete, and what is written about it elsewhere agrees with it."""

from __future__ import annotations

import re
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from workspace import CONSTRAINTS, ROOT, Member, closure, read_members, requirement_name

MEMBERS = read_members()
HOUSE = tomllib.loads((ROOT / "pyproject.toml").read_text())
each_member = pytest.mark.parametrize("member", MEMBERS.values(), ids=MEMBERS)


def siblings_of(member: Member) -> list[Requirement]:
    return [Requirement(each) for each in member.requirements if requirement_name(each) in MEMBERS]


def test_the_five_packages_and_two_apps_are_members() -> None:
    kinds = {name: member.folder.parent.name for name, member in MEMBERS.items()}
    packages = {f"hjepa-{name}" for name in ("models", "data", "train", "eval", "video")}
    assert kinds == dict.fromkeys(packages, "packages") | dict.fromkeys(("hjepa-pretrain", "hjepa-benchmark"), "apps")


@each_member
def test_member_is_complete(member: Member) -> None:
    wanted = ["README.md", "CHANGELOG.md", "LICENSE"]
    assert [name for name in wanted if not (member.folder / name).is_file()] == []
    assert (member.source / "__init__.py").is_file()
    assert (member.source / "py.typed").is_file()
    assert any(member.folder.glob("tests/**/test_*.py")), "has no tests"


@each_member
def test_member_has_a_static_version_that_its_changelog_tells(member: Member) -> None:
    headings = re.findall(r"^## (\S+)", (member.folder / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[:1] == [member.version]
    assert str(Version(member.version)) == member.version


@each_member
def test_members_agree_on_python_and_licence(member: Member) -> None:
    project = member.pyproject["project"]
    assert project["requires-python"] == ">=3.11,<3.14"
    assert project["license"] == "Apache-2.0"
    assert (member.folder / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


@each_member
def test_sibling_bounds_admit_the_siblings_of_the_workspace(member: Member) -> None:
    """The resolver does not check this: it takes a workspace member whatever bound is written."""
    for sibling in siblings_of(member):
        version = MEMBERS[sibling.name].version
        assert sibling.specifier.contains(version), f"{sibling} excludes {version}, the version of this workspace"


@each_member
def test_sibling_bounds_have_a_floor_and_a_ceiling(member: Member) -> None:
    for sibling in siblings_of(member):
        assert {bound.operator for bound in sibling.specifier} == {">=", "<"}, str(sibling)


def test_a_closure_holds_what_stands_below_a_member_and_nothing_else() -> None:
    assert closure("hjepa-models", MEMBERS) == ["hjepa-models"]
    assert set(closure("hjepa-video", MEMBERS)) == {"hjepa-video", "hjepa-models", "hjepa-data"}
    assert "hjepa-benchmark" not in closure("hjepa-pretrain", MEMBERS)


def test_every_member_is_known_where_members_are_listed() -> None:
    assert set(HOUSE["tool"]["uv"]["sources"]) == set(MEMBERS)
    assert set(HOUSE["tool"]["importlinter"]["root_packages"]) == {member.module for member in MEMBERS.values()}
    sources = {str(member.source.parent.relative_to(ROOT)) for member in MEMBERS.values()}
    assert sources <= set(HOUSE["tool"]["mypy"]["mypy_path"])


def test_constraints_pin_every_requirement_and_name_no_host() -> None:
    lines = [line for line in CONSTRAINTS.read_text().splitlines() if not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[a-z0-9-]+==[0-9][\w.!+]*( ; .+)?", line)] == []
    pinned = {requirement_name(line) for line in lines}
    required = {requirement_name(each) for member in MEMBERS.values() for each in member.requirements}
    built_with = {requirement_name(each) for m in MEMBERS.values() for each in m.pyproject["build-system"]["requires"]}
    assert (required | built_with) - set(MEMBERS) <= pinned
    assert not pinned & set(MEMBERS)
