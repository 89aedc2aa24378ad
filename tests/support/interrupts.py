"""Exceptions that arrive in the caller's thread in the middle of a call, at a point that a test chooses.

The interpreter handles signals, and exceptions set by other threads, at its own points alone: after a call, at the
start of a function, and at a jump back. A trace function that raised would raise elsewhere too, for example between the
end of a `with` block and the release of its lock. So the trace function here raises nothing. It marks a signal as
arrived, and the interpreter handles the signal at its next point. The mark is set by an operator: a call in the trace
function would be a point itself.
"""

from __future__ import annotations

import _thread
import contextlib
import ctypes
import dis
import functools
import pathlib
import queue
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any, ClassVar, Self

import pytest

import stepwire
from stepwire.connection import errands, retry

__all__ = ["Arrival", "Departure", "require_traces", "signalled"]

PATIENCE_SECONDS = 120.0
_CTRL_C: Any = object()
_STEPWIRE = str(pathlib.Path(stepwire.__file__).parent)
_LOCKED = {errands.__file__, retry.__file__}
"""The modules with locks that a departure takes: stopped there, the errand's thread would be in its way."""

_TESTS = str(pathlib.Path(__file__).parents[1])
_POINTS = frozenset(code for name, code in dis.opmap.items() if name.startswith(("CALL", "RESUME", "JUMP_BACKWARD")))


def require_traces() -> None:
    """Skip the test where the places cannot be found. To be called in the test's own thread.

    CPython 3.12 traces all threads through one set of events. There a trace sees nothing now and then, where several
    threads have begun and ended traces. CPython 3.13 has no such opcodes.
    """
    if sys.version_info >= (3, 12):
        pytest.skip("the places where an interrupt arrives are found by the traces of CPython 3.11")


class _Signals:
    """A mapping whose reads mark a signal as arrived."""

    __getitem__: ClassVar[Any] = _thread.interrupt_main


class _Exceptions:
    """A mapping whose writes set the exception of a thread."""

    __setitem__: ClassVar[Any] = ctypes.pythonapi.PyThreadState_SetAsyncExc


class Arrival:
    """Has an exception arrive in a block, at the nth of the points that this thread passes outside of tests.

    Attributes:
        points: the number of points so far.
        arrived: True once the exception is on its way.
    """

    def __init__(self, *at: int, exception: type[BaseException] | None = None) -> None:
        """Choose the points, counted from 0; none to count alone.

        Args:
            at: the points.
            exception: the class of an exception that another thread sets; None for Ctrl-C.
        """
        require_traces()
        self.points = 0
        self.arrived = False
        self._at = frozenset(at)
        self._signals, self._exceptions = _Signals(), _Exceptions()
        self._sigint = signal.SIGINT
        self._thread = ctypes.c_ulong(threading.get_ident())
        self._exception = None if exception is None else ctypes.py_object(exception)

    def __repr__(self) -> str:
        return f"Arrival({sorted(self._at)})"

    def _trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "call":
            if frame.f_code.co_filename.startswith(_TESTS):
                return None
            frame.f_trace_opcodes = True
        elif event == "opcode" and frame.f_code.co_code[frame.f_lasti] in _POINTS:
            number = self.points
            self.points = number + 1
            if number in self._at:
                self.arrived = True
                if self._exception is None:
                    self._signals[self._sigint]
                else:
                    self._exceptions[self._thread] = self._exception
        return self._trace

    def __enter__(self) -> Self:
        sys.settrace(self._trace)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        sys.settrace(None)


@contextlib.contextmanager
def signalled(exception: BaseException, moment: Callable[[], object], number: int = signal.SIGUSR1) -> Iterator[None]:
    """Have the handler of a signal raise in the main thread, once, during a block.

    Args:
        exception: the exception of the handler.
        moment: a function that returns when the signal is to be sent.
        number: the number of the signal.
    """
    handled = threading.Event()
    main = threading.main_thread().ident
    assert main is not None
    assert threading.get_ident() == main

    def raised(number: int, frame: FrameType | None) -> None:
        if not handled.is_set():
            handled.set()
            raise exception

    def send() -> None:
        moment()
        signal.pthread_kill(main, number)
        while not handled.wait(0.01):  # a signal just before a wait does not end the wait; what follows is ignored
            signal.pthread_kill(main, number)

    before = signal.signal(number, raised)
    sender = threading.Thread(target=send)
    sender.start()
    try:
        yield
    finally:
        sender.join(PATIENCE_SECONDS)
        signal.signal(number, before)
        assert not sender.is_alive()


class _Bell(queue.SimpleQueue[bool]):
    """A bell at which Ctrl-C can arrive."""

    def get(self, block: bool = True, timeout: float | None = None) -> bool:
        if (rung := super().get(block, timeout)) is _CTRL_C:
            raise KeyboardInterrupt
        return rung


def _is_of_finaliser(frame: FrameType | None) -> bool:
    """Tell whether the collector has brought a thread into a frame: perhaps with locks that a departure takes."""
    while frame is not None:
        if frame.f_code.co_filename == weakref.__file__:
            return True
        frame = frame.f_back
    return False


class Departure:
    """Has Ctrl-C arrive in the thread that waits, while its errand is at the nth line of stepwire's own code.

    The errand's thread goes on when its caller has left the errand. So this is not for an errand that goes on without
    its caller, as an end does.
    """

    def __init__(self, at: int | None = None) -> None:
        """Choose the line, counted from 0; None to count alone."""
        require_traces()
        self.lines = 0
        self.arrived = False
        self._at = at
        self._left = threading.Event()
        self._patched = pytest.MonkeyPatch()

    def __repr__(self) -> str:
        return f"Departure({self._at})"

    def __enter__(self) -> Self:
        init, made, leave = errands.Errand.__init__, errands.Errand._made, errands.Errand.leave

        def begun(errand: Any, call: Any) -> None:
            init(errand, call)
            errand.bell = _Bell()

        def traced(errand: Any) -> Any:
            sys.settrace(functools.partial(self._trace, errand))
            try:
                return made(errand)
            finally:
                sys.settrace(None)

        def left(errand: Any) -> Any:
            ring = leave(errand)
            self._left.set()
            return ring

        for name, function in (("__init__", begun), ("_made", traced), ("leave", left)):
            self._patched.setattr(errands.Errand, name, function)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._patched.undo()

    def _trace(self, errand: Any, frame: FrameType, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith(_STEPWIRE) or frame.f_code.co_filename in _LOCKED:
            return None
        if event == "call" and _is_of_finaliser(frame):
            return None
        if event == "line":
            number = self.lines
            self.lines = number + 1
            if number == self._at:
                self.arrived = True
                errand.bell.put(_CTRL_C)
                assert self._left.wait(PATIENCE_SECONDS)
        return functools.partial(self._trace, errand)
