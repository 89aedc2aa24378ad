"""Steps that begin in the backward pass: the last layers' gradients are sent before the first layers' are computed."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from typing import Any, NamedTuple, TypeAlias

import torch

from stepwire.errors import DeadlineExceededError, InvalidRequestError, UnavailableError
from stepwire.steps.gradient_feed import GradientFeed
from stepwire.torch.parameters import Parameters
from stepwire.torch.tensors import ParameterTensor, version_of

__all__ = ["BackwardSender", "Numbers"]

Numbers: TypeAlias = tuple[Any, float | None]
"""The numbers of a step: overrides of the groups' numbers, and the loss scale."""

Begin: TypeAlias = Callable[[GradientFeed, frozenset[str], Numbers], Future[Any]]
"""A function that begins a step in the background, with the source of its gradients, their names, and its numbers."""


class _Begun(NamedTuple):
    feed: GradientFeed
    reply: Future[Any]
    numbers: Numbers
    marks: dict[str, tuple[int, int]]


class BackwardSender:
    """Begins each step with the first gradient of the backward pass, and ends the step when `step` is called.

    The sender expects a step like the one before: the same tensors have gradients, and the numbers do not change
    between the backward pass and `step`. The expectation fails with a second backward pass, a changed gradient, or a
    written parameter. Then the step is aborted, which leaves no trace on the server, and `step` sends all gradients as
    usual.
    """

    def __init__(self, parameters: Parameters, begin: Begin, numbers: Callable[[], Numbers | None]) -> None:
        """Watch the backward pass.

        Args:
            parameters: the parameters of the gradients.
            begin: a function that begins a step.
            numbers: a function that returns the present numbers of a step; None if no step can begin.
        """
        self._parameters = parameters
        self._begin = begin
        self._numbers = numbers
        self._expected: frozenset[str] = frozenset()
        self._begun: _Begun | None = None
        self._lost = False
        self._lock = threading.Lock()  # several threads run the backward pass of a graph on several devices
        self._hooks = [
            tensor.parameter.register_post_accumulate_grad_hook(lambda _, tensor=tensor: self._on_gradient(tensor))
            for tensor in parameters.tensors
            if tensor.parameter.requires_grad
        ]

    def _on_gradient(self, tensor: ParameterTensor) -> None:
        with self._lock:
            if self._begun is None and not self._lost and tensor.name in self._expected:
                self._begun = self._start()
            if self._begun is None:
                return
            self._lost = self._lost or tensor.name in self._begun.marks or tensor.name not in self._expected
            if not self._lost:
                self._feed(self._begun, tensor)

    def _start(self) -> _Begun | None:
        if (numbers := self._numbers()) is None:
            return None
        names = [tensor.name for tensor in self._parameters.tensors]
        feed = GradientFeed(names)
        return _Begun(feed, self._begin(feed, self._expected, numbers), numbers, {})

    def _feed(self, begun: _Begun, tensor: ParameterTensor) -> None:
        try:
            gradient = tensor.gradient()
        except InvalidRequestError:  # `step` raises it again
            self._lost = True
            return
        if gradient is None:
            self._lost = True
            return
        begun.marks[tensor.name] = _mark(tensor)
        begun.feed.give(tensor.name, gradient, _copy_event(tensor) if tensor.on_gpu else None)

    def finish(self, numbers: Numbers) -> Any:
        """End the step that was begun and return its reply; None if no step, or another step, was begun.

        Args:
            numbers: the present numbers.

        Returns:
            The reply; None if the caller has to send the step.

        Raises:
            StepwireError: the server's refusal.
        """
        with self._lock:
            begun, lost = self._begun, self._lost
            self._begun, self._lost = None, False
        tensors = [tensor for tensor in self._parameters.tensors if tensor.parameter.grad is not None]
        expected, self._expected = self._expected, frozenset(tensor.name for tensor in tensors)
        if begun is None:
            return None
        alike = not lost and expected == self._expected and begun.numbers == numbers
        if not alike or begun.marks != {tensor.name: _mark(tensor) for tensor in tensors} or self._parameters.changed():
            _abort(begun)
            return None
        begun.feed.commit()
        try:
            return begun.reply.result()
        except (UnavailableError, DeadlineExceededError, CancelledError):
            return None  # the caller sends the same step, by its number if it was sent before
        except BaseException:  # after an interrupt of the user no reply may be written behind the user's back
            _abort(begun)
            raise

    def drop(self) -> None:
        """Abort the step that was begun, if there is one."""
        with self._lock:
            begun, self._begun = self._begun, None
        if begun is not None:
            _abort(begun)

    def close(self) -> None:
        """Abort the step that was begun, and watch no more. Closing twice is harmless."""
        self.drop()
        for hook in self._hooks:
            hook.remove()


def _abort(begun: _Begun) -> None:
    begun.feed.abort()
    with contextlib.suppress(CancelledError):  # behind a step of the user's that failed, so never sent
        begun.reply.exception()  # the session is free again when the step has ended


def _mark(tensor: ParameterTensor) -> tuple[int, int]:
    gradient = tensor.parameter.grad
    return gradient.data_ptr(), version_of(gradient)


def _copy_event(tensor: ParameterTensor) -> Callable[[], object]:
    """Return a function that waits for the last copy from the tensor's GPU."""
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(tensor.parameter.device))
    wait: Callable[[], object] = event.synchronize
    return wait
