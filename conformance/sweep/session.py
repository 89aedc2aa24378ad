"""One session of stepwire's server, stepped in this process without gRPC."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from conformance.inputs import Tensors
from stepwire.optimizers import Optimizer
from stepwire.optimizers.gradient_treatment import GradientTreatment, treatment_to_wire
from stepwire.v1 import session_pb2, tensor_pb2
from stepwire.wire.dtypes import FLOAT32
from stepwire.wire.messages import optimizer_to_wire
from stepwire_server.config import ServerConfig
from stepwire_server.devices.budget import MemoryBudget
from stepwire_server.devices.pool import Device
from stepwire_server.engines import Engine
from stepwire_server.engines.protocol import PARAM
from stepwire_server.records.load_request import LoadRequest
from stepwire_server.records.step_request import StepRequest
from stepwire_server.records.step_result import StepResult
from stepwire_server.rpc.decode_config import decode_session_config
from stepwire_server.sessions.session import Session

__all__ = ["LocalSession"]

_BUDGET_BYTES: Final = 1 << 30
_REPLY_ELEMENTS: Final = 1 << 20
_PRECISIONS: Final = {
    "float32": session_pb2.STATE_PRECISION_FLOAT32,
    "bfloat16": session_pb2.STATE_PRECISION_BFLOAT16_MOMENTS,
    "int8": session_pb2.STATE_PRECISION_INT8_MOMENTS,
}


class _Writer:
    """Receives a reply in one array; a `ReplyWriter`."""

    def __init__(self, values: np.ndarray) -> None:
        """Write the reply into `values`."""
        self._values = values

    def buffer(self, offset: int, count: int) -> np.ndarray:
        """See `ReplyWriter.buffer`."""
        return self._values[offset : offset + count]

    def before(self) -> np.ndarray:
        """See `ReplyWriter.before`: no step here has a base."""
        raise AssertionError("a reply without a base")

    def flush(self) -> None:
        """See `ReplyWriter.flush`."""


class LocalSession:
    """The session of one case. A context manager, which ends it.

    Attributes:
        values: the parameters after the last step, flat, with zeros between tensors.
        result: the result of the last step; None before the first.
    """

    def __init__(
        self, engine: Engine, optimizer: Optimizer, initial: Tensors, treatment: Mapping[str, Any], precision: str
    ) -> None:
        """Create a session and load its parameters.

        Args:
            engine: the engine to step on.
            optimizer: the rule with its numbers.
            initial: the parameters by tensor.
            treatment: the options of `GradientTreatment`.
            precision: that of the moments, "float32", "bfloat16" or "int8".
        """
        message = session_pb2.SessionConfig(
            tensors=[tensor_pb2.TensorSpec(name=name, shape=values.shape) for name, values in initial.items()],
            optimizer=optimizer_to_wire(optimizer),
            gradient=treatment_to_wire(GradientTreatment(**treatment)),
            state_precision=_PRECISIONS[precision],
        )
        self._config = decode_session_config(message, ServerConfig())
        device = Device(engine, MemoryBudget(_BUDGET_BYTES))
        self._session = Session("0" * 32, self._config, device, epoch=1, clock=lambda: 0.0)
        self._holder = self._session.acquire()
        config = self._config
        self._request = StepRequest(0, 0, FLOAT32, FLOAT32, True, _REPLY_ELEMENTS, config.groups)
        self.values = np.zeros(config.layout.size, np.float32)
        self.result: StepResult | None = None
        self._load(self.packed(initial))

    def packed(self, tensors: Tensors) -> np.ndarray:
        """Return tensors in the places of the session's layout, along the last axis."""
        (first, *_) = tensors.values()
        flat = np.zeros((*first.shape[:-1], self._config.layout.size), np.float32)
        for tensor in self._config.layout.tensors:
            flat[..., tensor.offset : tensor.end] = tensors[tensor.spec.name]
        return flat

    def unpacked(self, flat: np.ndarray) -> Tensors:
        """Return the tensors of a flat array."""
        return {tensor.spec.name: flat[tensor.offset : tensor.end] for tensor in self._config.layout.tensors}

    def step(self, number: int, gradient: np.ndarray, numbers: Mapping[str, Any], loss_scale: float = 1.0) -> None:
        """Apply a step with a flat gradient, and with `numbers` in place of the session's own."""
        config = self._config
        groups = config.groups
        if numbers:
            groups = tuple(config.optimizer.override(group, numbers, "numbers") for group in groups)
        request = self._request._replace(step=number, groups=groups, loss_scale=loss_scale)
        with self._session.begin(request, self._holder, 0.0) as step:
            step.add(0, len(gradient), gradient.view(np.uint8))
            self.result = self._session.commit(step, _Writer(self.values))

    @property
    def loss_scale(self) -> float:
        """The factor that the next gradient must have been multiplied by; 1 without loss scaling."""
        return self._session.loss_scale or 1.0

    def slot(self, name: str) -> np.ndarray:
        """Return a slot, flat."""
        values = np.empty(self._config.layout.size, np.float32)
        self._session.exchange.read(self._session.exchange.snapshot(), name, 0, values)
        return values

    def _load(self, values: np.ndarray) -> None:
        with self._session.exchange.loading(LoadRequest(1, (PARAM,)), self._holder) as load:
            assert load is not None
            load.add(PARAM, 0, len(values), values.view(np.uint8))
            load.complete()
            self._session.exchange.commit_load(load)

    def __enter__(self) -> LocalSession:
        """Hold the session for a block."""
        return self

    def __exit__(self, *exception: object) -> None:
        """End the session."""
        self._session.close()
