"""Steps alike: the same bits as steps that are built, and every other step goes the ordinary way."""

from __future__ import annotations

import contextlib
import gc
import pathlib
import signal
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import stepwire
from stepwire.errors import InvalidRequestError
from stepwire.steps.alike import AlikeExchange, AlikeSteps
from stepwire.steps.build import StepBuilder
from stepwire_server.server import Server
from tests.support.numpy_server import numpy_server

SHAPES: dict[str, tuple[int, ...]] = {"w": (5, 3), "s": (), "e": (0, 4), "b": (7,)}
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}
SGD = stepwire.SGD(lr=1.0)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with numpy_server() as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[stepwire.Client]:
    with stepwire.connect(server.target, transport="packets", timeout=120.0) as client:
        yield client


@pytest.fixture
def alike(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The numbers of the steps that were not built."""
    numbers, message = list[int](), AlikeExchange.message

    def noted(exchange: AlikeExchange, step: int, epoch: int, load: int) -> bytes:
        numbers.append(step)
        return message(exchange, step, epoch, load)

    monkeypatch.setattr(AlikeExchange, "message", noted)
    yield numbers


def draw(seed: int, dtype: Any = np.float32) -> dict[str, Any]:
    generator = np.random.default_rng(seed)
    return {name: generator.standard_normal(shape).astype(dtype) for name, shape in SHAPES.items()}


def bits(arrays: dict[str, Any]) -> list[tuple[str, Any, Any, bytes]]:
    return [(name, array.shape, array.dtype, array.tobytes()) for name, array in arrays.items()]


def built(client: stepwire.Client, dtype: str, gradients: list[dict[str, Any]]) -> list[Any]:
    """Return the replies of the same steps, each of which is built."""
    with built_alone(), client.create_session(draw(0), gradient_dtype=dtype, reply_dtype=dtype) as session:
        return [bits(session.step(gradient)) for gradient in gradients]


@contextlib.contextmanager
def built_alone() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(AlikeSteps, "exchange", lambda *arguments: None)
        yield


Given = Callable[[stepwire.Session, dict[str, Any]], dict[str, Any]]


def in_the_same(session: stepwire.Session, values: dict[str, Any]) -> dict[str, Any]:
    kept: dict[str, Any] = session.__dict__.setdefault("kept", {name: value.copy() for name, value in values.items()})
    for name, value in values.items():
        kept[name][...] = value
    return kept


def in_place(session: stepwire.Session, values: dict[str, Any]) -> dict[str, Any]:
    shared: Any = session.shared_gradients()
    for name, value in values.items():
        shared[name][...] = value
    return dict(shared)


def in_each_others_place(session: stepwire.Session, values: dict[str, Any]) -> dict[str, Any]:
    """`b` lies where a part of `w` belongs."""
    shared: Any = session.shared_gradients()
    inside = shared["w"].reshape(-1)[2:9]
    inside[...] = values["b"]
    return values | {"b": inside}


GIVEN: dict[str, Given] = {
    "the same arrays": in_the_same,
    "new arrays": lambda session, values: values,
    "arrays in place": in_place,
    "views in the place of others": in_each_others_place,
    "another order": lambda session, values: dict(reversed(values.items())),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", GIVEN)
def test_steps_alike_have_the_bits_of_steps_that_are_built(
    client: stepwire.Client, alike: list[int], way: str, dtype: str
) -> None:
    gradients = [draw(seed, DTYPES[dtype]) for seed in range(1, 9)]
    expected = built(client, dtype, gradients)
    with client.create_session(draw(0), gradient_dtype=dtype, reply_dtype=dtype) as session:
        session.attach()
        replies = [bits(session.step(GIVEN[way](session, gradient))) for gradient in gradients]
        assert session.info().applied_step == session.applied_step == 8
        assert [past.result.step for past in session.history()] == list(range(1, 9))
    order = "besw" if way == "another order" else None
    assert alike == list(range(2, 9))
    if order is None:
        assert replies == expected
    else:
        assert [[name for name, *_ in reply] for reply in replies] == [list(reversed(SHAPES))] * 8
        assert [sorted(reply) for reply in replies] == [sorted(reply) for reply in expected]


def test_replies_are_written_to_arrays_of_the_users_or_show_the_servers_memory(
    client: stepwire.Client, alike: list[int]
) -> None:
    gradient = draw(1)
    expected = built(client, "float32", [gradient] * 7)
    with client.create_session(draw(0)) as session:
        out: Any = draw(2)
        for place in range(3):
            assert session.step(gradient, out=out) is out
            assert bits(out) == expected[place]
        shown: Any = session.shared_parameters()
        for place in range(3, 7):
            reply: Any = session.step(gradient, out=shown)
            assert bits(reply) == expected[place]
            assert all(np.shares_memory(reply[name], shown[name]) for name in ("w", "s", "b"))
    assert set(alike) >= {3, 5, 6, 7}


def test_a_reply_over_its_gradient_is_refused_as_ever(client: stepwire.Client) -> None:
    gradient: Any = draw(1)
    with client.create_session(draw(0)) as session:
        for _ in range(4):
            session.step(gradient, out=draw(2))
        with pytest.raises(InvalidRequestError, match="shares memory with the gradient"):
            session.step(gradient, out=gradient)
        out = draw(3)
        for _ in range(4):
            session.step(gradient, out=out)
        gradient["w"] = out["w"]
        with pytest.raises(InvalidRequestError, match="shares memory with the gradient"):
            session.step(gradient, out=out)
        assert session.info().applied_step == session.applied_step == 8


OTHERS: dict[str, Callable[[stepwire.Session], Any]] = {
    "a rate": lambda session: session.step(draw(1), lr=0.5),
    "no reply": lambda session: session.step(draw(1), reply="none"),
    "a list of the user's": lambda session: session.step(draw(1), on_tensor=lambda name, values: None),
    "an encoding": lambda session: session.step(draw(1), reply_dtype="bfloat16"),
    "arrays of another dtype": lambda session: session.step(draw(1, np.float16)),
    "strides": lambda session: session.step(draw(1) | {"w": np.ones((3, 5), np.float32).T}),
    "a list": lambda session: session.step(list(draw(1).values())),
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_step_of_another_kind_is_built(client: stepwire.Client, alike: list[int], other: str) -> None:
    names = [str(place) for place in range(len(SHAPES))] if other == "a list" else list(SHAPES)
    parameters = dict(zip(names, draw(0).values(), strict=True))
    with client.create_session(parameters) as session:
        for _ in range(4):
            session.step(dict(zip(names, draw(1).values(), strict=True)))
        assert alike.pop() == 4
        OTHERS[other](session)
        assert 5 not in alike
        session.step(dict(zip(names, draw(1).values(), strict=True)))
        session.step(dict(zip(names, draw(1).values(), strict=True)))
        assert alike.pop() == 7


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        ({"w": np.ones((3, 5), np.float32)}, "shape"),
        ({"w": np.ones((5, 3), np.int32)}, "dtype int32"),
        ({"v": np.ones(3, np.float32)}, "unknown"),
    ],
)
def test_wrong_arrays_are_refused_behind_steps_alike(client: stepwire.Client, wrong: Any, problem: str) -> None:
    with client.create_session(draw(0)) as session:
        for _ in range(4):
            session.step(draw(1))
        with pytest.raises(InvalidRequestError, match=problem):
            session.step(draw(1) | wrong)
        assert session.info().applied_step == 4


def test_steps_alike_go_on_behind_a_new_stream_a_load_and_another_number(
    client: stepwire.Client, alike: list[int]
) -> None:
    with client.create_session({"w": np.zeros(3, np.float32)}, optimizer=SGD) as session:
        gradient, total = {"w": np.ones(3, np.float32)}, 0.0
        for turn in range(4):
            if turn == 1:
                session.attach()
            elif turn == 2:
                session.load({"w": np.full(3, 10.0, np.float32)})
                total = -10.0
            for _ in range(60):  # past the numbers that one byte has
                total += 1.0
                assert session.step(gradient)["w"].tolist() == [-total] * 3
        assert session.info().applied_step == 240
        assert len(alike) > 220


def test_a_handler_that_changes_the_dict_of_a_step_changes_no_repetition(
    client: stepwire.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step was interrupted behind its sending: its gradient is that of its sending."""
    gradient = {"w": np.ones(3, np.float32)}
    with client.create_session({"w": np.zeros(3, np.float32)}, optimizer=SGD) as session:
        for _ in range(3):
            session.step(gradient)

        def interrupted(exchange: AlikeExchange) -> None:
            signal.raise_signal(signal.SIGUSR1)

        def handler(number: int, frame: Any) -> None:
            gradient["w"] = np.full(3, 4.0, np.float32)
            raise KeyboardInterrupt

        before = signal.signal(signal.SIGUSR1, handler)
        try:
            with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
                patched.setattr(AlikeExchange, "prepare", interrupted)
                session.step(gradient)
        finally:
            signal.signal(signal.SIGUSR1, before)
        assert session.statistics().step_in_doubt == 4
        assert session.step({"w": np.ones(3, np.float32)})["w"].tolist() == [-4.0] * 3
        assert session.step(gradient)["w"].tolist() == [-8.0] * 3
        assert session.info().applied_step == 5


def test_the_memory_of_a_stream_ends_with_it(client: stepwire.Client, alike: list[int]) -> None:
    with client.create_session(draw(0)) as session:
        for _ in range(3):
            session.step(draw(1))
        held: Any = session.shards[0]._known.hold  # type: ignore[attr-defined]
        memory = weakref.ref(held.shared)
        session.detach()
        gc.collect()
        assert (memory(), alike) == (None, [2, 3])


def test_a_reply_that_shows_memory_comes_by_messages_where_the_next_stream_has_none(
    tmp_path: pathlib.Path, alike: list[int]
) -> None:
    """The server is started again without shared memory, and the lane breaks under a step alike."""
    settings: dict[str, Any] = {"data_dir": tmp_path / "data", "bind": f"unix:{tmp_path}/socket"}
    gradient = {"w": np.ones(3, np.float32)}
    with contextlib.ExitStack() as stack:
        first = contextlib.ExitStack()
        target = first.enter_context(numpy_server(**settings)).target
        client = stack.enter_context(stepwire.connect(target, transport="packets", timeout=120.0))
        session = client.create_session({"w": np.zeros(3, np.float32)}, optimizer=SGD, durability="journal")
        out: Any = session.shared_parameters()
        for _ in range(5):
            session.step(gradient, out=out)
        first.close()
        stack.enter_context(numpy_server(**settings, shared_memory=False))
        reply: Any = session.step(gradient, out=out)
        assert ({name: each.tolist() for name, each in reply.items()}, session.applied_step) == ({"w": [-6.0] * 3}, 6)
        assert 6 in alike


def test_nothing_is_built_for_a_step_alike(client: stepwire.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    with client.create_session(draw(0)) as session:
        gradient = draw(1)
        for _ in range(3):
            session.step(gradient)
        monkeypatch.setattr(StepBuilder, "build", None)
        session.step(gradient)
        session.step(draw(2))
        assert session.applied_step == 5


@pytest.mark.many
def test_packets_without_shared_memory_are_built(alike: list[int]) -> None:
    with (
        numpy_server(shared_memory=False) as server,
        stepwire.connect(server.target, transport="packets", timeout=120.0) as client,
        client.create_session(draw(0)) as session,
    ):
        for _ in range(4):
            session.step(draw(1))
        assert (session.applied_step, alike) == (4, [])
