"""Local SGD and DiLoCo: each worker steps a model of its own, and every so often all of them meet in one outer step."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Final, NamedTuple

import numpy as np
import torch

from stepwire.errors import InvalidRequestError, NonFiniteGradientError, StepwireError, UnsupportedFeatureError
from stepwire.optimizers import SGD, Optimizer
from stepwire.optimizers.hyperparameters import whole_number
from stepwire.results import Snapshot, StepResult
from stepwire.session import Session
from stepwire.torch.options import RemoteOptions
from stepwire.torch.parameters import Arrays, Parameters
from stepwire.torch.pseudo_gradients import Encoding
from stepwire.torch.tensors import from_numpy, to_numpy
from stepwire.torch.workers import WorkerLoads, aggregation_of, leave, with_job
from stepwire.wire.dtypes import FLOAT32, dtype_named

__all__ = ["DILOCO", "LocalSGD"]

_LOG = logging.getLogger(__name__)

DILOCO: Final = SGD(lr=0.7, momentum=0.9, nesterov=True)
"""The outer optimizer of DiLoCo (Douillard et al. 2023)."""

_NOT_HERE: Final = (
    "session",
    "reply_dtype",
    "tensor_precision",
    "amp_scaling",
    "shared_views",
    "send_in_backward",
    "light_state_dict",
)


class _Sent(NamedTuple):
    """An outer step that was begun and whose result the model lacks.

    Attributes:
        values: the model's values at its beginning.
        gradient: the pseudo-gradient, as it is sent.
        residual: the error of its encoding, for the next one.
        weight: its weight.
        future: its result; None where it is sent by the caller.
    """

    values: Arrays
    gradient: Arrays
    residual: Arrays
    weight: float | None
    future: Future[Any] | None


class LocalSGD:
    """Steps a model by a local optimizer, and every `every` steps by an outer optimizer that all workers share.

    The gradient of the outer step is the way back: the parameters after the last outer step minus the present ones. The
    server reduces those of all workers, and steps. Its parameters replace the model's. With the outer optimizer
    `stepwire.SGD(lr=1)` the model gets the mean of all workers' parameters: FedAvg. `stepwire.Adam` is FedAdam.

    With `overlap` the outer step goes on beside the next inner ones. Its result comes as a change: the model gets
    outer + (present − sent), which keeps the inner steps made meanwhile.

    Buffers such as BatchNorm's averages stay each worker's own.

    Attributes:
        weight: the weight of this worker in the next outer steps, such as its number of samples; None for 1. It is for
            `stepwire.Aggregation(…, reduction="weighted_mean")`.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        inner_optimizer: torch.optim.Optimizer,
        *,
        every: int | None,
        outer: Optimizer = DILOCO,
        overlap: bool = False,
        delay: int | None = None,
        **options: Any,
    ) -> None:
        """Make or join the session of the outer optimizer, and write its parameters into the model.

        Args:
            model: the model; its parameters that need a gradient are stepped.
            inner_optimizer: a torch optimizer of the model, which stays in this process with its state.
            every: the inner steps between two outer ones; None for `synchronize` alone.
            outer: the outer optimizer; by default DiLoCo's Nesterov momentum.
            overlap: go on with inner steps while the outer one is under way.
            delay: with `overlap`, the inner steps after which the result is applied, waiting for it if need be. None
                for whenever it arrives. With a number the run has the same bits every time.
            options: those of `RemoteOptions`: `server`, and with several workers `worker`, `workers` or `aggregation`,
                and `job`. `gradient_dtype` may be `"bfloat16"` or `"int8"`; the error of the encoding is carried to the
                next pseudo-gradient, unless `error_feedback=False`.

        Raises:
            InvalidRequestError: a number is out of range, or an option is missing.
            UnsupportedFeatureError: an option or a parameter is not served.
            StepwireError: as `Client.create_session`.
        """
        self._every = None if every is None else _positive(every, "every")
        self._delay = None if delay is None else _positive(delay, "delay")
        if self._delay is not None and not overlap:
            raise InvalidRequestError.of("delay", "it is for overlap=True; leave it out")
        self._options, self._overlap = _options(options), overlap
        self.inner_optimizer = inner_optimizer
        self.weight: float | None = None
        named = [(name, each) for name, each in model.named_parameters() if each.requires_grad]
        group = {"params": [each for _, each in named], "param_names": [name for name, _ in named]}
        self._parameters = Parameters([group])
        self._sent: _Sent | None = None
        self._inner_steps, self._closed = 0, False
        sent = self._options.gradient_dtype
        self._encoding = Encoding(dtype_named(sent or FLOAT32, "gradient_dtype", gradients=True), self._options)
        self._client = self._options.client()
        try:
            self._session = self._made(outer)
            self._loads = WorkerLoads(self._session, self._parameters, self._options.timeout)
            self._loads.join()
        except BaseException:
            if self._options.owns_client:
                self._client.close()
            raise
        self._start = self._values()

    def _made(self, outer: Optimizer) -> Session:
        options, aggregation = self._options, aggregation_of(self._options)
        try:
            return self._client.create_session(
                self._parameters.fetch(),
                optimizer=outer,
                gradient_dtype=self._encoding.dtype,
                error_feedback=self._encoding.in_session,
                state_precision=options.state_precision,
                non_finite=options.non_finite,
                clip_grad_norm=options.clip_grad_norm,
                clip_grad_value=options.clip_grad_value,
                telemetry=options.telemetry,
                durability=options.durability,
                aggregation=aggregation,
                worker=0 if options.worker is None else options.worker,
                lease_seconds=options.lease_seconds,
                device=options.device,
                label=options.label,
                keep=options.keep,
                logger=options.logger,
                request_id=None if aggregation is None else options.job,
            )
        except InvalidRequestError as error:
            raise with_job(error, options) from error

    # --- facts -------------------------------------------------------------------------------------------

    @property
    def session(self) -> Session:
        """The session of the outer optimizer."""
        return self._session

    @property
    def applied_step(self) -> int:
        """The number of outer steps, those of other workers included; see `stepwire.Aggregation`."""
        return self._session.applied_step

    @property
    def last_result(self) -> StepResult | None:
        """The result of the last outer step; None before the first."""
        return self._session.last_result

    @property
    def inner_steps(self) -> int:
        """The inner steps since the last outer one was begun."""
        return self._inner_steps

    # --- steps -------------------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make a step of the inner optimizer, and an outer one if it is time.

        Args:
            closure: as for the inner optimizer.

        Returns:
            The result of the inner optimizer's `step`.

        Raises:
            StepwireError: as `synchronize`. The inner step was made.
        """
        loss = self.inner_optimizer.step() if closure is None else self.inner_optimizer.step(closure)
        self.stepped()
        return loss

    def stepped(self) -> None:
        """Note an inner step that other code made, such as `GradScaler`, and make an outer one if it is time.

        Raises:
            StepwireError: as `synchronize`.
        """
        self._inner_steps += 1
        if self._sent is not None and self._is_due(self._sent):
            self._finish(self._sent)
        if self._every is not None and self._inner_steps >= self._every:
            self.synchronize()

    def synchronize(self) -> None:
        """Make an outer step now. With `overlap` it is begun, and one before it is finished.

        After an error the next call, or the next inner step, repeats the same outer step, which is applied once.

        Raises:
            NonFiniteGradientError: the model has NaN or Inf; nothing was applied, and `pull` goes back.
            NotEnoughWorkersError: too few other workers came; nothing was applied.
            StepwireError: as `Session.step`.
        """
        self._check_open()
        if (before := self._sent) is not None:
            self._finish(before)
            if self._inner_steps == 0:
                return
        values = self._values()
        gradient, residual = self._encoding.encoded({name: self._start[name] - values[name] for name in values})
        future = None
        if self._overlap:
            future = self._session.step_async(gradient, weight=self.weight, timeout=self._options.timeout)
        self._sent, self._inner_steps = _Sent(values, gradient, residual, self.weight, future), 0
        if future is None:
            self._finish(self._sent)

    def pull(self) -> None:
        """Give up the inner steps since the last outer one, and write the outer parameters into the model.

        Raises:
            StepwireError: as `Session.pull`.
        """
        self._wait()
        self._loads.adopt()
        self._sent, self._inner_steps, self._start = None, 0, self._values()

    def _is_due(self, sent: _Sent) -> bool:
        if sent.future is None:  # it has failed before
            return True
        return sent.future.done() if self._delay is None else self._inner_steps >= self._delay

    def _finish(self, sent: _Sent) -> None:
        """Wait for an outer step, and have the model follow it."""
        try:
            if sent.future is not None:
                reply: Any = sent.future.result()
            else:
                reply = self._session.step(sent.gradient, weight=sent.weight, timeout=self._options.timeout)
        except NonFiniteGradientError:
            self._sent = None
            raise
        except StepwireError:
            self._sent = sent._replace(future=None)
            raise
        self._encoding.residual, self._sent = sent.residual, None
        self._loads.stepped()
        self._follow(reply, sent.values)

    def _follow(self, outer: Arrays, sent: Arrays) -> None:
        """Write the outer parameters into the model, and on top of them the inner steps made since `sent`."""
        present = self._values()
        self._parameters.adopt(outer)
        self._start = self._values()  # as the model shows them, in its own dtype
        if any(present[name].tobytes() != sent[name].tobytes() for name in sent):
            self._parameters.adopt({name: outer[name] + (present[name] - sent[name]) for name in sent})

    def _values(self) -> Arrays:
        return {name: values.astype(np.float32) for name, values in self._parameters.fetch().items()}

    def _wait(self) -> None:
        """Wait for the outer step that is under way, whatever comes of it."""
        if self._sent is not None and self._sent.future is not None:
            with contextlib.suppress(StepwireError):
                self._sent.future.result()

    # --- state -------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the state: the inner optimizer's, and the outer one with its parameters. It has no model.

        Raises:
            StepwireError: as `Session.state`, and `synchronize` for an outer step that is under way.
        """
        self._check_open()
        if self._sent is not None:
            self._finish(self._sent)
        outer = self._session.state(timeout=self._options.timeout)
        slots = {
            slot: {name: from_numpy(values) for name, values in each.items()} for slot, each in outer.slots.items()
        }
        return {
            "inner_optimizer": self.inner_optimizer.state_dict(),
            "inner_steps": self._inner_steps,
            "start": {name: from_numpy(values.copy()) for name, values in self._start.items()},
            "outer": {
                "step": outer.step,
                "slots": slots,
                "tensor_steps": dict(outer.tensor_steps),
                "tensor_scalars": dict(outer.tensor_scalars),
            },
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state. The model's parameters stay: load the model's own state dict too.

        All workers load, and the first load counts. A worker that joins a job under way takes over the state of the
        inner optimizer alone, and the model keeps the job's parameters.

        Args:
            state_dict: the dict of `state_dict`.

        Raises:
            InvalidRequestError: the state is of another model or another outer optimizer.
            StepwireError: as `Session.load_state`.
        """
        self._check_open()
        self._wait()
        self.inner_optimizer.load_state_dict(state_dict["inner_optimizer"])
        if self._loads.joins_late:
            return
        outer = state_dict["outer"]
        state = Snapshot(
            step=max(outer["step"], self.applied_step),
            slots={
                slot: {name: to_numpy(each) for name, each in held.items()} for slot, held in outer["slots"].items()
            },
            tensor_steps=outer["tensor_steps"],
            tensor_scalars=outer["tensor_scalars"],
        )
        model = self._values()
        self._loads.load(lambda: self._session.load_state(state, timeout=self._options.timeout), state=True)
        self._parameters.adopt(model)
        self._start = {name: to_numpy(each).copy() for name, each in state_dict["start"].items()}
        self._sent, self._encoding.residual, self._inner_steps = None, {}, state_dict["inner_steps"]

    # --- the end -----------------------------------------------------------------------------------------

    def close(self) -> None:
        """Finish the outer step that is under way, and leave; the last worker ends the session."""
        self._end(keep=False)

    def detach(self) -> None:
        """Finish the outer step that is under way, and leave the session on the server."""
        self._end(keep=True)

    def _end(self, *, keep: bool) -> None:
        if self._closed:
            return
        self._closed = True
        with contextlib.ExitStack() as ending:
            if self._options.owns_client:
                ending.callback(self._client.close)
            ending.callback(leave, self._session, keep=keep)
            if self._sent is not None:
                try:
                    self._finish(self._sent)
                except StepwireError as error:
                    _LOG.warning("the last outer step is not in the model: %s", error)

    def _check_open(self) -> None:
        if self._closed:
            raise InvalidRequestError.of("LocalSGD", "it is closed; make a new one, of the same job to go on with it")

    def __enter__(self) -> LocalSGD:
        """Use it for a block, and close it after."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close."""
        self.close()


def _options(given: dict[str, Any]) -> RemoteOptions:
    """Return the options of the session.

    Raises:
        UnsupportedFeatureError: an option is not for a local optimizer.
    """
    for name in _NOT_HERE:
        if name in given:
            raise UnsupportedFeatureError(
                f"{name}: not with LocalSGD; leave it out", metadata={"field": name, "feature": "torch_local_sgd"}
            )
    return dataclasses.replace(RemoteOptions(error_feedback=True), **given)


def _positive(value: int, field: str) -> int:
    if (count := whole_number(value, field)) < 1:
        raise InvalidRequestError.of(field, f"{count} is not a positive number of steps")
    return count
