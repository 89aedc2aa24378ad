"""Every bit pattern through the kernels of every engine, against ml_dtypes and NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from stepwire_server.engines import CpuEngine, CudaEngine
from stepwire_server.engines.protocol import Pass
from stepwire_server.rules import Precision, Recipe, Rule

pytestmark = pytest.mark.many


def take(p: Any, g: Any) -> tuple[Any]:
    """Return the gradient as the parameter."""
    return (g,)


TAKE = Pass(Recipe(Rule("take", take, (), lambda hyper, t: ())), (1.0, 1.0))


@pytest.fixture(params=["numba", "numpy", "cuda"])
def engine(request):
    if request.param == "cuda":
        return CudaEngine(cupy=request.getfixturevalue("fake_cupy")())
    if request.param == "numba":
        pytest.importorskip("numba")
    return CpuEngine(threads=1, use_numba=request.param == "numba")


def through(engine, values: np.ndarray, reply: np.dtype[Any]) -> np.ndarray:
    """Decode values into the state and encode the state into the answer."""
    state = engine.allocate({"param": Precision.FLOAT32}, len(values))
    out = np.empty(len(values), reply)
    state.update(TAKE, 0, state.receive().put(0, values), 0, len(values), out).wait()
    return out


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_every_pattern_is_decoded_exactly(name, wire, engine, assert_same_bits) -> None:
    values = np.arange(65_536, dtype=np.uint32).astype(np.uint16).view(wire[name])
    assert_same_bits(through(engine, values, wire["float32"]), values.astype(np.float32))


def hard_to_round(name: str, wire: dict[str, np.dtype[Any]]) -> np.ndarray:
    """Every value of the dtype, its neighbours in float32, midpoints between values and their neighbours, and noise."""
    every = np.arange(65_536, dtype=np.uint32).astype(np.uint16).view(wire[name]).astype(np.float32)
    finite = np.unique(every[np.isfinite(every)])
    middles = ((finite[:-1].astype(np.float64) + finite[1:]) / 2).astype(np.float32)
    points = np.concatenate([finite, middles, [65_520.0, 65_519.996, 3.4e38, 1e-45, 2.0**-25, 2.0**-24]])
    points = points.astype(np.float32)
    up, down = np.nextafter(points, np.float32(np.inf)), np.nextafter(points, np.float32(-np.inf))
    noise = np.random.default_rng(0).integers(0, 2**32, 200_000, np.uint32).view(np.float32)
    return np.concatenate([every, points, up, down, noise, -noise])


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_encoding_rounds_to_nearest_even(name, wire, engine, assert_same_bits) -> None:
    with np.errstate(all="ignore"):
        values = hard_to_round(name, wire)
        expected = values.astype(wire[name])
    assert_same_bits(through(engine, values, wire[name]), expected)


def test_float32_passes_unchanged(wire, engine, assert_same_bits) -> None:
    """A NaN that signals may be made quiet by the treatment's factors of one."""
    values = np.random.default_rng(0).integers(0, 2**32, 10_000, np.uint32).view(np.float32)
    assert_same_bits(through(engine, values, wire["float32"]), values)
