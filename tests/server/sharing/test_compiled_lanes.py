"""Compiled lanes, from a client in raw messages: the steps that they make, and all that they hand over to Python."""

from __future__ import annotations

import contextlib
import functools
import os
import pathlib
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from stepwire.v1 import optimizer_pb2, step_pb2
from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire.wire.packets import REQUEST_BYTES
from stepwire_server.config import ServerConfig
from stepwire_server.server import Server
from stepwire_server.sharing import packet_lane
from tests.server.sharing.test_packet_lanes import LaneStream, in_a_packet
from tests.support.lane_wire import steps_in_lanes, until_granted, wait_for_loops
from tests.support.raw_handoff import held_by_process

pytestmark = pytest.mark.many

pytest.importorskip("numba")

ROUNDS = int(os.environ.get("STEPWIRE_HOSTILE_PACKETS", "24"))
GROWTH_BYTES = 32 << 20
LANES = 100
SLOTS = ("param", "exp_avg", "exp_avg_sq")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A server whose lanes make every step that they can, from the second alike on: at least every other step.

    Python makes one when a grant has ended, be it by its time. Nothing is swept beside the tests.
    """
    config = ServerConfig(bind="127.0.0.1:0", device="cpu", threads=1, memory_budget=256 << 20, sweep_seconds=3600.0)
    with Server(config) as server:
        server.lanes.after_steps = server.lanes.steps_alike = 1
        yield server


@pytest.fixture
def live(wire: Any, make_config: Any, make_live: Any, server: Server) -> Any:
    """A session of one group, one step old; its loop is there."""
    return made(wire, make_config, make_live, server)


def own_config(make_config: Any) -> Any:
    numbers = optimizer_pb2.Hyperparameters(weight_decay=1e-3)  # the kernels of the tests of integration
    optimizer = optimizer_pb2.Optimizer(rule=optimizer_pb2.RULE_ADAM, hyperparameters=numbers)
    return make_config((3, 4), (5,), optimizer=optimizer)


def made(wire: Any, make_config: Any, make_live: Any, server: Server) -> Any:
    session = make_live(wire, wire.create(own_config(make_config)))
    session.load(session.load_opening(1), session.load_chunk(commit=True))
    session.step(1)
    with LaneStream(session) as lane:
        lane.exchange(lane.in_memory(2))
        lane.exchange(lane.in_memory(3))
        wait_for_loops(server)
    return session


def twin_of(live: Any, make_live: Any) -> Any:
    """Make a session like another one, as it was three steps old, which is stepped over gRPC."""
    config = live.wire.get(live.id).config
    config.ClearField("device")
    twin = make_live(live.wire, live.wire.create(config))
    twin.load(twin.load_opening(1), twin.load_chunk(commit=True))
    for step in (1, 2, 3):
        twin.step(step)
    return twin


@pytest.fixture
def lane_steps(server: Server) -> Callable[[], int]:
    """Count the steps that lanes have made; whatever they have made is told first."""
    return lambda: steps_in_lanes(server)


def test_steps_in_lanes_have_the_bits_of_others(live: Any, make_live: Any, server: Server, lane_steps: Any) -> None:
    twin, before, steps = twin_of(live, make_live), lane_steps(), range(4, 140)
    with LaneStream(live) as lane:
        for step in steps:
            if step % 10 == 0:
                server.registry.sweep()  # which ends the grant
            expected = twin.attach(in_a_packet(twin, step))[-1]
            reply = lane.exchange(lane.in_memory(step))
            assert lane.parameters() == expected.payload
            told, wanted = reply.result.telemetry, expected.result.telemetry
            for telemetry in (told, wanted):
                for field in ("receive_seconds", "queue_seconds", "apply_seconds", "previous_send_seconds"):
                    telemetry.ClearField(field)  # type: ignore[arg-type]
            assert (reply.result.step, told) == (step, wanted)
    assert lane_steps() - before >= len(steps) // 2
    assert live.wire.pull(live.id, *SLOTS) == twin.wire.pull(twin.id, *SLOTS)


@contextlib.contextmanager
def granted_on_a_server_of_its_own(live: Any) -> Iterator[tuple[Server, LaneStream]]:
    """Make a session like another one, whose next steps are a lane's from the fourth on, until somebody asks."""
    with Server(ServerConfig(bind="127.0.0.1:0", device="cpu", sweep_seconds=3600.0, lane_spin_microseconds=50)) as own:
        own.lanes.after_steps = own.lanes.steps_alike = 1
        with live.wire.__class__(own.target) as wire:
            session = live.__class__(wire, wire.create(live.wire.get(live.id).config))
            with LaneStream(session) as lane:
                session.load(session.load_opening(1), session.load_chunk(commit=True))
                for step in (1, 2, 3):
                    lane.exchange(lane.in_memory(step))
                until_granted(own, 1, functools.partial(lane.exchange, lane.in_memory(3)))
                yield own, lane


