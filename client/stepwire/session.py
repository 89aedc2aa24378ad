"""The client's end of a session: steps by number, pulls, loads, and coming back after a broken connection."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from stepwire.attachment import Attachment, StepCall
from stepwire.calls import Calls
from stepwire.codecs import FLOAT32, dtype_from_wire, dtype_named, dtype_to_wire
from stepwire.errors import (
    InvalidRequestError,
    SessionNotFoundError,
    UnavailableError,
    UnsupportedFeatureError,
)
from stepwire.packing import Arrays, Container, Flat, Packer
from stepwire.results import SessionInfo, SessionState, StepResult
from stepwire.retry import Deadline
from stepwire.transfer import load_messages, read_pull
from stepwire.v1 import optimizer_pb2, session_pb2, step_pb2
from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire.wire import (
    hyperparameters_from_wire,
    layout_from_wire,
    optimizer_from_wire,
    overrides_to_wire,
)

__all__ = ["Overrides", "Session"]

Overrides: TypeAlias = Mapping[str, Any] | Sequence[Mapping[str, Any]]
"""Hyper-parameters of one step: one mapping for all groups, or one a group."""

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

    def __init__(self, calls: Calls, message: session_pb2.Session, token: int, chunk_bytes: int, *, as_list: bool):
        """Speak for a session that the server described; token 0 takes its slot when first needed."""
        self.session_id = message.session_id
        self._calls = calls
        self._packer = Packer(layout_from_wire(message.layout))
        self._slots = tuple(message.layout.slots)
        self._optimizer = optimizer_from_wire(message.config.optimizer, "optimizer")
        tensors = self._packer.layout.tensors
        self._frozen = frozenset(index for index, tensor in enumerate(tensors) if tensor.spec.frozen)
        keeps = message.config.gradient.missing_gradient == optimizer_pb2.MISSING_GRADIENT_POLICY_KEEP
        self._optional = frozenset(tensor.spec.name for tensor in tensors if keeps or tensor.spec.frozen)
        self._loss_scale = message.loss_scale if message.HasField("loss_scale") else None
        self._groups = [hyperparameters_from_wire(group.overrides) for group in message.config.groups]
        self._gradient_dtype = dtype_from_wire(message.config.gradient_dtype, FLOAT32, "gradient_dtype")
        self._reply_dtype = dtype_from_wire(message.config.reply_dtype, FLOAT32, "reply_dtype")
        self._as_list = as_list
        self._chunk_bytes = chunk_bytes
        self._attachment = Attachment(calls.channel, message, token, self._packer, chunk_bytes)
        self._last_result: step_pb2.StepResult | None = None  # decoded when asked for
        self._load_in_doubt = 0  # the number of a load that failed, and may have been committed
        self._lock = threading.RLock()

    @property
    def applied_step(self) -> int:
        """The last step known to be applied; the next `step` is the one after it."""
        return self._attachment.applied_step

    @property
    def last_result(self) -> StepResult | None:
        """What the last step did; None before the first."""
        return None if self._last_result is None else StepResult.from_wire(self._last_result)

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
        out: Container | None = None,
        timeout: float | None = None,
    ) -> Container:
        """Apply one optimizer step, exactly once, and return the new parameters.

        Lost connections are mended and the step is repeated by its number until `timeout`; the server applies it
        once however often it arrives.

        Args:
            gradients: one array a tensor, in the shapes of creation: float32, bfloat16 or float16. Frozen tensors need
                none; with missing_gradient "keep" any may be left out or None, and stay as they are.
            lr: the learning rate of this step, for all groups; overrides a schedule.
            hyperparameters: other values for this step: one mapping, or one a group.
            loss_scale: what the gradients were multiplied by; the server divides by it first.
            gradient_dtype: how gradients travel; default as created.
            reply_dtype: how parameters travel, and the dtype of the answer; default as created.
            out: arrays to write the parameters into instead of new ones; when an error is raised their content is
                undefined.
            timeout: seconds for the step with all its repetitions; default the client's.

        Returns:
            The parameters, as a dict or list like `gradients`; `out` if given. `last_result` has the telemetry.

        Raises:
            InvalidRequestError: names, shapes, dtypes or values are wrong; nothing was sent or applied.
            NonFiniteGradientError: NaN or Inf under the policy `reject`; nothing was applied.
            FencedError: another client took the session's slot.
            SessionNotFoundError: the session is gone; `metadata["last_known_step"]`.
            StepMismatchError: the session moved without this client.
            UnavailableError: no connection within the timeout; call `step` again with the same gradients.
        """
        with self._lock:
            call, answer = self._step_call(gradients, lr, hyperparameters, gradient_dtype, reply_dtype, out)
            if loss_scale is not None:
                call.begin.loss_scale = loss_scale
            deadline = self._calls.deadline(timeout)
            if self._attachment.token == 0:  # only who holds the slot knows which step is the next
                self._repeat(self._attachment.attach, deadline)
            call.begin.step = self._attachment.applied_step + 1
            self._last_result = self._repeat(lambda left: self._attachment.take_step(call, left), deadline)
            return answer

    def attach(self, *, transport: str = "auto", take_over: bool = False, timeout: float | None = None) -> None:
        """Attach a stream now instead of at the first step.

        Args:
            transport: `"auto"` or `"tcp"`; this version moves bulk data over gRPC only.
            take_over: take the slot from whoever holds it, and fence them.
            timeout: seconds.

        Raises:
            FencedError: another client took the slot, and `take_over` is not set.
            UnsupportedFeatureError: the transport is not served.
            StepwireError: as `step`.
        """
        if transport not in ("auto", "tcp"):
            raise UnsupportedFeatureError(
                f"transport: {transport!r} is not served by this version; use 'auto' or 'tcp'",
                metadata={"field": "transport", "feature": f"transport_{transport}"},
            )
        with self._lock:
            if take_over:
                self.detach()
                self._attachment.token = 0
            self._repeat(self._attachment.attach, self._calls.deadline(timeout))

    def detach(self) -> None:
        """Close the stream and leave the session on the server. Detaching twice is harmless."""
        with self._lock:
            self._attachment.detach()

    # --- state -------------------------------------------------------------------------------------------

    def pull(
        self, *, average: bool = False, dtype: npt.DTypeLike = np.float32, timeout: float | None = None
    ) -> Container:
        """Return the current parameters.

        Args:
            average: their moving average instead, of a session created with `parameter_average_decay`.
            dtype: of the answer.
            timeout: seconds.

        Raises:
            InvalidRequestError: the session keeps no average.
            StepwireError: the session is gone, not loaded, or was stepping all the time until the timeout.
        """
        wire_dtype = dtype_named(dtype, "dtype")
        answer = self._packer.empty(wire_dtype, as_list=self._as_list)
        self._pull({_AVERAGE if average else _PARAM: self._packer.targets(answer, "out")}, wire_dtype, timeout)
        return answer

    def state(self, *, timeout: float | None = None) -> SessionState:
        """Return everything: parameters, moments and step counts, all as of one step.

        Raises:
            StepwireError: as `pull`.
        """
        slots = {slot: self._packer.empty(FLOAT32, as_list=False) for slot in self._slots}
        targets = {slot: self._packer.targets(arrays, "out") for slot, arrays in slots.items()}
        header = self._pull(targets, FLOAT32, timeout)
        names = [tensor.spec.name for tensor in self._packer.layout.tensors]
        return SessionState(
            step=header.step,
            slots={slot: dict(arrays) for slot, arrays in slots.items() if isinstance(arrays, dict)},
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
        self._load({_PARAM: self._packer.ordered(parameters, "parameters")}, pb.LoadOpen(), timeout)

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
        opening = pb.LoadOpen(step=state.step, tensor_steps=steps)
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

    def _pull(self, targets: Mapping[str, Flat], dtype: np.dtype[Any], timeout: float | None) -> pb.PullHeader:
        request = pb.PullRequest(
            session_id=self.session_id,
            slots=targets,
            dtype=dtype_to_wire(dtype),
            chunk_bytes=self._chunk_bytes,
        )
        header: pb.PullHeader = self._repeat(
            lambda deadline: self._calls.download(
                "Pull", request, lambda messages: read_pull(messages, self._packer, dtype, targets), deadline
            ),
            self._calls.deadline(timeout),
        )
        return header

    def _load(self, sources: Mapping[str, Flat], opening: pb.LoadOpen, timeout: float | None) -> None:
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

    def _send_load(self, sources: Mapping[str, Flat], opening: pb.LoadOpen, deadline: Deadline) -> bool:
        """Send the next load until it is committed; True if the server says that it had been before."""
        opening.session_id, opening.attach_token = self.session_id, self._attachment.token
        opening.load = self._attachment.applied_load + 1
        try:
            answer: pb.LoadResponse = self._repeat(
                lambda left: self._calls.upload(
                    "Load", load_messages(opening, self._packer, sources, self._chunk_bytes), pb.LoadResponse, left
                ),
                deadline,
            )
        except BaseException:
            self._load_in_doubt = opening.load
            raise
        self._attachment.loaded(opening.load, answer.session.applied_step)
        return answer.replayed

    def _repeat(self, attempt: Callable[[Deadline], _T], deadline: Deadline) -> _T:
        try:
            return self._calls.retry.call(attempt, deadline)
        except SessionNotFoundError as error:
            raise SessionNotFoundError(
                f"{error} (the last step this client knows to be applied is {self.applied_step})",
                metadata={**error.metadata, "last_known_step": self.applied_step},
            ) from None

    def _step_call(
        self,
        gradients: Arrays,
        lr: float | None,
        hyperparameters: Overrides | None,
        gradient_dtype: npt.DTypeLike | None,
        reply_dtype: npt.DTypeLike | None,
        out: Container | None,
    ) -> tuple[StepCall, Container]:
        """Check the arguments of a step; return what to send and where the answer goes."""
        sent = dtype_named(gradient_dtype, "gradient_dtype") if gradient_dtype else self._gradient_dtype
        received = dtype_named(reply_dtype, "reply_dtype") if reply_dtype else self._reply_dtype
        begin = step_pb2.StepBegin(
            epoch=self._attachment.epoch,
            gradient_dtype=dtype_to_wire(sent),
            reply_dtype=dtype_to_wire(received),
            hyperparameters=self._overrides(lr, hyperparameters),
            reply_chunk_bytes=self._chunk_bytes,
        )
        flat, missing = self._packer.present(gradients, "gradients", self._optional)
        begin.missing_tensors.extend(sorted(missing - self._frozen))
        answer = self._packer.empty(received, as_list=not isinstance(gradients, Mapping)) if out is None else out
        return StepCall(begin, flat, sent, self._packer.targets(answer, "out"), received, missing), answer

    def _overrides(self, lr: float | None, overrides: Overrides | None) -> list[Any]:
        if overrides is None and lr is None:
            return []
        per_group = (
            [overrides or {}] * len(self._groups) if overrides is None or isinstance(overrides, Mapping) else overrides
        )
        if len(per_group) != len(self._groups):
            raise InvalidRequestError(
                f"hyperparameters: {len(per_group)} entries for {len(self._groups)} groups",
                metadata={"field": "hyperparameters"},
            )
        shared = {} if lr is None else {"lr": lr}
        return [
            overrides_to_wire(self._optimizer, group, {**shared, **values}, f"hyperparameters[{index}]")
            for index, (group, values) in enumerate(zip(self._groups, per_group, strict=True))
        ]
