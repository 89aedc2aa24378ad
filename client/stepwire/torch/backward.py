"""Steps that begin in the backward pass: the last layers' gradients are sent while the first ones' are computed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, NamedTuple, TypeAlias

import torch

from stepwire.errors import DeadlineExceededError, InvalidRequestError, UnavailableError
from stepwire.steps.gradient_feed import GradientFeed
from stepwire.torch.parameters import Parameters
from stepwire.torch.tensors import HeldTensor

__all__ = ["BackwardSender", "Numbers"]

Numbers: TypeAlias = tuple[Any, float | None]
"""What a step's first message says beside its gradients: overrides of the groups' numbers, and the loss scale."""

Begin: TypeAlias = Callable[[GradientFeed, frozenset[str], Numbers], Future[Any]]
"""Begins a step in the background: where its gradients come from, whose they are, and its numbers."""


class _Begun(NamedTuple):
    feed: GradientFeed
    answer: Future[Any]
    numbers: Numbers
    marks: dict[str, tuple[int, int]]


class BackwardSender:
    """Begins each step with the first gradient that the backward pass makes, and ends it when `step` is called.

    It bets that the step is like the one before: the same tensors have gradients, and nothing that its first message
    says is changed between backward pass and step. A bet that is lost, by a second backward pass, by gradients that
    somebody changed, or by a parameter that was written, costs the time it took: the step is given up, which leaves no
    trace on the server, and is taken as any other.
    """

    def __init__(self, parameters: Parameters, begin: Begin, numbers: Callable[[], Numbers | None]) -> None:
        """Watch the backward pass.

        Args:
            parameters: whose gradients are sent.
            begin: begins a step.
            numbers: what a step would say now; None where none can be begun.
        """
        self._parameters = parameters
        self._begin = begin
        self._numbers = numbers
        self._expected: frozenset[str] = frozenset()
        self._begun: _Begun | None = None
        self._lost = False
        self._lock = threading.Lock()  # a graph on several devices is walked by several threads
        self._hooks = [
            tensor.parameter.register_post_accumulate_grad_hook(lambda _, tensor=tensor: self._made(tensor))
            for tensor in parameters.tensors
            if tensor.parameter.requires_grad
        ]

    def _made(self, tensor: HeldTensor) -> None:
        with self._lock:
            if self._begun is None and not self._lost and tensor.name in self._expected:
                self._begun = self._start()
            if self._begun is None:
                return
            self._lost = self._lost or tensor.name in self._begun.marks or tensor.name not in self._expected
            if not self._lost:
                self._give(self._begun, tensor)

    def _start(self) -> _Begun | None:
        if (numbers := self._numbers()) is None:
            return None
        names = [tensor.name for tensor in self._parameters.tensors]
        feed = GradientFeed(names)
        return _Begun(feed, self._begin(feed, self._expected, numbers), numbers, {})

    def _give(self, begun: _Begun, tensor: HeldTensor) -> None:
        try:
            gradient = tensor.gradient()
        except InvalidRequestError:  # which `step` will say
            self._lost = True
            return
        if gradient is None:
            self._lost = True
            return
        begun.marks[tensor.name] = _mark(tensor)
        begun.feed.give(tensor.name, gradient, _copied(tensor) if tensor.on_gpu else None)

    def finish(self, numbers: Numbers) -> Any:
        """End the step that was begun and return its answer; None where none was, or not this one.

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
            _give_up(begun)
            return None
        begun.feed.commit()
        try:
            return begun.answer.result()
        except (UnavailableError, DeadlineExceededError):
            return None  # by its number it is the same step that is taken now

    def drop(self) -> None:
        """Give up what was begun, if anything."""
        with self._lock:
            begun, self._begun = self._begun, None
        if begun is not None:
            _give_up(begun)

    def close(self) -> None:
        """Give up what was begun, and watch no more. Closing twice is harmless."""
        self.drop()
        for hook in self._hooks:
            hook.remove()


def _give_up(begun: _Begun) -> None:
    begun.feed.abort()
    begun.answer.exception()  # the session is free again when the step has ended


def _mark(tensor: HeldTensor) -> tuple[int, int]:
    gradient = tensor.parameter.grad
    return gradient.data_ptr(), gradient._version


def _copied(tensor: HeldTensor) -> Callable[[], object]:
    """Return what waits for the copy from a GPU that was just asked for."""
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(tensor.parameter.device))
    wait: Callable[[], object] = event.synchronize
    return wait
