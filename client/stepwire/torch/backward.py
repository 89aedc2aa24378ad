"""Steps that begin in the backward pass: the last layers' gradients are sent before the first layers' are computed."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from typing import Any, NamedTuple, TypeAlias

import numpy.typing as npt
import torch

from stepwire.connection.errands import run, undelivered
from stepwire.errors import DeadlineExceededError, InvalidRequestError, UnavailableError, UnsupportedFeatureError
from stepwire.lifetimes.endings import ENDINGS
from stepwire.lifetimes.weak_calls import weak_call
from stepwire.steps.gradient_feed import GradientFeed
from stepwire.torch.gradient_hooks import GradientHooks
from stepwire.torch.parameters import Arrays, Parameters
from stepwire.torch.tensors import ParameterTensor

__all__ = ["BackwardSender", "Numbers"]

Numbers: TypeAlias = tuple[Any, float | None]
"""The numbers of a step: overrides of the groups' numbers, and the loss scale."""

Begin: TypeAlias = Callable[[GradientFeed, frozenset[str], Numbers], Future[Any]]
"""A function that begins a step in the background, with the source of its gradients, their names, and its numbers."""


class _Begun(NamedTuple):
    feed: GradientFeed
    reply: Future[Any]
    numbers: Numbers
    given: Arrays


@dataclasses.dataclass(slots=True)
class _Bet:
    """The step that was begun, apart from its sender, so that it ends when the sender is dropped."""

    begun: _Begun | None = None


class BackwardSender:
    """Begins each step with the first gradient of the backward pass, and ends the step when `step` is called.

    The sender expects a step like the one before: the same tensors have gradients, and the numbers do not change
    between the backward pass and `step`. The expectation fails with a second backward pass, a changed gradient, or a
    written parameter. Then the step is aborted, which leaves no trace on the server, and `step` sends all gradients as
    usual.

    Gradients are compared by their content, in one pass over them: torch's version counters miss some writes of torch
    itself, such as the unscaling of `GradScaler`.

    Attributes:
        committed: True if the last `finish` committed the step that was begun, perhaps without its reply.
    """

    def __init__(self, parameters: Parameters, begin: Begin, numbers: Callable[[], Numbers | None]) -> None:
        """Watch the backward pass.

        Args:
            parameters: the parameters of the gradients.
            begin: a function that begins a step.
            numbers: a function that returns the present numbers of a step; None if no step can begin.
        """
        self._parameters = parameters
        self._begin = weak_call(begin, "optimizer")
        self._numbers = weak_call(numbers, "optimizer")
        self._expected: frozenset[str] = frozenset()
        self._bet = _Bet()
        self._lost = False
        self.committed = False
        self._lock = threading.Lock()  # several threads run the backward pass of a graph on several devices
        ENDINGS.with_owner(self, functools.partial(_forget, self._bet))
        self._hooks = GradientHooks(self._on_gradient)
        self._hooks.watch(parameters.tensors)

    def _on_gradient(self, tensor: ParameterTensor) -> None:
        with self._lock:
            bet = self._bet
            if bet.begun is None and not self._lost and tensor.name in self._expected:
                self._start()
            if bet.begun is None:
                return
            self._lost = self._lost or tensor.name in bet.begun.given or tensor.name not in self._expected
            if not self._lost:
                self._feed(bet.begun, tensor)

    def _start(self) -> None:
        if (numbers := self._numbers()) is None:
            return
        feed = GradientFeed([tensor.name for tensor in self._parameters.tensors])
        try:
            self._bet.begun = _Begun(feed, self._begin(feed, self._expected, numbers), numbers, {})
        except BaseException:  # an interrupt, perhaps after the step began
            run(feed.abort, lasting=True)
            raise

    def _feed(self, begun: _Begun, tensor: ParameterTensor) -> None:
        try:
            gradient = tensor.gradient()
        except InvalidRequestError:  # `step` raises it again
            self._lost = True
            return
        if gradient is None:
            self._lost = True
            return
        begun.feed.give(tensor.name, gradient, _copy_event(tensor) if tensor.on_gpu else None)
        begun.given[tensor.name] = gradient  # after an interrupt in between the gradients are not alike

    def finish(self, numbers: Numbers) -> Any:
        """End the step that was begun and return its reply; None if no step, or another step, was begun.

        Args:
            numbers: the present numbers.

        Returns:
            The reply; None if the caller has to send the step.

        Raises:
            StepwireError: the server's refusal.
        """
        begun = self._bet.begun
        try:
            return self._finished(begun, numbers)
        except BaseException:  # after an interrupt of the user no reply may be written behind the user's back
            _abort(begun)
            raise

    def _finished(self, begun: _Begun | None, numbers: Numbers) -> Any:
        with self._lock:
            lost = self._lost
            self._bet.begun, self._lost, self.committed = None, False, False
        tensors = [tensor for tensor in self._parameters.tensors if tensor.parameter.grad is not None]
        self._hooks.watch(tensors)
        expected, self._expected = self._expected, frozenset(tensor.name for tensor in tensors)
        if begun is None:
            return None
        alike = not lost and expected == self._expected and begun.numbers == numbers and not begun.feed.is_aborted
        if not alike or self._parameters.changed() or not self._holds(begun):
            _abort(begun)
            return None
        begun.feed.commit()
        self.committed = True
        try:
            return run(functools.partial(_reply, begun))
        except (UnavailableError, DeadlineExceededError, CancelledError):
            return None  # the caller sends the same step, by its number if it was sent before
        except UnsupportedFeatureError as error:
            if error.metadata.get("field") != "feed":
                raise
            return None  # the session has moved to several servers, which take the whole gradient

    def _holds(self, begun: _Begun) -> bool:
        """Tell whether the step that was begun has the present gradients."""
        try:
            present = self._parameters.gradients()
        except InvalidRequestError:  # the caller raises it again
            return False
        if present.keys() != begun.given.keys():
            return False
        return all(_same(begun.given[name], array) for name, array in present.items()) and begun.feed.holds()

    def drop(self) -> None:
        """Abort the step that was begun, if there is one."""
        _abort(self._bet.begun)
        self._bet.begun = None

    def close(self) -> None:
        """Abort the step that was begun, and watch no more. Closing twice is harmless."""
        self.drop()
        self._hooks.remove()


def _reply(begun: _Begun) -> Any:
    """Wait for the reply, in a thread of the client's own."""
    reply = begun.reply.result()
    if begun.feed.undelivered is not None:
        undelivered(begun.feed.undelivered)
    return reply


def _abort(begun: _Begun | None) -> None:
    """Abort a step, and wait until the session is free again; a step that has ended stays as it is."""
    if begun is not None:
        run(functools.partial(_aborted, begun), lasting=True)


def _aborted(begun: _Begun) -> None:
    begun.feed.abort()
    with contextlib.suppress(CancelledError):  # behind a step of the user's that failed, so never sent
        begun.reply.exception()


def _forget(bet: _Bet, seconds: float) -> None:
    """Give up the step of a sender that was dropped; nobody waits for it."""
    if bet.begun is not None:
        bet.begun.feed.abort()


def _same(one: npt.NDArray[Any], other: npt.NDArray[Any]) -> bool:
    """Tell whether two contiguous arrays are the same elements in the same memory."""
    return (one.ctypes.data, one.dtype, one.shape) == (other.ctypes.data, other.dtype, other.shape)


def _copy_event(tensor: ParameterTensor) -> Callable[[], object]:
    """Return a function that waits for the last copy from the tensor's GPU."""
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(tensor.parameter.device))
    wait: Callable[[], object] = event.synchronize
    return wait
