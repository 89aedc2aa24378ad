"""The client's end of a session: steps by number, pulls, loads, and coming back after a broken connection."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt

from stepwire.arrays.packing import Arrays, Flat, Packer
from stepwire.arrays.trees import Structure, Tree, flattened, is_nested
from stepwire.connection.channel import Calls
from stepwire.connection.retry import Deadline
from stepwire.errors import (
    InvalidRequestError,
    Reason,
    SessionNotFoundError,
    UnavailableError,
    UnsupportedFeatureError,
)
from stepwire.links.pull_and_load import load_messages, read_pull
from stepwire.links.remote import Attachment
from stepwire.results import SessionConfig, SessionInfo, SessionState, StepResult, TransportChoice
from stepwire.steps.background import BackgroundSteps
from stepwire.steps.build import OnReady, Overrides, Reply, StepBuilder, StepOptions
from stepwire.steps.shared import SharedArrays
from stepwire.transports.available import asked_transport
from stepwire.transports.route import Route, Router
from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire.v1 import session_pb2, state_pb2, step_pb2
from stepwire.wire.channel_options import chunk_bytes_for
from stepwire.wire.dtypes import FLOAT32, dtype_named, dtype_to_wire
from stepwire.wire.messages import layout_from_wire

__all__ = ["Session"]

_T = TypeVar("_T")
_PARAM = "param"
_AVERAGE = "param_average"
_CLOSE_TIMEOUT_SECONDS = 5.0


class Session:
    """One optimizer on the server. Made by `Client.create_session` or `Client.session`.

    Thread-safe; steps are taken one at a time. As a context manager it ends the session on the server; `detach`
    leaves it there for somebody else, or for later.

    Attributes:
        session_id: who knows it may use the session.
    """

    def __init__(
        self,
        calls: Calls,
        router: Router,
        message: session_pb2.Session,
        token: int,
        chunk_bytes: int,
        *,
        structure: Structure,
        error_feedback: bool = False,
    ) -> None:
        """Speak for a session that the server described; token 0 takes its slot when first needed.

        `structure` is what parameters come back in where no arrays of the user's say another.
        """
        self.session_id = message.session_id
        self._calls = calls
        self._packer = Packer(layout_from_wire(message.layout))
        self._slots = tuple(message.layout.slots)
        self._config = message.config
        self._loss_scale = message.loss_scale if message.HasField("loss_scale") else None
        self._structure = structure
        chunk_bytes = chunk_bytes_for(self._packer.layout.size * FLOAT32.itemsize, chunk_bytes)
        self._chunk_bytes = chunk_bytes
        self._steps = StepBuilder(message, self._packer, chunk_bytes, error_feedback=error_feedback)
        self._queue: BackgroundSteps | None = None
        self._route = Route(router, message.session_id)
        self._attachment = Attachment(self._route, message, token, self._packer, chunk_bytes)
        self._last_result: step_pb2.StepResult | None = None  # decoded when asked for
        self._load_in_doubt = 0  # the number of a load that failed, and may have been committed
        self._lock = threading.RLock()
        self._lock_of_queue = threading.Lock()

    @property
    def applied_step(self) -> int:
        """The last step known to be applied; the next `step` is the one after it."""
        return self._attachment.applied_step

    @property
    def last_result(self) -> StepResult | None:
        """What the last step did; None before the first."""
        return None if self._last_result is None else StepResult.from_wire(self._last_result)

    @property
    def transport(self) -> TransportChoice | None:
        """Which way gradients and parameters go, and why no better one; None before the first stream is attached."""
        return self._route.choice

    @property
    def loss_scale(self) -> float | None:
        """What the next gradient must be multiplied by, where the session scales losses by itself; else None."""
        last = self._last_result
        return (
            last.telemetry.loss_scale
            if last is not None and last.telemetry.HasField("loss_scale")
            else self._loss_scale
        )

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor, by name."""
        return {tensor.spec.name: tensor.spec.shape for tensor in self._packer.layout.tensors}

    @property
    def slots(self) -> tuple[str, ...]:
        """What the server holds for each tensor, by the names that `state` has: `"param"`, `"exp_avg"` and so on."""
        return self._slots

    @property
    def configuration(self) -> SessionConfig:
        """What the session was created as; useful where somebody else created it."""
        return SessionConfig.from_wire(self._config)

    # --- steps -------------------------------------------------------------------------------------------

    def step(
        self,
        gradients: Arrays,
        *,
        lr: float | None = None,
        hyperparameters: Overrides | None = None,
        loss_scale: float | None = None,
        gradient_dtype: npt.DTypeLike | None = None,
        reply_dtype: npt.DTypeLike | None = None,
        reply: Reply = "parameters",
        reply_first: Sequence[str] = (),
        on_tensor: OnReady | None = None,
        overlap: bool = False,
        out: Tree | None = None,
        timeout: float | None = None,
    ) -> Tree:
        """Apply one optimizer step, exactly once, and return the new parameters.

        Lost connections are mended and the step is repeated by its number until `timeout`; the server applies it
        once however often it arrives.

        Args:
            gradients: one array a tensor, in the shapes of creation: float32, bfloat16 or float16; a dict, a list, or a
                tree of them. Frozen tensors need none; with missing_gradient "keep" any may be left out or None, and
                stay as they are; None in the place of a branch leaves out all that is in it.
            lr: the learning rate of this step, for all groups; overrides a schedule.
            hyperparameters: other values for this step: one mapping, or one a group.
            loss_scale: what the gradients were multiplied by; the server divides by it first.
            gradient_dtype: how gradients travel, "int8" included; default as created.
            reply_dtype: how parameters travel, and the dtype of the answer; default as created.
            reply: `"parameters"`; `"none"`: no answer, `pull` when they are needed; `"changed"`, for bfloat16 answers:
                the same parameters, of which only those travel that changed, where that is less. The client holds
                them in bfloat16 for that.
            reply_first: names of tensors, or of branches, whose parameters come back first, in this order.
            on_tensor: called with the name and the new values of each tensor as soon as they have arrived, in the
                thread that takes the step; again where a broken connection has the answer repeated.
            overlap: the server applies each part of the gradient as it arrives instead of all at the end, which takes
                the time of receiving and answering together. For sessions without clipping by norm and with
                `non_finite="allow"`. A step that fails may then be half applied: take it again with the same gradients
                until it succeeds; nothing else is possible before.
            out: arrays to write the parameters into instead of new ones; when an error is raised their content is
                undefined. What `shared_parameters` returned stands for the same as it is after the step.
            timeout: seconds for the step with all its repetitions; default the client's.

        Returns:
            The parameters, nested like `gradients`, or, where those leave tensors out, as the session's were at
            creation; `out` if given; with reply "none" an empty dict, list or tuple. `last_result` has the telemetry.

        Raises:
            InvalidRequestError: names, shapes, dtypes or values are wrong; nothing was sent or applied.
            NonFiniteGradientError: NaN or Inf under the policy `reject`; nothing was applied.
            FencedError: another client took the session's slot.
            SessionNotFoundError: the session is gone; `metadata["last_known_step"]`.
            SessionNotReadyError: a step with `overlap` was broken off half applied, and this is not that step.
            StepMismatchError: the session moved without this client.
            UnavailableError: no connection within the timeout; call `step` again with the same gradients.
        """
        options = StepOptions(
            lr=lr,
            hyperparameters=hyperparameters,
            loss_scale=loss_scale,
            gradient_dtype=gradient_dtype,
            reply_dtype=reply_dtype,
            reply=reply,
            reply_first=reply_first,
            on_tensor=on_tensor,
            overlap=overlap,
            out=cast(Any, out),  # a tree is taken apart before it is built into a call
        )
        return self.take(gradients, options, timeout)

    def take(self, gradients: Arrays, options: StepOptions, timeout: float | None = None) -> Tree:
        """Take a step whose options are a record; see `step`."""
        if is_nested(gradients) or is_nested(options.out):
            return self._take_nested(gradients, options, timeout)
        with self._lock:
            call, answer = self._steps.build(gradients, options)
            deadline = self._calls.deadline(timeout)
            if self._attachment.token == 0:  # only who holds the slot knows which step is the next
                self._repeat(self._attachment.attach, deadline)
            call.begin.step = self._attachment.applied_step + 1
            try:
                result = self._repeat(lambda left: self._attachment.take_step(call, left), deadline)
            except BaseException:
                self._steps.failed(call)
                raise
            self._steps.applied(call, result)
            self._last_result = result
            if answer is not None:
                return answer
            return {} if isinstance(gradients, Mapping) else []

    def _take_nested(self, gradients: Arrays, options: StepOptions, timeout: float | None) -> Tree:
        """Take a step of which something nests: by the names, and back."""
        given = flattened(gradients, "gradients")
        out = None if options.out is None else flattened(options.out, "out").named
        answer = self.take(given.named, dataclasses.replace(options, out=out), timeout)
        if options.out is not None and answer is out:
            return options.out
        assert isinstance(answer, dict)
        return given.structure.restored(answer, self._structure)

    def step_async(
        self, gradients: Arrays, *, steps_in_flight: int = 2, timeout: float | None = None, **options: Any
    ) -> Future[Tree]:
        """Take a step in the background, so that the next batch can be prepared meanwhile.

        Steps are taken one after another in the order of the calls. The gradients, and `out`, must not change until
        the future is done. Where a step fails, those waiting behind it are cancelled.

        Args:
            gradients: as for `step`.
            steps_in_flight: how many may be under way or waiting; this call waits while there are so many. Fixed by
                the first call.
            timeout: seconds for the step itself, without the time it waits for others.
            options: the other arguments of `step`.

        Returns:
            A future of what `step` returns or raises.

        Raises:
            InvalidRequestError: `steps_in_flight` is not a positive integer.
            TypeError: an option that `step` does not have.
        """
        chosen = StepOptions(**options)
        with self._lock_of_queue:
            if self._queue is None:
                self._queue = BackgroundSteps(steps_in_flight)
            queue = self._queue
        return queue.submit(lambda: self.take(gradients, chosen, timeout))

    def attach(self, *, transport: str | None = None, take_over: bool = False, timeout: float | None = None) -> None:
        """Attach a stream now instead of at the first step.

        Args:
            transport: as `stepwire.connect` takes it, for this session from now on; None leaves it as it is.
            take_over: take the slot from whoever holds it, and fence them.
            timeout: seconds.

        Raises:
            FencedError: another client took the slot, and `take_over` is not set.
            UnsupportedFeatureError: the transport cannot be had.
            StepwireError: as `step`.
        """
        asked = None if transport is None else asked_transport(transport)
        with self._lock:
            before = self._route.asked
            if asked is not None and asked != before:
                self.detach()
                self._route.ask(asked)
            if take_over:
                self.detach()
                self._attachment.token = 0
            try:
                self._repeat(self._attachment.attach, self._calls.deadline(timeout))
            except UnsupportedFeatureError:
                self._route.ask(before)
                raise

    def detach(self) -> None:
        """Close the stream and leave the session on the server. Detaching twice is harmless."""
        with self._lock:
            self._attachment.detach()

    # --- shared memory -----------------------------------------------------------------------------------

    def shared_gradients(self, *, timeout: float | None = None) -> Tree:
        """Return writable arrays in the memory that the server takes gradients from, attaching first if need be.

        `step` sends these as they are, without a copy. They may be written whenever no step is under way, and start as
        zeros. After a broken connection they are ordinary arrays, which a step copies: ask again for new ones.

        Over `cuda_ipc` they are views of device memory, which `torch.as_tensor(view, device="cuda")` and
        `cupy.asarray(view)` take without a copy.

        Args:
            timeout: seconds.

        Raises:
            UnsupportedFeatureError: the session is not attached over shared memory; the message says why.
            StepwireError: as `attach`.
        """
        return self._structure.restored(self._shared(timeout).gradients())

    def shared_parameters(self, *, private: bool = False, timeout: float | None = None) -> Tree:
        """Return read-only arrays that show the parameters where the server puts them, attaching first if need be.

        Each step changes them in place, also while it is being taken; given as `out` they make its answer no copy. What
        was loaded, or stepped with other dtypes, `overlap` or `reply="changed"`, shows after the next step without, at
        the latest. After a broken connection they may show what was: take those that `step` returns, or ask again.

        Over `cuda_ipc` they are views of device memory, as gradients are.

        Args:
            private: arrays that may be written. What is written is this process's own and hides what the server puts
                there, page by page, until `forget_writes`; `load` it, and it is the server's too.
            timeout: seconds.

        Raises:
            UnsupportedFeatureError: the session is not attached over shared memory; the message says why.
            StepwireError: as `attach`.
        """
        return self._structure.restored(self._shared(timeout).parameters(private=private))

    def forget_writes(self) -> None:
        """Show the server's parameters in all that `shared_parameters` returned, also where `private` was written."""
        with self._lock:
            if self._attachment.shared is not None:
                self._attachment.shared.forget_writes()

    def _shared(self, timeout: float | None) -> SharedArrays:
        with self._lock:
            self._repeat(self._attachment.attach, self._calls.deadline(timeout))
            if self._attachment.shared is None:
                choice = self._route.choice
                reason = "" if choice is None else choice.reasons.get("shm", f"it uses {choice.name!r}")
                raise UnsupportedFeatureError(
                    f"the session shares no memory with its server: {reason}; pass arrays of your own to `step`",
                    metadata={"field": "transport", "feature": "transport_shm"},
                )
            return self._attachment.shared

    # --- state -------------------------------------------------------------------------------------------

    def pull(self, *, average: bool = False, dtype: npt.DTypeLike = np.float32, timeout: float | None = None) -> Tree:
        """Return the current parameters, nested as at creation.

        For a session that was found by its id that is a flat dict of names; see `Client.session`.

        Args:
            average: their moving average instead, of a session created with `parameter_average_decay`.
            dtype: of the answer.
            timeout: seconds.

        Raises:
            InvalidRequestError: the session keeps no average.
            StepwireError: the session is gone, not loaded, or was stepping all the time until the timeout.
        """
        wire_dtype = dtype_named(dtype, "dtype")
        named, targets = self._packer.allocate_named(wire_dtype)
        self._pull({_AVERAGE if average else _PARAM: targets}, wire_dtype, timeout)
        return self._structure.restored(named)

    def state(self, *, timeout: float | None = None) -> SessionState:
        """Return everything: parameters, moments and step counts, all as of one step.

        Raises:
            StepwireError: as `pull`.
        """
        rooms = {slot: self._packer.allocate_named(FLOAT32) for slot in self._slots}
        header = self._pull({slot: targets for slot, (_, targets) in rooms.items()}, FLOAT32, timeout)
        names = [tensor.spec.name for tensor in self._packer.layout.tensors]
        return SessionState(
            step=header.step,
            slots={slot: named for slot, (named, _) in rooms.items()},
            tensor_steps=dict(zip(names, header.tensor_steps, strict=True)),
            loss_scale=(
                (header.loss_scale.scale, header.loss_scale.clean_steps) if header.HasField("loss_scale") else None
            ),
        )

    def load(self, parameters: Arrays, *, timeout: float | None = None) -> None:
        """Replace the parameters; moments and step counts stay.

        Raises:
            InvalidRequestError: names, shapes or dtypes are wrong; nothing was changed.
            StepwireError: as `step`.
        """
        named = flattened(parameters, "parameters").named
        self._load({_PARAM: self._packer.ordered(named, "parameters")}, state_pb2.LoadOpen(), timeout)

    def load_state(self, state: SessionState, *, timeout: float | None = None) -> None:
        """Replace everything by what `state` returned, here or from another session of the same tensors.

        The next step is `state.step + 1`. Step numbers never go back, so to return to an earlier state, load it
        into a new session.

        Raises:
            InvalidRequestError: slots, names, shapes or dtypes do not fit; nothing was changed.
            StepMismatchError: the session is beyond `state.step`.
            StepwireError: as `step`.
        """
        if set(state.slots) != set(self._slots):
            raise InvalidRequestError(
                f"state.slots: has {sorted(state.slots)}, the session has {sorted(self._slots)}",
                metadata={"field": "state.slots"},
            )
        sources = {slot: self._packer.ordered(state.slots[slot], f"state.slots[{slot!r}]") for slot in self._slots}
        missing = [name for name in self.shapes if name not in state.tensor_steps]
        if missing:
            raise InvalidRequestError(
                f"state.tensor_steps: {missing[0]!r} is missing", metadata={"field": "state.tensor_steps"}
            )
        steps = [state.tensor_steps[tensor.spec.name] for tensor in self._packer.layout.tensors]
        opening = state_pb2.LoadOpen(step=state.step, tensor_steps=steps)
        if state.loss_scale is not None:
            opening.loss_scale.scale, opening.loss_scale.clean_steps = state.loss_scale
        self._load(sources, opening, timeout)
        if state.loss_scale is not None:
            self._loss_scale, self._last_result = state.loss_scale[0], None

    def info(self, *, timeout: float | None = None) -> SessionInfo:
        """Ask the server how the session stands.

        Raises:
            SessionNotFoundError: it is gone.
        """
        answer = self._calls.unary(
            "GetSession", pb.GetSessionRequest(session_id=self.session_id), pb.GetSessionResponse, timeout
        )
        return SessionInfo.from_wire(answer.session)

    def close(self) -> None:
        """End the session on the server and free its memory there. Closing twice is harmless.

        A server that cannot be reached ends it when its lease runs out.
        """
        with self._lock_of_queue:
            queue, self._queue = self._queue, None
        if queue is not None:
            queue.close()
        self.detach()
        try:
            self._calls.unary(
                "DeleteSession",
                pb.DeleteSessionRequest(session_id=self.session_id),
                pb.DeleteSessionResponse,
                _CLOSE_TIMEOUT_SECONDS,
            )
        except (SessionNotFoundError, UnavailableError, ValueError):  # ValueError: the channel is closed
            pass

    def __enter__(self) -> Session:
        """Use the session for a block and end it after."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()

    # --- with retries ------------------------------------------------------------------------------------

    def _pull(self, targets: Mapping[str, Flat], dtype: np.dtype[Any], timeout: float | None) -> state_pb2.PullHeader:
        request = pb.PullRequest(
            session_id=self.session_id,
            slots=targets,
            dtype=dtype_to_wire(dtype),
            chunk_bytes=self._chunk_bytes,
        )
        header: state_pb2.PullHeader = self._repeat(
            lambda deadline: self._route.way(deadline).calls.download(
                "Pull", request, lambda messages: read_pull(messages, self._packer, dtype, targets), deadline
            ),
            self._calls.deadline(timeout),
        )
        return header

    def _load(self, sources: Mapping[str, Flat], opening: state_pb2.LoadOpen, timeout: float | None) -> None:
        with self._lock:
            deadline = self._calls.deadline(timeout)
            if self._attachment.token == 0 or self._attachment.in_doubt:
                self._repeat(self._attachment.attach, deadline)
            keeps_step = not opening.HasField("step")
            opening.slots.extend(sources)
            while True:
                if keeps_step:  # said all the same, so that a load that arrives after a step is refused
                    opening.step = self._attachment.step_on_server
                replayed = self._send_load(sources, opening, deadline)
                if not replayed or opening.load != self._load_in_doubt:
                    return
                # An earlier call that failed had been committed after all, and this one was taken for its repetition.

    def _send_load(self, sources: Mapping[str, Flat], opening: state_pb2.LoadOpen, deadline: Deadline) -> bool:
        """Send the next load until it is committed; True if the server says that it had been before."""
        opening.session_id, opening.attach_token = self.session_id, self._attachment.token
        opening.load = self._attachment.applied_load + 1
        try:
            answer: pb.LoadResponse = self._repeat(
                lambda left: self._route.way(left).calls.upload(
                    "Load", load_messages(opening, self._packer, sources, self._chunk_bytes), pb.LoadResponse, left
                ),
                deadline,
            )
        except BaseException:
            self._load_in_doubt = opening.load
            raise
        self._attachment.loaded(opening.load, answer.session.applied_step)
        self._steps.loaded()
        return answer.replayed

    def _repeat(self, attempt: Callable[[Deadline], _T], deadline: Deadline) -> _T:
        try:
            return self._calls.retry.call(lambda left: self._on_route(attempt, left), deadline)
        except SessionNotFoundError as error:
            raise SessionNotFoundError(
                f"{error} (the last step this client knows to be applied is {self.applied_step})",
                metadata={**error.metadata, "last_known_step": self.applied_step},
            ) from None

    def _on_route(self, attempt: Callable[[Deadline], _T], deadline: Deadline) -> _T:
        try:
            return attempt(deadline)
        except UnavailableError as error:
            if error.reason == Reason.UNREACHABLE:
                self._route.lost()
            raise
