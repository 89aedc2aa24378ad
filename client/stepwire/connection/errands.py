"""Errands: the calls that threads of the client's own make, while a user's thread waits for them on one primitive.

An exception can arrive in a user's thread between any two instructions: by Ctrl-C, by a handler of another signal, or
from another thread. Code in Python that takes a lock is then left between the lock and its `with` block, and the lock
stays held for ever. gRPC has such code in every call, and so has `threading.Condition`. So a user's thread runs none of
it. It puts an errand into a queue and waits for a bell, which is C in one piece. An errand's own thread gets no such
exception, so what an errand does is whole.

A caller who is interrupted leaves its errand: another errand ends the deadlines of the first, which so breaks off as at
its deadline. An outcome that nobody got is told to the code that made it, by `undelivered`. `as_a_whole` has the
outcomes of several errands, and the caller's own work between them, reach the caller together or not at all.

The cost is two switches of threads a call. A thread for gRPC's reads alone would cost one a message.
"""

from __future__ import annotations

import _thread
import contextvars
import functools
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import FunctionType
from typing import Any, Final, Generic, ParamSpec, TypeAlias, TypeVar, cast

from stepwire.lifetimes.endings import ENDINGS

__all__ = [
    "Errand",
    "adopt_thread",
    "as_a_whole",
    "by_errand",
    "by_errands",
    "each_by_errand",
    "ends_with",
    "is_left",
    "later",
    "run",
    "together",
    "undelivered",
]

_P = ParamSpec("_P")
_T = TypeVar("_T")
_Ring: TypeAlias = Callable[[], object]
_log = logging.getLogger("stepwire")
_END: Final = object()
_MOST_IDLE: Final = 8
_PATIENCE_SECONDS: Final = 5.0
"""The longest time that an interrupted caller waits until its errand has let go of the caller's arrays."""


class Errand(Generic[_T]):
    """One call, its outcome, and a caller who may leave.

    Attributes:
        bell: rings False at the end of the call, and True once a caller who left has no more to wait for.
        result: the result of the call.
        failure: the error of the call; None without one.
        is_left: True once the caller has left.
        is_settled: True once a caller who left has no more to wait for.
        hooks: the functions to call if the outcome reaches nobody.
    """

    result: _T

    def __init__(self, call: Callable[[], _T]) -> None:
        """Be ready to make a call, in the context of this moment."""
        self.bell: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self.failure: BaseException | None = None
        self._call = call
        self._context = contextvars.copy_context()
        self._lock = threading.Lock()  # of the client's own threads; the caller takes none
        self._ends: list[Callable[[], object]] = []
        self.hooks: list[Callable[[], object]] = []
        self.is_left = self.is_settled = self._begun = self._over = False

    def __call__(self) -> _Ring | None:
        """Make the call, unless the caller has left; return the ring of the bell."""
        with self._lock:
            if self.is_left:
                return None
            self._begun = True
        try:
            self.result = self._context.run(self._made)
        except BaseException as error:
            self.failure = error
        del self._call, self._context
        with self._lock:
            self._over, left = True, self.is_left
        if left or self.failure is not None:
            _tell(self.hooks)
        self.is_settled = left
        return functools.partial(self.bell.put, left)

    def _made(self) -> _T:
        present = _Present(self)
        _current.set(present)
        try:
            return self._call()
        finally:
            present.errand = None

    def leave(self) -> _Ring | None:
        """End the call as at its deadline: its caller waits for it no longer. Return the ring of the bell, if over."""
        with self._lock:
            self.is_left = True
            ends, under_way, over = list(self._ends), self._begun and not self._over, self._over
        if under_way:
            _tell(ends)
            return None
        if over:
            _tell(self.hooks)
        self.is_settled = True
        return functools.partial(self.bell.put, True)

    def ends_with(self, end: Callable[[], object]) -> None:
        """Call a function when the caller leaves; at once, if the caller has left."""
        with self._lock:
            if not self.is_left:
                self._ends.append(end)
        if self.is_left:
            end()

    def undelivered(self, hook: Callable[[], object]) -> None:
        """Call a function if the outcome reaches nobody."""
        self.hooks.append(hook)

    def outlived(self) -> BaseException | None:
        """Wait in the caller's thread until the errand is left; return a second interrupt, if one came meanwhile."""
        second, until = None, time.monotonic() + _PATIENCE_SECONDS
        while (seconds := until - time.monotonic()) > 0:
            try:
                if self.bell.get(timeout=seconds):
                    break
            except queue.Empty:
                break
            except BaseException as interrupt:
                second = interrupt
                if self.is_settled:  # it may have come with the ring, which rings once
                    break
        return second


