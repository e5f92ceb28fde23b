import doctest
import importlib
import pkgutil

import pytest

import hjepa_train

MODULES = sorted(module.name for module in pkgutil.walk_packages(hjepa_train.__path__, "hjepa_train."))


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_the_docstrings(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_there_are_examples():
    assert sum(doctest.testmod(importlib.import_module(name)).attempted for name in MODULES) >= 10
