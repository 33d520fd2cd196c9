import doctest
import importlib
import pkgutil

import pytest

import celltron.core

MODULES = [entry.name for entry in pkgutil.iter_modules(celltron.core.__path__)]


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_hold(name: str) -> None:
    assert doctest.testmod(importlib.import_module(f"celltron.core.{name}")).failed == 0