def test_a_lane_makes_steps_without_a_thread_in_python(live: Any, server: Server, lane_steps: Any) -> None:
    """The hook of profilers sees every call of Python in every thread of the server."""
    calls: list[tuple[str, str]] = []
    watched = threading.get_ident()
    recording = threading.Event()

    def hook(frame: Any, event: str, argument: Any) -> None:
        if recording.is_set() and threading.get_ident() != watched:
            calls.append((threading.current_thread().name, frame.f_code.co_qualname))

    threading.setprofile(hook)
    try:
        with granted_on_a_server_of_its_own(live) as (own, lane):
            messages = [lane.in_memory(step).SerializeToString() for step in range(4, 60)]
            recording.set()
            for message in messages:
                lane.lane.send(message)
                lane.lane.recv(1 << 18)
            recording.clear()
            assert lane.live.wire.get(lane.live.id).applied_step == 59
            assert own.lanes.statistics().steps == 56
    finally:
        threading.setprofile(None)  # type: ignore[arg-type]
    assert calls == []


def test_a_session_that_cannot_be_told_of_all_steps_is_damaged(
    live: Any, refusal: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The arrays have steps then that its numbers have not."""
    counted: list[int] = []

    def count() -> None:
        counted.append(1)
        if len(counted) == 2:
            raise MemoryError

    with granted_on_a_server_of_its_own(live) as (own, lane):
        for step in range(4, 8):
            lane.exchange(lane.in_memory(step))
        monkeypatch.setattr(own.lanes, "count", count)
        refusal(lambda: lane.live.wire.pull(lane.live.id), "INTERNAL", "INTERNAL")
        refusal(lambda: lane.live.wire.pull(lane.live.id), "DATA_LOSS", "SESSION_DAMAGED")
    assert len(counted) == 2


def test_whatever_a_lane_does_not_expect_goes_the_way_of_every_step(live: Any, make_live: Any, lane_steps: Any) -> None:
    """Replays, other settings, other forms, calls and pulls between steps of the lane."""
    twin, before = twin_of(live, make_live), lane_steps()
    step = 3
    with LaneStream(live) as lane:
        for others in range(6):
            for _ in range(4):
                step += 1
                assert lane.exchange(lane.in_memory(step)).result.step == step
                twin.step(step)
            if others == 0:
                replayed = lane.exchange(lane.in_memory(step)).result
                assert (replayed.step, replayed.replayed) == (step, True)
            elif others == 1:
                step += 1
                settings = optimizer_pb2.Hyperparameters(lr=0.5)
                message = lane.in_memory(step)
                message.begin.hyperparameters.append(settings)
                lane.exchange(message)
                begin = step_pb2.StepBegin(step=step, hyperparameters=[settings])
                twin.attach(twin.frame(begin=begin, commit=True, payload=twin.gradient(step)))
            elif others == 2:
                step += 1
                reply = lane.exchange(in_a_packet(live, step))
                assert reply.payload == twin.attach(in_a_packet(twin, step))[-1].payload
            elif others == 3:
                step += 1
                reply = lane.over_stream(in_a_packet(live, step))
                assert reply.payload == twin.attach(in_a_packet(twin, step))[-1].payload
            elif others == 4:
                assert live.wire.pull(live.id, *SLOTS) == twin.wire.pull(twin.id, *SLOTS)
            else:
                step += 1
                for each in (live, twin):
                    each.wire.unary("Step", each.unary_step(step))
    assert lane_steps() - before > 6
    assert live.wire.pull(live.id, *SLOTS) == twin.wire.pull(twin.id, *SLOTS)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 3e38])
def test_a_gradient_that_python_has_to_judge_changes_nothing_before(live: Any, refusal: Any, bad: float) -> None:
    with LaneStream(live) as lane:
        for step in (4, 5, 6):
            lane.exchange(lane.in_memory(step))
        gradient = live.gradient(7)
        gradient[3] = bad
        message = lane.in_memory(7)
        os.pwrite(lane.handed.descriptors[0], gradient.tobytes(), 0)
        if bad == 3e38:  # which is finite, and so is its square
            assert lane.exchange(message).result.telemetry.grad_norm == pytest.approx(3e38)
            return
        state = live.wire.pull(live.id, *SLOTS)
        lane.lane.send(message.SerializeToString())
        assert lane.has_ended()
        refusal(lane.stream.receive, "INVALID_ARGUMENT", "NON_FINITE_GRADIENT")
    assert live.wire.pull(live.id, *SLOTS) == state


def test_numbers_and_gaps_are_refused_as_ever(live: Any, refusal: Any) -> None:
    for number, reason in ((9, "STEP_MISMATCH"), (3, "STEP_SUPERSEDED")):
        applied = live.wire.get(live.id).applied_step
        with LaneStream(live) as lane:
            for step in range(applied + 1, applied + 4):
                lane.exchange(lane.in_memory(step))
            wrong = applied + number if number > 3 else 1
            lane.lane.send(lane.in_memory(wrong).SerializeToString())
            assert lane.has_ended()
            refusal(lane.stream.receive, "ABORTED", reason)
        assert live.wire.get(live.id).applied_step == applied + 3


def test_another_client_and_the_end_of_the_session_end_a_grant(live: Any, refusal: Any, until: Any) -> None:
    with LaneStream(live) as lane:
        for step in (4, 5, 6):
            lane.exchange(lane.in_memory(step))
        live.token = 0
        with LaneStream(live) as other:
            assert other.opened.applied_step == 6
            for step in (7, 8, 9):
                other.exchange(other.in_memory(step))
            refusal(lambda: lane_step(lane, 7), "FAILED_PRECONDITION", "FENCED")
            live.wire.unary("DeleteSession", pb.DeleteSessionRequest(session_id=live.id, attach_token=live.token))
            refusal(lambda: lane_step(other, 10), "NOT_FOUND", "SESSION_NOT_FOUND")


def lane_step(lane: LaneStream, step: int) -> None:
    """Step where the lane may have ended: the stream says why."""
    try:
        lane.lane.send(lane.in_memory(step).SerializeToString())
    except OSError:
        pass
    assert lane.has_ended()
    lane.stream.receive()


@pytest.mark.usefixtures("uncollected")
def test_the_memory_of_a_stream_that_ends_goes_at_once(live: Any, until: Any) -> None:
    held, applied = held_by_process(), live.wire.get(live.id).applied_step
    for turn in range(8):
        with LaneStream(live) as lane:
            lane.exchange(lane.in_memory(applied + turn + 1))
            if turn % 2:
                lane.lane.send(b"no message")
        until(lambda: not live.wire.get(live.id).attached)
        until(lambda: held_by_process() <= held)


def test_hostile_datagrams_in_a_granted_lane_leave_nothing(live: Any, until: Any, lane_steps: Any) -> None:
    """`make attack-test` sends 100,000 of them; the suite sends some."""
    generator, sent, steps_before, resident = np.random.default_rng(5), 0, lane_steps(), 0
    with LaneStream(live):
        pass
    until(lambda: not live.wire.get(live.id).attached)
    held, applied = held_by_process(), live.wire.get(live.id).applied_step
    while sent < ROUNDS:
        with LaneStream(live) as lane:
            for step in range(applied + 1, applied + 4):
                lane.exchange(lane.in_memory(step))
            lane.lane.send(hostile(lane.in_memory(applied + 4).SerializeToString(), sent, generator))
            sent += 1
            resident = resident or resident_bytes()  # with one lane in use
        until(lambda: not live.wire.get(live.id).attached)
        before, applied = applied + 3, live.wire.get(live.id).applied_step
        assert applied - before in (0, 1), "a field that nobody reads may differ"
    until(lambda: held_by_process() <= held)
    assert lane_steps() - steps_before >= ROUNDS, "a loop met each of them"
    assert resident_bytes() - resident < GROWTH_BYTES


def resident_bytes() -> int:
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) << 10
    raise AssertionError("no VmRSS")


def hostile(message: bytes, sent: int, generator: np.random.Generator) -> bytes:
    """Make another datagram of the one that a lane expects."""
    changed, place = bytearray(message), int(generator.integers(len(message)))
    if sent % 4 == 0:
        changed[place] ^= 1 << int(generator.integers(8))
    elif sent % 4 == 1:
        return generator.bytes(len(message))
    elif sent % 4 == 2:
        return generator.bytes(REQUEST_BYTES + 5)
    else:
        del changed[place:]
    return bytes(changed) or b"x"


def test_a_client_that_reads_no_replies_is_ended(live: Any, until: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packet_lane, "_SEND_SECONDS", 1)
    monkeypatch.setattr(packet_lane, "SEND_BUFFER_BYTES", 8 << 10)
    with LaneStream(live) as lane:
        for step in (4, 5, 6):
            lane.exchange(lane.in_memory(step))
        lane.lane.settimeout(0.2)
        message = in_a_packet(live, 7).SerializeToString()
        with pytest.raises(OSError):
            while True:
                lane.lane.send(message)  # whose reply is a replay
        assert live.wire.get(live.id).applied_step == 7
    until(lambda: not live.wire.get(live.id).attached)


CLIENT = """
import socket, sys
lane = socket.socket(fileno=int(sys.argv[1]))
lane.setblocking(True)
for line in sys.stdin:
    if line.startswith("recv"):
        lane.recv(1 << 18)
    else:
        lane.send(bytes.fromhex(line))
    print(flush=True)
"""


class OtherProcess:
    """A process that has the client's end of a lane, alone, and does what it is told. A context manager."""

    def __init__(self, lane: LaneStream) -> None:
        arguments = [sys.executable, "-I", "-S", "-c", CLIENT, str(lane.lane.fileno())]
        self.process = subprocess.Popen(
            arguments,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[lane.lane.fileno()],
            text=True,
        )
        lane.lane.close()

    def ask(self, line: str) -> None:
        assert self.process.stdin is not None
        print(line, file=self.process.stdin, flush=True)

    def do(self, line: str) -> None:
        self.ask(line)
        assert self.process.stdout is not None and self.process.stdout.readline() == "\n"

    def __enter__(self) -> OtherProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.mark.parametrize("messages", [0, 1, 2])
def test_a_client_killed_at_any_message_loses_and_repeats_no_step(
    live: Any, until: Any, make_live: Any, messages: int
) -> None:
    twin = twin_of(live, make_live)
    with LaneStream(live) as lane:
        for step in (4, 5, 6):
            lane.exchange(lane.in_memory(step))
            twin.step(step)
        with OtherProcess(lane) as client:
            for line in [lane.in_memory(7).SerializeToString().hex(), "recv"][:messages]:
                client.do(line)
            until(lambda: live.wire.get(live.id).applied_step == 6 + (messages > 0))
        assert live.wire.get(live.id).attached
    until(lambda: not live.wire.get(live.id).attached)
    for each in (live, twin):
        each.step(7)
    assert live.wire.pull(live.id, *SLOTS) == twin.wire.pull(twin.id, *SLOTS)


def test_a_client_that_is_stopped_keeps_no_other_lane_waiting(
    wire: Any, make_config: Any, make_live: Any, server: Server, live: Any, lane_steps: Any
) -> None:
    other = made(wire, make_config, make_live, server)
    with LaneStream(live) as stopped, LaneStream(other) as busy:
        for step in (4, 5, 6):
            stopped.exchange(stopped.in_memory(step))
            busy.exchange(busy.in_memory(step))
        before, steps = lane_steps(), range(7, 40)
        with OtherProcess(stopped) as client:
            client.do(stopped.in_memory(7).SerializeToString().hex())
            client.process.send_signal(signal.SIGSTOP)
            client.ask("recv")
            for step in steps:
                busy.exchange(busy.in_memory(step))
            client.process.send_signal(signal.SIGCONT)
            assert client.process.stdout is not None and client.process.stdout.readline() == "\n"
        assert live.wire.get(live.id).applied_step == 7
        assert lane_steps() - before >= len(steps) // 2


def test_many_sessions_have_one_thread(
    wire: Any, make_config: Any, make_live: Any, server: Server, live: Any, lane_steps: Any
) -> None:
    def loops() -> int:
        return sum(thread.name == "compiled-lanes" for thread in threading.enumerate())

    before, threads, steps = lane_steps(), loops(), range(4, 24)
    with contextlib.ExitStack() as stack:
        many = [made(wire, make_config, make_live, server) for _ in range(12)]
        lanes = [stack.enter_context(LaneStream(each)) for each in many]
        for step in steps:
            for lane in lanes:
                lane.lane.send(lane.in_memory(step).SerializeToString())
            for lane in lanes:
                assert pb.AttachResponse.FromString(lane.lane.recv(1 << 18)).result.step == step
        assert loops() == threads
        assert len({lane.parameters() for lane in lanes}) == 1
    assert lane_steps() - before >= len(many) * (len(steps) // 2)


def test_a_drain_ends_all_grants(wire: Any, make_config: Any, make_live: Any, refusal: Any) -> None:
    with Server(ServerConfig(bind="127.0.0.1:0", device="cpu", sweep_seconds=3600.0, drain_seconds=5.0)) as own:
        own.lanes.after_steps = own.lanes.steps_alike = 1
        with wire.__class__(own.target) as channel:
            session = made(channel, make_config, make_live, own)
            with LaneStream(session) as lane:
                for step in (4, 5, 6):
                    lane.exchange(lane.in_memory(step))
                assert own.drain()
                refusal(lambda: lane_step(lane, 7), "UNAVAILABLE", "SHUTTING_DOWN")
            assert channel.get(session.id).applied_step == 6
            assert own.lanes.statistics().granted == 0


def test_a_drain_ends_a_hundred_grants_in_its_time(wire: Any, make_config: Any, make_live: Any) -> None:
    with (
        Server(ServerConfig(bind="127.0.0.1:0", device="cpu", sweep_seconds=3600.0, drain_seconds=30.0)) as own,
        wire.__class__(own.target) as channel,
        contextlib.ExitStack() as stack,
    ):
        own.lanes.after_steps = own.lanes.steps_alike = 1
        lanes = []
        for _ in range(LANES):
            session = make_live(channel, channel.create(own_config(make_config)))
            lane = stack.enter_context(LaneStream(session))
            lanes.append(lane)
            for step in (1, 2, 3):
                lane.exchange(lane.in_memory(step))
            until_granted(own, len(lanes), functools.partial(lane.exchange, lane.in_memory(3)))
        assert own.drain()
        assert own.lanes.statistics().granted == 0
        for lane in lanes:
            with contextlib.suppress(OSError):
                lane.lane.send(lane.in_memory(4).SerializeToString())
            assert lane.has_ended()
            assert channel.get(lane.live.id).applied_step == 3


def test_a_server_that_is_told_to_has_no_lanes(wire: Any, make_config: Any, make_live: Any) -> None:
    config = ServerConfig(bind="127.0.0.1:0", device="cpu", sweep_seconds=3600.0, compiled_lanes=False)
    with Server(config) as own, wire.__class__(own.target) as channel:
        own.lanes.after_steps = own.lanes.steps_alike = 1
        session = made(channel, make_config, make_live, own)
        with LaneStream(session) as lane:
            for step in range(4, 10):
                assert lane.exchange(lane.in_memory(step)).result.step == step
        assert own.lanes.statistics().steps == 0
