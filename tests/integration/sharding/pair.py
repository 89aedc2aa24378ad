"""A model, and one training of it twice: in one session, and over the sessions of several servers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

import stepwire
from stepwire.results import StepResult
from stepwire_server.server import Server
from tests.integration.training import bits, same_bits

__all__ = ["SHAPES", "TREATMENTS", "Arrays", "Opened", "Pair", "arrays", "over"]

Opened = Callable[..., stepwire.Client]
Arrays = dict[str, np.ndarray[Any, Any]]

_SEED = 20_261_201
SHAPES = {"embedding": (310, 501), "w": (129, 130), "b": (131,), "scale": (), "none": (0, 3), "head": (3, 47_111)}


TREATMENTS: dict[str, dict[str, Any]] = {
    "reject": {},
    "allow": {"non_finite": "allow"},
    "norm": {"clip_grad_norm": 1.0},
    "optax": {"clip_grad_norm": 3.0, "clip_formula": "optax"},
    "group": {"groups": [{"params": ["w", "head"], "clip_grad_norm": 0.5, "lr": 1e-3}]},
    "both": {
        "groups": [{"params": ["w", "b"], "clip_grad_norm": 2.0}, {"params": ["head"], "maximize": True}],
        "clip_grad_norm": 1.5,
        "clip_formula": "keras",
    },
    "value": {"clip_grad_value": 0.3, "clip_grad_norm": 100.0},
}


def over(servers: list[Server], opened: Opened, count: int) -> stepwire.Client:
    """A client of some of the servers."""
    return opened(tuple(server.target for server in servers[:count]))


def arrays(shapes: dict[str, tuple[int, ...]], step: int, dtype: Any = np.float32) -> Arrays:
    """Return a gradient, the same whenever it is asked for; step 0 is the start."""
    generator = np.random.default_rng((_SEED, step))
    return {name: generator.standard_normal(shape, np.float32).astype(dtype) for name, shape in shapes.items()}


def decided(result: StepResult | None) -> str:
    """Write out what of a result is the same bit for bit wherever the gradient is decided on as a whole: NaN is NaN."""
    assert result is not None
    groups = [
        dataclasses.replace(group, update_norm=None, param_norm=None, clipped_grad_norm=0.0) for group in result.groups
    ]
    kept = dataclasses.replace(
        result,
        epoch=0,
        groups=tuple(groups),
        receive_seconds=0.0,
        queue_seconds=0.0,
        apply_seconds=0.0,
        previous_send_seconds=None,
        clipped_grad_norm=0.0,
        update_norm=None,
        param_norm=None,
    )
    return repr(kept)


def measured(result: StepResult | None) -> list[float]:
    """Return what of a result is measured and decides nothing."""
    assert result is not None
    values = [
        (each.clipped_grad_norm, each.update_norm or 0.0, each.param_norm or 0.0) for each in (result, *result.groups)
    ]
    return [value for each in values for value in each]


class Pair:
    """One training twice: in one session, and cut over several."""

    def __init__(self, one: stepwire.Client, many: stepwire.Client, shapes: dict[str, tuple[int, ...]], **options: Any):
        self.shapes = shapes
        self.whole = one.create_session(arrays(shapes, 0), **options)
        self.cut = many.create_session(arrays(shapes, 0), **options)
        self.exact = options.get("non_finite") != "allow" or bool(options.get("clip_grad_norm"))

    def step(self, gradient: Arrays, **options: Any) -> None:
        """Apply a step in both; answers and results are the same."""
        expected = self.whole.step(gradient, **options)
        assert bits(self.cut.step(gradient, **options)) == bits(expected)
        self.compare_results()

    def compare_results(self) -> None:
        whole, cut = self.whole.last_result, self.cut.last_result
        if self.exact:
            assert decided(cut) == decided(whole)
        np.testing.assert_allclose(measured(cut), measured(whole), rtol=1e-5, atol=1e-30)

    def compare(self) -> None:
        """Compare everything the servers hold."""
        whole, cut = self.whole.state(), self.cut.state()
        assert same_bits(cut, whole)
        assert cut.loss_scale == whole.loss_scale

    def close(self) -> None:
        self.whole.close()
        self.cut.close()
