"""A peer: `torch.optim.Adam` in the client's own process, with nothing to send; the competitor of every service."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any

import variants
from contest import Action, Contender, needed

__all__ = ["contenders"]

# Torch's default for one tensor on a processor is neither foreach nor fused.
_DEFAULT: dict[str, Any] = {}
_FUSED: dict[str, Any] = {"fused": True}


def contenders() -> list[Contender]:
    """Return torch's fused form and its default one."""
    return [Contender("local torch fused", _adam(_FUSED)), Contender("local torch default", _adam(_DEFAULT))]


def _adam(form: dict[str, Any]) -> Callable[[contextlib.ExitStack, int], Action]:
    def prepare(stack: contextlib.ExitStack, size: int) -> Action:
        torch = needed("torch")
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        parameter = torch.nn.Parameter(torch.from_numpy(variants.parameters_of(size)))
        parameter.grad = torch.from_numpy(variants.gradient_of(size).copy())
        step: Action = torch.optim.Adam([parameter], **form).step
        return step

    return prepare
