"""Servers that are killed at named points while digits are learned: the last parameters are those of a quiet run.

Each gradient is that of the parameters before, so one lost, doubled or different step shows in all later ones.
"""

from __future__ import annotations

import pathlib
import random
from typing import Any

import numpy as np
import pytest

import stepwire
from stepwire_server.demo import MLP, Digits
from tests.crash.crashing_server import POINTS
from tests.crash.test_crashes import SEEDS, SOME, Supervised, bits
from tests.integration.proxy import Proxy
from tests.support.numpy_server import numpy_server

pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install scikit-learn")
pytestmark = [pytest.mark.slow, pytest.mark.many]

STEPS = 16

KINDS: dict[str, dict[str, Any]] = {
    "whole": {"clip_grad_norm": 1.0},
    "overlap": {"non_finite": "allow"},
    "bfloat16": {"gradient_dtype": "bfloat16"},
    "sums of three": {"accumulation_steps": 3},
}


def trained(target: str, kind: str, digits: Digits, **options: Any) -> bytes:
    """Train the network of the demo, and return its last parameters."""
    rng, retry = np.random.default_rng(7), stepwire.Retry(initial_seconds=0.01, max_seconds=0.1)
    model = MLP((64, 64, 10), rng)
    with stepwire.connect(target, timeout=60.0, retry=retry, window_bytes=16 << 20) as client:
        session = client.create_session(
            model.parameters, optimizer=stepwire.AdamW(lr=3e-3), keep=True, **KINDS[kind] | options
        )
        for number in range(1, STEPS + 1):
            _, gradients = model.loss_and_gradients(*digits.batch(rng))
            model.parameters = session.step(gradients, **({"overlap": True} if kind == "overlap" else {}))
            assert session.last_result is not None
            assert session.last_result.step == number
        assert bits(session.pull()) == bits(model.parameters)
    return bits(model.parameters)


@pytest.fixture(scope="module")
def digits() -> Digits:
    return Digits.load()


@pytest.fixture(scope="module")
def expected(digits: Digits) -> dict[str, bytes]:
    with numpy_server(max_chunk_bytes=64 << 10) as server:
        return {kind: trained(server.target, kind, digits) for kind in KINDS}


LEVELS = ("journal", "checkpoint")
CASES = [(level, point, seed) for level in LEVELS for point in POINTS for seed in range(SEEDS)]
if SEEDS == 1:  # one of the two levels at each second point
    CASES = [(LEVELS[index // 2 % 2], point, 0) for index, point in enumerate(POINTS) if index % 4 in (0, 3)]


@pytest.mark.parametrize(("level", "point", "seed"), CASES or [(level, SOME[1], 0) for level in LEVELS])
def test_digits_are_learned_as_without_a_crash(
    level: Any, point: str, seed: int, digits: Digits, expected: dict[str, bytes], tmp_path: pathlib.Path
) -> None:
    draw = random.Random(f"{level} {point} {seed} digits")
    count, kind = draw.choice([2, 3, 5, 8, 13, 21, 34]), draw.choice(sorted(KINDS))
    durability = stepwire.Durability(level=level, every_steps=draw.choice([2, 5, 100]))
    with Proxy("127.0.0.1:1") as proxy, Supervised(proxy, tmp_path, point, count) as supervised:
        assert trained(proxy.target, kind, digits, durability=durability) == expected[kind]
        assert supervised.starts <= 3
