"""Moments in several precisions in one session: each tensor is stepped as in a session of its own precision."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import stepwire
import stepwire_server.testing
from stepwire.errors import InvalidRequestError, UnsupportedFeatureError
from tests.integration.training import bits, same_bits

SHAPES = {"embedding": (70, 64), "layer/w": (90, 61), "layer/b": (61,), "head": (61, 80), "norm": (5000,)}
"""Sizes on both sides of the 4,096 elements from which 8 bits are used, and ends within blocks."""

OPTIONS: dict[str, Any] = {
    "state_precision": "int8",
    "groups": [{"params": ["head", "norm"], "state_precision": "bfloat16", "lr": 0.02}],
    "tensor_precision": {"embedding": "float32", "norm": "int8"},
}
HELD = {"embedding": "float32", "layer/w": "int8", "layer/b": "int8", "head": "bfloat16", "norm": "int8"}


@pytest.fixture(scope="module")
def client() -> Iterator[stepwire.Client]:
    with stepwire_server.testing.serving() as target, stepwire.connect(target) as client:
        yield client


def arrays(step: int) -> dict[str, Any]:
    generator = np.random.default_rng(step)
    return {name: generator.standard_normal(shape, np.float32) for name, shape in SHAPES.items()}


def test_the_config_has_the_precision_of_each_tensor(client: stepwire.Client) -> None:
    with client.create_session(arrays(0), **OPTIONS) as session:
        assert session.config.tensor_precision == HELD
        assert session.config.state_precision == "int8"
        assert client.session(session.session_id).config == session.config
        assert session.slots == ("param", "exp_avg", "exp_avg_scale", "exp_avg_sq", "exp_avg_sq_scale")


@pytest.mark.parametrize("overlap", [False, True])
def test_each_tensor_has_the_bits_of_a_session_of_its_own(client: stepwire.Client, overlap: bool) -> None:
    options: dict[str, Any] = {"non_finite": "allow" if overlap else "reject"}
    mixed = client.create_session(arrays(0), **OPTIONS, **options)
    alone = {
        name: client.create_session({name: array}, **options, state_precision=HELD[name])
        for name, array in arrays(0).items()
    }
    for step in range(1, 5):
        gradient, steps = arrays(step), {"overlap": True} if overlap else {}
        got = mixed.step(gradient, **steps)
        for name, session in alone.items():
            lr = 0.02 if name in ("head", "norm") else 0.001
            assert bits({name: got[name]}) == bits(session.step({name: gradient[name]}, lr=lr, **steps))
    state = mixed.state()
    for name, session in alone.items():
        for slot, values in session.state().slots.items():
            assert bits({name: state.slots[slot][name]}) == bits(values), slot
        session.close()
    for name, kind in HELD.items():
        blocks = kind == "int8" and np.prod(SHAPES[name]) >= 4096
        assert state.slots["exp_avg_scale"][name].any() == blocks
    mixed.close()


def test_a_state_goes_on_in_another_session_bit_for_bit(client: stepwire.Client) -> None:
    with client.create_session(arrays(0), **OPTIONS) as one, client.create_session(arrays(0), **OPTIONS) as other:
        for step in (1, 2):
            one.step(arrays(step))
        other.load_state(one.state())
        for step in (3, 4):
            assert bits(other.step(arrays(step))) == bits(one.step(arrays(step)))
        assert same_bits(other.state(), one.state())


def test_memory_is_what_each_precision_takes(client: stepwire.Client) -> None:
    sizes = {}
    for precision, own in (("float32", {}), ("int8", {}), ("int8", {"embedding": "float32"})):
        with client.create_session(arrays(0), state_precision=precision, tensor_precision=own) as session:
            sizes[precision, len(own)] = session.info().memory_bytes
    assert sizes["int8", 0] < sizes["int8", 1] < sizes["float32", 0]
    assert sizes["int8", 1] - sizes["int8", 0] == pytest.approx(2 * 70 * 64 * (4 - 1 - 4 / 256), abs=2000)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"tensor_precision": {"layer": "int4"}}, "tensor_precision['layer']"),
        ({"tensor_precision": {"laye": "int8"}}, "tensor_precision['laye']"),
        ({"tensor_precision": ["layer"]}, "tensor_precision"),
        ({"groups": [{"params": ["head"], "state_precision": "half"}]}, "groups[0].state_precision"),
        (
            {"optimizer": stepwire.Adagrad(), "tensor_precision": {"layer/w": "int8"}},
            "config.tensors[1].state_precision",
        ),
        (
            {"optimizer": stepwire.Adagrad(), "groups": [{"params": ["head"], "state_precision": "int8"}]},
            "config.groups[1].state_precision",
        ),
    ],
)
def test_a_wrong_precision_is_refused_by_its_field(
    client: stepwire.Client, options: dict[str, Any], field: str
) -> None:
    with pytest.raises((InvalidRequestError, UnsupportedFeatureError)) as refused:
        client.create_session(arrays(0), **options)
    assert refused.value.metadata["field"] == field


def test_the_precision_of_a_tensor_comes_before_that_of_its_branch(client: stepwire.Client) -> None:
    for own in ({"layer": "bfloat16", "layer/b": "float32"}, {"layer/b": "float32", "layer": "bfloat16"}):
        with client.create_session(arrays(0), tensor_precision=own, state_precision="int8") as session:
            assert session.config.tensor_precision == {
                "embedding": "int8",
                "layer/w": "bfloat16",
                "layer/b": "float32",
                "head": "int8",
                "norm": "int8",
            }


def test_embeddings_in_float32_are_exact_beside_8_bits(client: stepwire.Client) -> None:
    """The advice of the documentation: a tensor of sparse gradients is stepped as without 8 bits."""
    exact = client.create_session(arrays(0))
    mixed = client.create_session(arrays(0), state_precision="int8", tensor_precision={"embedding": "float32"})
    for step in range(1, 20):
        gradient = arrays(step)
        gradient["embedding"][np.random.default_rng(step).random(70) < 0.9] = 0.0
        expected, got = exact.step(gradient), mixed.step(gradient)
        assert bits({"e": got["embedding"]}) == bits({"e": expected["embedding"]})
        assert np.abs(got["layer/w"] - expected["layer/w"]).max() < 0.005
    exact.close()
    mixed.close()
