"""Names of leaves, and which leaves a session can have."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np
import pytest

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")

import jax.numpy as jnp  # noqa: E402

import stepwire  # noqa: E402
from stepwire.arrays.trees import flattened  # noqa: E402
from stepwire.errors import InvalidRequestError, UnsupportedFeatureError  # noqa: E402
from stepwire.optax.leaves import is_traced, leaves_of  # noqa: E402


class Pair(NamedTuple):
    a: Any
    b: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    weight: Any
    bias: Any


def test_names_are_those_of_trees_without_jax() -> None:
    tree = {"b": [jnp.ones(1), {"x.y": jnp.ones(2)}], "a": (jnp.ones(3),), "mlp/~/linear": {"w": jnp.ones(1)}}
    assert leaves_of(tree, "params").names == sorted(flattened(tree, "params").named)


def test_any_pytree_has_names() -> None:
    tree = {"layers": [Layer(jnp.ones(1), None), Pair(jnp.ones(2), {3: jnp.ones(3)})]}
    assert leaves_of(tree, "params").names == ["layers/0/weight", "layers/1/a", "layers/1/b/3"]
    assert leaves_of(jnp.ones(2), "params").names == ["params"]


@pytest.mark.parametrize(
    ("dtypes", "wire"),
    [
        ([jnp.float32, jnp.float32], "float32"),
        ([jnp.bfloat16, jnp.bfloat16], "bfloat16"),
        ([jnp.float16, jnp.float16], "float16"),
        ([jnp.float16, jnp.bfloat16], "float32"),
        ([jnp.float32, jnp.bfloat16], "float32"),
    ],
)
def test_dtypes_travel_without_loss(dtypes: list[Any], wire: str) -> None:
    assert leaves_of([jnp.ones(1, dtype) for dtype in dtypes], "params").wire_dtype.name == wire


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"w": np.ones(2)}, r"params\['w'\]: dtype float64 is not served; cast it .*, or leave the leaf to another"),
        ({"w": jnp.ones(2, jnp.complex64)}, "complex64 is not served"),
        ({"steps": jnp.ones(2, jnp.int32)}, "int32 is not served"),
        ({}, "params: the tree has no arrays"),
        ({"a/b": jnp.ones(1), "a": {"b": jnp.ones(1)}}, "two leaves have the name 'a/b'"),
    ],
)
def test_what_a_session_cannot_have_is_refused(tree: Any, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        leaves_of(tree, "params")


def test_tracing_is_noticed_with_constants_alone() -> None:
    seen: list[bool] = []
    jax.jit(lambda: seen.append(is_traced([jnp.ones(1)])))()
    assert seen == [True]
    assert not is_traced([jnp.ones(1), np.ones(1), 3])


@pytest.mark.parametrize("sparse", [False, True])
def test_rows_are_refused_with_the_way_to_step_them(sparse: bool) -> None:
    from jax.experimental import sparse as jax_sparse

    leaf = jax_sparse.BCOO.fromdense(jnp.eye(2)) if sparse else stepwire.Rows([0], np.ones((1, 2), np.float32))
    words = rf"grads\['table/a'\]: {type(leaf).__name__}; a transformation steps whole arrays.*session\.step"
    with pytest.raises(UnsupportedFeatureError, match=words):
        leaves_of({"table": {"a": leaf}, "w": jnp.zeros(2)}, "grads")
