"""Servers that lose steps, as durability `checkpoint` allows: clients are told, or send the steps again."""

from __future__ import annotations

import contextlib
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import stepwire
from stepwire.errors import Reason
from stepwire.links.hold import Hold
from stepwire_server.server import Server
from tests.integration.proxy import Proxy
from tests.support.numpy_server import numpy_server

pytestmark = pytest.mark.many

SIZE = 40_000


def gradient(number: int) -> dict[str, Any]:
    draw = np.random.default_rng((5, number))
    return {name: draw.standard_normal(size).astype(np.float32) for name, size in (("a", SIZE), ("b", 3))}


def parameters() -> dict[str, Any]:
    return {"a": np.ones(SIZE, np.float32), "b": np.zeros(3, np.float32)}


def bits(arrays: Any) -> bytes:
    return b"".join(arrays[name].tobytes() for name in sorted(arrays))


class Restarting:
    """A server behind an address, which can be replaced by one that starts from an image of its disk.

    Attributes:
        server: the present server.
        target: the address.
    """

    def __init__(self, folder: pathlib.Path, stack: contextlib.ExitStack) -> None:
        """Start the first server."""
        self._folder, self._stack, self._count = folder, stack, 0
        self._images: list[pathlib.Path] = []
        self.server = self._start(folder / "data-0")
        self._proxy = stack.enter_context(Proxy(self.server.target))
        self.target = self._proxy.target

    def _start(self, data: pathlib.Path) -> Server:
        self._data = data
        return self._stack.enter_context(numpy_server(data_dir=str(data), max_chunk_bytes=64 << 10))

    def checkpoint(self, session: stepwire.Session) -> None:
        """Save a checkpoint of the present moment."""
        directory = self.server.registry.directory
        assert directory is not None
        directory.checkpointer.checkpoint(self.server.registry.get(session.session_id))

    def image(self) -> pathlib.Path:
        """Copy the disk as it is."""
        self._count += 1
        return pathlib.Path(shutil.copytree(self._data, self._folder / f"data-{self._count}"))

    def crash(self, image: pathlib.Path) -> None:
        """Have another server stand at the address, which starts from an image."""
        old, self.server = self.server, self._start(image)
        self._proxy.upstream = self.server.target
        old.close()


@pytest.fixture
def restarting(tmp_path: pathlib.Path) -> Iterator[Restarting]:
    with contextlib.ExitStack() as stack:
        yield Restarting(tmp_path, stack)


@pytest.fixture(scope="module")
def expected() -> list[bytes]:
    """The parameters after each step of an undisturbed run."""
    with numpy_server(max_chunk_bytes=64 << 10) as server, stepwire.connect(server.target) as client:
        session = client.create_session(parameters())
        return [bits(session.step(gradient(number))) for number in range(1, 9)]


Connect = Callable[..., stepwire.Client]


@pytest.fixture
def connect(restarting: Restarting) -> Iterator[Connect]:
    retry = stepwire.Retry(initial_seconds=0.001, max_seconds=0.01)
    with contextlib.ExitStack() as stack:
        yield lambda **options: stack.enter_context(
            stepwire.connect(restarting.target, timeout=120.0, retry=retry, **options)
        )


def stepped(session: stepwire.Session, first: int, last: int) -> list[bytes]:
    return [bits(session.step(gradient(number))) for number in range(first, last + 1)]


def test_a_client_is_told_once_what_was_lost(restarting: Restarting, connect: Connect, expected: list[bytes]) -> None:
    session = connect().create_session(parameters(), durability="checkpoint", keep=True)
    assert stepped(session, 1, 2) == expected[:2]
    restarting.checkpoint(session)
    image = restarting.image()
    assert stepped(session, 3, 4) == expected[2:4]
    assert session.last_result is not None
    assert (session.last_result.step, session.last_result.durable_step) == (4, 2)
    restarting.crash(image)
    with pytest.raises(stepwire.StateLossError, match="has lost steps 3 to 4; pull the parameters") as lost:
        session.step(gradient(5))
    assert (lost.value.durable_step, lost.value.applied_step, lost.value.lost_load) == (2, 4, False)
    assert lost.value.reason == Reason.STATE_LOST
    assert (session.applied_step, bits(session.pull())) == (2, expected[1])
    assert stepped(session, 3, 5) == expected[2:5]


