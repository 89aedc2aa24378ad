"""Trees of arrays: their names, and sessions that are used with trees as they are with flat dicts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import stepwire
from stepwire.arrays.trees import Structure, expanded, flattened, is_nested, structure_like
from stepwire.errors import InvalidRequestError, Reason


class Pair(NamedTuple):
    a: Any
    b: Any


TREE = {"encoder": [{"w": 1, "b": 2}, (3, 4)], "head": Pair(5, {"x.y": 6}), "empty": {}}
NAMES = ["encoder/0/w", "encoder/0/b", "encoder/1/0", "encoder/1/1", "head/0", "head/1/x.y"]

KEYS = st.text(st.characters(codec="ascii", exclude_characters="/"), min_size=1, max_size=3)
TREES = st.recursive(
    st.integers(),
    lambda inner: (
        st.dictionaries(KEYS, inner) | st.lists(inner) | st.lists(inner).map(tuple) | st.builds(Pair, inner, inner)
    ),
).filter(lambda tree: not isinstance(tree, int))


def test_names_are_paths() -> None:
    assert list(flattened(TREE, "parameters").named) == NAMES


def test_structure_comes_back() -> None:
    named, structure = flattened(TREE, "parameters")
    restored = structure.restored({name: named[name] for name in reversed(named)})
    assert restored == TREE
    assert type(restored["head"]) is Pair  # type: ignore[call-overload]
    assert type(restored["encoder"][1]) is tuple  # type: ignore[call-overload]


@given(TREES)
def test_any_tree_comes_back(tree: Any) -> None:
    named, structure = flattened(tree, "parameters")
    if named or not is_nested(tree):
        assert structure.restored(named) == tree
    assert all(isinstance(leaf, int) for leaf in named.values())


@pytest.mark.parametrize("flat", [{"a": 1, "b/c": 2}, [1, 2], {}, []])
def test_what_is_flat_stays_what_it_was(flat: Any) -> None:
    assert not is_nested(flat)
    named, structure = flattened(flat, "parameters")
    assert structure.restored(named) == flat


@pytest.mark.parametrize("tree", [{"a": {}}, {"a": [1]}, [[1]], [{}], [()], (1, 2), {"a": (1,)}])
def test_what_nests_is_told_from_what_does_not(tree: Any) -> None:
    assert is_nested(tree)


def test_keys_may_have_slashes() -> None:
    tree = {"mlp/~/linear_0": {"w": 1}, "mlp/~/linear_1": {"w": 2}}
    named, structure = flattened(tree, "parameters")
    assert list(named) == ["mlp/~/linear_0/w", "mlp/~/linear_1/w"]
    assert structure.restored(named) == tree


@pytest.mark.parametrize("tree", [{"a/b": {"c": 1}, "a": {"b/c": 1}}, {"": [1], "0": 2}, {"a/0": 1, "a": (2,)}])
def test_two_arrays_of_one_name_are_refused(tree: Any) -> None:
    with pytest.raises(
        InvalidRequestError, match="two arrays have the name .*; rename the key, or pass a flat"
    ) as refused:
        flattened(tree, "gradients")
    assert refused.value.reason is Reason.INVALID_TENSOR
    assert refused.value.metadata == {"field": "gradients"}


def test_a_key_that_is_no_string_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="parameters: the name 3 is not a string"):
        flattened({"a": {3: 1}}, "parameters")


@pytest.mark.parametrize("tree", [1.0, "ab", b"ab", {1}, np.zeros(2)])
def test_what_is_no_container_is_refused(tree: Any) -> None:
    with pytest.raises(InvalidRequestError, match="like: .* is neither a dict nor a list of arrays"):
        structure_like(tree)


def test_names_of_others_are_left_flat_or_nested_as_told() -> None:
    _, structure = flattened({"a": {"b": 1}}, "parameters")
    assert structure.restored({"c": 1}) == {"c": 1}
    assert structure.restored({"0": 1}, flattened([1], "parameters").structure) == [1]
    assert [flattened(tree, "x").structure.restored({}) for tree in ({"a": [1]}, [[1]], ([1],))] == [{}, [], ()]
    assert Structure().restored({}) == {}


def test_a_branch_stands_for_what_is_in_it() -> None:
    tensors = dict.fromkeys(NAMES)
    assert list(expanded(["head", "encoder/0", "encoder/1/1", "enc"], tensors)) == [
        "head/0",
        "head/1/x.y",
        "encoder/0/w",
        "encoder/0/b",
        "encoder/1/1",
        "enc",
    ]


# --- sessions ---------------------------------------------------------------------------------------------------


SHAPES = {"encoder/0/w": (3, 4), "encoder/0/b": (4,), "encoder/1/w": (70_000,), "head/0": (), "head/1": (2, 2)}
BRANCHES = {"encoder": [{"w": 0, "b": 0}, {"w": 0}], "head": (0, 0)}


def flat(seed: int) -> dict[str, Any]:
    generator = np.random.default_rng(seed)
    return {name: generator.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}


def nested(seed: int) -> Any:
    return flattened(BRANCHES, "x").structure.restored(flat(seed))


def bits(tree: Any) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in flattened(tree, "x").named.items()}


def shape_of(tree: Any) -> Any:
    """A tree with 0 in the place of each array."""
    named, structure = flattened(tree, "x")
    return structure.restored(dict.fromkeys(named, 0))


@pytest.fixture(params=[1, 2], ids=["one server", "two shards"])
def anyone(target: str, request: pytest.FixtureRequest) -> Iterator[stepwire.Client]:
    with stepwire.connect(target, channels=request.param, timeout=120.0) as client:
        yield client


def test_a_tree_steps_as_its_flat_names_do(anyone: stepwire.Client) -> None:
    with anyone.create_session(nested(0)) as tree, anyone.create_session(flat(0)) as names:
        assert tree.shapes == SHAPES
        for seed in (1, 2):
            reply, plain = tree.step(nested(seed)), names.step(flat(seed))
            assert (shape_of(reply), bits(reply)) == (BRANCHES, bits(plain))
        assert (shape_of(tree.pull()), bits(tree.pull())) == (BRANCHES, bits(plain))
        tree.load(nested(5))
        names.load(flat(5))
        assert bits(tree.pull()) == bits(flat(5))
        by_name = tree.step(flat(6))
        assert isinstance(by_name, dict)
        assert list(by_name) == list(SHAPES)
        assert bits(by_name) == bits(names.step(nested(6)))
        assert list(tree.state().slots["exp_avg"]) == list(SHAPES)


def test_replies_nest_as_gradients_do(client: stepwire.Client) -> None:
    with client.create_session([np.zeros(2, np.float32), np.zeros((), np.float32)]) as session:
        gradients = [np.ones(2, np.float32), np.ones((), np.float32)]
        for kind in (list, tuple, Pair._make):
            assert type(session.step(kind(gradients))) is type(kind(gradients))
        assert isinstance(session.step(dict(zip("01", gradients, strict=True))), dict)
        assert isinstance(session.pull(), list)
        assert [session.step(kind(gradients), reply="none") for kind in (list, tuple)] == [[], ()]


def test_out_may_be_a_tree(client: stepwire.Client) -> None:
    with client.create_session(nested(0)) as session:
        for gradients in (nested(1), flat(1)):
            out = nested(9)
            arrays = flattened(out, "out").named
            assert session.step(gradients, out=out) is out
            assert bits(session.pull()) == bits(out) == bits(arrays)
        plain = flat(9)
        assert session.step(nested(2), out=plain) is plain
        assert bits(session.pull()) == bits(plain)
        with pytest.raises(InvalidRequestError, match=r"out\['head/0'\]"):
            session.step(nested(3), out={**nested(9), "head": (1.5, 2.5)})


def test_gradients_may_leave_leaves_and_branches_out(client: stepwire.Client) -> None:
    with (
        client.create_session(nested(0), missing_gradient="keep") as tree,
        client.create_session(flat(0), missing_gradient="keep") as names,
    ):
        gradients = flat(1)
        for missing in (
            {"encoder": None, "head": (gradients["head/0"], None)},
            {"head": (gradients["head/0"], None)},
        ):
            reply = tree.step(missing)
            plain = names.step({"head/0": gradients["head/0"]})
            assert (shape_of(reply), bits(reply)) == (BRANCHES, bits(plain))
        assert tree.state().tensor_steps == {name: 2 * (name == "head/0") for name in SHAPES}


def test_names_of_branches_stand_for_their_tensors(client: stepwire.Client) -> None:
    order: list[str] = []
    groups = [{"params": ["encoder/0"], "lr": 0.5}, {"params": ["head/0"], "lr": 0.25}]
    with client.create_session(nested(0), groups=groups, frozen=["encoder/1"]) as session:
        reply = session.step(nested(1), reply_first=["head"], on_tensor=lambda name, values: order.append(name))
        moved = {name: np.abs(value - flat(0)[name]).max() for name, value in flattened(reply, "x").named.items()}
        assert moved["encoder/1/w"] == 0.0
        assert moved["encoder/0/w"] == pytest.approx(0.5, rel=1e-5)
        assert moved["head/0"] == pytest.approx(0.25, rel=1e-5)
        assert set(order[:2]) == {"head/0", "head/1"}
        with pytest.raises(InvalidRequestError, match="'head/7' is not a tensor"):
            session.step(nested(1), reply_first=["head/7"])
    with pytest.raises(InvalidRequestError, match="'encoder/0/w' is in two groups"):
        client.create_session(nested(0), groups=[{"params": ["encoder"]}, {"params": ["encoder/0/w"]}])


def test_shared_arrays_nest_as_parameters_did(client: stepwire.Client) -> None:
    with client.create_session(nested(0)) as session, client.create_session(flat(0)) as other:
        session.attach()
        gradients, parameters = session.shared_gradients(), session.shared_parameters()
        assert shape_of(gradients) == shape_of(parameters) == BRANCHES
        for name, array in flattened(gradients, "x").named.items():
            array[...] = flat(1)[name]
        reply = session.step(gradients, out=parameters)
        assert shape_of(reply) == BRANCHES
        assert bits(reply) == bits(other.step(flat(1)))


def test_a_session_found_by_its_id_is_flat_unless_it_is_told(anyone: stepwire.Client) -> None:
    with anyone.create_session(nested(0)) as session:
        session.detach()
        found = anyone.session(session.session_id)
        assert list(found.pull()) == list(SHAPES)
        assert shape_of(found.step(nested(1))) == BRANCHES
        like = anyone.session(session.session_id, like=nested(7))
        assert shape_of(like.pull()) == BRANCHES
        assert bits(like.pull()) == bits(found.pull())


def test_steps_in_the_background_accept_trees(client: stepwire.Client) -> None:
    with client.create_session(nested(0)) as session, client.create_session(flat(0)) as other:
        reply = session.step_async(nested(1)).result(timeout=120.0)
        assert (shape_of(reply), bits(reply)) == (BRANCHES, bits(other.step(flat(1))))
