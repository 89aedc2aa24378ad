"""Loads and pulls that lie (facts: attacks 4, 5, 9, 18). A load that is refused has loaded nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from stepwire.v1 import optimizer_pb2, session_pb2, step_pb2, tensor_pb2
from stepwire.v1 import optimizer_service_pb2 as pb

pytestmark = pytest.mark.many

CHUNK_BYTES = 64 << 10
LAST = 2**64 - 1
COMMIT = pb.LoadRequest(commit=True)

Load = Callable[[Any], list[pb.LoadRequest]]


def ones(count: int) -> Any:
    return np.ones(count, np.float32)


@pytest.mark.parametrize(
    ("load", "reason"),
    [(0, "STEP_SUPERSEDED"), (3, "STEP_MISMATCH"), (2**53, "STEP_MISMATCH"), (LAST, "STEP_MISMATCH")],
)
def test_a_load_that_is_neither_next_nor_last_is_refused(live: Any, untouched: Any, load: int, reason: str) -> None:
    refused = untouched(
        lambda: live.load(live.load_opening(load), live.load_chunk(commit=True)),
        "ABORTED",
        reason,
        f"load {load} ",
        "the next load is 2",
    )
    assert refused.metadata == {"expected_load": "2", "actual_load": str(load)}


def test_a_replayed_load_changes_nothing(live: Any) -> None:
    before = live.fingerprint()
    answer = live.load(live.load_opening(1, "exp_avg", step=9, tensor_steps=[9, 9, 9]))
    assert (answer.replayed, answer.session.applied_load, answer.session.applied_step) == (True, 1, 1)
    assert live.fingerprint() == before


@pytest.mark.parametrize("step", [0])
def test_a_load_cannot_take_the_step_back(live: Any, untouched: Any, step: int) -> None:
    refused = untouched(
        lambda: live.load(live.load_opening(2, step=step), live.load_chunk(commit=True)),
        "ABORTED",
        "STEP_SUPERSEDED",
        f"open.step is {step} and the session is at step 1",
    )
    assert refused.metadata == {"field": "open.step", "expected_step": "1", "actual_step": str(step)}


OPENINGS: dict[str, tuple[dict[str, Any], str, str]] = {
    # what: (fields of the opening, field, text)
    "a step of 2^53": ({"step": 2**53}, "open.step", str(2**53)),
    "the last step there is": ({"step": LAST}, "open.step", str(LAST)),
    "a t of 2^53": ({"tensor_steps": [1, 2**53, 1]}, "open.tensor_steps", str(2**53)),
    "the last t there is": ({"tensor_steps": [LAST, 0, 0]}, "open.tensor_steps", str(LAST)),
    "too few ts": ({"tensor_steps": [1, 1]}, "open.tensor_steps", "2 entries; it must be 0 or 3"),
    "too many ts": ({"tensor_steps": [1] * 4}, "open.tensor_steps", "4 entries; it must be 0 or 3"),
    "scalars of a rule without": ({"tensor_scalars": [1.0] * 3}, "open.tensor_scalars", "adam_torch keeps no scalar"),
    "an unknown slot": ({"slots": ["param", "momentum"]}, "open.slots", "'momentum' is unknown"),
    "a slot twice": ({"slots": ["param", "param"]}, "open.slots", "'param' is named twice"),
    "a path": ({"slots": ["../param"]}, "open.slots", "'../param' is unknown"),
    "lines": ({"slots": ["par\nam"]}, "open.slots", r"'par\nam' is unknown"),
    "a long name": ({"slots": ["s" * 5000]}, "open.slots", f"'{'s' * 64}' is unknown"),
    "another rule's slot": ({"slots": ["max_exp_avg_sq"]}, "open.slots", "'max_exp_avg_sq' is unknown"),
    "a loss scale": ({"loss_scale": optimizer_pb2.LossScaleState(scale=1.0)}, "open.loss_scale", "no loss scaling"),
    "blocks' maxima of no blocks": ({"slots": ["exp_avg_scale"]}, "open.slots", "'exp_avg_scale' is unknown"),
    "int8": ({"dtype": tensor_pb2.DTYPE_INT8_BLOCKWISE}, "open.dtype", "encoding 4"),
    "encoding 99": ({"dtype": 99}, "open.dtype", "encoding 99"),
}


@pytest.mark.parametrize("what", OPENINGS)
def test_a_load_that_opens_wrong_is_refused_by_its_field(live: Any, untouched: Any, what: str) -> None:
    fields, field, text = OPENINGS[what]
    opening = live.load_opening(2, **fields)
    untouched(
        lambda: live.load(opening, live.load_chunk(commit=True)),
        "INVALID_ARGUMENT",
        "INVALID_CONFIG",
        text,
        field=field,
    )


SCALING = optimizer_pb2.GradientTreatment(loss_scaling=optimizer_pb2.LossScaling(initial_scale=4.0))


@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf"), float("nan")])
def test_a_loss_scale_out_of_range_is_refused_by_its_field(
    wire: Any, make_config: Any, make_live: Any, refusal: Any, scale: float
) -> None:
    live = make_live(wire, wire.create(make_config((3,), gradient=SCALING)))
    opening = live.load_opening(1, loss_scale=optimizer_pb2.LossScaleState(scale=scale))
    refusal(
        lambda: live.load(opening, live.load_chunk(commit=True)),
        "INVALID_ARGUMENT",
        "INVALID_CONFIG",
        repr(scale),
        field="open.loss_scale.scale",
    )
    assert wire.get(live.id).loss_scale == 4.0


def test_blocks_maxima_are_loaded_with_what_they_scale(
    wire: Any, make_config: Any, make_live: Any, refusal: Any
) -> None:
    config = make_config((5000,), state_precision=session_pb2.STATE_PRECISION_INT8_MOMENTS)
    live = make_live(wire, wire.create(config))
    opening = live.load_opening(1, "param", "exp_avg_scale")
    refusal(
        lambda: live.load(opening, live.load_chunk(), live.load_chunk("exp_avg_scale", commit=True)),
        "INVALID_ARGUMENT",
        "INVALID_CONFIG",
        "'exp_avg_scale' says how 'exp_avg' is held and is loaded with it; name both",
        field="open.slots",
    )


def test_a_load_of_nothing_is_refused(live: Any, untouched: Any) -> None:
    opening = live.load_opening(2)
    del opening.open.slots[:]
    untouched(lambda: live.load(opening, COMMIT), "INVALID_ARGUMENT", "INVALID_CONFIG", "no slot", field="open.slots")


def test_counters_just_below_the_end_still_count(live: Any) -> None:
    """The last step and the last t that may be loaded are 2^53 - 1; steps go on from there."""
    most = 2**53 - 1
    live.load(live.load_opening(2, step=most, tensor_steps=[most, 0, most]), live.load_chunk(commit=True))
    result = live.step(most + 1)
    assert (result.step, [group.t for group in result.telemetry.groups]) == (2**53, [2**53, 2**53])
    header, _ = live.wire.pull(live.id, "param")
    assert (header.step, list(header.tensor_steps)) == (2**53, [2**53, 1, 2**53])


CHUNKS: dict[str, tuple[Load, str, str, str]] = {
    # what: (messages after the opening of ("param", "exp_avg"), reason, field, text)
    "nothing": (lambda live: [COMMIT], "INVALID_TENSOR", "chunk", "elements [0, 17) were not sent"),
    "one slot of two": (
        lambda live: [live.load_chunk(), COMMIT],
        "INVALID_TENSOR",
        "chunk",
        "elements [0, 17) were not sent",
    ),
    "a gap": (
        lambda live: [live.load_chunk(), live.load_chunk("exp_avg", 0, ones(258)), COMMIT],
        "INVALID_TENSOR",
        "chunk",
        "elements [258, 263) were not sent",
    ),
    "an overlap": (
        lambda live: [live.load_chunk("param", 0, ones(9)), live.load_chunk("param", 8, ones(9))],
        "INVALID_TENSOR",
        "chunk",
        "chunk [8, 17) overlaps [0, 9)",
    ),
    "beyond the end": (
        lambda live: [live.load_chunk("param", 260, ones(4))],
        "INVALID_TENSOR",
        "chunk",
        "chunk [260, 264) is not a non-empty part",
    ),
    "round the corner": (
        lambda live: [live.load_chunk("param", LAST, ones(1))],
        "INVALID_TENSOR",
        "chunk",
        f"chunk [{LAST}, {2**64})",
    ),
    "no elements": (
        lambda live: [live.load_chunk("param", 0, ones(0))],
        "INVALID_TENSOR",
        "chunk",
        "chunk [0, 0) is not a non-empty part",
    ),
    "too few bytes": (
        lambda live: [live.load_chunk(payload=bytes(1051))],
        "INVALID_TENSOR",
        "chunk.count",
        "has 1051 bytes",
    ),
    "a count that wraps": (
        lambda live: [live.load_chunk(chunk=tensor_pb2.Chunk(count=2**62 + 1), payload=bytes(4))],
        "INVALID_TENSOR",
        "chunk.count",
        f"count is {2**62 + 1}",
    ),
    "a slot that was not announced": (
        lambda live: [live.load_chunk("exp_avg_sq")],
        "INVALID_CONFIG",
        "slot",
        "'exp_avg_sq' was not announced",
    ),
    "a slot that is not": (lambda live: [live.load_chunk("\x1b[2J")], "INVALID_CONFIG", "slot", r"'\x1b[2J' was not"),
    "no slot": (lambda live: [live.load_chunk("")], "INVALID_CONFIG", "slot", "'' was not announced"),
    "a payload alone": (
        lambda live: [pb.LoadRequest(slot="param", payload=b"1234")],
        "INVALID_FRAME",
        "chunk",
        "a payload of 4 bytes comes without `chunk`",
    ),
    "no commit": (
        lambda live: [live.load_chunk(), live.load_chunk("exp_avg")],
        "INVALID_FRAME",
        "commit",
        "the stream ended before `commit`; nothing was loaded",
    ),
    "open again": (
        lambda live: [live.load_chunk(), live.load_opening(2), live.load_chunk("exp_avg", commit=True)],
        "INVALID_FRAME",
        "open",
        "only the first message",
    ),
}


@pytest.mark.parametrize("what", CHUNKS)
def test_a_load_that_does_not_cover_its_slots_once_is_refused(live: Any, untouched: Any, what: str) -> None:
    messages, reason, field, text = CHUNKS[what]
    opening = live.load_opening(2, "param", "exp_avg")
    untouched(lambda: live.load(opening, *messages(live)), "INVALID_ARGUMENT", reason, text, field=field)


def test_a_load_of_rows_is_refused(live: Any, untouched: Any) -> None:
    message = live.load_chunk(commit=True)
    message.chunk.rows.append(3)
    untouched(
        lambda: live.load(live.load_opening(2), message),
        "INVALID_ARGUMENT",
        "INVALID_FRAME",
        "the load brings whole slots",
        field="chunk.rows",
    )


def test_a_chunk_of_more_bytes_than_a_message_may_hold_is_refused(
    wire: Any, make_config: Any, make_live: Any, refusal: Any
) -> None:
    live = make_live(wire, wire.create(make_config((40_000,))))
    refusal(
        lambda: live.load(live.load_opening(1), live.load_chunk("param", 0, ones(16_385))),
        "INVALID_ARGUMENT",
        "INVALID_FRAME",
        f"65540 bytes; a chunk holds at most {CHUNK_BYTES}",
        field="payload",
    )


@pytest.mark.parametrize("what", ["chunk", "payload", "commit"])
def test_an_opening_that_is_not_alone_is_refused(live: Any, untouched: Any, what: str) -> None:
    extra: dict[str, Any] = {"chunk": tensor_pb2.Chunk(count=1), "payload": b"1234", "commit": True}
    opening = pb.LoadRequest(open=live.load_opening(2).open, **{what: extra[what]})
    untouched(
        lambda: live.load(opening, live.load_chunk(commit=True)),
        "INVALID_ARGUMENT",
        "INVALID_FRAME",
        "`open` alone",
        field=what,
    )


@pytest.mark.parametrize("messages", [[], [COMMIT], [pb.LoadRequest()]], ids=["none", "commit", "empty"])
def test_a_load_that_does_not_open_is_refused(live: Any, untouched: Any, messages: list[pb.LoadRequest]) -> None:
    untouched(lambda: live.load(*messages), "INVALID_ARGUMENT", "INVALID_FRAME", "must carry `open`", field="open")


def test_bytes_that_are_no_message_are_refused_wherever_they_come(live: Any, untouched: Any) -> None:
    for call in (
        lambda: live.load(b"\xff\xff"),
        lambda: live.load(live.load_opening(2), b"\xff\xff"),
        lambda: live.load(live.load_opening(2), live.load_chunk(), b"\xff\xff", COMMIT),
    ):
        untouched(call, "INVALID_ARGUMENT", "INVALID_FRAME", "message of 2 bytes cannot be decoded")


def test_a_load_that_does_not_fit_the_budget_is_refused_before_it_is_staged(
    connect: Any, make_config: Any, make_live: Any, refusal: Any
) -> None:
    """State of 3 x 40,000 bytes and a gradient fit; a second state beside it does not."""
    import stepwire_server.testing

    with stepwire_server.testing.serving(memory_budget=200_000) as target, connect(target) as wire:
        live = make_live(wire, wire.create(make_config((10_000,))))
        before = live.fingerprint()
        chunks = [live.load_chunk(slot) for slot in ("param", "exp_avg", "exp_avg_sq")]
        refused = refusal(
            lambda: live.load(live.load_opening(1, "param", "exp_avg", "exp_avg_sq"), *chunks, COMMIT),
            "RESOURCE_EXHAUSTED",
            "MEMORY_EXHAUSTED",
            "staging the load needs 120000 bytes and 80000 of 200000 are free",
        )
        assert refused.metadata == {"requested_bytes": "120000", "available_bytes": "80000"}
        assert (live.fingerprint(), wire.reserved_bytes()) == (before, 120_000)
        live.load(live.load_opening(1), live.load_chunk(), COMMIT)
        assert wire.reserved_bytes() == 120_000


PULLS: dict[str, tuple[dict[str, Any], str, str]] = {
    "an unknown slot": ({"slots": ["param", "velocity"]}, "slots", "'velocity' is unknown"),
    "a slot twice": ({"slots": ["param", "param"]}, "slots", "'param' is named twice"),
    "lines": ({"slots": ["a\nb"]}, "slots", r"'a\nb' is unknown"),
    "encoding 9": ({"dtype": 9}, "dtype", "encoding 9"),
    "tiny chunks": ({"chunk_bytes": 1}, "chunk_bytes", "1 bytes"),
    "huge chunks": ({"chunk_bytes": LAST}, "chunk_bytes", f"{LAST} bytes"),
    "chunks one too large": ({"chunk_bytes": CHUNK_BYTES + 1}, "chunk_bytes", f"{CHUNK_BYTES + 1} bytes"),
}


@pytest.mark.parametrize("what", PULLS)
def test_a_pull_that_asks_wrong_is_refused_by_its_field(live: Any, untouched: Any, what: str) -> None:
    fields, field, text = PULLS[what]
    request = pb.PullRequest(session_id=live.id, **fields)
    untouched(lambda: live.wire.stream("Pull", [request]), "INVALID_ARGUMENT", "INVALID_CONFIG", text, field=field)


def test_a_step_within_a_load_is_no_part_of_it(live: Any) -> None:
    """A load is staged beside the state, so a step that is committed meanwhile counts, and the load comes after it."""
    steps, stream = live.wire.open(), live.wire.open("Load")
    steps.send(live.opening())
    live.attached(steps.receive())
    stream.send(live.load_opening(2, "exp_avg"), live.load_chunk("exp_avg", 0, ones(100)))
    steps.send(live.frame(begin=step_pb2.StepBegin(step=2), commit=True))
    assert pb.AttachResponse.FromString(steps.receive()).result.step == 2
    stream.send(live.load_chunk("exp_avg", 100, ones(163)), COMMIT)
    answer = pb.LoadResponse.FromString(stream.receive())
    stream.finish()
    steps.cancel()
    assert (answer.session.applied_load, answer.session.applied_step) == (2, 2)
    loaded = np.frombuffer(live.wire.pull(live.id, "exp_avg")[1]["exp_avg"], np.float32)
    assert loaded[:17].tolist() + loaded[256:].tolist() == [1.0] * 24


@pytest.mark.parametrize("cuts", [(0, 263), (0, 17, 256, 263), (0, 5, 100, 260, 263)])
def test_padding_is_ignored_when_loaded_and_zero_when_pulled(live: Any, cuts: tuple[int, ...]) -> None:
    values = live.gradient(3)
    chunks = [live.load_chunk("param", start, values[start:end]) for start, end in zip(cuts, cuts[1:], strict=False)]
    live.load(live.load_opening(2), *chunks, COMMIT)
    expected = values.copy()
    expected[17:256] = 0.0
    assert live.wire.pull(live.id, "param")[1]["param"] == expected.tobytes()
