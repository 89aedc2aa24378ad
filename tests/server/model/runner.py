"""Carries operations out on a server, and holds every answer against the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import event

from stepwire.v1 import attach_pb2, state_pb2, step_pb2
from stepwire.v1 import optimizer_service_pb2 as pb
from tests.server.model.messages import begin_message, chunk_message, load_messages, loaded_values, resized, slip
from tests.server.model.model import (
    DTYPES,
    INVALID_CONFIG,
    INVALID_FRAME,
    INVALID_TENSOR,
    MISMATCH,
    NOT_FOUND,
    NOT_READY,
    SUPERSEDED,
    Answer,
    Hold,
    Model,
    Staged,
    Status,
)
from tests.server.model.operations import (
    LAST,
    Begin,
    Close,
    Config,
    Delete,
    Frame,
    Load,
    Open,
    Overtaken,
    Pull,
    Unary,
    Vector,
    WholeStep,
)


@dataclasses.dataclass
class Stream:
    """An attached stream, its hold, and the step it is in."""

    handle: Any
    hold: Hold
    staged: Staged | None = None


class Run:
    """Carries the operations out on the server, and holds every answer against the model."""

    def __init__(self, wire: Any, refused: type[Exception], config: Config) -> None:
        self.model = Model(config)
        self.wire = wire
        self.refused = refused
        created = wire.create(self.model.message())
        self.id = created.session.session_id
        self.tokens = [0, created.attach_token]  # by the number of the hold
        assert created.session.layout.size == self.model.size
        assert list(created.session.layout.slots) == list(self.model.slots)
        self.streams: dict[int, Stream] = {}
        self.bits: bytes | None = None  # the float32 parameters, while they are known
        self.stored: step_pb2.StepResult | None = None

    def do(self, operation: Any) -> None:
        """Do one operation, unless the holder of the worker is in a step that the operation is not about.

        Nothing answers `begin` and chunks, so only the stream itself knows when the server has read them. Attaching
        alone is possible in the middle of them: the step is then refused, sooner or later, and changes nothing.
        """
        busy = [index for index, stream in self.streams.items() if stream.staged and stream.hold == self.model.hold]
        if busy and getattr(operation, "stream", None) != busy[0] and not isinstance(operation, Open):
            return
        event(type(operation).__name__)
        getattr(self, type(operation).__name__.lower())(operation)

    def close_all(self) -> None:
        for index in list(self.streams):
            self.close(Close(index))

    def delete_left(self) -> None:
        if self.model.alive:
            self.wire.unary("DeleteSession", pb.DeleteSessionRequest(session_id=self.id))

    # Each operation.

    def open(self, operation: Open) -> None:
        self.close(Close(operation.stream))
        model, number = self.model, self.number(operation.token)
        handle = self.wire.open()
        first = pb.AttachRequest(
            open=attach_pb2.AttachOpen(
                session_id=self.id,
                worker=operation.worker,
                attach_token=self.token_of(number),
                epoch=operation.epoch,
                durable_step=operation.durable_step,
            )
        )
        faults = model.attach_faults(number, operation.epoch, operation.durable_step)
        if operation.worker:
            faults.add(INVALID_CONFIG)
        if operation.fault:
            faults.add(INVALID_FRAME)
        if operation.fault == "begin":
            first.begin.step = 1
        elif operation.fault == "payload":
            first.payload = b"1234"
        elif operation.fault == "unopened":
            first.ClearField("open")
        handle.send(b"\xff\xff" if operation.fault == "garbage" else first)
        if faults:
            self.expect_refusal(handle, faults)
            return
        opened = pb.AttachResponse.FromString(handle.receive()).opened
        event("attached again" if number else "acquired")
        if any(stream.staged is not None for stream in self.streams.values()):
            event("attached while a step was under way")
        hold = model.attach(number)
        assert opened.attach_token not in self.tokens and opened.epoch == 1
        self.tokens.append(opened.attach_token)
        assert (opened.applied_step, opened.applied_load) == (model.applied_step, model.applied_load)
        assert (opened.ready, opened.durable_step) == (model.ready, 0)
        self.streams[operation.stream] = Stream(handle, hold)

    def close(self, operation: Close) -> None:
        stream = self.streams.pop(operation.stream, None)
        if stream is None:
            return
        stream.handle.finish()
        if stream.staged is not None:
            self.expect_refusal(stream.handle, {INVALID_FRAME, *self.stale_faults(stream), *self.end_faults()})
        elif self.model.alive:
            with pytest.raises(StopIteration):
                stream.handle.receive()
        else:  # the end of a session ends the stream that holds it, and an older one may have ended well before
            with pytest.raises((StopIteration, self.refused)) as caught:
                stream.handle.receive()
            if isinstance(caught.value, self.refused):
                self.check_refusal(caught.value, {NOT_FOUND})

    def wholestep(self, operation: WholeStep) -> None:
        if operation.stream not in self.streams:
            self.open(Open(operation.stream, "newest", 1, 0, 0, ""))
        elif self.streams[operation.stream].staged is not None:
            self.close(Close(operation.stream))
            self.open(Open(operation.stream, "newest", 1, 0, 0, ""))
        model = self.model
        values = operation.gradient.values(model.size)
        cuts = sorted({0, model.size, *(cut for cut in operation.cuts if cut < model.size)})
        ranges = [(start, end - start) for start, end in zip(cuts, cuts[1:], strict=False)]
        np.random.default_rng(operation.seed).shuffle(ranges)
        dtype = model.gradient_dtype(operation.begin)
        messages = [chunk_message(offset, count, values, dtype) for offset, count in map(tuple, ranges)]
        if messages:
            slip(messages, operation.slip)
        if operation.in_one and len(messages) == 1:
            frames = [(operation.begin, messages[0], True)]
        else:
            frames = [
                (operation.begin, None, False),
                *((None, message, False) for message in messages),
                (None, None, True),
            ]
        for begin, message, commit in frames:
            if operation.stream not in self.streams:
                return
            request = message or pb.AttachRequest()
            self.send(operation.stream, begin, request, commit=commit)

    def overtaken(self, operation: Overtaken) -> None:
        model, index = self.model, operation.stream
        self.close(Close(index))
        self.open(Open(index, "newest", 0, 0, 0, ""))
        dtype, values = model.gradient_dtype(operation.begin), operation.gradient.values(model.size)
        if index in self.streams:
            self.send(index, operation.begin, chunk_message(0, model.size, values, dtype))
        self.open(Open(1 - index, operation.token, 0, 0, 0, ""))
        if index in self.streams:
            self.send(index, None, pb.AttachRequest(), commit=True)

    def frame(self, operation: Frame) -> None:
        if operation.stream not in self.streams:
            return
        model = self.model
        request = pb.AttachRequest()
        staged = self.streams[operation.stream].staged
        current = operation.begin or (staged.begin if staged else Begin())
        if operation.chunk is not None:
            size = model.size
            offset = [0, size // 3, size // 2, size - 1, size, size + 1, 2**63, LAST][operation.chunk[0]]
            offset = max(offset, 0)
            count = [0, 1, size // 3, max(size - offset, 0), size, 2**62 + 1][operation.chunk[1]]
            values = operation.gradient.values(size)
            request = chunk_message(offset, count, values, model.gradient_dtype(current), operation.extra_bytes)
        if "open" in operation.faults:
            request.open.session_id = self.id
        if "rows" in operation.faults and operation.chunk is not None:
            request.chunk.rows.append(0)
        if "payload" in operation.faults and operation.chunk is None:
            request.payload = b"12345678"
        self.send(
            operation.stream,
            operation.begin,
            request,
            commit=operation.commit,
            clip="clip" in operation.faults,
            garbage="garbage" in operation.faults,
        )

    def unary(self, operation: Unary) -> None:
        model, number = self.model, self.number(operation.token)
        dtype = np.dtype(DTYPES[model.gradient_dtype(operation.begin)])
        payload = operation.gradient.values(model.size).astype(dtype).tobytes()
        payload = resized(payload, operation.extra_bytes)
        request = pb.StepRequest(
            session_id=self.id,
            worker=operation.worker,
            attach_token=self.token_of(number),
            begin=begin_message(self.model, operation.begin),
            payload=payload,
        )
        faults = model.begin_faults(operation.begin) | model.call_faults(number)
        if operation.worker:
            faults.add(INVALID_CONFIG)
        staged = model.stage(operation.begin)
        if model.size or payload:
            faults |= model.chunk_faults(staged, 0, model.size, payload)
        faults |= model.commit_faults(staged)
        if faults:
            self.expect_refused_call(faults, "Step", request)
            return
        answer = pb.StepResponse.FromString(self.wire.unary("Step", request))
        self.check_answer(model.commit(staged), answer.result, answer.payload)

    def load(self, operation: Load) -> None:
        model, number = self.model, self.number(operation.token)
        number = min(max(model.applied_load + operation.delta, 0), LAST)
        replay = number == model.applied_load and number > 0
        step = None if operation.step_delta is None else min(max(model.applied_step + operation.step_delta, 0), LAST)
        opening = state_pb2.LoadOpen(
            session_id=self.id,
            worker=1 if operation.fault == "worker" else 0,
            attach_token=self.token_of(number),
            load=number,
            slots=operation.slots,
            dtype=operation.dtype,  # type: ignore[arg-type]
            epoch=operation.epoch,
            step=step,
            tensor_steps=operation.tensor_steps,
        )
        faults = model.session_faults(operation.epoch) | model.call_faults(number)
        names = operation.slots
        if not names or len(set(names)) < len(names) or not set(names) <= set(model.slots):
            faults.add(INVALID_CONFIG)
        if len(operation.tensor_steps) not in (0, len(model.ranges)) or max((0, *operation.tensor_steps)) >= 2**53:
            faults.add(INVALID_CONFIG)
        if step is not None and step >= 2**53:
            faults.add(INVALID_CONFIG)
        if operation.fault == "worker":
            faults.add(INVALID_CONFIG)
        if operation.fault == "unopened":
            faults.add(INVALID_FRAME)
        if not replay:
            if number != model.applied_load + 1:
                faults.add(SUPERSEDED if number <= model.applied_load else MISMATCH)
            if step is not None and step < model.applied_step:
                faults.add(SUPERSEDED)
        values = loaded_values(operation, model.size)
        messages, body_faults = load_messages(self.id, operation, values, model.size)
        if faults or (body_faults and not replay):
            allowed = faults | body_faults
            self.expect_refused_stream(allowed, "Load", [pb.LoadRequest(open=opening), *messages], operation)
            return
        (data,) = self.wire.stream("Load", [pb.LoadRequest(open=opening), *messages])
        answer = pb.LoadResponse.FromString(data)
        assert answer.replayed is replay
        event("load replayed" if replay else "loaded")
        if not replay:
            model.applied_load = number
            for slot, value in values.items():
                model.state[slot] = np.where(model.inside, value, 0.0)
            if step is not None and step != model.applied_step:
                model.applied_step, model.last, self.stored = step, None, None
            if operation.tensor_steps:
                model.t = list(operation.tensor_steps)
            model.ready = model.ready or "param" in names
            model.peak = max(model.peak, 2.0)
            self.bits = None
        assert (answer.session.applied_load, answer.session.applied_step) == (model.applied_load, model.applied_step)
        assert answer.session.ready is model.ready

    def pull(self, operation: Pull) -> None:
        model = self.model
        request = pb.PullRequest(
            session_id=self.id,
            slots=operation.slots,
            dtype=operation.dtype,  # type: ignore[arg-type]
            chunk_bytes=operation.chunk_bytes,
        )
        faults = set()
        if not model.alive:
            faults.add(NOT_FOUND)
        if not model.ready:
            faults.add(NOT_READY)
        names = operation.slots
        if len(set(names)) < len(names) or not set(names) <= set(model.slots):
            faults.add(INVALID_CONFIG)
        if operation.dtype == 4 or operation.chunk_bytes == 1:
            faults.add(INVALID_CONFIG)
        if faults:
            self.expect_refused_stream(faults, "Pull", [request])
            return
        self.check_state(request)

    def delete(self, operation: Delete) -> None:
        model = self.model
        request = pb.DeleteSessionRequest(session_id=self.id)
        if not model.alive:
            self.expect_refused_call({NOT_FOUND}, "DeleteSession", request)
            return
        answer = pb.DeleteSessionResponse.FromString(self.wire.unary("DeleteSession", request))
        assert answer.applied_step == model.applied_step
        model.alive = False

    def token_of(self, number: int) -> int:
        """Return the token of a hold; of one that is not given out, a number that is nobody's."""
        return self.tokens[number] if number < len(self.tokens) else LAST

    def number(self, kind: str) -> int:
        hold = self.model.hold
        return {
            "newest": hold.number,
            "none": 0,
            "older": hold.number - 1 or LAST,
            "foreign": hold.acquired - 1 or LAST,
            "future": LAST,
        }[kind]

    # One message of a stream, and what must come of it.

    def send(
        self,
        index: int,
        begin: Begin | None,
        request: pb.AttachRequest,
        *,
        commit: bool = False,
        clip: bool = False,
        garbage: bool = False,
    ) -> None:
        stream, model = self.streams[index], self.model
        if begin is not None:
            request.begin.CopyFrom(begin_message(self.model, begin))
        if commit:
            request.commit.SetInParent()
            if clip:
                request.commit.clip_coefficient = 0.5
        stream.handle.send(b"\xff\xff" if garbage else request)
        faults = {INVALID_FRAME} if garbage else self.frame_faults(stream, begin, request)
        stale = self.stale_faults(stream)
        if faults or (stale and (begin is not None or commit)):
            del self.streams[index]
            self.expect_refusal(stream.handle, faults | stale | self.end_faults())
        elif commit:
            assert stream.staged is not None
            staged, stream.staged = stream.staged, None
            self.read_answer(stream, model.commit(staged))

    def stale_faults(self, stream: Stream) -> set[Status]:
        """Return the refusals of a stream that has been displaced; at the latest, its commit leads to one."""
        stale = self.model.hold_faults(stream.hold)
        return {*stale, NOT_FOUND} if stale and not self.model.alive else stale

    def end_faults(self) -> set[Status]:
        """Return the refusal that a stream may have had already: the end of a session ends it at any moment."""
        return set() if self.model.alive else {NOT_FOUND}

    def frame_faults(self, stream: Stream, begin: Begin | None, request: pb.AttachRequest) -> set[Status]:
        model, faults = self.model, set()
        if (begin is None) == (stream.staged is None):
            faults.add(INVALID_FRAME)
        if begin is not None and stream.staged is None:
            faults |= model.begin_faults(begin)
            stream.staged = model.stage(begin)
        if request.HasField("open"):
            faults.add(INVALID_FRAME)
        if request.HasField("chunk"):
            if request.chunk.rows:
                faults.add(INVALID_TENSOR)
            if stream.staged is not None:
                faults |= model.chunk_faults(stream.staged, request.chunk.offset, request.chunk.count, request.payload)
        elif request.payload:
            faults.add(INVALID_FRAME)
        if request.HasField("commit"):
            if request.commit.HasField("clip_coefficient"):
                faults.add(INVALID_CONFIG)
            if stream.staged is not None:
                faults |= model.commit_faults(stream.staged)
        return faults

    def read_answer(self, stream: Stream, answer: Answer) -> None:
        payload, covered = b"", 0
        while True:
            message = pb.AttachResponse.FromString(stream.handle.receive())
            if message.HasField("chunk"):
                assert message.chunk.offset == covered
                covered += message.chunk.count
                payload += message.payload
            if message.HasField("result"):
                break
        assert covered == (0 if answer.parameters is None else self.model.size)
        self.check_answer(answer, message.result, payload)

    # Comparisons.

    def check_answer(self, answer: Answer, result: step_pb2.StepResult, payload: bytes) -> None:
        telemetry = result.telemetry
        assert (result.step, result.epoch, result.durable_step) == (answer.step, 1, 0)
        assert (result.replayed, result.skipped) == (answer.replay, answer.skipped)
        assert telemetry.non_finite_count == answer.non_finite
        assert telemetry.clip_coefficient == 1.0
        assert [group.t for group in telemetry.groups] == list(answer.ts)
        norms = [group.grad_norm for group in telemetry.groups]
        np.testing.assert_allclose(norms, answer.grad_norms, rtol=1e-6)
        np.testing.assert_allclose(telemetry.grad_norm, np.sqrt(np.sum(np.square(answer.grad_norms))), rtol=1e-6)
        for group in telemetry.groups:
            used = group.hyperparameters
            assert (used.lr, used.maximize) == answer.numbers
            assert (used.beta1, used.beta2, used.eps) == (self.model.beta1, self.model.beta2, self.model.eps)
            assert used.weight_decay == self.model.config.weight_decay
        assert telemetry.previous_send_seconds >= 0.0
        telemetry.ClearField("previous_send_seconds")  # of the stream, not of the step
        event("replayed" if answer.replay else "skipped" if answer.skipped else "applied")
        if answer.replay:
            result.replayed = False
            assert result == self.stored, "a replay tells what was told the first time"
        else:
            self.stored = step_pb2.StepResult()
            self.stored.CopyFrom(result)
            if not answer.skipped:
                self.bits = None
        if answer.parameters is None:
            assert payload == b""
        else:
            self.check_parameters(payload, answer.dtype)

    def check_parameters(self, payload: bytes, dtype: int) -> None:
        """Compare with the model, and bit for bit with the masters where they are known."""
        got = np.frombuffer(payload, DTYPES[dtype])
        self.check_values(got, self.model.state["param"], dtype)
        if self.bits is not None:
            with np.errstate(over="ignore"):
                assert payload == np.frombuffer(self.bits, np.float32).astype(DTYPES[dtype]).tobytes()
        elif dtype == 1:
            self.bits = payload

    def check_values(self, got: Any, want: Vector, dtype: int) -> None:
        assert len(got) == len(want)
        values = got.astype(np.float64)
        assert (values[~self.model.inside] == 0).all(), "padding is zero when received"
        assert np.array_equal(np.isnan(values), np.isnan(want))
        finite = np.isfinite(want)
        error = np.abs(values[finite] - want[finite])
        assert (error <= self.model.tolerance(dtype, want[finite])).all(), f"off by {error.max()}"

    def check_state(self, request: pb.PullRequest) -> None:
        model, dtype = self.model, request.dtype or 1
        first, *chunks = map(pb.PullResponse.FromString, self.wire.stream("Pull", [request]))
        header = first.header
        assert (header.step, header.load, header.epoch) == (model.applied_step, model.applied_load, 1)
        assert list(header.tensor_steps) == model.t
        values: dict[str, bytes] = {}
        for chunk in chunks:
            before = values.get(chunk.slot, b"")
            assert chunk.chunk.offset == len(before) // np.dtype(DTYPES[dtype]).itemsize
            assert len(chunk.payload) == chunk.chunk.count * np.dtype(DTYPES[dtype]).itemsize
            values[chunk.slot] = before + chunk.payload
        assert list(values) == (list(request.slots) or ["param"] if model.size else [])
        for slot, payload in values.items():
            if slot == "param":
                self.check_parameters(payload, dtype)
            else:
                self.check_values(np.frombuffer(payload, DTYPES[dtype]), model.state[slot], dtype)

    def check_everything(self) -> None:
        """Pull all there is, or find that there is nothing."""
        model = self.model
        if not model.alive:
            self.expect_refused_call({NOT_FOUND}, "GetSession", pb.GetSessionRequest(session_id=self.id))
            return
        session = self.wire.get(self.id)
        assert (session.applied_step, session.applied_load) == (model.applied_step, model.applied_load)
        assert (session.ready, session.attached) == (model.ready, False)
        if model.ready:
            self.check_state(pb.PullRequest(session_id=self.id, slots=model.slots))
        self.delete(Delete())

    # Refusals.

    def expect_refusal(self, handle: Any, faults: set[Status]) -> None:
        with pytest.raises(self.refused) as caught:
            handle.receive()
        self.check_refusal(caught.value, faults)

    def expect_refused_call(self, faults: set[Status], method: str, request: Any) -> None:
        with pytest.raises(self.refused) as caught:
            self.wire.unary(method, request)
        self.check_refusal(caught.value, faults)

    def expect_refused_stream(
        self, faults: set[Status], method: str, requests: Sequence[Any], operation: Load | None = None
    ) -> None:
        if operation is not None and operation.fault == "unopened":
            requests = requests[1:]
        with pytest.raises(self.refused) as caught:
            self.wire.stream(method, requests)
        self.check_refusal(caught.value, faults)

    def check_refusal(self, refused: Any, faults: set[Status]) -> None:
        assert (refused.code, refused.reason) in faults, refused.text
        event(refused.reason)
