"""A few threads that share the large ranges of one engine."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable

from stepwire_server.engines.protocol import GRAIN

__all__ = ["Shares"]


class Shares:
    """Threads that the callers of an engine share.

    Attributes:
        threads: those that work on one call, the caller's included.
    """

    def __init__(self, threads: int) -> None:
        """Prepare to work with some threads."""
        self.threads = threads
        self._pool = concurrent.futures.ThreadPoolExecutor(max(threads - 1, 1), "stepwire-cpu")

    def run(self, work: Callable[[int, int], None], size: int, least: int) -> None:
        """Call `work(first, size)` for shares that together make up `[0, size)`, and wait for all of them.

        Ranges of fewer than `least` elements are not shared. Shares are few and large, one a thread and the first
        for the caller: tasks of 1 MiB took twice as long. Workers only run kernels and wait for nobody, so
        callers that queue here cannot deadlock.
        """
        share = size if size < least else self.share(size)
        if share >= size:
            work(0, size)
            return
        others = [self._pool.submit(work, low, min(share, size - low)) for low in range(share, size, share)]
        try:
            work(0, share)
        finally:
            concurrent.futures.wait(others)
        for other in others:
            other.result()

    def share(self, size: int) -> int:
        """Return the elements of one thread's share of a range."""
        return GRAIN * -(-size // (GRAIN * self.threads))

    def close(self) -> None:
        """Stop the threads once they are idle."""
        self._pool.shutdown()
