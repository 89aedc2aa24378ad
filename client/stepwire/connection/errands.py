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

import contextvars
import functools
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import FunctionType
from typing import Any, Final, Generic, ParamSpec, Protocol, TypeVar, cast

from stepwire.connection.own_threads import OwnThreads, Ring
from stepwire.lifetimes.endings import ENDINGS

__all__ = [
    "Errand",
    "GivesWay",
    "PreparedErrand",
    "adopt_thread",
    "as_a_whole",
    "by_errand",
    "by_errands",
    "each_by_errand",
    "ends_with",
    "in_thread",
    "is_heard",
    "is_left",
    "later",
    "run",
    "together",
    "undelivered",
]

_P = ParamSpec("_P")
_T = TypeVar("_T")
_log = logging.getLogger("stepwire")
_END: Final = object()
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

    def __call__(self) -> Ring | None:
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

    def leave(self) -> Ring | None:
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

    def outlived(self, *, left: bool = True) -> BaseException | None:
        """Wait in the caller's thread for the end of the errand; return an interrupt that came meanwhile.

        Args:
            left: the caller has left the errand, and waits until it is settled.
        """
        second, until = None, time.monotonic() + _PATIENCE_SECONDS
        while (seconds := until - time.monotonic()) > 0:
            try:
                if self.bell.get(timeout=seconds) or not left:
                    break
            except queue.Empty:
                break
            except BaseException as interrupt:
                second = interrupt
                if self.is_settled or self._over and not left:  # it may have come with the ring, which rings once
                    break
        return second


class PreparedErrand:
    """An errand for the moment of an interrupt: put in one instruction, before anything else can arrive.

    Attributes:
        put: puts the errand; it is C in one piece.
    """

    def __init__(self, call: Callable[[], object]) -> None:
        """Be ready to make a call, once."""
        self._errand = Errand(call)
        self.put = functools.partial(_threads.inbox.put, self._errand)

    def wait(self) -> None:
        """Wait until the call is made, but not for long.

        Raises:
            BaseException: an interrupt that came meanwhile.
        """
        _threads.start()
        if (second := self._errand.outlived(left=False)) is not None:
            raise second from None


class GivesWay(Protocol):
    """A call that this thread makes without an errand, with a lock that errands need."""

    def give_way(self) -> bool:
        """Release the lock, if the call has it, and tell whether it had."""
        ...

    def go_on(self) -> None:
        """Acquire the lock again."""
        ...


class _InThread(threading.local):
    """The call that this thread makes without an errand; None without one."""

    direct: GivesWay | None = None


class _Present:
    """The errand that goes on. A context outlives it: gRPC's threads have copies."""

    def __init__(self, errand: Errand[Any]) -> None:
        self.errand: Errand[Any] | None = errand


_current: contextvars.ContextVar[_Present | None] = contextvars.ContextVar("stepwire-errand", default=None)
_whole: contextvars.ContextVar[list[Callable[[], object]] | None] = contextvars.ContextVar("whole", default=None)


_threads = OwnThreads()
in_thread = _InThread()
os.register_at_fork(after_in_child=_threads.forget)


def run(call: Callable[[], _T], *, lasting: bool = False) -> _T:
    """Have another thread make a call, and wait for its outcome. A thread of the client's own makes the call itself.

    Between the bell and the caller's next instruction are returns alone, and no exception arrives at a return.

    A handler of a signal may call this in the middle of a direct step of its thread, which gives way meanwhile.

    Args:
        call: the call.
        lasting: let the call go on to its end if the caller is interrupted.

    Raises:
        BaseException: the error of the call, or an interrupt of this thread.
    """
    if (direct := in_thread.direct) is None:
        return _run(call, lasting=lasting)
    gave_way = direct.give_way()
    try:
        return _run(call, lasting=lasting)
    finally:
        if gave_way:
            direct.go_on()


def _run(call: Callable[[], _T], *, lasting: bool) -> _T:
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


def _made(call: Callable[[], object], ring: Callable[[None], object]) -> Ring:
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


def undelivered(hook: Callable[_P, object], *args: _P.args, **kwargs: _P.kwargs) -> None:
    """Have the present errand, or the calls that are one as a whole, call a function if the outcome reaches nobody."""
    if (errand := _present()) is not None:
        errand.undelivered(functools.partial(hook, *args, **kwargs))
    elif (hooks := _whole.get()) is not None:
        hooks.append(functools.partial(hook, *args, **kwargs))


def is_heard() -> bool:
    """Tell whether anybody hears of the end of a call, or of an outcome that reaches nobody."""
    return _current.get() is not None or _whole.get() is not None


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
