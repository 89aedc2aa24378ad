"""One training over every transport that loses nothing: the same bits in every answer and in the state at the end."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import stepwire
from stepwire_server.config import ServerConfig
from stepwire_server.server import Server
from tests.integration.training import OVERLAPPED, bits, same_bits

pytestmark = pytest.mark.many

STEPS = 12
# Two hidden layers, one of them cut over two servers.
SHAPES = {"w1": (300, 500), "b1": (500,), "w2": (500, 10), "b2": (10,)}


@pytest.fixture(scope="module")
def servers() -> Iterator[list[Server]]:
    with contextlib.ExitStack() as stack:
        config = ServerConfig(bind="127.0.0.1:0", device="cpu", max_chunk_bytes=64 << 10)
        yield [stack.enter_context(Server(config)) for _ in range(2)]


def gradient(step: int) -> dict[str, Any]:
    generator = np.random.default_rng((7, step))
    return {name: generator.standard_normal(shape, np.float32) for name, shape in SHAPES.items()}


def trained(session: Any, **options: Any) -> Any:
    """Return every answer and the state at the end."""
    with session:
        answers = [bits(session.step(gradient(step), **options)) for step in range(1, STEPS + 1)]
        return answers, session.state()


WAYS: dict[str, tuple[Callable[[list[Server]], Any], dict[str, Any], dict[str, Any]]] = {
    "uds": (lambda servers: servers[0].target, {"transport": "uds"}, {}),
    "shm": (lambda servers: servers[0].target, {"transport": "shm"}, {}),
    "packets": (lambda servers: servers[0].target, {"transport": "packets"}, {}),
    "packets overlap": (lambda servers: servers[0].target, {"transport": "packets"}, {"overlap": True}),
    "auto": (lambda servers: servers[0].target, {}, {}),
    "unix target": (lambda servers: f"unix:{servers[0].unix_socket}", {"transport": "uds"}, {}),
    "tcp overlap": (lambda servers: servers[0].target, {"transport": "tcp"}, {"overlap": True}),
    "uds overlap": (lambda servers: servers[0].target, {"transport": "uds"}, {"overlap": True}),
    "two channels": (lambda servers: servers[0].target, {"transport": "tcp", "channels": 2}, {}),
    "two servers": (lambda servers: [server.target for server in servers], {"transport": "tcp"}, {}),
    "two servers, shm": (lambda servers: [server.target for server in servers], {"transport": "shm"}, {}),
}


def create(client: Any) -> Any:
    options = {"optimizer": stepwire.AdamW(lr=1e-2), "non_finite": "allow"}
    return client.create_session({name: np.ones(shape, np.float32) for name, shape in SHAPES.items()}, **options)


@pytest.fixture(scope="module")
def expected(servers: list[Server]) -> Any:
    with stepwire.connect(servers[0].target, transport="tcp") as client:
        return trained(create(client))


@pytest.mark.parametrize("way", WAYS)
def test_every_transport_gives_the_bits_of_tcp(servers: list[Server], expected: Any, way: str) -> None:
    targets, connecting, stepping = WAYS[way]
    with stepwire.connect(targets(servers), **connecting) as client:
        session = create(client)
        answers, state = trained(session, **stepping)
    assert answers == expected[0]
    assert same_bits(state, expected[1])


def test_patches_give_the_bits_of_whole_answers(servers: list[Server]) -> None:
    found = {}
    for transport in ("tcp", "uds"):
        with stepwire.connect(servers[0].target, transport=transport) as client:
            for reply in ("parameters", "changed"):
                with OVERLAPPED.create(client) as session:
                    steps = [OVERLAPPED.gradient(step) for step in range(1, 6)]
                    found[transport, reply] = [bits(session.step(values, reply=reply)) for values in steps]
    assert len({str(answers) for answers in found.values()}) == 1