class _Present:
    """The errand that goes on. A context outlives it: gRPC's threads have copies."""

    def __init__(self, errand: Errand[Any]) -> None:
        self.errand: Errand[Any] | None = errand


_current: contextvars.ContextVar[_Present | None] = contextvars.ContextVar("stepwire-errand", default=None)
_whole: contextvars.ContextVar[list[Callable[[], object]] | None] = contextvars.ContextVar("whole", default=None)


class _OwnThreads:
    """The threads that make errands. One of them is always idle, and few are, whatever the number of callers."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Begin anew, in a forked process that has none of the threads."""
        self.inbox: queue.SimpleQueue[Callable[[], _Ring | None]] = queue.SimpleQueue()
        self._own = threading.local()
        self._lock = threading.Lock()
        self._idle = self._count = 0

    @property
    def is_one_of_them(self) -> bool:
        return getattr(self._own, "is_adopted", False)

    def adopt(self) -> None:
        """Have this thread make its errands itself: no exception of other threads arrives in it."""
        self._own.is_adopted = True

    def start(self) -> None:
        """Have a thread, if there is none. Starting a `threading.Thread` takes locks, so another thread does it."""
        if self._count:
            return
        try:
            _thread.start_new_thread(self._begin, ())
        except RuntimeError:  # there are no more threads to be had
            while not self.inbox.empty():
                if (ring := self.inbox.get()()) is not None:
                    ring()

    def _begin(self) -> None:
        if not self._hire():
            self._work()

    def _hire(self) -> bool:
        with self._lock:
            self._count += 1
            self._idle += 1
        try:
            threading.Thread(target=self._work, name="stepwire-errands", daemon=True).start()
        except RuntimeError:
            with self._lock:
                self._count -= 1
                self._idle -= 1
            return False
        return True

    def _work(self) -> None:
        self.adopt()
        while True:
            errand = self.inbox.get()
            with self._lock:
                self._idle -= 1
                is_last = self._idle <= 0
            if is_last:  # an errand may wait for the next one, which ends it
                self._hire()
            ring = errand()
            del errand  # its caller may wait for the end of what it holds
            with self._lock:  # before the ring: the caller wakes, and finds the interpreter free
                retires = self._idle >= _MOST_IDLE
                self._count, self._idle = self._count - retires, self._idle + (not retires)
            if ring is not None:
                ring()
            if retires:
                return
            del ring


_threads = _OwnThreads()
os.register_at_fork(after_in_child=_threads.forget)


def run(call: Callable[[], _T], *, lasting: bool = False) -> _T:
    """Have another thread make a call, and wait for its outcome. A thread of the client's own makes the call itself.

    Between the bell and the caller's next instruction are returns alone, and no exception arrives at a return.

    Args:
        call: the call.
        lasting: let the call go on to its end if the caller is interrupted.

    Raises:
        BaseException: the error of the call, or an interrupt of this thread.
    """
    is_own = _threads.is_one_of_them
    if is_own and _present() is not None:
        return call()
    errand, hooks = Errand(call), _whole.get()
    if is_own:
        errand()
    else:
        _wait(errand, lasting=lasting)
    failure, errand.failure = errand.failure, None
    if failure is None:
        if hooks is not None:
            hooks += errand.hooks
        return errand.result
    if not is_own and ENDINGS.is_over and threading.current_thread().daemon:
        threading.Event().wait()  # for the end of the process, as daemon threads do: no traceback is printed then
    try:
        raise failure
    finally:
        del failure  # its traceback has this frame


