"""Moves that break off, at each of their calls: the session is where it was, or where it was to be, and steps once."""

from __future__ import annotations

import contextlib
import pathlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import stepwire
from stepwire.connection.channel import Calls
from stepwire.sharding.move import Move
from stepwire_server.server import Server
from tests.integration.training import bits
from tests.support.numpy_server import numpy_server

SHAPES = {"w": (3, 70_000), "b": (5,)}
OPTIONS: dict[str, Any] = {"optimizer": stepwire.Adam(lr=1e-2), "clip_grad_norm": 1.0}
METHODS = ("CreateSession", "FreezeSession", "ExportSession", "ImportSession", "HandOverSession")
STEPS = 5


class Killed(BaseException):
    """The end of the mover's process."""


def gradient(step: int) -> dict[str, Any]:
    chance = np.random.default_rng(step)
    return {name: chance.standard_normal(shape, np.float32) for name, shape in SHAPES.items()}


@pytest.fixture(scope="module")
def undisturbed() -> list[Any]:
    """The replies of a session that stays."""
    with numpy_server() as server, stepwire.connect(server.target) as client:
        session = client.create_session(gradient(0), **OPTIONS)
        return [bits(session.step(gradient(step))) for step in range(1, STEPS + 1)]


class Broken:
    """Calls something at one call of a mover: before it is sent, or once it was answered."""

    def __init__(self, method: str, number: int, event: Callable[[], object], *, after: bool) -> None:
        self.happened = False
        self._asked, self._event, self._after = (method, number), event, after
        self._counts: dict[str, int] = {}
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patched:
            for name in ("unary", "once", "download", "upload"):
                patched.setattr(Calls, name, self._watched(getattr(Calls, name)))
            yield

    def _watched(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def made(calls: Calls, method: str, *arguments: Any) -> Any:
            with self._lock:
                count = self._counts[method] = self._counts.get(method, 0) + 1
            here = (method, count) == self._asked
            if here and not self._after:
                self._happen()
            found = call(calls, method, *arguments)
            if here and self._after:
                self._happen()
            return found

        return made

    def _happen(self) -> None:
        self.happened = True
        self._event()


def kill() -> None:
    raise Killed


def finished(session: stepwire.Session, undisturbed: list[Any], steps: range) -> None:
    for step in steps:
        assert bits(session.step(gradient(step))) == undisturbed[step - 1]


@pytest.mark.many
@pytest.mark.parametrize("after", [False, True], ids=["unsent", "unheard"])
@pytest.mark.parametrize(("former", "new"), [(2, 3), (3, 2)])
@pytest.mark.parametrize("method", METHODS)
def test_a_mover_that_ends_anywhere_leaves_one_session(
    undisturbed: list[Any], method: str, former: int, new: int, after: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Move, "_undo", lambda self: None)  # a process that has ended undoes nothing
    now, retry = [0.0], stepwire.Retry(initial_seconds=0.001, max_seconds=0.01)
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(numpy_server(clock=lambda: now[0])) for _ in range(3)]
        targets = [server.target for server in servers]
        client = stack.enter_context(stepwire.connect(targets[:former], retry=retry))
        number = 1
        while True:
            session = client.create_session(gradient(0), keep=True, **OPTIONS)
            finished(session, undisturbed, range(1, 3))
            broken = Broken(method, number, kill, after=after)
            with broken.watching(), contextlib.suppress(Killed):
                stepwire.move_session(session.session_id, targets, targets[:new])
            if not broken.happened:
                break
            now[0] += 60.0  # nobody renews the freeze
            finished(session, undisturbed, range(3, 4))
            decided = method == METHODS[-1] and (number, after) > (1, False)
            assert len(session.shards) == (new if decided else former)
            found = stepwire.move_session(session.session_id, targets, targets[::-1][:new])
            finished(session, undisturbed, range(4, STEPS + 1))
            assert session.session_id == found
            session.close()
            number += 1
        assert number > (new if method in ("CreateSession", "ImportSession") else former)


class Places:
    """Servers with data directories, which a folder tells the present addresses of."""

    def __init__(self, folder: pathlib.Path, stack: contextlib.ExitStack) -> None:
        self.folder, self._stack = folder, stack

    def serve(self, name: str) -> Server:
        """Start a server; one that was there before is overtaken, and knows nothing of it until it looks."""
        return self._stack.enter_context(
            numpy_server(
                data_dir=str(self.folder / f"data-{name}"),
                directory=str(self.folder / "directory"),
                shard=name,
                drain_seconds=5.0,
            )
        )

    def target(self, name: str) -> str:
        return f"directory:{self.folder / 'directory'}/{name}"


@pytest.mark.many
@pytest.mark.parametrize("after", [False, True], ids=["before", "behind"])
@pytest.mark.parametrize("durability", ["journal", "checkpoint"])
@pytest.mark.parametrize("victim", ["a", "b", "c"])
@pytest.mark.parametrize("method", METHODS)
def test_a_server_that_ends_anywhere_leaves_one_session(
    undisturbed: list[Any], method: str, victim: str, after: bool, durability: Any, tmp_path: pathlib.Path
) -> None:
    """From a and b to b and c: whichever is overtaken in the middle, steps go on, and the move is made in the end."""
    retry = stepwire.Retry(initial_seconds=0.001, max_seconds=0.01)
    with contextlib.ExitStack() as stack:
        places = Places(tmp_path, stack)
        for name in ("a", "b", "c"):
            places.serve(name)
        options = OPTIONS | {"durability": durability, "keep": True}
        folder = f"directory:{tmp_path / 'directory'}"
        client = stack.enter_context(stepwire.connect(folder, retry=retry, window_bytes=1 << 24))
        session = client.create_session(gradient(0), **options)
        finished(session, undisturbed, range(1, 3))
        former = [places.target(name) for name in ("a", "b", "c")]
        first = stepwire.move_session(session.session_id, former, former[:2])
        broken = Broken(method, 1, lambda: places.serve(victim), after=after)
        with broken.watching(), contextlib.suppress(stepwire.StepwireError):
            stepwire.move_session(first, former, former[1:])
        assert broken.happened
        finished(session, undisturbed, range(3, 4))
        found = stepwire.move_session(session.session_id, former, former[1:])
        finished(session, undisturbed, range(4, STEPS + 1))
        assert session.session_id == found
        assert [shard.info().durable_step for shard in session.shards] == [STEPS] * 2 or durability == "checkpoint"
        session.close()


def test_a_record_of_a_move_outlives_the_server_that_has_it(undisturbed: list[Any], tmp_path: pathlib.Path) -> None:
    with contextlib.ExitStack() as stack:
        places = Places(tmp_path, stack)
        for name in ("a", "b", "c"):
            places.serve(name)
        targets = [places.target(name) for name in ("a", "b", "c")]
        with stepwire.connect(f"directory:{tmp_path / 'directory'}") as client:
            session = client.create_session(gradient(0), durability="journal", keep=True, **OPTIONS)
            finished(session, undisturbed, range(1, 3))
            former = session.session_id
            found = stepwire.move_session(former, targets, targets[2:])
        for name in ("a", "b"):
            places.serve(name)
            assert [path.name for path in (tmp_path / f"data-{name}" / "sessions").iterdir()] == []
        with stepwire.connect(f"directory:{tmp_path / 'directory'}") as client:
            again = client.session(former)
            assert again.session_id == found
            finished(again, undisturbed, range(3, STEPS + 1))
