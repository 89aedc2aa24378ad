"""NaN and Inf in one shard are refused, skipped or applied by all."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import stepwire
from stepwire_server.server import Server
from tests.integration.sharding.pair import SHAPES, Arrays, Opened, Pair, arrays, over
from tests.integration.training import same_bits

pytestmark = pytest.mark.many


def with_nan(gradient: Arrays, name: str, element: int, value: float = np.nan) -> Arrays:
    """Return the gradient with one element that is not finite."""
    spoiled = gradient[name].copy()
    spoiled.reshape(-1)[element] = value
    return gradient | {name: spoiled}


def test_nan_in_one_shard_is_refused_by_all(servers: list[Server], opened: Opened, one: stepwire.Client) -> None:
    pair = Pair(one, over(servers, opened, 3), SHAPES, clip_grad_norm=1.0)
    pair.step(arrays(SHAPES, 1))
    before = pair.cut.state()
    element = 3 * 47_111 - 5
    spoiled = with_nan(arrays(SHAPES, 2), "head", element)
    with pytest.raises(stepwire.NonFiniteGradientError, match="gradient of tensor 'head' holds NaN") as refused:
        pair.cut.step(spoiled)
    assert (refused.value.metadata["tensor"], refused.value.metadata["element"]) == ("head", str(element))
    assert pair.cut.applied_step == 1
    assert same_bits(pair.cut.state(), before)
    pair.step(arrays(SHAPES, 2))
    pair.compare()
    pair.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "value"),
    [
        ({"non_finite": "skip"}, np.nan),
        ({"non_finite": "skip", "accumulation_steps": 2, "clip_grad_norm": 1.0}, np.inf),
        (
            {"loss_scaling": stepwire.LossScaling(initial_scale=1024.0, growth_interval=2), "clip_grad_norm": 1.0},
            np.inf,
        ),
        (
            {"loss_scaling": stepwire.LossScaling(initial_scale=1024.0, growth_interval=1), "accumulation_steps": 3},
            np.nan,
        ),
        ({"non_finite": "allow", "clip_grad_norm": 1.0}, np.nan),
        ({"non_finite": "allow"}, np.nan),
        ({"non_finite": "allow"}, np.inf),
    ],
    ids=["skip", "accumulated", "loss_scaling", "accumulated and scaled", "clipped", "allow-nan", "allow-inf"],
)
def test_nan_in_one_shard_is_skipped_or_applied_by_all(
    servers: list[Server], opened: Opened, one: stepwire.Client, options: dict[str, Any], value: float
) -> None:
    pair = Pair(one, over(servers, opened, 3), SHAPES, **options)
    for step in range(1, 7):
        gradient = arrays(SHAPES, step)
        pair.step(with_nan(gradient, "embedding", 3, value) if step in (2, 3) else gradient)
        assert pair.cut.loss_scale == pair.whole.loss_scale
    pair.compare()
    pair.close()
