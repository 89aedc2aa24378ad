"""A few threads that work together on the large ranges of one engine."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable

from stepwire.host.threads import DaemonThreads
from stepwire_server.engines.protocol import GRAIN

__all__ = ["RangeThreads"]


class RangeThreads:
    """The threads that the callers of an engine have in common.

    Attributes:
        threads: the number of threads that work on one call, the caller's included.
    """

    def __init__(self, threads: int) -> None:
        """Prepare to work with some threads."""
        self.threads = threads
        self._pool = DaemonThreads(max(threads - 1, 1), "stepwire-cpu")

    def run(self, work: Callable[[int, int], None], size: int, least: int, grain: int = GRAIN) -> None:
        """Call `work(first, size)` for ranges that together make up `[0, size)`, and wait for all of them.

        Work on fewer than `least` elements stays with the caller. Ranges are few and large, one a thread and the first
        for the caller: tasks of 1 MiB took twice as long. The threads run kernels alone and wait for nobody, so callers
        that queue here cannot deadlock.

        Args:
            work: the work on one range; it is called in several threads at a time.
            size: the number of elements.
            least: the number of elements from which a second thread pays.
            grain: the number that all ranges but the last are multiples of.
        """
        most = size if size < least else self.range_size(size, grain)
        if most >= size:
            work(0, size)
            return
        others = [self._pool.submit(work, low, min(most, size - low)) for low in range(most, size, most)]
        try:
            work(0, most)
        finally:
            concurrent.futures.wait(others)
        for other in others:
            other.result()

    def range_size(self, size: int, grain: int = GRAIN) -> int:
        """Return the number of elements that one thread works on, of `size` in all."""
        return grain * -(-size // (grain * self.threads))

    def close(self) -> None:
        """Stop the threads once they are idle."""
        self._pool.shutdown()
