"""One sequence of operations of several callers on a session, and what the parameters must be after each of them.

Each gradient moves one element of every shard by one, so the parameters tell how often it was applied. An element that
no gradient moves tells the load. The model has two rules:

- An acknowledged step has been applied once, to all shards, and stays applied until a load replaces it.
- A step whose call failed has been applied once or not at all. After the next acknowledged call it is settled.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, wait
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

import stepwire
from stepwire.errors import StepwireError
from stepwire.v1 import attach_pb2, state_pb2, step_pb2, tensor_pb2
from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire.wire.frames import read_frame
from tests.integration.callers.line import CHUNK_BYTES, Fault, Line, LineServer, Status

__all__ = ["CALL", "Operation", "Run"]

SHARD = 1280
"""Elements of a shard: a gradient of two messages."""
CALL = 2
"""The caller that steps by unary calls, as a client in another language may."""


class Operation(NamedTuple):
    """The operation of one caller.

    Attributes:
        caller: 0 or 1, clients of this package; or `CALL`.
        kind: the call; "deliver" lets the oldest late messages of the caller reach the server.
        fault: what the lines do meanwhile.
        shard: the shard whose line has the fault; None for all.
    """

    caller: int
    kind: str
    fault: Fault = Fault()
    shard: int | None = None


class Gradient(NamedTuple):
    """The number of a gradient, and whether it is sent with overlap."""

    number: int
    overlap: bool = False


class Shard:
    """The knowledge of the model about one shard.

    Attributes:
        base: the value of the last load that is known.
        applied: the gradients that are applied.
        pending: gradients whose calls failed, and that may be applied yet.
        loads: the values of loads that failed, and that may be committed yet.
    """

    def __init__(self, session: Any) -> None:
        """Know a session of the server as it was created."""
        self._session = session
        self.base = 0
        self.applied: set[int] = set()
        self.pending: set[int] = set()
        self.loads: set[int] = set()

    @property
    def is_whole(self) -> bool:
        """Tell whether no step is half applied."""
        return not self._session.unfinished_step

    def observe(self) -> None:
        """Compare with the parameters of the shard."""
        if self.is_whole:
            values = np.empty(SHARD, np.float32)
            self._session.exchange.read(self._session.exchange.snapshot(), "param", 0, values)
            self._compare(values)

    def settle(self) -> None:
        """Note that nothing that was sent before can change the shard any more, but for a step that is half applied."""
        if self.is_whole:
            self.pending, self.loads = set(), set()

    def _compare(self, values: npt.NDArray[np.float32]) -> None:
        base = int(values[-1])
        if base != self.base:
            assert base in self.loads, f"{base} was loaded, and {self.base} was known"
            self.base, self.applied, self.pending = base, set(), set()
            self.loads.discard(base)
        applied = applied_to(values)
        assert self.applied <= applied, f"{self.applied - applied} were applied, and are not any more"
        assert applied <= self.applied | self.pending, f"{applied - self.applied} cannot have been applied"
        self.applied = applied


def applied_to(values: npt.NDArray[np.float32]) -> set[int]:
    """Return the numbers of the gradients that were applied since the last load."""
    counts = values[-1] - values[:-1]
    (moved,) = np.nonzero(counts)
    assert set(counts[moved].tolist()) <= {1.0}, "a gradient was applied twice"
    return set(moved.tolist())


def one_hot(number: int) -> npt.NDArray[np.float32]:
    """Return the gradient of a number."""
    gradient = np.zeros(SHARD, np.float32)
    gradient[number] = 1.0
    return gradient


class Run:
    """One sequence, against a session of its own."""

    def __init__(
        self, server: LineServer, clients: Sequence[tuple[stepwire.Client, list[Line]]], options: dict[str, Any]
    ) -> None:
        """Create the session, and find it as the second caller."""
        self.lines = [lines for _, lines in clients]
        self.names = [f"w{index}" for index in range(len(self.lines[0]))]
        zeros = {name: np.zeros(SHARD, np.float32) for name in self.names}
        first = clients[0][0].create_session(zeros, optimizer=stepwire.SGD(lr=1.0), **options)
        ids = first.session_id.split(",")
        assert len(ids) == len(self.names)
        self.sessions = [first, clients[1][0].session(first.session_id)]
        self.shards = [Shard(server.registry.get(each)) for each in ids]
        self.failed: list[Gradient | None] = [None, None]
        self.numbers = (number * 97 % (SHARD - 1) for number in itertools.count())  # over both messages
        self.values = itertools.count(1000, 1000)
        self.direct = Line(server)
        self.lines.append([self.direct])
        self.calls = UnaryCaller(self.direct, ids[0])

    def do(self, operation: Operation) -> None:
        """Carry an operation out, and compare."""
        self._arm(operation)
        getattr(self, operation.kind.replace(" ", "_"))(operation.caller)
        self._arm(None)
        self.observe()

    # --- operations ---------------------------------------------------------------------------------------

    def step(self, caller: int) -> None:
        """Step with the next gradient."""
        self._step(caller, Gradient(next(self.numbers)))

    def overlapped(self, caller: int) -> None:
        """Step with the next gradient, part by part."""
        self._step(caller, Gradient(next(self.numbers), overlap=True))

    def again(self, caller: int) -> None:
        """Repeat the gradient that failed."""
        if (gradient := self.failed[caller]) is not None:
            self._step(caller, gradient)

    def pair(self, caller: int) -> None:
        """Step with two gradients in the background: a failure of the first cancels the second."""
        pair = [Gradient(next(self.numbers)) for _ in range(2)]
        for gradient in pair:
            self._expect(gradient)
        futures = [self.sessions[caller].step_async(self._arrays(gradient)) for gradient in pair]
        wait(futures)
        self.observe()
        self.failed[caller] = None
        for gradient, future in zip(pair, futures, strict=True):
            try:
                reply = future.result()
            except CancelledError:
                assert all(gradient.number not in shard.applied for shard in self.shards), (
                    "a cancelled step was applied"
                )
            except StepwireError:
                self.failed[caller] = self.failed[caller] or gradient
                self._expect(gradient)
            else:
                self._settle()
                self._check_reply(gradient, reply, exact=gradient is pair[1])

    def load(self, caller: int) -> None:
        """Load one value into all elements."""
        value = next(self.values)
        for shard in self.shards:
            shard.loads.add(value)
        parameters = {name: np.full(SHARD, value, np.float32) for name in self.names}
        if self._acknowledged(lambda: self.sessions[caller].load(parameters)):
            assert [shard.base for shard in self.shards] == [value] * len(self.shards)
            assert all(not shard.applied for shard in self.shards), "a step of the past was applied to a load"
            self.failed[caller] = None

    def pull(self, caller: int) -> None:
        """Read the parameters."""
        if not all(shard.is_whole for shard in self.shards):
            return
        try:
            pulled: Any = self.sessions[caller].pull()
        except StepwireError:
            return
        self.observe()
        for name, shard in zip(self.names, self.shards, strict=True):
            assert applied_to(pulled[name]) == shard.applied
        self.failed[caller] = None  # whoever knows the state may repeat a gradient knowingly

    def attach(self, caller: int) -> None:
        """Attach with the own token; streams that were attached already tell nothing new."""
        session = self.sessions[caller]
        opened = session.statistics().streams_opened
        try:
            session.attach()
        except StepwireError:
            return
        if session.statistics().streams_opened >= opened + len(self.shards):
            self._settle()

    def take_over(self, caller: int) -> None:
        """Attach, and acquire the worker if another caller holds it."""
        self._acknowledged(lambda: self.sessions[caller].attach(take_over=True))

    def detach(self, caller: int) -> None:
        """Close the stream."""
        self.sessions[caller].detach()

    def deliver(self, caller: int) -> None:
        """Let late messages of the caller reach the server."""
        for line in self.lines[caller]:
            if line.deliver():
                return

    def call(self, caller: int) -> None:
        """Attach by hand, and step with the next gradient in one call."""
        gradient = Gradient(next(self.numbers))

        def attached() -> None:
            self._settle()
            self._expect(gradient)

        try:
            reply = self.calls.step(one_hot(gradient.number), attached)
        except Status:
            return
        self._settle()
        self._check_reply(gradient, {self.names[0]: reply})

    def call_load(self, caller: int) -> None:
        """Load one value into all elements by hand, with the token of the call before."""
        value = next(self.values)
        for shard in self.shards:
            shard.loads.add(value)
        try:
            self.calls.load(np.full(SHARD, value, np.float32))
        except Status:
            return
        self._settle()
        assert [(shard.base, shard.applied) for shard in self.shards] == [(value, set())]

    # --- the end ------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Let each caller send its next batch; whatever came before, one that acquires the worker and loads goes on."""
        for caller in (0, 1):
            self.do(Operation(caller, "step"))
        for caller in (0, 1):
            self.sessions[caller].attach(take_over=True)
            self.do(Operation(caller, "load"))
            for _ in range(2):
                self.do(Operation(caller, "step"))
                assert self.failed[caller] is None
        while any(line.deliver() for lines in self.lines for line in lines):
            self.observe()

    def close(self) -> None:
        """End the session and drop what is late."""
        self._arm(None)
        self.sessions[0].close()
        self.sessions[1].detach()
        for lines in self.lines:
            for line in lines:
                line.close()

    # --- the model ----------------------------------------------------------------------------------------

    def observe(self) -> None:
        """Compare all shards."""
        for shard in self.shards:
            shard.observe()

    def _settle(self) -> None:
        """Compare all shards after a call that was acknowledged: it settles everything that was sent before it."""
        self.observe()
        for shard in self.shards:
            shard.settle()

    def _acknowledged(self, call: Callable[[], object]) -> bool:
        """Make a call; an acknowledged one settles everything that was sent before it."""
        try:
            call()
        except StepwireError:
            return False
        self._settle()
        return True

    def _expect(self, gradient: Gradient) -> None:
        for shard in self.shards:
            shard.pending.add(gradient.number)

    def _arrays(self, gradient: Gradient) -> dict[str, Any]:
        return {name: one_hot(gradient.number) for name in self.names}

    def _step(self, caller: int, gradient: Gradient) -> None:
        self._expect(gradient)
        replies: list[Any] = []
        step, options = self.sessions[caller].step, {"overlap": True} if gradient.overlap else {}
        done = self._acknowledged(lambda: replies.append(step(self._arrays(gradient), **options)))
        self.failed[caller] = None if done else gradient
        if done:
            self._check_reply(gradient, replies[0])

    def _check_reply(self, gradient: Gradient, reply: Any, *, exact: bool = True) -> None:
        """Compare the reply of an acknowledged step."""
        for name, shard in zip(self.names, self.shards, strict=True):
            assert gradient.number in shard.applied, "an acknowledged step was not applied"
            assert gradient.number in applied_to(reply[name]), "the reply is that of another step"
            assert not exact or (applied_to(reply[name]), reply[name][-1]) == (shard.applied, shard.base)

    def _arm(self, operation: Operation | None) -> None:
        """Set the faults of the lines for an operation; None for none."""
        for lines in self.lines:
            for line in lines:
                line.arm(Fault())
        if operation is not None:
            lines = self.lines[operation.caller]
            for rank, line in enumerate(lines):
                if operation.shard is None or operation.shard % len(lines) == rank:
                    line.arm(operation.fault)


