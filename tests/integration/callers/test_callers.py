"""Several callers of one session, whatever each of them does after whatever fails: each step once, or not at all.

Hypothesis makes the sequences: steps, repetitions, loads, attaches and take-overs of two clients, with replies lost,
messages never sent, and messages that reach the server late. Each gradient moves one element of every shard, so the
parameters tell how often it was applied. An element that no gradient moves tells the load. The model has two rules:

- An acknowledged step has been applied once, to all shards, and stays applied until a load replaces it.
- A step whose call failed has been applied once or not at all. After the next acknowledged call it is settled.

The number of examples comes from `STEPWIRE_CALLERS_EXAMPLES`; `make callers` sets it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import stepwire
from stepwire.connection.channel import Calls
from stepwire.errors import DeadlineExceededError, StepwireError
from stepwire.links.hold import Hold
from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire.v1 import step_pb2
from stepwire_server.testing import serving
from tests.support.raw import RawClient, Refused

EXAMPLES = int(os.environ.get("STEPWIRE_CALLERS_EXAMPLES", "8"))
SHARD = 70_000
"""Elements of a shard; a model of two of them is cut in the middle."""

FAULTS = ("none", "none", "none", "lost", "lost", "unsent", "late")
KINDS = ("step", "step", "step", "again", "load", "attach", "take over", "detach", "deliver")


class Operation(NamedTuple):
    """The operation of one caller.

    Attributes:
        caller: 0 or 1.
        kind: the call; "deliver" lets the oldest late message of the caller reach the server.
        fault: what happens to the messages of the call.
        shard: the shard that the fault hits; None for all.
    """

    caller: int
    kind: str
    fault: str
    shard: int | None


OPERATIONS = st.builds(
    Operation,
    st.sampled_from([0, 0, 0, 1]),
    st.sampled_from(KINDS),
    st.sampled_from(FAULTS),
    st.sampled_from([None, 0, 1]),
)


class Shard:
    """The knowledge of the model about one shard.

    Attributes:
        base: the value of the last load that is known.
        applied: the gradients that are applied.
        pending: gradients whose calls failed, and that may be applied yet.
        loads: the values of loads that failed, and that may be committed yet.
    """

    def __init__(self) -> None:
        """Start as created."""
        self.base = 0
        self.applied: set[int] = set()
        self.pending: set[int] = set()
        self.loads: set[int] = set()

    def observe(self, values: Any) -> None:
        """Compare with the parameters of the shard."""
        base = int(values[-1])
        if base != self.base:
            assert base in self.loads, f"{base} was loaded, and {self.base} was known"
            self.base, self.applied, self.pending = base, set(), set()
            self.loads.discard(base)
        counts = base - values[:-1]
        (moved,) = np.nonzero(counts)
        assert set(counts[moved].tolist()) <= {1.0}, "a gradient was applied twice"
        applied = set(moved.tolist())
        assert self.applied <= applied, f"{self.applied - applied} were applied, and are not any more"
        assert applied <= self.applied | self.pending, f"{applied - self.applied} cannot have been applied"
        self.applied = applied

    def settle(self) -> None:
        """Note that nothing that was sent before can change the shard any more."""
        self.pending, self.loads = set(), set()


class Run:
    """One sequence against a session of its own."""

    def __init__(self, clients: list[stepwire.Client], raw: RawClient, shards: int) -> None:
        """Create the session, and find it as the second caller."""
        self.size = shards * SHARD
        options: Any = {"optimizer": stepwire.SGD(lr=1.0), "non_finite": "allow"}
        first = clients[0].create_session({"w": np.zeros(self.size, np.float32)}, **options)
        self.sessions = [first, clients[1].session(first.session_id)]
        self.ids = first.session_id.split(",")
        assert len(self.ids) == shards
        self.shards = [Shard() for _ in self.ids]
        sizes = [sum(size for (size,) in each.shapes.values()) for each in first.shards]
        self.starts = np.cumsum([0, *sizes[:-1]])
        self.failed: list[int | None] = [None, None]
        self.late: list[list[pb.StepRequest]] = [[], []]
        self.raw = raw
        self.numbers = iter(range(10_000))

    def do(self, operation: Operation) -> None:
        """Carry an operation out, and compare."""
        session, caller = self.sessions[operation.caller], operation.caller
        if operation.kind == "step":
            self.step(operation, next(self.numbers))
        elif operation.kind == "again":
            if (number := self.failed[caller]) is not None:
                self.step(operation, number)
        elif operation.kind == "load":
            self.load(operation, 1000 * (next(self.numbers) + 1))
        elif operation.kind == "deliver":
            if self.late[caller]:
                with contextlib.suppress(Refused):
                    self.raw.call("Step", self.late[caller].pop(0))
        elif operation.kind == "detach":
            session.detach()
        else:
            self.acknowledge(lambda: session.attach(take_over=operation.kind == "take over"))
        self.observe()

    def step(self, operation: Operation, number: int) -> None:
        """Step with the gradient of a number."""
        gradient = np.zeros(self.size, np.float32)
        gradient[self.starts + number] = 1.0
        for shard in self.shards:
            shard.pending.add(number)
        replies: list[Any] = []
        with self.faulty_steps(operation):
            done = self.acknowledge(lambda: replies.append(self.sessions[operation.caller].step({"w": gradient})))
        self.failed[operation.caller] = None if done else number
        if done:
            for shard, values in zip(self.shards, np.split(replies[0]["w"], self.starts[1:]), strict=True):
                assert number in shard.applied, "an acknowledged step was not applied"
                assert set(np.nonzero(shard.base - values[:-1])[0].tolist()) == shard.applied

    def load(self, operation: Operation, value: int) -> None:
        """Load one value into all elements."""
        for shard in self.shards:
            shard.loads.add(value)
        parameters = {"w": np.full(self.size, value, np.float32)}
        with self.faulty_loads(operation):
            if self.acknowledge(lambda: self.sessions[operation.caller].load(parameters)):
                assert [shard.base for shard in self.shards] == [value] * len(self.shards)
                assert all(not shard.applied for shard in self.shards), "a step of the past was applied to a load"
                self.failed[operation.caller] = None

    def acknowledge(self, call: Callable[[], object]) -> bool:
        """Make a call; an acknowledged one settles everything that was sent before it."""
        try:
            call()
        except StepwireError:
            return False
        self.observe()
        for shard in self.shards:
            shard.settle()
        return True

    def observe(self) -> None:
        """Compare all shards."""
        for link, shard in zip(self.sessions[0].shards, self.shards, strict=True):
            (values,) = link.pull().values()  # type: ignore[union-attr]
            shard.observe(values)

    def finish(self) -> None:
        """Let each caller send its next batch; whatever came before, one that acquires the worker and loads goes on."""
        for caller in (0, 1):
            self.do(Operation(caller, "step", "none", None))
        for caller in (0, 1):
            session = self.sessions[caller]
            session.attach(take_over=True)
            self.do(Operation(caller, "load", "none", None))
            for _ in range(2):
                self.do(Operation(caller, "step", "none", None))
                assert self.failed[caller] is None

    @contextlib.contextmanager
    def faulty_steps(self, operation: Operation) -> Iterator[None]:
        """Let the messages of the steps in a block meet a fault."""
        exchange, late = Hold._exchange, self.late[operation.caller]

        def meet(hold: Hold, stream: Any, call: Any, deadline: Any) -> Any:
            if not self.hits(operation, hold._session_id):
                return exchange(hold, stream, call, deadline)
            if operation.fault == "lost":
                exchange(hold, stream, call, deadline)
            elif operation.fault == "late":
                hold.check(call.begin.step, sent=call.sent)
                begin = step_pb2.StepBegin(step=call.begin.step, epoch=hold.epoch, load=hold.applied_load)
                payload = b"".join(each.tobytes() for each in call.gradients)
                late.append(
                    pb.StepRequest(session_id=hold._session_id, attach_token=hold.token, begin=begin, payload=payload)
                )
            raise DeadlineExceededError("the call met its fault")

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(Hold, "_exchange", meet)
            yield

    @contextlib.contextmanager
    def faulty_loads(self, operation: Operation) -> Iterator[None]:
        """Let the messages of the loads in a block meet a fault."""
        upload = Calls.upload

        def meet(calls: Calls, method: str, frames: Any, response: Any, deadline: Any) -> Any:
            messages = list(frames)
            if not self.hits(operation, pb.LoadRequest.FromString(messages[0]).open.session_id):
                return upload(calls, method, messages, response, deadline)
            if operation.fault == "lost":
                upload(calls, method, messages, response, deadline)
            raise DeadlineExceededError("the call met its fault")

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(Calls, "upload", meet)
            yield

    def hits(self, operation: Operation, session_id: str) -> bool:
        """Tell whether the fault of an operation hits a shard."""
        if operation.fault == "none":
            return False
        return operation.shard is None or operation.shard % len(self.ids) == self.ids.index(session_id)


@pytest.fixture(scope="module", params=[1, 2])
def shards(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(scope="module")
def callers(shards: int) -> Iterator[tuple[list[stepwire.Client], RawClient]]:
    """Two clients, and a raw one, of one server."""
    with contextlib.ExitStack() as exits:
        target = exits.enter_context(serving(threads=1, max_chunk_bytes=1 << 20))
        raw = exits.enter_context(RawClient(target))
        made = [stepwire.connect(target, channels=shards, transport="tcp", timeout=30.0) for _ in range(2)]
        yield [exits.enter_context(client) for client in made], raw


REPLACED = [Operation(0, "step", "lost", None), Operation(0, "load", "lost", None), Operation(0, "again", "none", None)]
"""A load whose reply is lost replaces a step whose reply is lost: its repetition acts on what was loaded."""


@example(operations=REPLACED)
@given(operations=st.lists(OPERATIONS, min_size=3, max_size=14))
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_an_acknowledged_step_has_been_applied_once(
    callers: tuple[list[stepwire.Client], RawClient], shards: int, operations: list[Operation]
) -> None:
    run = Run(*callers, shards)
    try:
        for operation in operations:
            run.do(operation)
        run.finish()
    finally:
        run.sessions[0].close()
