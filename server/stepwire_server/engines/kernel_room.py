"""The room for compiled kernels, as an engine asks for it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

__all__ = ["KernelRoom"]


class KernelRoom(Protocol):
    """The room for compiled kernels."""

    @property
    def most(self) -> int:
        """The most kernels."""
        ...

    def admitted(self) -> AbstractContextManager[None]:
        """Admit one more kernel, which is made within the block.

        Raises:
            ResourceExhaustedError: there is no room for it.
        """
        ...