class UnaryCaller:
    """A caller that attaches, drops the stream, and steps in one call, as `docs/protocol.md` says."""

    def __init__(self, line: Line, session_id: str) -> None:
        """Step a session over a line."""
        self._line = line
        self._session_id = session_id
        self._token = self._applied_load = 0
        self._load_in_doubt = False

    def load(self, values: npt.NDArray[np.float32]) -> None:
        """Load parameters; after a load that failed, an attach tells whether it was committed.

        Raises:
            Status: the server refused, or the connection broke.
        """
        if self._load_in_doubt:
            self._learn(self._attach(self._token))
        opening = state_pb2.LoadOpen(
            session_id=self._session_id, attach_token=self._token, load=self._applied_load + 1, slots=["param"]
        )
        messages = [pb.LoadRequest(open=opening)]
        for start in range(0, SHARD, CHUNK_BYTES // 4):
            part = values[start : start + CHUNK_BYTES // 4]
            chunk = tensor_pb2.Chunk(offset=start, count=len(part))
            messages.append(pb.LoadRequest(slot="param", chunk=chunk, payload=part.tobytes()))
        messages[-1].commit = True
        self._load_in_doubt = True
        self._line.stream_unary("/stepwire.v1.OptimizerService/Load")([each.SerializeToString() for each in messages])
        self._load_in_doubt = False
        self._applied_load += 1

    def step(self, gradient: npt.NDArray[np.float32], attached: Callable[[], None]) -> npt.NDArray[np.float32]:
        """Step with a new gradient, and return the parameters; `attached` is called before it is sent.

        Raises:
            Status: the server refused, or the connection broke.
        """
        try:
            opened = self._attach(self._token)
        except Status as status:
            if status.code().name != "FAILED_PRECONDITION":
                raise
            opened = self._attach(0)
        self._learn(opened)
        attached()
        begin = step_pb2.StepBegin(step=opened.applied_step + 1, epoch=opened.epoch, load=opened.applied_load)
        request = pb.StepRequest(
            session_id=self._session_id, attach_token=self._token, begin=begin, payload=gradient.tobytes()
        )
        reply = self._line.unary_unary("/stepwire.v1.OptimizerService/Step")(request.SerializeToString())
        return read_frame(pb.StepResponse, reply).payload.view(np.float32)

    def _learn(self, opened: attach_pb2.AttachOpened) -> None:
        self._token, self._applied_load, self._load_in_doubt = opened.attach_token, opened.applied_load, False

    def _attach(self, token: int) -> attach_pb2.AttachOpened:
        request = pb.AttachRequest(open=attach_pb2.AttachOpen(session_id=self._session_id, attach_token=token))
        stream = self._line.stream_stream("/stepwire.v1.OptimizerService/Attach")(iter([request.SerializeToString()]))
        try:
            opened: attach_pb2.AttachOpened = pb.AttachResponse.FromString(next(stream)).opened
            return opened
        finally:
            stream.cancel()
