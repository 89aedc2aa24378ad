"""Hooks of torch, registered for a block."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["hooked"]


@contextlib.contextmanager
def hooked(register: Callable[..., Any], hook: Callable[..., Any], **options: Any) -> Iterator[None]:
    """Register a hook for a block. After it the hook does nothing, though an interrupt may have left it registered.

    Args:
        register: the function of torch that registers, and returns a handle.
        hook: the hook.
        options: the options of `register`.
    """
    handle, is_over = None, False

    def within(*arguments: Any) -> Any:
        return None if is_over else hook(*arguments)

    try:
        handle = register(within, **options)
        yield
    finally:
        is_over = True
        if handle is not None:
            handle.remove()
