import doctest
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hjepa_models

CHOICES = (
    hjepa_models.Position,
    hjepa_models.AttentionBackend,
    hjepa_models.PredictorMode,
    hjepa_models.Pooling,
    hjepa_models.Fpn,
    hjepa_models.Targets,
    hjepa_models.Prediction,
    hjepa_models.Objective,
    hjepa_models.LevelWeighting,
    hjepa_models.GlobalObjective,
)
README = Path(__file__).parents[1] / "README.md"
MODULES = [module.name for module in pkgutil.walk_packages(hjepa_models.__path__, "hjepa_models.")]


@pytest.mark.parametrize("name", MODULES)
def test_doctests(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_readme_examples_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, str(README), "exec"), {})


def table_rows():
    """The rows of the README's table that have something to try, and the lines that each shows."""
    rows = {}
    for line in README.read_text().splitlines():
        cells = re.split(r"(?<!\\)\|", line)[1:-1]
        shown = [part.replace("\\|", "|") for part in re.findall(r"`([^`]+)`", cells[-1])] if len(cells) == 4 else []
        if shown:
            rows[cells[0].strip()] = cells, shown
    return rows


@pytest.fixture
def prelude(tmp_path, monkeypatch):
    """What the lines of the table continue."""
    monkeypatch.chdir(tmp_path)
    block = next(b for b in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL) if "def hjepa(" in b)
    namespace = {}
    exec(compile(block, str(README), "exec"), namespace)
    return namespace


@pytest.mark.parametrize("row", table_rows())
def test_rows_of_the_table_run(row, prelude):
    """Three lines at most; each names how it is configured and where it comes from."""
    cells, lines = table_rows()[row]
    assert all(cell.strip() for cell in cells)
    assert len(lines) <= 3
    exec(compile("\n".join(lines), str(README), "exec"), prelude)


def test_the_table_names_every_choice():
    """A choice that a config allows is in the table, so that none is there that nobody can find."""
    text = " ".join(cells[1] for cells, _ in table_rows().values())
    for choices in CHOICES:
        for choice in choices:
            assert re.search(rf"\b{choice}\b", text), f"{choices.__name__}.{choice} is not in the table"


def test_importing_the_package_imports_nothing_that_takes_long():
    slow = {"timm", "huggingface_hub", "onnx", "onnxscript", "onnxruntime", "torchao", "torch._dynamo"}
    code = "import sys, hjepa_models; hjepa_models.HJEPAConfig(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, timeout=300, capture_output=True, text=True)
    loaded = set(done.stdout.split())
    assert "hjepa_models.export" in loaded
    assert not loaded & slow


def test_everything_exported_exists():
    assert hjepa_models.__all__ == sorted(hjepa_models.__all__, key=lambda n: (not n.isupper(), n[0].islower(), n))
    assert all(hasattr(hjepa_models, name) for name in hjepa_models.__all__)
