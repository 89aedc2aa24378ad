"""Servers for models that are partitioned, and clients of several of them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import pytest

import stepwire
from stepwire_server.server import Server
from tests.integration.sharding.pair import Opened
from tests.support.numpy_server import numpy_server


@pytest.fixture(scope="module")
def servers() -> Iterator[list[Server]]:
    """Five servers whose messages hold 64 KiB."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(numpy_server(max_chunk_bytes=64 << 10)) for _ in range(5)]


@pytest.fixture(scope="module")
def opened() -> Iterator[Opened]:
    """Open clients over TCP that retry within milliseconds; each set of targets once."""
    with contextlib.ExitStack() as stack:

        @functools.cache
        def open_once(targets: tuple[str, ...], channels: int = 1) -> stepwire.Client:
            retry = stepwire.Retry(initial_seconds=0.001, max_seconds=0.01)
            return stack.enter_context(
                stepwire.connect(list(targets), transport="tcp", channels=channels, timeout=120.0, retry=retry)
            )

        yield open_once


@pytest.fixture(scope="module")
def one(servers: list[Server], opened: Opened) -> stepwire.Client:
    """A client of one server."""
    return opened((servers[0].target,))
