import doctest
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hjepa_models

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


def test_importing_the_package_does_not_import_timm():
    code = "import sys, hjepa_models; hjepa_models.HJEPAConfig(); assert 'timm' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_everything_exported_exists():
    assert hjepa_models.__all__ == sorted(hjepa_models.__all__, key=lambda n: (not n.isupper(), n[0].islower(), n))
    assert all(hasattr(hjepa_models, name) for name in hjepa_models.__all__)
