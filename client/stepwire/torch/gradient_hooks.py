"""Hooks that tell an object of gradients, and neither keep the object alive nor outlive it."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable
from typing import Any

from stepwire.lifetimes.endings import ENDINGS
from stepwire.torch.tensors import ParameterTensor

__all__ = ["GradientHooks"]


class GradientHooks:
    """The hooks of one object. Removed twice without complaint.

    Autograd keeps a hook with its parameter, and a model outlives its optimizer in many programs. A hook that referred
    to the optimizer would keep it, its session and its threads.
    """

    def __init__(self, tell: Callable[[ParameterTensor], object]) -> None:
        """Tell an object of gradients.

        Args:
            tell: a bound method of the object.
        """
        self._tell = weakref.WeakMethod(tell)
        self._hooks: dict[str, Any] = {}
        ENDINGS.with_owner(tell.__self__, functools.partial(_remove, self._hooks))  # type: ignore[attr-defined]

    def watch(self, tensors: Iterable[ParameterTensor]) -> None:
        """Have autograd tell of gradients; a parameter that is frozen cannot have a hook."""
        for tensor in tensors:
            if tensor.parameter.requires_grad and tensor.name not in self._hooks:
                hook = functools.partial(_hook, self._tell, tensor)
                self._hooks[tensor.name] = tensor.parameter.register_post_accumulate_grad_hook(hook)

    def remove(self) -> None:
        """Tell no more."""
        _remove(self._hooks)


def _hook(tell: weakref.WeakMethod[Callable[[ParameterTensor], object]], tensor: ParameterTensor, _: Any) -> None:
    if (told := tell()) is not None:
        told(tensor)


def _remove(hooks: dict[str, Any], seconds: float = 0.0) -> None:
    while hooks:
        hooks.popitem()[1].remove()
