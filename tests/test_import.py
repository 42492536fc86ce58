"""`import speclm` is cheap, and its names are there all the same."""

import subprocess
import sys
from typing import Any

import pytest

import speclm


def run(script: str) -> str:
    command = [sys.executable, "-c", script]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_import_loads_neither_torch_nor_transformers():
    script = "import sys, speclm; print({'torch', 'transformers'} & set(sys.modules))"
    assert run(script) == "set()\n"


def test_public_names_are_imported_at_first_use():
    names: dict[str, Any] = {}
    exec("from speclm import *", names)
    assert names["SpecModel"].__module__ == "speclm.model.spec_model"
    assert all(names[name] is not None for name in speclm.__all__)
    assert all(speclm.__getattr__(name) is names[name] for name in speclm._MODULES)
    assert set(speclm.__all__) <= set(dir(speclm))


def test_a_name_that_the_package_lacks_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'speclm' has no attribute 'Model'"):
        speclm.Model  # noqa: B018
