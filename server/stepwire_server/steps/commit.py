"""What a commit does to the state, once the step has been admitted and everything has arrived.

`Commit` checks everything when it is made, and changes nothing; `apply` then changes the state, range by range, each
range's answer being encoded in the same pass that updates it.
"""

from __future__ import annotations

import numpy as np

from stepwire.optimizers import Adagrad
from stepwire_server.engines.protocol import EngineState
from stepwire_server.records.session_config import SessionConfig
from stepwire_server.records.step_request import StepRequest
from stepwire_server.records.step_result import Outcome, updated
from stepwire_server.steps.check_gradient import check_gradient
from stepwire_server.steps.gradient import GradientStaging
from stepwire_server.steps.reply import ReplyPipeline, ReplyWriter, reply_ranges, send_parameters, split_range
from stepwire_server.steps.tensor_steps import TensorSteps
from stepwire_server.steps.update import gradient_factor, passes, trusted
from stepwire_server.steps.updating import Update

__all__ = ["Commit", "initialize"]

_COPY_ELEMENTS = 1 << 20


class Commit:
    """One step on its way into the state.

    Attributes:
        updates: the step changes the state; otherwise it is skipped.
    """

    def __init__(
        self,
        config: SessionConfig,
        request: StepRequest,
        staging: GradientStaging,
        state: EngineState,
        progress: TensorSteps,
    ) -> None:
        """Check that the step can be applied, and compute its numbers; nothing is changed.

        Raises:
            InvalidRequestError, NonFiniteGradientError: as `check_gradient`.
        """
        verdict = check_gradient(config, request, staging, state, progress)
        self._config, self._request, self._staging, self._state = config, request, staging, state
        self._groups, self._norms, self._last = verdict.groups, verdict.norms, verdict.last
        skip = request.decision is not None and request.decision.skip
        self.updates = not skip and (verdict.finite or config.treatment.policy == "allow")
        if self.updates and self._last:
            runs = progress.runs(staging.active)
            self._runs = passes(config, self._groups, runs, staging.unscale, self._norms.coefficients)
            if config.rule.direction is not None:
                self._runs = trusted(self._runs, self._groups, staging, state)

    def apply(self, sink: ReplyWriter) -> Outcome:
        """Change the state, and answer with the new parameters."""
        if not self._last:
            self._accumulate()
            return self.keep(sink)
        request, update = self._request, Update(self._state, self._runs, len(self._groups))
        with ReplyPipeline(sink, self._state.depth) as answer:
            for start, end, chunk in self._staging.drain(reply_ranges(self._config.layout, request.reply_first)):
                if chunk is None and not request.reply:
                    continue
                gradient, offset = (None, 0) if chunk is None else (chunk.gradient, chunk.offset)
                for low, high in split_range(start, end, request.reply_elements) if request.reply else [(start, end)]:
                    out = sink.buffer(low, high - low) if request.reply else None
                    before = sink.before() if request.reply and request.reply_base is not None else None
                    asked = [] if before is None else update.answer(low, high, low, before)
                    asked += update.step(gradient, offset, low, high, out)
                    if out is not None:
                        answer.add(asked)
        self._state.settle()
        count = self._staging.non_finite_count
        return updated(self._config, self._groups, self._norms, update.norms(), count)

    def keep(self, sink: ReplyWriter) -> Outcome:
        """Answer with the parameters as they are."""
        if self._request.reply_base is None:  # otherwise the client has them
            send_parameters(self._state, self._config.layout, self._request, sink)
        skipped, ones = not self.updates, (1.0,) * len(self._groups)
        norms = self._norms._replace(coefficients=ones, coefficient=1.0, left=self._norms.total)
        clipped = (0.0,) * len(self._groups) if skipped else norms.groups
        total = 0.0 if skipped else norms.total
        count = self._staging.non_finite_count
        return Outcome(False, skipped, self._groups, norms, clipped, total, (), (), count)

    def _accumulate(self) -> None:
        staging = self._staging
        for start, end, group in staging.active.segments:
            factor = gradient_factor(self._groups[group], staging.unscale)
            for piece in staging.pieces(start, end):
                self._state.accumulate(piece.start, piece.chunk.gradient, piece.begin, piece.end, factor)
        self._state.settle()


def initialize(config: SessionConfig, state: EngineState) -> None:
    """Give slots their first values where these are not zeros."""
    if isinstance(config.optimizer, Adagrad) and config.optimizer.initial_accumulator_value:
        values = np.full(
            min(_COPY_ELEMENTS, config.layout.size), config.optimizer.initial_accumulator_value, np.float32
        )
        for tensor in config.layout.tensors:
            for low, high in split_range(tensor.offset, tensor.end, _COPY_ELEMENTS):
                state.write("sum", low, values[: high - low])
