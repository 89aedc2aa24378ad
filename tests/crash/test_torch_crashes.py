"""Servers that are killed at named points under the torch drop-in: the model is that of a run without a crash."""

from __future__ import annotations

import pathlib
import random
from typing import Any

import pytest

from tests.crash.crashing_server import POINTS
from tests.crash.test_crashes import SEEDS, SOME, Supervised
from tests.integration.proxy import Proxy
from tests.support.numpy_server import numpy_server

torch = pytest.importorskip("torch")
stepwire_torch = pytest.importorskip("stepwire.torch")

pytestmark = pytest.mark.slow

STEPS = 8


def model() -> Any:
    torch.manual_seed(3)
    return torch.nn.Sequential(torch.nn.Linear(40, 300), torch.nn.Tanh(), torch.nn.Linear(300, 4))


def batch(number: int) -> tuple[Any, Any]:
    torch.manual_seed(100 + number)
    return torch.randn(16, 40), torch.randint(0, 4, (16,))


def trained(target: str, **options: Any) -> list[bytes]:
    """Train a model, and return its parameters."""
    trainee = model()
    optimizer = stepwire_torch.AdamW(trainee.parameters(), lr=0.01, server=target, timeout=60.0, **options)
    for number in range(STEPS):
        inputs, labels = batch(number)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(trainee(inputs), labels).backward()
        optimizer.step()
    values = [parameter.detach().numpy().tobytes() for parameter in trainee.parameters()]
    optimizer.close()
    return values


@pytest.fixture(scope="module")
def expected() -> list[bytes]:
    with numpy_server() as server:
        return trained(server.target)


LEVELS = ("journal", "checkpoint")
CASES = [(level, point, seed) for level in LEVELS for point in POINTS for seed in range(SEEDS)]
if SEEDS == 1:  # one of the two levels at each point
    CASES = [(LEVELS[index % 4 // 2], point, 0) for index, point in enumerate(POINTS)]


@pytest.mark.parametrize(("durability", "point", "seed"), CASES or [(level, SOME[1], 0) for level in LEVELS])
def test_a_model_is_that_of_a_run_without_a_crash(
    durability: Any, point: str, seed: int, expected: list[bytes], tmp_path: pathlib.Path
) -> None:
    draw = random.Random(f"{point} {seed} torch")
    count = draw.choice([3, 5, 8, 13, 21])
    options: dict[str, Any] = draw.choice([{}, {"send_in_backward": True}])
    options |= {"durability": durability, "window_bytes": 64 << 20}
    with Proxy("127.0.0.1:1") as proxy, Supervised(proxy, tmp_path, point, count):
        assert trained(proxy.target, **options) == expected
