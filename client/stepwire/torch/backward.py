"""Steps that begin in the backward pass: the last layers' gradients are sent before the first layers' are computed."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import CancelledError, Future
from typing import Any, NamedTuple, TypeAlias

import numpy.typing as npt
import torch

from stepwire.errors import DeadlineExceededError, InvalidRequestError, UnavailableError
from stepwire.steps.gradient_feed import GradientFeed
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
        self._begin = begin
        self._numbers = numbers
        self._expected: frozenset[str] = frozenset()
        self._begun: _Begun | None = None
        self._lost = False
        self.committed = False
        self._lock = threading.Lock()  # several threads run the backward pass of a graph on several devices
        self._hooks: dict[str, Any] = {}
        self._watch(parameters.tensors)

    def _watch(self, tensors: Iterable[ParameterTensor]) -> None:
        """Have autograd tell of gradients; a parameter that is frozen cannot have a hook."""
        for tensor in tensors:
            if tensor.parameter.requires_grad and tensor.name not in self._hooks:
                self._hooks[tensor.name] = tensor.parameter.register_post_accumulate_grad_hook(
                    lambda _, tensor=tensor: self._on_gradient(tensor)
                )

    def _on_gradient(self, tensor: ParameterTensor) -> None:
        with self._lock:
            if self._begun is None and not self._lost and tensor.name in self._expected:
                self._begun = self._start()
            if self._begun is None:
                return
            self._lost = self._lost or tensor.name in self._begun.given or tensor.name not in self._expected
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
        begun.given[tensor.name] = gradient
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
            self._begun, self._lost, self.committed = None, False, False
        tensors = [tensor for tensor in self._parameters.tensors if tensor.parameter.grad is not None]
        self._watch(tensors)
        expected, self._expected = self._expected, frozenset(tensor.name for tensor in tensors)
        if begun is None:
            return None
        alike = not lost and expected == self._expected and begun.numbers == numbers
        if not alike or self._parameters.changed() or not self._holds(begun):
            _abort(begun)
            return None
        begun.feed.commit()
        self.committed = True
        try:
            return begun.reply.result()
        except (UnavailableError, DeadlineExceededError, CancelledError):
            return None  # the caller sends the same step, by its number if it was sent before
        except BaseException:  # after an interrupt of the user no reply may be written behind the user's back
            _abort(begun)
            raise

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
        with self._lock:
            begun, self._begun = self._begun, None
        if begun is not None:
            _abort(begun)

    def close(self) -> None:
        """Abort the step that was begun, and watch no more. Closing twice is harmless."""
        self.drop()
        for hook in self._hooks.values():
            hook.remove()


def _abort(begun: _Begun) -> None:
    begun.feed.abort()
    with contextlib.suppress(CancelledError):  # behind a step of the user's that failed, so never sent
        begun.reply.exception()  # the session is free again when the step has ended


def _same(one: npt.NDArray[Any], other: npt.NDArray[Any]) -> bool:
    """Tell whether two contiguous arrays are the same elements in the same memory."""
    return (one.ctypes.data, one.dtype, one.shape) == (other.ctypes.data, other.dtype, other.shape)


def _copy_event(tensor: ParameterTensor) -> Callable[[], object]:
    """Return a function that waits for the last copy from the tensor's GPU."""
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(tensor.parameter.device))
    wait: Callable[[], object] = event.synchronize
    return wait
