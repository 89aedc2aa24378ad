"""A call whose messages come for as long as somebody listens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Generic, Protocol, TypeVar

from stepwire.connection.channel import Calls
from stepwire.connection.errands import each_by_errand, later
from stepwire.connection.watchdog import Watchdog
from stepwire.errors import DeadlineExceededError, UnavailableError

__all__ = ["Closable", "Watch", "watched"]

_T = TypeVar("_T")
_T_co = TypeVar("_T_co", covariant=True)


class Closable(Protocol[_T_co]):
    """An iterator that any thread may close."""

    def __iter__(self) -> Iterator[_T_co]:
        """Return itself."""

    def __next__(self) -> _T_co:
        """Return the next element."""

    def close(self) -> None:
        """End the iteration. Closing twice is harmless."""


def watched(watch: Closable[_T]) -> Iterator[_T]:
    """Yield the elements of a watch, each fetched by another thread, which closes it at the end."""
    try:
        yield from each_by_errand(watch)
    finally:
        later(watch.close)


class Watch(Iterator[_T], Generic[_T]):
    """Iterates over the messages of a server-streaming call, which begins with the first.

    One thread at a time iterates; any thread may close it.
    """

    def __init__(self, calls: Calls, method: str, request: bytes, read: Callable[[bytes], _T], seconds: float) -> None:
        """Prepare the call.

        Args:
            calls: the channel.
            method: the name of the method.
            request: its request, encoded.
            read: decodes a message.
            seconds: the longest wait for a message.
        """
        self._calls = calls
        self._method = method
        self._request = request
        self._read = read
        self._seconds = seconds
        self._stream: Any = None
        self._closed = False
        self._watchdog = Watchdog(self._cancel)

    def __next__(self) -> _T:
        """Wait for the next message.

        Raises:
            DeadlineExceededError: none came within the time.
            StepwireError: the server's refusal, or the connection is lost.
        """
        if self._closed:
            raise StopIteration
        self._watchdog.arm(self._seconds)
        try:
            with self._calls.translated(), self._calls.deadline(self._seconds).within(self._cancel):
                if self._stream is None:
                    self._stream = self._calls.stream(self._method, self._request)
                return self._read(next(self._stream))
        except UnavailableError:
            if not self._watchdog.barked:
                raise
            raise DeadlineExceededError(
                f"no message within {self._seconds:g} s; ask again, or with a longer timeout",
                metadata={"timeout_seconds": self._seconds},
            ) from None
        finally:
            self._watchdog.disarm()

    def close(self) -> None:
        """End the call. Closing twice is harmless."""
        self._closed = True
        self._watchdog.close()
        self._cancel()

    def _cancel(self) -> None:
        if self._stream is not None:
            self._stream.cancel()
