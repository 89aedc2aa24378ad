"""One session of a server, stepped by generated code alone, as in another language."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import grpc
import numpy as np
from google.protobuf import any_pb2

from conformance.stored_case import StoredCase, Tensors
from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire.v1 import state_pb2, status_pb2, step_pb2, tensor_pb2
from stepwire.v1.optimizer_service_pb2_grpc import OptimizerServiceStub

__all__ = ["NotServedError", "RemoteSession"]

_PATIENCE_SECONDS: Final = 60.0


class NotServedError(Exception):
    """The server refused an option with UNSUPPORTED_FEATURE; the text names the feature."""


def _feature(error: grpc.RpcError) -> str | None:
    """Return the feature that a refusal names; None for any other error."""
    assert isinstance(error, grpc.Call)
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            for detail in status_pb2.RichStatus.FromString(value).details:
                if (info := _error_info(detail)).reason == "UNSUPPORTED_FEATURE":
                    return str(info.metadata["feature"] or info.metadata["field"])
    return None


def _error_info(detail: any_pb2.Any) -> status_pb2.ErrorInfo:
    matches = detail.type_url.endswith("google.rpc.ErrorInfo")
    return status_pb2.ErrorInfo.FromString(detail.value) if matches else status_pb2.ErrorInfo()


def _call(method: Callable[..., Any], request: Any) -> Any:
    try:
        return method(request, timeout=_PATIENCE_SECONDS)
    except grpc.RpcError as error:
        if (feature := _feature(error)) is not None:
            raise NotServedError(feature) from None
        raise


def _float32(values: np.ndarray) -> bytes:
    return values.astype("<f4").tobytes()


def _bfloat16(values: np.ndarray) -> bytes:
    """Keep the upper halves: the lower halves of these cases' gradients are zero."""
    return (values.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()


def _float16(values: np.ndarray) -> bytes:
    return values.astype("<f2").tobytes()


_ENCODERS: Final[Mapping[int, Callable[[np.ndarray], bytes]]] = {
    tensor_pb2.DTYPE_UNSPECIFIED: _float32,
    tensor_pb2.DTYPE_FLOAT32: _float32,
    tensor_pb2.DTYPE_BFLOAT16: _bfloat16,
    tensor_pb2.DTYPE_FLOAT16: _float16,
}


class RemoteSession:
    """The session of a case, with its parameters loaded. A context manager that deletes it.

    Args:
        channel: the channel to the server.
        case: the case, with the config and the parameters of the session.

    Raises:
        NotServedError: the server does not serve an option of the case.
    """

    def __init__(self, channel: grpc.Channel, case: StoredCase) -> None:
        """Create the session."""
        self._stub, self._case = OptimizerServiceStub(channel), case
        request = pb.CreateSessionRequest(request_id=f"conformance-{secrets.token_hex(8)}", config=case.config)
        created = _call(self._stub.CreateSession, request)
        self._id, self._token, self._layout = created.session.session_id, created.attach_token, created.session.layout
        self._scale = created.session.loss_scale if created.session.HasField("loss_scale") else None
        self._encode = _ENCODERS[case.config.gradient_dtype]

    def __enter__(self) -> RemoteSession:
        """Load the parameters."""
        parameters = self._packed(self._case.initial)
        opening = state_pb2.LoadOpen(session_id=self._id, attach_token=self._token, load=1, slots=["param"])
        chunk = tensor_pb2.Chunk(offset=0, count=len(parameters))
        messages = [
            pb.LoadRequest(open=opening),
            pb.LoadRequest(slot="param", chunk=chunk, commit=True, payload=_float32(parameters)),
        ]
        _call(self._stub.Load, iter(messages))
        return self

    def __exit__(self, *exception: object) -> None:
        """Delete the session."""
        _call(self._stub.DeleteSession, pb.DeleteSessionRequest(session_id=self._id))

    @property
    def slots(self) -> Sequence[str]:
        """The state arrays that the server keeps."""
        return list(self._layout.slots)

    def step(self, number: int, *, reply: bool) -> tuple[step_pb2.StepResult, Tensors]:
        """Apply a step with the case's gradient; return the result, and the parameters with `reply`."""
        special = self._case.special(number)
        begin = special.begin
        begin.step = number
        begin.reply.mode = step_pb2.REPLY_MODE_PARAMETERS if reply else step_pb2.REPLY_MODE_NONE
        payload = self._encode(self._gradient(number, special.factor, special.first_element, begin.missing_tensors))
        request = pb.StepRequest(session_id=self._id, attach_token=self._token, begin=begin, payload=payload)
        response = _call(self._stub.Step, request)
        if response.result.telemetry.HasField("loss_scale"):
            self._scale = response.result.telemetry.loss_scale
        return response.result, self._unpacked(np.frombuffer(response.payload, "<f4")) if reply else {}

    def _gradient(self, number: int, factor: float, first: float | None, missing: Sequence[int]) -> np.ndarray:
        """Return the flat gradient as it travels; a missing tensor is NaN, which the server must not read."""
        cycle = {name: values[(number - 1) % len(values)] for name, values in self._case.gradients.items()}
        flat = self._packed(cycle) * np.float32(factor * (self._scale or 1.0))
        for index in missing:
            placement = self._layout.tensors[index]
            flat[placement.offset : placement.offset + placement.count] = np.nan
        if first is not None:
            flat[self._layout.tensors[0].offset] = first
        return flat

    def _packed(self, tensors: Tensors) -> np.ndarray:
        flat = np.zeros(self._layout.size, np.float32)
        for placement in self._layout.tensors:
            flat[placement.offset : placement.offset + placement.count] = tensors[placement.spec.name].ravel()
        return flat

    def _unpacked(self, flat: np.ndarray) -> Tensors:
        return {
            placement.spec.name: flat[placement.offset : placement.offset + placement.count].reshape(
                tuple(placement.spec.shape)
            )
            for placement in self._layout.tensors
        }

    def pull(self, slots: Sequence[str]) -> tuple[dict[str, Tensors], dict[str, int]]:
        """Return state, and the number of updates of each tensor."""
        arrays = {slot: np.full(self._layout.size, np.nan, np.float32) for slot in slots}
        counts: dict[str, int] = {}
        for message in self._pulled(slots):
            if message.HasField("header"):
                names = [placement.spec.name for placement in self._layout.tensors]
                counts = dict(zip(names, message.header.tensor_steps, strict=True))
            else:
                start, end = message.chunk.offset, message.chunk.offset + message.chunk.count
                arrays[message.slot][start:end] = np.frombuffer(message.payload, "<f4")
        return {slot: self._unpacked(array) for slot, array in arrays.items()}, counts

    def _pulled(self, slots: Sequence[str]) -> Iterator[pb.PullResponse]:
        return iter(_call(self._stub.Pull, pb.PullRequest(session_id=self._id, slots=slots)))
