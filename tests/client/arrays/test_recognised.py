"""Arrays that come back: recognised while nothing of them has changed, and checked again otherwise."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import stepwire
from stepwire.arrays.recognised import FITTING, RecognisedArrays
from stepwire_server.testing import serving
from tests.support.numpy_server import numpy_server

# Programs that change an array in place do so while NumPy allows it.
pytestmark = pytest.mark.filterwarnings("ignore:Setting the (shape|strides|dtype):DeprecationWarning")


class Checks:
    """Counts its calls, and returns views in the order of the names."""

    def __init__(self, arrays: dict[str, Any]) -> None:
        self.count = 0
        self.arrays = arrays

    def __call__(self) -> list[Any]:
        self.count += 1
        return [self.arrays[name].reshape(-1) for name in ("b", "a")]


def arrays() -> dict[str, Any]:
    return {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(2, np.float32)}


def known(given: dict[str, Any], *, written: bool = False) -> tuple[RecognisedArrays, Checks]:
    recognised, checks = RecognisedArrays(("b", "a"), 8, written=written), Checks(given)
    recognised.views(given, checks)
    return recognised, checks


def test_the_same_arrays_are_checked_once_and_seen_anew() -> None:
    given = arrays()
    recognised, checks = known(given)
    given["a"] += 1
    for container in (given, dict(given)):
        b, a = recognised.views(container, checks)
        assert (a.tolist(), b.tolist()) == ([1, 2, 3, 4, 5, 6], [1, 1])
        assert np.shares_memory(a, given["a"])
    assert checks.count == 1


@pytest.mark.parametrize("change", ["shape", "strides", "dtype", "names", "missing", "more", "list", "type"])
def test_whatever_changes_is_checked_again(change: str) -> None:
    given: Any = arrays()
    recognised, checks = known(given)
    if change == "shape":
        given["a"].shape = (3, 2)
    elif change == "strides":
        given["a"].strides = (4, 8)
    elif change == "dtype":
        given["b"].dtype = np.int32
    elif change == "names":
        given = {"b": given["a"], "a": given["b"]}
    elif change == "missing":
        del given["a"]
    elif change == "more":
        given["c"] = np.ones(1)
    elif change == "type":
        given["b"] = given["b"].view(np.ma.MaskedArray)
    else:
        given = list(given.values())
    assert not recognised.knows(given)
    assert not recognised.recalls(given)
    again: Any = list if change == "missing" else checks
    recognised.views(given, again)
    assert checks.count == (1 if change == "missing" else 2)


def test_other_arrays_of_one_form_are_not_checked_again() -> None:
    """They are other arrays all the same: what is known of the ones before by their identity is not known of them."""
    given = arrays()
    recognised, checks = known(given)
    first = recognised.knows(given)
    other = {name: array + 1 for name, array in given.items()}
    assert not recognised.knows(other)
    b, a = recognised.views(other, checks)
    assert (a.tolist(), b.tolist()) == ([1, 2, 3, 4, 5, 6], [2, 2])
    assert checks.count == 1
    assert recognised.recalls(other) is FITTING
    assert first is not None
    for _ in range(3):
        recognised.views(other, checks)
        assert not recognised.knows(given)
    assert recognised.knows(other) not in (None, first), "they came again and again"
    assert checks.count == 1


def test_arrays_of_one_form_that_may_not_be_written_are_checked() -> None:
    given = arrays()
    recognised, checks = known(given, written=True)
    other = arrays()
    other["b"].flags.writeable = False
    assert not recognised.recalls(other)
    other["b"].flags.writeable = True
    assert recognised.recalls(other)
    assert checks.count == 1


def test_what_is_written_has_to_stay_writable() -> None:
    given = arrays()
    recognised, _ = known(given, written=True)
    assert recognised.knows(given)
    given["a"].flags.writeable = False
    assert not recognised.knows(given)


def test_an_array_that_is_gone_is_not_recognised_in_another_of_its_identity() -> None:
    given = arrays()
    recognised, _ = known(given)
    array = given.pop("b")
    identity = id(array)
    del array
    for _ in range(100):  # the allocator gives the place out again sooner or later
        given["b"] = np.ones(2, np.float32)
        assert not recognised.knows(given)
        if id(given["b"]) == identity:
            break


@pytest.mark.parametrize("odd", [np.ones((2, 6), np.float32)[:, ::2], np.ma.ones((2, 3))])
def test_odd_arrays_are_checked_each_time(odd: Any) -> None:
    given = arrays() | {"a": odd}
    recognised, checks = known(given)
    recognised.views(given, checks)
    assert checks.count == 2


def test_large_arrays_are_recognised_by_their_form_alone() -> None:
    given = arrays() | {"a": np.ones((200, 300), np.float32)}
    recognised, checks = known(given)
    for _ in range(10):
        recognised.views(given, checks)
        assert not recognised.knows(given)
    assert checks.count == 1


def test_a_session_checks_arrays_that_changed_in_place() -> None:
    """Its own checks are what a change leads to: none of them is skipped for an array that was good before."""
    with numpy_server() as server, stepwire.connect(server.target) as client:
        start = {"w": np.ones((2, 3), np.float32), "b": np.ones(2, np.float32)}
        with client.create_session(start, optimizer=stepwire.SGD(lr=1.0)) as session:
            gradient = {name: np.ones_like(array) for name, array in start.items()}
            out = {name: np.empty_like(array) for name, array in start.items()}
            for _ in range(2):
                session.step(gradient, out=out)
            gradient["w"][:] = 2.0
            assert session.step(gradient, out=out)["w"].tolist() == [[-3.0] * 3] * 2
            with pytest.raises(stepwire.InvalidRequestError, match="shares memory with the gradient"):
                session.step(out, out=out)
            session.step(gradient, out=out)
            with pytest.raises(stepwire.InvalidRequestError, match="shares memory with the gradient"):
                session.step(gradient, out=gradient)
            out["w"].flags.writeable = False
            with pytest.raises(stepwire.InvalidRequestError, match="read-only"):
                session.step(gradient, out=out)
            gradient["w"].shape = (3, 2)
            with pytest.raises(stepwire.InvalidRequestError, match="shape"):
                session.step(gradient)


def test_a_step_in_place_says_nothing_of_other_arrays() -> None:
    """A reply over the gradient is refused also where a step in between had a reply that shares no memory with it."""
    with serving(device="cpu") as target, stepwire.connect(target, timeout=120.0) as client:
        start = {"w": np.ones((2, 3), np.float32), "b": np.ones(2, np.float32)}
        with client.create_session(start, optimizer=stepwire.SGD(lr=1.0)) as session:
            both = {name: np.zeros_like(array) for name, array in start.items()}
            for steps in (1, 6):
                session.step({name: np.ones_like(array) for name, array in start.items()}, out=both)
                for _ in range(steps):
                    session.step(both)
                session.step(both, out=session.shared_parameters())
                with pytest.raises(stepwire.InvalidRequestError, match="shares memory with the gradient"):
                    session.step(both, out=both)
