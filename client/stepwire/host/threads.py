"""A pool of threads that an ending process does not wait for.

The interpreter joins the threads of `ThreadPoolExecutor` before it runs any `atexit` function, and takes no work for
them from then on. So one thread that waits for a step, or for a message on an idle stream, would keep a program from
ending for ever, and no program could train at its end. These threads are daemons, and take work to the last.
"""

from __future__ import annotations

import functools
import queue
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any, TypeAlias, TypeVar

__all__ = ["DaemonThreads"]

_T = TypeVar("_T")
_Work: TypeAlias = "queue.SimpleQueue[Callable[[], object] | None]"


class _Calls:
    """The number of calls that wait or are made.

    The standard library counts idle threads instead. It loses one whenever a busy thread takes the call that an idle
    thread was counted for, and so starts all threads that it may.
    """

    def __init__(self) -> None:
        self._count = 0
        self._lock = threading.Lock()

    def begin(self) -> int:
        """Count one more, and return their number."""
        with self._lock:
            self._count += 1
            return self._count

    def end(self) -> None:
        """Count one less."""
        with self._lock:
            self._count -= 1


class DaemonThreads(Executor):
    """A pool of daemon threads, as many as calls were under way at a time.

    They end with the pool, or with `shutdown`.
    """

    def __init__(self, size: int, name: str, begin: Callable[[], object] | None = None) -> None:
        """Start no thread yet.

        Args:
            size: the most threads.
            name: the beginning of their names.
            begin: a function that each thread calls first.
        """
        self._size = size
        self._name = name
        self._begin = begin
        self._work: _Work = queue.SimpleQueue()
        self._calls = _Calls()
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._closed = False
        weakref.finalize(self, self._work.put, None).atexit = False

    def submit(self, call: Callable[..., _T], /, *args: Any, **options: Any) -> Future[_T]:
        """Have a thread make a call when one is free.

        Raises:
            RuntimeError: `shutdown` was called.
        """
        future: Future[_T] = Future()
        with self._lock:
            if self._closed:
                raise RuntimeError("the threads were shut down, and make no more calls")
            self._work.put(functools.partial(_make, future, functools.partial(call, *args, **options)))
            if self._calls.begin() > len(self._threads) and len(self._threads) < self._size:
                name = f"{self._name}_{len(self._threads)}"
                run = functools.partial(_run, self._work, self._calls, self._begin)
                thread = threading.Thread(target=run, name=name, daemon=True)
                thread.start()
                self._threads.append(thread)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Let the threads end when the calls are made. Shutting down twice is harmless.

        Args:
            wait: wait for the threads.
            cancel_futures: make no call that has not begun.
        """
        with self._lock:
            self._closed = True
            if cancel_futures:
                self._cancel()
            self._work.put(None)
            threads = list(self._threads)
        for thread in threads if wait else ():
            thread.join()

    def _cancel(self) -> None:
        while not self._work.empty():
            call = self._work.get()
            if isinstance(call, functools.partial):
                call.args[0].cancel()


def _run(work: _Work, calls: _Calls, begin: Callable[[], object] | None) -> None:
    """Make calls until there is a None, which is left for the other threads."""
    if begin is not None:
        begin()
    while True:
        call = work.get()
        if call is None:
            work.put(None)
            return
        call()
        calls.end()
        del call  # which may be the last user of something that waits for its end


def _make(future: Future[_T], call: Callable[[], _T]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = call()
    except BaseException as failure:
        future.set_exception(failure)
        del future  # whose failure has this frame: a circle
    else:
        future.set_result(result)
