"""A window brings the very bits that were applied: int8 with error feedback, on every way that a gradient takes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import stepwire
from tests.integration.durability.test_losses import Connect, Restarting, bits, connect, restarting
from tests.support.lost_replies import lost_replies
from tests.support.numpy_server import numpy_server

__all__ = ["connect", "restarting"]

SIZE = 100_000  # more than one message
OPTIONS: dict[str, Any] = {"gradient_dtype": "int8", "error_feedback": True}


def gradient(number: int) -> dict[str, Any]:
    return {"w": np.random.default_rng((6, number)).standard_normal(SIZE).astype(np.float32)}


@pytest.fixture(scope="module")
def expected() -> list[bytes]:
    """The parameters after each step of an undisturbed run."""
    with numpy_server(max_chunk_bytes=64 << 10) as server, stepwire.connect(server.target) as client:
        session = client.create_session({"w": np.ones(SIZE, np.float32)}, **OPTIONS)
        return [bits(session.step(gradient(number))) for number in range(1, 8)]


@pytest.mark.parametrize("lose", [False, True], ids=["all replies", "a lost reply"])
@pytest.mark.parametrize("transport", ["tcp", "shm"])
def test_a_window_sends_the_bits_that_were_applied(
    transport: str, lose: bool, restarting: Restarting, connect: Connect, expected: list[bytes]
) -> None:
    client = connect(window_bytes=16 << 20, transport=transport)
    session = client.create_session({"w": np.ones(SIZE, np.float32)}, durability="checkpoint", keep=True, **OPTIONS)
    image = restarting.image()
    for number in range(1, 5):
        if lose:
            with lost_replies(), pytest.raises(stepwire.DeadlineExceededError):
                session.step(gradient(number))
        assert bits(session.step(gradient(number))) == expected[number - 1]
    restarting.crash(image)
    assert [bits(session.step(gradient(number))) for number in range(5, 8)] == expected[4:]
