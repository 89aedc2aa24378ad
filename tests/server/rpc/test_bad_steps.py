"""Steps that lie about their number, their bytes, their place or their order (facts: attacks 4, 5, 6, 9, 18).

`live` has a flat space of 263 elements: t0 and t1 in [0, 17), padding to 256, `last` in [256, 263). Whatever is refused
here must leave it as it was in every bit; the fixture `untouched` sees to that.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from stepwire.optimizers import LARGEST_NUMBER
from stepwire.v1 import attach_pb2, optimizer_pb2, step_pb2, tensor_pb2
from stepwire.v1 import optimizer_service_pb2 as pb

pytestmark = pytest.mark.many


@pytest.fixture
def server(lane_server: Any) -> Any:
    return lane_server


@pytest.fixture
def wire(wire_of_each_kind: Any) -> Any:
    return wire_of_each_kind


CHUNK_BYTES = 64 << 10
LAST = 2**64 - 1
NAN, INF = float("nan"), float("inf")


def begin(step: int = 2, **fields: Any) -> step_pb2.StepBegin:
    return step_pb2.StepBegin(step=step, **fields)


def numbers(**values: Any) -> list[optimizer_pb2.Hyperparameters]:
    return [optimizer_pb2.Hyperparameters(**values)]


def chunk(offset: int, count: int, payload: bytes | None = None, **fields: Any) -> pb.AttachRequest:
    """Make a message with a chunk of ones, or of any other payload."""
    return pb.AttachRequest(
        chunk=tensor_pb2.Chunk(offset=offset, count=count, **fields),
        payload=np.ones(count, np.float32).tobytes() if payload is None else payload,
    )


BEGIN = pb.AttachRequest(begin=begin())
COMMIT = pb.AttachRequest(commit=step_pb2.StepCommit())
WHOLE = chunk(0, 263)

# --- numbers ------------------------------------------------------------------------------------------------

WRONG_STEPS = {
    # step: (reason, expected in the metadata)
    0: "STEP_SUPERSEDED",
    3: "STEP_MISMATCH",
    10: "STEP_MISMATCH",
    2**53: "STEP_MISMATCH",
    2**63: "STEP_MISMATCH",
    LAST: "STEP_MISMATCH",
}


@pytest.mark.parametrize("unary", [False, True])
@pytest.mark.parametrize("step", WRONG_STEPS)
def test_a_step_that_is_neither_next_nor_last_is_refused(live: Any, untouched: Any, step: int, unary: bool) -> None:
    def call() -> None:
        if unary:
            live.wire.unary("Step", live.unary_step(step))
        live.step(step)

    refused = untouched(call, "ABORTED", WRONG_STEPS[step], f"step {step} ", "the next step is 2")
    assert refused.metadata == {"expected_step": "2", "actual_step": str(step)}


@pytest.mark.parametrize("unary", [False, True])
@pytest.mark.parametrize("times", [1, 3])
def test_a_replayed_step_is_answered_again_and_applied_once(live: Any, times: int, unary: bool) -> None:
    before = live.fingerprint()
    for _ in range(times):
        if unary:
            answer = pb.StepResponse.FromString(live.wire.unary("Step", live.unary_step(1)))
        else:
            (answer,) = live.attach(live.frame(begin=1, commit=True))
        assert (answer.result.step, answer.result.replayed) == (1, True)
        assert answer.payload == live.wire.pull(live.id, "param")[1]["param"]
    assert live.fingerprint() == before


def test_steps_out_of_order_on_one_stream_stop_at_the_first_gap(live: Any, refusal: Any) -> None:
    frames = [live.frame(begin=step, commit=True) for step in (2, 3, 5, 4)]
    refused = refusal(lambda: live.attach(*frames), "ABORTED", "STEP_MISMATCH", "step 5 ")
    results = [pb.AttachResponse.FromString(answer).result.step for answer in refused.answers[1:]]
    assert results == [2, 3]
    assert live.wire.get(live.id).applied_step == 3


@pytest.mark.parametrize("epoch", [2, 7, 2**53, LAST])
@pytest.mark.parametrize("where", ["open", "begin", "Step"])
def test_an_epoch_that_is_not_the_sessions_is_stale(live: Any, untouched: Any, where: str, epoch: int) -> None:
    calls = {
        "open": lambda: live.wire.stream("Attach", [live.opening(epoch=epoch)]),
        "begin": lambda: live.attach(live.frame(begin=begin(epoch=epoch), commit=True)),
        "Step": lambda: live.wire.unary("Step", live.unary_step(2, begin=begin(epoch=epoch))),
    }
    refused = untouched(calls[where], "FAILED_PRECONDITION", "STALE_EPOCH", f"of epoch {epoch}")
    assert refused.metadata == {"epoch": "1", "actual_epoch": str(epoch)}


@pytest.mark.parametrize("token", [1, 3, 2**53, LAST])
@pytest.mark.parametrize("where", ["open", "Step", "Load"])
def test_a_token_that_was_not_given_is_fenced(live: Any, untouched: Any, where: str, token: int) -> None:
    calls = {
        "open": lambda: live.wire.stream("Attach", [live.opening(attach_token=token)]),
        "Step": lambda: live.wire.unary("Step", live.unary_step(2, attach_token=token)),
        "Load": lambda: live.load(live.load_opening(2, attach_token=token), live.load_chunk(commit=True)),
    }
    refused = untouched(calls[where], "FAILED_PRECONDITION", "FENCED", "worker 0 is held by another client")
    assert refused.metadata == {"worker": "0"}, "the token of the holder is nobody else's business"


@pytest.mark.parametrize("where", ["Step", "Load"])
def test_a_token_that_the_client_has_outgrown_steps_and_loads_nothing(live: Any, untouched: Any, where: str) -> None:
    """The first token created the session, and the client has stepped with the second one since."""
    first = live.first_token
    calls = {
        "Step": lambda: live.wire.unary("Step", live.unary_step(2, attach_token=first)),
        "Load": lambda: live.load(live.load_opening(2, attach_token=first), live.load_chunk(commit=True)),
    }
    untouched(calls[where], "UNAVAILABLE", "STREAM_DISPLACED", "held by a newer stream of this client")


@pytest.mark.parametrize("where", ["Step", "Load"])
def test_a_call_without_a_token_is_fenced(live: Any, untouched: Any, where: str) -> None:
    """0 acquires the worker only where a stream attaches."""
    calls = {
        "Step": lambda: live.wire.unary("Step", live.unary_step(2, attach_token=0)),
        "Load": lambda: live.load(live.load_opening(2, attach_token=0), live.load_chunk(commit=True)),
    }
    untouched(calls[where], "FAILED_PRECONDITION", "FENCED", "worker 0 is held by another client")


@pytest.mark.parametrize("worker", [1, 2**32 - 1])
@pytest.mark.parametrize("where", ["open", "Step", "Load"])
def test_a_worker_that_the_session_does_not_have_is_refused(live: Any, untouched: Any, where: str, worker: int) -> None:
    calls = {
        "open": lambda: live.wire.stream("Attach", [live.opening(worker=worker)]),
        "Step": lambda: live.wire.unary("Step", live.unary_step(2, worker=worker)),
        "Load": lambda: live.load(live.load_opening(2, worker=worker), live.load_chunk(commit=True)),
    }
    untouched(calls[where], "INVALID_ARGUMENT", "INVALID_CONFIG", f"{worker} is none of them", field="worker")


# --- what opens a step --------------------------------------------------------------------------------------

WRONG_BEGINS: dict[str, tuple[step_pb2.StepBegin, str, str, str]] = {
    "lr negative": (begin(hyperparameters=numbers(lr=-3.5)), "INVALID_CONFIG", "begin.hyperparameters[0].lr", "-3.5"),
    "lr beyond float32": (
        begin(hyperparameters=numbers(lr=1e39)),
        "INVALID_CONFIG",
        "begin.hyperparameters[0].lr",
        "lr is 1e+39; it must be finite and >= 0 in float32",
    ),
    "lr beyond float32 as a step size": (
        begin(hyperparameters=numbers(lr=1e38)),
        "INVALID_CONFIG",
        "begin.hyperparameters[0].lr",
        "lr is 1e+38, and beside the other numbers float32 has step sizes up to lr = 3.4e+37 alone",
    ),
    "lr nan": (begin(hyperparameters=numbers(lr=NAN)), "INVALID_CONFIG", "begin.hyperparameters[0].lr", "nan"),
    "beta1": (begin(hyperparameters=numbers(beta1=1.25)), "INVALID_CONFIG", "begin.hyperparameters[0].beta1", "1.25"),
    "eps inf": (begin(hyperparameters=numbers(eps=INF)), "INVALID_CONFIG", "begin.hyperparameters[0].eps", "inf"),
    "foreign": (
        begin(hyperparameters=numbers(momentum=0.5)),
        "INVALID_CONFIG",
        "begin.hyperparameters[0].momentum",
        "'momentum'",
    ),
    "the second of two": (
        begin(hyperparameters=[*numbers(lr=0.5), *numbers(lr=-1.5)]),
        "INVALID_CONFIG",
        "begin.hyperparameters[1].lr",
        "-1.5",
    ),
    "three for two": (
        begin(hyperparameters=numbers() * 3),
        "INVALID_CONFIG",
        "begin.hyperparameters",
        "3 entries; it must be 0, 1 or 2",
    ),
    "reply int8": (begin(reply={"dtype": 4}), "INVALID_CONFIG", "begin.reply.dtype", "encoding 4"),
    "gradient 77": (begin(gradient_dtype=77), "INVALID_CONFIG", "begin.gradient_dtype", "encoding 77"),
    "reply -1": (begin(reply={"dtype": -1}), "INVALID_CONFIG", "begin.reply.dtype", "encoding -1"),
    "tiny answers": (begin(reply={"chunk_bytes": 4095}), "INVALID_CONFIG", "begin.reply.chunk_bytes", "4095 bytes"),
    "huge answers": (begin(reply={"chunk_bytes": LAST}), "INVALID_CONFIG", "begin.reply.chunk_bytes", str(LAST)),
}


@pytest.mark.parametrize("unary", [False, True])
@pytest.mark.parametrize("what", WRONG_BEGINS)
def test_a_step_that_opens_wrong_is_refused_by_its_field(live: Any, untouched: Any, what: str, unary: bool) -> None:
    opening, reason, field, text = WRONG_BEGINS[what]

    def call() -> None:
        if unary:
            live.wire.unary("Step", live.unary_step(2, begin=opening))
        live.attach(live.frame(begin=opening, commit=True))

    untouched(call, "INVALID_ARGUMENT", reason, text, field=field)


@pytest.mark.parametrize(
    "edges",
    [
        {"lr": LARGEST_NUMBER / 2, "beta1": 0.5, "eps": 5e-324, "weight_decay": 1.0},
        {"lr": 1e-3, "beta1": 0.9999999999999999, "eps": LARGEST_NUMBER, "weight_decay": 1.0},
    ],
)
def test_numbers_at_the_edge_of_what_is_allowed_break_nothing(edges: dict[str, float], live: Any) -> None:
    (answer,) = live.attach(live.frame(begin=begin(hyperparameters=numbers(**edges)), commit=True))
    assert answer.result.step == 2
    (answer,) = live.attach(live.frame(begin=3, commit=True))
    assert (answer.result.step, answer.result.telemetry.groups[0].t) == (3, 3)


# --- chunks -------------------------------------------------------------------------------------------------

WRONG_CHUNKS: dict[str, tuple[list[pb.AttachRequest], str, list[str]]] = {
    # what: (messages between begin and commit, field, texts)
    "nothing": ([], "chunk", ["elements [0, 17) were not sent"]),
    "a gap at the start": ([chunk(1, 262)], "chunk", ["elements [0, 1) were not sent"]),
    "a gap inside": ([chunk(0, 10), chunk(11, 252)], "chunk", ["elements [10, 11) were not sent"]),
    "a gap at the end": ([chunk(0, 262)], "chunk", ["elements [262, 263) were not sent"]),
    "padding alone": ([chunk(17, 239)], "chunk", ["elements [0, 17) were not sent"]),
    "a group left out": ([chunk(0, 256)], "chunk", ["elements [256, 263) were not sent"]),
    "twice the same": ([chunk(0, 9), chunk(0, 9)], "chunk", ["chunk [0, 9) overlaps [0, 9)"]),
    "one too many before": ([chunk(5, 5), chunk(0, 6)], "chunk", ["chunk [0, 6) overlaps [5, 10)"]),
    "one too many after": ([chunk(5, 5), chunk(9, 5)], "chunk", ["chunk [9, 14) overlaps [5, 10)"]),
    "inside": ([chunk(0, 263), chunk(100, 1)], "chunk", ["chunk [100, 101) overlaps [0, 263)"]),
    "around": ([chunk(100, 1), chunk(0, 263)], "chunk", ["chunk [0, 263) overlaps [100, 101)"]),
    "no elements": ([chunk(0, 0)], "chunk", ["chunk [0, 0) is not a non-empty part of [0, 263)"]),
    "none at the end": ([chunk(263, 0)], "chunk", ["chunk [263, 263) is not a non-empty part"]),
    "one beyond the end": ([chunk(263, 1)], "chunk", ["chunk [263, 264) is not a non-empty part"]),
    "across the end": ([chunk(0, 264)], "chunk", ["chunk [0, 264) is not a non-empty part"]),
    "far away": ([chunk(2**63, 1)], "chunk", [f"chunk [{2**63}, {2**63 + 1})"]),
    "round the corner": ([chunk(LAST, 1)], "chunk", [f"chunk [{LAST}, {2**64})"]),
    "too few bytes": ([chunk(0, 263, bytes(1051))], "chunk.count", ["count is 263 (1052 bytes", "has 1051 bytes"]),
    "too many bytes": ([chunk(0, 263, bytes(1053))], "chunk.count", ["count is 263 (1052 bytes", "has 1053 bytes"]),
    "no bytes": ([chunk(0, 263, b"")], "chunk.count", ["has 0 bytes"]),
    "bytes of no element": ([chunk(0, 0, b"abcd")], "chunk.count", ["count is 0 (0 bytes", "has 4 bytes"]),
    "of half the size": ([chunk(0, 263, bytes(526))], "chunk.count", ["1052 bytes of float32", "has 526 bytes"]),
    "a count that wraps": ([chunk(0, 2**62 + 1, bytes(4))], "chunk.count", [f"count is {2**62 + 1}", "has 4 bytes"]),
    "a count beyond all": ([chunk(2**63, LAST, bytes(4))], "chunk.count", [f"count is {LAST}"]),
}


@pytest.mark.parametrize("what", WRONG_CHUNKS)
def test_chunks_that_do_not_cover_the_space_once_are_refused(live: Any, untouched: Any, what: str) -> None:
    frames, field, texts = WRONG_CHUNKS[what]
    untouched(lambda: live.attach(BEGIN, *frames, COMMIT), "INVALID_ARGUMENT", "INVALID_TENSOR", *texts, field=field)


@pytest.mark.parametrize(
    ("payload", "texts"),
    [
        (b"", ["count is 263", "has 0 bytes"]),
        (bytes(1051), ["count is 263", "has 1051 bytes"]),
        (bytes(1056), ["has 1056 bytes"]),
    ],
)
def test_a_unary_step_of_another_size_is_refused(live: Any, untouched: Any, payload: bytes, texts: list[str]) -> None:
    untouched(
        lambda: live.wire.unary("Step", live.unary_step(2, payload=payload)),
        "INVALID_ARGUMENT",
        "INVALID_TENSOR",
        *texts,
        field="chunk.count",
    )


def test_a_unary_step_of_an_empty_session_has_no_payload(
    wire: Any, make_config: Any, make_live: Any, refusal: Any
) -> None:
    live = make_live(wire, wire.create(make_config((0, 3))))
    refusal(
        lambda: wire.unary("Step", live.unary_step(1, payload=b"abcd")),
        "INVALID_ARGUMENT",
        "INVALID_TENSOR",
        "has 4 bytes",
        field="chunk.count",
    )
    assert pb.StepResponse.FromString(wire.unary("Step", live.unary_step(1))).result.step == 1


def test_too_many_tiny_chunks_are_refused(wire: Any, make_config: Any, make_live: Any, refusal: Any) -> None:
    """Each costs a hundred times its bytes in bookkeeping, which no budget counts."""
    live = make_live(wire, wire.create(make_config((2000,))))
    frames = [pb.AttachRequest(begin=begin(1)), *(chunk(index, 1) for index in range(1025)), COMMIT]
    before, reserved = live.fingerprint(), wire.reserved_bytes()
    refusal(
        lambda: live.attach(*frames),
        "INVALID_ARGUMENT",
        "INVALID_TENSOR",
        "chunk [1024, 1025) is one more than the 1024 allowed",
        field="chunk",
    )
    assert (live.fingerprint(), wire.reserved_bytes()) == (before, reserved)


def test_a_chunk_of_more_bytes_than_a_message_may_hold_is_refused(
    wire: Any, make_config: Any, make_live: Any, refusal: Any
) -> None:
    live = make_live(wire, wire.create(make_config((40_000,))))
    frame = chunk(0, 16_385)
    frame.begin.step = 1
    refusal(
        lambda: live.attach(frame, COMMIT),
        "INVALID_ARGUMENT",
        "INVALID_FRAME",
        f"65540 bytes; a chunk holds at most {CHUNK_BYTES}",
        field="payload",
    )
    refusal(
        lambda: wire.unary("Step", live.unary_step(1)),
        "INVALID_ARGUMENT",
        "INVALID_FRAME",
        f"40000 elements are more than the {CHUNK_BYTES} bytes of one call",
        field="payload",
    )
    assert wire.get(live.id).applied_step == 0


def test_rows_of_a_session_without_tables_are_refused(live: Any, untouched: Any) -> None:
    untouched(
        lambda: live.attach(BEGIN, chunk(0, 263, rows=[0, 2]), COMMIT),
        "INVALID_ARGUMENT",
        "INVALID_TENSOR",
        "the session has no tables",
        field="chunk.rows",
    )


# --- messages out of order ----------------------------------------------------------------------------------

OPEN_AGAIN = pb.AttachRequest(open=attach_pb2.AttachOpen(session_id="again"))
PAYLOAD_ALONE = pb.AttachRequest(payload=b"12345678")
DISORDER: dict[str, tuple[list[pb.AttachRequest], str, str]] = {
    # what: (messages after the opening, field, text)
    "a chunk first": ([WHOLE], "begin", "a step starts with `begin`"),
    "a commit first": ([COMMIT], "begin", "a step starts with `begin`"),
    "an empty message first": ([pb.AttachRequest()], "begin", "a step starts with `begin`"),
    "a payload first": ([PAYLOAD_ALONE], "begin", "a step starts with `begin`"),
    "open again": ([OPEN_AGAIN], "begin", "a step starts with `begin`"),
    "open again inside": ([BEGIN, OPEN_AGAIN], "open", "only the first message"),
    "open again with begin": (
        [pb.AttachRequest(open=attach_pb2.AttachOpen(), begin=begin())],
        "open",
        "only the first message",
    ),
    "begin twice": ([BEGIN, BEGIN], "begin", "a second `begin`"),
    "begin twice with chunks": ([BEGIN, WHOLE, BEGIN], "begin", "a second `begin`"),
    "a payload alone": ([BEGIN, PAYLOAD_ALONE], "chunk", "a payload of 8 bytes comes without `chunk`"),
    "a payload with the commit": (
        [BEGIN, WHOLE, pb.AttachRequest(commit=step_pb2.StepCommit(), payload=b"123")],
        "chunk",
        "a payload of 3 bytes comes without `chunk`",
    ),
    "no commit": ([BEGIN, WHOLE], "commit", "ended inside a step"),
    "nothing but begin": ([BEGIN], "commit", "ended inside a step"),
}


@pytest.mark.parametrize("what", DISORDER)
def test_messages_out_of_order_are_refused(live: Any, untouched: Any, what: str) -> None:
    frames, field, text = DISORDER[what]
    untouched(lambda: live.attach(*frames), "INVALID_ARGUMENT", "INVALID_FRAME", text, field=field)


NOT_ALONE: dict[str, tuple[dict[str, Any], str]] = {
    "begin": ({"begin": begin()}, "begin"),
    "chunk": ({"chunk": tensor_pb2.Chunk(count=1)}, "chunk"),
    "commit": ({"commit": step_pb2.StepCommit()}, "commit"),
    "payload": ({"payload": b"1234"}, "payload"),
}


@pytest.mark.parametrize("what", NOT_ALONE)
def test_an_opening_that_is_not_alone_is_refused(live: Any, untouched: Any, what: str) -> None:
    fields, field = NOT_ALONE[what]
    frame = pb.AttachRequest(open=live.opening().open, **fields)
    untouched(
        lambda: live.wire.stream("Attach", [frame]), "INVALID_ARGUMENT", "INVALID_FRAME", "`open` alone", field=field
    )


@pytest.mark.parametrize(
    "frames", [[], [BEGIN], [WHOLE], [pb.AttachRequest()]], ids=["none", "begin", "chunk", "empty"]
)
def test_a_stream_that_does_not_open_is_refused(live: Any, untouched: Any, frames: list[pb.AttachRequest]) -> None:
    untouched(
        lambda: live.wire.stream("Attach", frames),
        "INVALID_ARGUMENT",
        "INVALID_FRAME",
        "the first message of a stream must carry `open`",
        field="open",
    )


GARBAGE = {"noise": b"\xff\xfe\xfd", "cut": WHOLE.SerializeToString()[:-1], "text": b"GET / HTTP/1.1\r\n\r\n"}


@pytest.mark.parametrize("what", GARBAGE)
def test_bytes_that_are_no_message_are_refused_wherever_they_come(live: Any, untouched: Any, what: str) -> None:
    data = GARBAGE[what]
    text = f"message of {len(data)} bytes cannot be decoded"
    for call in (
        lambda: live.wire.stream("Attach", [data]),
        lambda: live.attach(data),
        lambda: live.attach(BEGIN, data),
        lambda: live.attach(BEGIN, WHOLE, data, COMMIT),
    ):
        untouched(call, "INVALID_ARGUMENT", "INVALID_FRAME", text)


# --- gradients that are not finite --------------------------------------------------------------------------


def spoiled(live: Any, *places: int, bad: float = NAN) -> Any:
    gradient = live.gradient(2)
    gradient[list(places)] = bad
    return gradient


@pytest.mark.parametrize("dtype", [(np.float32, 1), (ml_dtypes.bfloat16, 2), (np.float16, 3)])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_the_first_tensor_that_is_not_finite_is_named(live: Any, untouched: Any, bad: float, dtype: Any) -> None:
    """However the chunks are cut and whatever their order; the count is of all."""
    gradient = spoiled(live, 14, 16, 260, bad=bad).astype(dtype[0])
    opening = pb.AttachRequest(begin=begin(gradient_dtype=dtype[1]))
    chunks = [
        live.frame(offset, count, payload=gradient[offset : offset + count])
        for offset, count in ((258, 5), (0, 15), (15, 243))
    ]
    refused = untouched(
        lambda: live.attach(opening, *chunks, COMMIT),
        "INVALID_ARGUMENT",
        "NON_FINITE_GRADIENT",
        "step 2: the gradient of tensor 't1' holds NaN or Inf (3 elements in all)",
    )
    assert refused.metadata == {"tensor": "t1", "element": "2", "non_finite_count": "3"}


def test_a_unary_step_that_is_not_finite_is_refused_too(live: Any, untouched: Any) -> None:
    request = live.unary_step(2, payload=spoiled(live, 262).tobytes())
    refused = untouched(lambda: live.wire.unary("Step", request), "INVALID_ARGUMENT", "NON_FINITE_GRADIENT", "'last'")
    assert refused.metadata == {"tensor": "last", "element": "6", "non_finite_count": "1"}


def test_padding_may_hold_anything(live: Any) -> None:
    """Ignored when sent, zero when received."""
    gradient = live.gradient(2)
    gradient[17:256] = NAN
    (answer,) = live.attach(live.frame(begin=2, commit=True, payload=gradient))
    assert answer.result.telemetry.non_finite_count == 0
    squares = float((np.delete(gradient, np.s_[17:256]).astype(np.float64) ** 2).sum())
    assert answer.result.telemetry.grad_norm == float(np.float32(squares**0.5))
    assert np.frombuffer(answer.payload, np.float32)[17:256].tolist() == [0.0] * 239


def test_padding_may_be_left_out(wire: Any, make_config: Any, make_live: Any) -> None:
    """And the step is the same in every bit, its answer too."""
    answers = []
    for frames in ([(0, 263)], [(0, 17), (256, 7)], [(0, 20), (250, 13)]):
        config = make_config((3, 4), (5,), groups=[optimizer_pb2.ParameterGroup(), optimizer_pb2.ParameterGroup()])
        config.tensors.add(name="last", shape=[7], group=1)
        live = make_live(wire, wire.create(config))
        opening = pb.AttachRequest(begin=begin(1))
        sent = live.attach(opening, *(live.frame(offset, count) for offset, count in frames), COMMIT)
        answers.append((b"".join(answer.payload for answer in sent), sent[-1].result.telemetry.grad_norm))
        wire.unary("DeleteSession", pb.DeleteSessionRequest(session_id=live.id))
    assert len(answers[0][0]) == 4 * 263
    assert answers[1:] == answers[:1] * 2


@pytest.mark.parametrize(("policy", "skipped"), [("SKIP", True), ("ALLOW", False)])
def test_other_policies_apply_or_skip_the_step(
    wire: Any, make_config: Any, make_live: Any, policy: str, skipped: bool
) -> None:
    treatment = optimizer_pb2.GradientTreatment(
        non_finite=optimizer_pb2.NonFinitePolicy.Value(f"NON_FINITE_POLICY_{policy}")
    )
    live = make_live(wire, wire.create(make_config((6,), gradient=treatment)))
    gradient = np.float32([1, NAN, 1, INF, 1, -INF])
    (answer,) = live.attach(live.frame(begin=1, commit=True, payload=gradient))
    result = answer.result
    assert (result.step, result.skipped, result.telemetry.non_finite_count) == (1, skipped, 3)
    assert result.telemetry.groups[0].t == (0 if skipped else 1)
    spoilt = np.isnan(np.frombuffer(answer.payload, np.float32)).tolist()
    assert spoilt == ([False] * 6 if skipped else [False, True] * 3)
    (again,) = live.attach(live.frame(begin=1, commit=True, payload=gradient))
    assert (again.result.replayed, again.result.skipped, again.payload) == (True, skipped, answer.payload)


def test_a_bad_step_leaves_its_number_free(live: Any, refusal: Any) -> None:
    refusal(lambda: live.step(2, spoiled(live, 0)), "INVALID_ARGUMENT", "NON_FINITE_GRADIENT")
    assert live.step(2).step == 2


def test_a_session_without_parameters_takes_no_steps(wire: Any, make_config: Any, make_live: Any, refusal: Any) -> None:
    live = make_live(wire, wire.create(make_config((3,), initialization=1)))
    for call in (lambda: live.step(1), lambda: wire.unary("Step", live.unary_step(1)), lambda: wire.pull(live.id)):
        refusal(call, "FAILED_PRECONDITION", "SESSION_NOT_READY", live.id, "load the slot 'param' first")
    live.load(live.load_opening(1, "exp_avg"), live.load_chunk("exp_avg", commit=True))
    refusal(lambda: live.step(1), "FAILED_PRECONDITION", "SESSION_NOT_READY")
    live.load(live.load_opening(2), live.load_chunk(commit=True))
    assert live.step(1).step == 1
