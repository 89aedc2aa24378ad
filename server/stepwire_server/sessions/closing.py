"""The end of what was made in vain."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Protocol

__all__ = ["closed_on_failure"]


class _Closable(Protocol):
    def close(self) -> None: ...


@contextlib.contextmanager
def closed_on_failure(made: _Closable) -> Iterator[None]:
    """Close what was made, such as a new session, if a block fails, so that nothing of it stays."""
    try:
        yield
    except BaseException:
        made.close()
        raise