@pytest.mark.parametrize("transport", ["tcp", "auto"])
@pytest.mark.parametrize("options", [{}, {"overlap": True}], ids=["whole", "overlap"])
def test_a_window_makes_a_loss_good(
    transport: str, options: dict[str, Any], restarting: Restarting, connect: Connect, expected: list[bytes]
) -> None:
    client = connect(window_bytes=16 << 20, transport=transport)
    session = client.create_session(parameters(), durability="checkpoint", non_finite="allow", keep=True)
    for number in (1, 2):
        session.step(gradient(number), **options)
    restarting.checkpoint(session)
    image = restarting.image()
    for number in (3, 4, 5):
        session.step(gradient(number), **options)
    restarting.crash(image)
    assert bits(session.step(gradient(6), **options)) == expected[5]
    assert session.applied_step == 6
    restarting.crash(restarting.image())
    assert stepped(session, 7, 8) == expected[6:8]


@pytest.mark.parametrize("trouble", ["another crash", "the deadline"])
def test_a_loss_is_made_good_whatever_happens_meanwhile(
    trouble: str, restarting: Restarting, connect: Connect, expected: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While step 4 is sent again; steps 5 and 6, which were acknowledged too, come behind it all the same."""
    session = connect(window_bytes=16 << 20).create_session(parameters(), durability="checkpoint", keep=True)
    stepped(session, 1, 2)
    restarting.checkpoint(session)
    image = restarting.image()
    stepped(session, 3, 6)
    send, troubles = Hold.step, [trouble]

    def send_in_trouble(hold: Hold, call: Any, deadline: Any) -> Any:
        if call.begin.step == 4 and troubles:
            if troubles.pop() == "the deadline":
                raise stepwire.DeadlineExceededError("the deadline has passed")
            restarting.crash(restarting.image())
        return send(hold, call, deadline)

    restarting.crash(image)
    monkeypatch.setattr(Hold, "step", send_in_trouble)
    if trouble == "the deadline":
        with pytest.raises(stepwire.DeadlineExceededError):
            session.step(gradient(7))
        assert session.applied_step == 6
    assert stepped(session, 7, 8) == expected[6:8]
    assert (session.applied_step, troubles) == (8, [])


def test_a_window_that_is_too_small_tells_of_the_loss(
    restarting: Restarting, connect: Connect, expected: list[bytes]
) -> None:
    session = connect(window_bytes=2 * 4 * SIZE + 4096).create_session(parameters(), durability="checkpoint", keep=True)
    image = restarting.image()
    stepped(session, 1, 3)
    restarting.crash(image)
    with pytest.raises(stepwire.StateLossError) as lost:
        session.step(gradient(4))
    assert (lost.value.durable_step, lost.value.applied_step, lost.value.lost_load) == (0, 3, False)


def test_a_server_that_knows_less_than_was_durable_is_refused(restarting: Restarting, connect: Connect) -> None:
    session = connect().create_session(parameters(), durability="journal", keep=True)
    image = restarting.image()
    stepped(session, 1, 2)
    restarting.crash(image)
    for _ in range(2):
        with pytest.raises(stepwire.DataLossError, match="load your own state into a new session") as lost:
            session.step(gradient(3))
        assert lost.value.reason == Reason.DURABLE_STEP_LOST
        assert lost.value.metadata["known_durable_step"] == "2"


@pytest.mark.parametrize("durability", ["journal", "checkpoint"])
def test_a_doubt_is_resolved_by_the_server_that_comes_next(
    durability: Any, restarting: Restarting, connect: Connect, expected: list[bytes]
) -> None:
    """The step failed at a server that is gone; another gradient is the next step, with nothing lost between."""
    session = connect(window_bytes=16 << 20).create_session(parameters(), durability=durability, keep=True)
    stepped(session, 1, 2)
    restarting.checkpoint(session)
    image = restarting.image()
    assert stepped(session, 3, 3) == expected[2:3]
    if durability == "journal":
        image = restarting.image()
    restarting.server.close()
    with pytest.raises(stepwire.UnavailableError):
        session.step(gradient(9), timeout=0.2)
    restarting.crash(image)
    assert stepped(session, 4, 6) == expected[3:6]


def lost(restarting: Restarting, session: stepwire.Session, expected: list[bytes]) -> None:
    """Take four steps, of which a restarted server has the first two."""
    assert stepped(session, 1, 2) == expected[:2]
    restarting.checkpoint(session)
    image = restarting.image()
    assert stepped(session, 3, 4) == expected[2:4]
    restarting.crash(image)


@pytest.mark.parametrize("attached", [False, True])
def test_a_load_of_parameters_is_no_end_of_a_loss(
    attached: bool, restarting: Restarting, connect: Connect, expected: list[bytes]
) -> None:
    """Moments and step counts would be those before the loss: it is told, once, and nothing is loaded."""
    session = connect().create_session(parameters(), durability="checkpoint", keep=True)
    lost(restarting, session, expected)
    if attached:
        session.detach()
        session.attach()
    with pytest.raises(stepwire.StateLossError, match="has lost steps 3 to 4"):
        session.load(parameters())
    assert (session.applied_step, bits(session.pull())) == (2, expected[1])
    session.load(parameters())
    assert (session.applied_step, bits(session.pull())) == (2, bits(parameters()))
    session.step(gradient(3))
    assert set(session.state().tensor_steps.values()) == {3}


def test_a_window_makes_a_loss_good_before_a_load(
    restarting: Restarting, connect: Connect, expected: list[bytes]
) -> None:
    session = connect(window_bytes=16 << 20).create_session(parameters(), durability="checkpoint", keep=True)
    lost(restarting, session, expected)
    session.load(parameters())
    assert (session.applied_step, bits(session.pull())) == (4, bits(parameters()))
    session.step(gradient(5))
    assert set(session.state().tensor_steps.values()) == {5}


@pytest.mark.parametrize("window_bytes", [0, 16 << 20])
def test_a_whole_state_replaces_what_was_lost(
    window_bytes: int, restarting: Restarting, connect: Connect, expected: list[bytes]
) -> None:
    session = connect(window_bytes=window_bytes).create_session(parameters(), durability="checkpoint", keep=True)
    assert stepped(session, 1, 2) == expected[:2]
    image = restarting.image()
    assert stepped(session, 3, 4) == expected[2:4]
    state = session.state()
    restarting.crash(image)
    session.load_state(state)
    assert stepped(session, 5, 6) == expected[4:6]


def read_by_pull(session: stepwire.Session) -> bytes:
    return bits(session.pull())


def read_by_state(session: stepwire.Session) -> bytes:
    return bits(session.state().slots["param"])


def read_by_checkpoint(session: stepwire.Session) -> bytes:
    """The parameters of a checkpoint, as a fork of it has them."""
    session.save_checkpoint("now")
    with session.fork(checkpoint="now") as fork:
        return bits(fork.pull())


def read_by_fork(session: stepwire.Session) -> bytes:
    with session.fork() as fork:
        return bits(fork.pull())


READS = pytest.mark.parametrize("read", [read_by_pull, read_by_state, read_by_checkpoint, read_by_fork])


@READS
def test_whoever_reads_after_a_loss_reads_what_the_window_made_good(
    read: Callable[[stepwire.Session], bytes], restarting: Restarting, connect: Connect, expected: list[bytes]
) -> None:
    session = connect(window_bytes=16 << 20).create_session(parameters(), durability="checkpoint", keep=True)
    lost(restarting, session, expected)
    assert read(session) == expected[3]
    assert stepped(session, 5, 6) == expected[4:6]


@READS
def test_whoever_reads_after_a_loss_is_told(
    read: Callable[[stepwire.Session], bytes], restarting: Restarting, connect: Connect, expected: list[bytes]
) -> None:
    session = connect().create_session(parameters(), durability="checkpoint", keep=True)
    lost(restarting, session, expected)
    with pytest.raises(stepwire.StateLossError, match="has lost steps 3 to 4"):
        read(session)
    assert (session.applied_step, read(session)) == (2, expected[1])
    assert stepped(session, 3, 4) == expected[2:4]


def test_a_loss_that_a_pull_tells_ends_a_doubt(restarting: Restarting, connect: Connect, expected: list[bytes]) -> None:
    session = connect().create_session(parameters(), durability="checkpoint", keep=True)
    stepped(session, 1, 2)
    restarting.checkpoint(session)
    image = restarting.image()
    stepped(session, 3, 3)
    restarting.server.close()
    with pytest.raises(stepwire.UnavailableError):
        session.step(gradient(4), timeout=0.2)
    restarting.crash(image)
    with pytest.raises(stepwire.StateLossError):
        session.pull()
    assert session.statistics().step_in_doubt is None
    assert stepped(session, 3, 5) == expected[2:5]


def test_clients_that_hold_no_worker_read_what_is_there(
    restarting: Restarting, connect: Connect, expected: list[bytes]
) -> None:
    """Neither one that never stepped the session, nor one that another client has replaced."""
    former = connect(window_bytes=16 << 20).create_session(parameters(), durability="checkpoint", keep=True)
    assert stepped(former, 1, 2) == expected[:2]
    holder = connect().session(former.session_id)
    holder.attach(take_over=True)
    restarting.checkpoint(holder)
    image = restarting.image()
    assert stepped(holder, 3, 4) == expected[2:4]
    reader = connect().session(former.session_id)
    restarting.crash(image)
    assert bits(reader.pull()) == bits(former.pull()) == expected[1]
    with pytest.raises(stepwire.StateLossError):
        holder.pull()


def test_a_window_never_sends_steps_that_another_client_has_replaced(
    restarting: Restarting, connect: Connect, expected: list[bytes]
) -> None:
    former = connect(window_bytes=16 << 20).create_session(parameters(), durability="checkpoint", keep=True)
    assert stepped(former, 1, 2) == expected[:2]
    restarting.checkpoint(former)
    image = restarting.image()
    assert stepped(former, 3, 3) == expected[2:3]
    restarting.crash(image)
    other = connect().session(former.session_id)
    other.step(gradient(30))  # a third step, too
    other.detach()
    former.attach(take_over=True)
    image = restarting.image()
    assert former.applied_step == 3
    former.step(gradient(4))
    restarting.crash(image)
    with pytest.raises(stepwire.StateLossError, match="has lost steps 3 to 4"):
        former.step(gradient(5))
    assert bits(former.pull()) == expected[1]
    image = restarting.image()
    assert stepped(former, 3, 4) == expected[2:4]
    restarting.crash(image)
    assert stepped(former, 5, 5) == expected[4:5]


@pytest.mark.parametrize(("window_bytes", "step"), [(0, 2), (16 << 20, 4)])
def test_a_rollback_comes_after_what_was_lost(
    window_bytes: int, step: int, restarting: Restarting, connect: Connect, expected: list[bytes]
) -> None:
    session = connect(window_bytes=window_bytes).create_session(parameters(), durability="checkpoint", keep=True)
    assert stepped(session, 1, 1) == expected[:1]
    session.save_checkpoint("best")
    assert stepped(session, 2, 2) == expected[1:2]
    restarting.checkpoint(session)
    image = restarting.image()
    assert stepped(session, 3, 4) == expected[2:4]
    restarting.crash(image)
    if not window_bytes:
        with pytest.raises(stepwire.StateLossError):
            session.rollback(checkpoint="best")
    assert bits(session.rollback(checkpoint="best")) == expected[0]
    assert session.applied_step == step
    assert stepped(session, 2, 4) == expected[1:4]
    assert session.applied_step == step + 3
