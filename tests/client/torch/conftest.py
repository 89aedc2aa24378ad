"""Fixtures of the drop-in's tests: a skip without torch, and the closing of optimizers."""

from __future__ import annotations

import contextlib
import importlib.util
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

REASON = "torch is not installed (pip install torch==2.13.0)"


class WithoutTorch(pytest.Module):
    """A module of tests that cannot even be imported."""

    def collect(self) -> NoReturn:
        pytest.skip(REASON, allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """Skip the modules here where there is no torch, so that each can import it at its top."""
    if importlib.util.find_spec("torch") is not None:
        return None
    return WithoutTorch.from_parent(parent, path=module_path)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Limit torch to one processor in each of several test processes."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port that nobody listens on, and that nobody else is given meanwhile."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        yield listener.getsockname()[1]


Made = Callable[..., Any]
"""`remote("Adam", params, lr=…)`: an optimizer of `stepwire.torch` with its state on the server of these tests."""


@pytest.fixture
def exits() -> Iterator[contextlib.ExitStack]:
    """Close the opened objects, the last first."""
    with contextlib.ExitStack() as stack:
        yield stack


@pytest.fixture
def remote(target: str, exits: contextlib.ExitStack) -> Made:
    """Make optimizers of `stepwire.torch` by their names, and close them after the test."""
    import stepwire.torch

    def made(name: str, params: Any, *args: Any, **options: Any) -> Any:
        return exits.enter_context(getattr(stepwire.torch, name)(params, *args, **{"server": target} | options))

    return made
