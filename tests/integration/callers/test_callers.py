"""Several callers of one session, whatever each of them does after whatever fails: each step once, or not at all.

Hypothesis makes the sequences: steps, repetitions, loads, pulls, attaches and take-overs of two clients and of a caller
of unary steps; with messages lost at any place of a call, and messages that reach the server late. See `run`.

The number of examples comes from `STEPWIRE_CALLERS_EXAMPLES`; `make callers` sets it. A short run, as CI has, tries the
same examples each time.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import stepwire
from tests.integration.callers.line import CHUNK_BYTES, Clock, Fault, Line, LineServer, connected
from tests.integration.callers.run import CALL, Operation, Run

EXAMPLES = int(os.environ.get("STEPWIRE_CALLERS_EXAMPLES", "60" if "CI" in os.environ else "20"))
PARTS = -(-EXAMPLES // 2000)
"""The examples of a long run are dealt to so many tests, since hypothesis remembers what a test has tried."""
KINDS = ("step", "step", "overlapped", "pair", "again", "again", "load", "pull", "attach", "take over", "detach")
DEAD = st.sampled_from([True, True, False])
FAULTS = st.one_of(
    st.just(Fault()),
    st.builds(Fault, st.integers(0, 8), st.just(False), st.just(0), DEAD),
    st.builds(Fault, st.sampled_from([0, 1, 1, 1, 2]), st.just(True), st.sampled_from([0, 1, 2, 9, 9]), DEAD),
)
SHARDS = st.sampled_from([None, 0, 1])
CLIENTS = st.sampled_from([0, 0, 0, 1])
BY_CLIENTS = st.builds(Operation, CLIENTS, st.sampled_from(KINDS), FAULTS, SHARDS)
DELIVERIES = st.builds(Operation, CLIENTS, st.just("deliver"))
BY_CALLS = st.builds(Operation, st.just(CALL), st.sampled_from(["call", "call", "call load", "deliver"]), FAULTS)


def scene(caller: int, first: str, fault: Fault, between: tuple[int, str], last: str) -> list[Operation]:
    """Return a call whose messages are late, what happens before they arrive, and what follows."""
    if caller == CALL:
        return [
            Operation(CALL, "call", fault._replace(after=1)),
            Operation(CALL, "call load"),
            Operation(CALL, "deliver"),
        ]
    return [
        Operation(caller, "attach"),
        Operation(caller, first, fault),
        Operation(*between),
        Operation(caller, "deliver"),
        Operation(caller, last),
    ]


SCENES = st.builds(
    scene,
    st.sampled_from([0, 0, 1, CALL]),
    st.sampled_from(["step", "overlapped", "load", "pair"]),
    st.builds(Fault, st.just(0), st.just(True), st.sampled_from([1, 2, 9]), DEAD),
    st.tuples(CLIENTS, st.sampled_from(["attach", "take over", "load", "step"])),
    st.sampled_from(["again", "step", "pull"]),
)
SINGLE = st.one_of(BY_CLIENTS, BY_CLIENTS, BY_CLIENTS, DELIVERIES, BY_CALLS).map(lambda operation: [operation])
SEQUENCES = st.lists(st.one_of(SINGLE, SINGLE, SINGLE, SCENES), min_size=2, max_size=10).map(
    lambda scenes: list(itertools.chain(*scenes))
)

LOST = Operation(0, "step", Fault(4, dead=True))
"""The reply of a first step is lost, after two messages of its attach and two of its gradient."""
REPLACED = [LOST, Operation(0, "load", Fault(6, dead=True)), Operation(0, "again")]
"""A load whose reply is lost replaces a step whose reply is lost: its repetition acts on what was loaded."""
HIDDEN = [LOST, Operation(1, "step"), Operation(0, "take over"), Operation(0, "again")]
"""Another client's step hides whether the first one was applied."""

LATE_CALL = [Operation(CALL, "call", Fault(1, late=True, arrives=9)), Operation(CALL, "call load")]
LATE_CALL += [Operation(CALL, "deliver"), Operation(CALL, "call")]
"""A unary step is for the state that a load of the same hold has replaced."""

HALF = [Operation(0, "overlapped", Fault(4, dead=True)), Operation(1, "overlapped"), Operation(0, "take over")]
HALF += [Operation(0, "again"), Operation(1, "take over"), Operation(1, "overlapped")]
"""A step is half applied, and another client has the next gradient, whose element lies in the first half too."""

MODES: dict[str, tuple[int, int, dict[str, Any]]] = {
    "one": (1, 2 * CHUNK_BYTES, {"non_finite": "allow"}),
    "shards": (2, CHUNK_BYTES, {"non_finite": "allow"}),
    "two phases": (2, CHUNK_BYTES, {"clip_grad_norm": 1e9}),
}
"""The shards of a model, the bytes of a reply in one message, and the options of its session."""


@pytest.fixture(scope="module", params=MODES)
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def callers(mode: str) -> Iterator[tuple[LineServer, list[tuple[stepwire.Client, list[Line]]]]]:
    """A server, and two clients of it."""
    clock, (shards, whole_bytes, _) = Clock(), MODES[mode]
    with contextlib.ExitStack() as exits:
        server = exits.enter_context(contextlib.closing(LineServer(clock, whole_bytes)))
        yield server, [exits.enter_context(connected(server, clock, shards)) for _ in range(2)]


@pytest.mark.parametrize("part", range(PARTS))
@example(operations=REPLACED)
@example(operations=HIDDEN)
@example(operations=LATE_CALL)
@example(operations=HALF)
@given(operations=SEQUENCES)
@settings(
    max_examples=-(-EXAMPLES // PARTS),
    derandomize=PARTS == 1,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_an_acknowledged_step_has_been_applied_once(
    callers: Any, mode: str, part: int, operations: list[Operation]
) -> None:
    shards, _, options = MODES[mode]
    run = Run(*callers, options)
    try:
        for operation in operations:
            if operation.caller == CALL and shards > 1:  # a caller by hand knows one session
                continue
            if operation.kind == "overlapped" and mode == "two phases":
                continue
            run.do(operation)
        run.finish()
    finally:
        run.close()
