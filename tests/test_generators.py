"""What is made from other code is as it would be made now."""

from __future__ import annotations

import importlib.util
import pathlib
import sys
from types import ModuleType

import pytest

ROOT = pathlib.Path(__file__).parents[1]


def generator(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"generators_{name}", ROOT / "generators" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_asynchronous_client_is_that_of_the_synchronous_one() -> None:
    """As `make aio` would write it, to the byte."""
    if importlib.util.find_spec("ruff") is None:
        pytest.skip(f"ruff, which formats what is generated, is not installed for {sys.executable}")
    aio = generator("aio")
    assert aio.written() == aio.TARGET.read_text(encoding="utf-8")
