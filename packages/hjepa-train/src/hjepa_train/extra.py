"""Packages that only some users want."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType


def require(module: str, field: str, install: str) -> None:
    """Raise a ValueError of one line where a package is not installed; nothing is imported.

    Args:
        module: Its import name.
        field: The setting that asks for it, as `field=value`.
        install: What to give to `pip install`.
    """
    if importlib.util.find_spec(module) is None:
        raise ValueError(f"{field}: the package {module} is not installed; pip install '{install}', or leave it out")


def load(module: str, field: str, install: str) -> ModuleType:
    """Import a package that may be missing; raise as `require`."""
    require(module, field, install)
    return importlib.import_module(module)
