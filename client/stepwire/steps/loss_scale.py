"""The loss scale of a session, as its client knows it."""

from __future__ import annotations

from stepwire.v1 import session_pb2, step_pb2

__all__ = ["KnownLossScale"]


class KnownLossScale:
    """The factor for the next loss: of the last step, or of a load or the creation if that came later."""

    def __init__(self, message: session_pb2.Session) -> None:
        """Start with the scale of a session as its server described it, if it scales losses."""
        self._loaded = message.loss_scale if message.HasField("loss_scale") else None
        self._result_before: step_pb2.StepResult | None = None

    def after(self, last: step_pb2.StepResult | None) -> float | None:
        """Return the factor after the last step; None without loss scaling."""
        if last is None or last is self._result_before or not last.telemetry.HasField("loss_scale"):
            return self._loaded
        return last.telemetry.loss_scale

    def loaded(self, scale: float, last: step_pb2.StepResult | None) -> None:
        """Note a scale that was loaded after the last step."""
        self._loaded, self._result_before = scale, last
