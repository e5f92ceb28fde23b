"""What is tracked: small files, no lock file, no index hosts, nothing that only one machine knows."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

from workspace import ROOT, Member, read_members

MEGABYTE = 1_000_000
INDEX_HOST = re.compile(r'https?://[^"/ ]+/(simple|packages)/')
UNFINISHED = re.compile(r"\bNotImplementedError\b|except[^\n]*:\s*\n?\s*pass\b|\bbreakpoint\(\)")
MEMBERS = read_members()


def tracked() -> list[Path]:
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [ROOT / name for name in listing.split("\0") if name and (ROOT / name).is_file()]


def test_no_tracked_file_is_above_a_megabyte() -> None:
    files = tracked()
    assert files
    assert {str(path): path.stat().st_size for path in files if path.stat().st_size > MEGABYTE} == {}


def test_the_lock_file_is_not_tracked() -> None:
    """It records the index that it was resolved from; constraints.txt pins without one."""
    assert [path for path in tracked() if path.name == "uv.lock"] == []


def test_no_index_host_is_named() -> None:
    named = []
    for path in tracked():
        match = INDEX_HOST.search(path.read_bytes().decode(errors="ignore"))
        named += [f"{path.relative_to(ROOT)}: {match[0]}"] if match else []
    assert named == []


@pytest.mark.parametrize("folder", ["simple", "packages"])
def test_an_index_host_would_be_seen(folder: str) -> None:
    assert INDEX_HOST.search(f'source = {{ registry = "https://mirror.example:8080/{folder}/torch/" }}')


@pytest.mark.parametrize("member", MEMBERS.values(), ids=MEMBERS)
def test_text_has_an_encoding(member: Member) -> None:
    """Else it is that of the locale, in which a file that is written on one machine cannot be read on another."""
    found = [
        f"{path}:{call.lineno}"
        for path in sorted(member.source.rglob("*.py"))
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and call.func.attr in ("read_text", "write_text")
        and len(call.args) < (2 if call.func.attr == "write_text" else 1)
        and "encoding" not in {keyword.arg for keyword in call.keywords}
    ]
    assert found == []


@pytest.mark.parametrize("member", MEMBERS.values(), ids=MEMBERS)
def test_what_is_exported_works(member: Member) -> None:
    """A thin package is thin, not stubbed; an error is not swallowed."""
    found = {str(path): UNFINISHED.findall(path.read_text()) for path in sorted(member.source.rglob("*.py"))}
    assert {path: matches for path, matches in found.items() if matches} == {}
