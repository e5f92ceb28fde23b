"""The pages say what is so: their commands are the ones that run, their examples run, their links lead somewhere."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

import run_readme
from workspace import ROOT, Member, read_members

MEMBERS = read_members()
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *(m.folder / "README.md" for m in MEMBERS.values())]
SHELL_BLOCK = re.compile(r"^```(?:bash|sh|console)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?://|mailto:|#)([^)#\s]+)")


def shell_lines(text: str) -> list[str]:
    return [line.strip().removeprefix("$ ") for block in SHELL_BLOCK.findall(text) for line in block.splitlines()]


def test_ci_runs_the_test_command_of_the_readme() -> None:
    script = (ROOT / ".ci" / "run").read_text().splitlines()
    assert "pip install uv && uv run nox" in shell_lines((ROOT / "README.md").read_text())
    assert "  pip install uv" in script
    assert script[-1] == "uv run nox"
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


@pytest.mark.parametrize("member", MEMBERS.values(), ids=MEMBERS)
def test_readme_shows_how_to_use_the_member(member: Member) -> None:
    text = (member.folder / "README.md").read_text()
    assert text.startswith(f"# {member.name}\n")
    shown = run_readme.python_blocks(text) if member.folder.parent.name == "packages" else shell_lines(text)
    assert shown, "has no example"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_a_page_lead_to_files(page: Path) -> None:
    assert [link for link in LINK.findall(page.read_text()) if not (page.parent / link).exists()] == []


def test_examples_share_a_namespace_and_errors_name_the_line_of_the_page(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text("# x\n\n```python\na = 1\n```\n\n```text\nboom\n```\n\n```python\nassert a == 1\n1 / 0\n```\n")
    with pytest.raises(ZeroDivisionError) as caught:
        run_readme.run(page)
    assert (Path(caught.traceback[-1].path), caught.traceback[-1].lineno + 1) == (page, 13)