def _wait(errand: Errand[Any], *, lasting: bool) -> None:
    try:
        _threads.inbox.put(errand)
        _threads.start()
        errand.bell.get()
    except BaseException:
        if not lasting:
            _threads.inbox.put(errand.leave)  # nothing arrives before this, not even a second interrupt
        _threads.start()
        if not lasting and (second := errand.outlived()) is not None:
            raise second from None
        raise


def as_a_whole(call: Callable[[], _T]) -> _T:
    """Make a call of several errands in this thread. If it fails, the outcomes of all of them have reached nobody.

    Raises:
        BaseException: the error of the call.
    """
    if _threads.is_one_of_them:
        return call()
    hooks: list[Callable[[], object]] = []
    outer = _whole.get()
    try:
        _whole.set(hooks)
        result = call()
        _whole.set(outer)
    except BaseException:
        run(functools.partial(_tell, hooks), lasting=True)
        _whole.set(outer)
        raise
    if outer is not None:
        outer += hooks
    return result


def by_errand(function: Callable[_P, _T], *, lasting: bool = False) -> Callable[_P, _T]:
    """Have another thread make each call of a function; see `run`."""

    @functools.wraps(function)
    def made(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        return run(functools.partial(function, *args, **kwargs), lasting=lasting)

    return made


def by_errands(*, but: Sequence[str] = (), lasting: Sequence[str] = ()) -> Callable[[type[_T]], type[_T]]:
    """Have another thread make each call of the public methods of a class.

    Args:
        but: the names of methods that the caller's thread makes: they wait for nothing, or by an errand of their own.
        lasting: the names of methods that go on to their end without their caller; see `run`.
    """

    def changed(owner: type[_T]) -> type[_T]:
        for name, member in list(vars(owner).items()):
            if isinstance(member, FunctionType) and not name.startswith("_") and name not in but:
                setattr(owner, name, by_errand(member, lasting=name in lasting))
        return owner

    return changed


def each_by_errand(elements: Iterator[_T]) -> Iterator[_T]:
    """Yield the elements of an iterator, each of them fetched by another thread."""
    while (element := run(lambda: next(elements, _END))) is not _END:
        yield cast(_T, element)


def together(call: Callable[[int], object], count: int) -> None:
    """Call a function with each number below `count`, all at once, and wait for all calls; it raises nothing.

    The first call is made by this thread, and all of them within the present errand.
    """
    bell: queue.SimpleQueue[None] = queue.SimpleQueue()
    for number in range(1, count):
        made = functools.partial(contextvars.copy_context().run, call, number)
        _threads.inbox.put(functools.partial(_made, made, bell.put))
    _threads.start()
    if count:
        call(0)
    for _ in range(1, count):
        bell.get()


def _made(call: Callable[[], object], ring: Callable[[None], object]) -> _Ring:
    call()
    return functools.partial(ring, None)


def later(call: Callable[[], object]) -> None:
    """Have another thread make a call that nobody waits for. Callable from anywhere, a finaliser included."""
    _threads.inbox.put(functools.partial(_quietly, call))
    _threads.start()


def adopt_thread() -> None:
    """Have this thread, which is the client's own, make its errands itself."""
    _threads.adopt()


def ends_with(end: Callable[[], object]) -> None:
    """Have the present errand, if there is one, call a function when its caller leaves it."""
    if (errand := _present()) is not None:
        errand.ends_with(end)


def is_left() -> bool:
    """Tell whether the caller of the present errand, if there is one, has left it."""
    return (errand := _present()) is not None and errand.is_left


def undelivered(hook: Callable[[], object]) -> None:
    """Have the present errand, if there is one, call a function if its outcome reaches nobody."""
    if (errand := _present()) is not None:
        errand.undelivered(hook)


def _present() -> Errand[Any] | None:
    present = _current.get()
    return None if present is None else present.errand


def _tell(hooks: Sequence[Callable[[], object]]) -> None:
    for hook in hooks:
        _quietly(hook)


def _quietly(call: Callable[[], object]) -> None:
    try:
        call()
    except BaseException:
        _log.exception("a call that nobody waits for has failed")
