"""The parts of `threading`, `queue`, `time` and `secrets` that the packages use, on virtual time.

They take the places of the real modules in every module of both packages, so that the code under test is the code that
ships.
"""

from __future__ import annotations

import contextlib
import functools
import queue
import random
import sys
import threading
import types
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import stepwire.connecting  # noqa: F401  # all modules are there before anything takes the places of theirs
from stepwire.connection import errands, line, stream
from stepwire.connection.own_threads import OwnThreads
from stepwire.connection.watchdog import Watchdog
from stepwire.lifetimes.endings import ENDINGS
from tests.simulation.runtime import Scheduler, Task

__all__ = ["installed"]

_SWITCHED = 0.03
"""The likelihood that another task goes on at a lock that is free."""


class _Lock:
    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._locked = False
        self._waiters: list[Task] = []

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        scheduler = self._scheduler
        if blocking and not self._locked:
            scheduler.give_way(_SWITCHED)
        end = None if timeout is None or timeout < 0 else scheduler.now + timeout
        while self._locked:
            left = None if end is None else end - scheduler.now
            if not blocking or (left is not None and left <= 0):
                return False
            task = scheduler.running
            assert task is not None, "the scheduler itself would have to wait for a lock"
            self._waiters.append(task)
            try:
                scheduler.block(left)
            finally:
                with contextlib.suppress(ValueError):
                    self._waiters.remove(task)
        self._locked = True
        return True

    def release(self) -> None:
        if not self._locked and not self._scheduler.process.dead:
            raise RuntimeError("release of a free lock")
        self._locked = False
        if self._waiters:
            self._scheduler.wake(self._waiters.pop(self._scheduler.chance.randrange(len(self._waiters))))

    def locked(self) -> bool:
        return self._locked

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *error: object) -> None:
        self.release()


class _RLock:
    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler, self._lock = scheduler, _Lock(scheduler)
        self._owner: object = None
        self._count = 0

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        me = self._scheduler.running or self._scheduler
        if self._owner is me:
            self._count += 1
            return True
        if not self._lock.acquire(blocking, timeout):
            return False
        self._owner, self._count = me, 1
        return True

    def release(self) -> None:
        self._count -= 1
        if not self._count:
            self._owner = None
            self._lock.release()

    def saved(self) -> int:
        count, self._count, self._owner = self._count, 0, None
        self._lock.release()
        return count

    def restore(self, count: int) -> None:
        self._lock.acquire()
        self._owner, self._count = self._scheduler.running or self._scheduler, count

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *error: object) -> None:
        self.release()


class _Condition:
    def __init__(self, scheduler: Scheduler, lock: Any = None) -> None:
        self._scheduler = scheduler
        self._lock = lock if lock is not None else _RLock(scheduler)
        self._waiters: list[Task] = []

    def wait(self, timeout: float | None = None) -> bool:
        task = self._scheduler.running
        assert task is not None, "the scheduler itself would have to wait"
        self._waiters.append(task)
        count = self._lock.saved() if isinstance(self._lock, _RLock) else self._lock.release()
        try:
            return self._scheduler.block(timeout)
        finally:
            with contextlib.suppress(ValueError):
                self._waiters.remove(task)
            if not task.process.dead:
                self._lock.restore(count) if isinstance(self._lock, _RLock) else self._lock.acquire()

    def wait_for(self, predicate: Callable[[], bool], timeout: float | None = None) -> bool:
        end = None if timeout is None else self._scheduler.now + timeout
        while not (result := predicate()):
            left = None if end is None else end - self._scheduler.now
            if left is not None and left <= 0:
                break
            self.wait(left)
        return result

    def notify(self, count: int = 1) -> None:
        woken, self._waiters = self._waiters[:count], self._waiters[count:]
        for task in woken:
            self._scheduler.wake(task)

    def notify_all(self) -> None:
        self.notify(len(self._waiters))

    def acquire(self, *args: Any) -> bool:
        return bool(self._lock.acquire(*args))

    def release(self) -> None:
        self._lock.release()

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *error: object) -> None:
        if self._scheduler.process.dead:
            return
        self._lock.release()


class _Event:
    def __init__(self, scheduler: Scheduler) -> None:
        self._condition, self._set = _Condition(scheduler), False

    def is_set(self) -> bool:
        return self._set

    def set(self) -> None:
        self._set = True
        self._condition.notify_all()

    def clear(self) -> None:
        self._set = False

    def wait(self, timeout: float | None = None) -> bool:
        with self._condition:
            return self._condition.wait_for(self.is_set, timeout)


class _Semaphore:
    def __init__(self, scheduler: Scheduler, value: int = 1) -> None:
        self._condition, self._value = _Condition(scheduler), value

    def acquire(self, blocking: bool = True, timeout: float | None = None) -> bool:
        with self._condition:
            if blocking:
                self._condition.wait_for(lambda: self._value > 0, timeout)
            acquired = self._value > 0
            self._value -= acquired
            return acquired

    def release(self, count: int = 1) -> None:
        self._value += count
        self._condition.notify(count)


class _SimpleQueue:
    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._items: deque[Any] = deque()
        self._waiters: list[Task] = []

    def put(self, item: Any, block: object = True, timeout: float | None = None) -> None:
        self._items.append(item)
        if self._waiters:
            self._scheduler.wake(self._waiters.pop(0))

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        end = None if timeout is None else self._scheduler.now + timeout
        while not self._items:
            left = None if end is None else end - self._scheduler.now
            task = self._scheduler.running
            if not block or task is None or (left is not None and left <= 0):
                raise queue.Empty
            self._waiters.append(task)
            try:
                self._scheduler.block(left)
            finally:
                with contextlib.suppress(ValueError):
                    self._waiters.remove(task)
        return self._items.popleft()

    def get_nowait(self) -> Any:
        return self.get(block=False)

    def empty(self) -> bool:
        return not self._items

    def qsize(self) -> int:
        return len(self._items)


class _Thread:
    def __init__(
        self,
        scheduler: Scheduler,
        *,
        target: Callable[..., object],
        args: tuple[Any, ...] = (),
        name: str = "thread",
        daemon: bool = True,
    ) -> None:
        self._scheduler, self._call, self.name = scheduler, functools.partial(target, *args), name
        self._task: Task | None = None

    def start(self) -> None:
        self._task = self._scheduler.spawn(self._call, name=self.name)

    def is_alive(self) -> bool:
        return self._task is not None and not self._task.done

    def join(self, timeout: float | None = None) -> None:
        end = None if timeout is None else self._scheduler.now + timeout
        while self._task is not None and not self._task.done:
            left = None if end is None else end - self._scheduler.now
            if left is not None and left <= 0:
                return
            assert self._scheduler.running is not None
            self._task.joiners.append(self._scheduler.running)
            self._scheduler.block(left)


class _Local:
    def __init__(self, scheduler: Scheduler) -> None:
        object.__setattr__(self, "_scheduler", scheduler)
        object.__setattr__(self, "_outside", {})

    def _values(self) -> dict[str, Any]:
        scheduler: Scheduler = object.__getattribute__(self, "_scheduler")
        if scheduler.running is None:
            outside: dict[str, Any] = object.__getattribute__(self, "_outside")
            return outside
        return scheduler.running.locals.setdefault(id(self), {})

    def __getattr__(self, name: str) -> Any:
        try:
            return self._values()[name]
        except KeyError:
            raise AttributeError(name) from None

    def __setattr__(self, name: str, value: Any) -> None:
        self._values()[name] = value


def _modules(scheduler: Scheduler) -> dict[str, types.SimpleNamespace]:
    """Return what takes the places of the modules, by their names."""

    def make(kind: Callable[..., Any]) -> Any:
        return functools.partial(kind, scheduler)

    chance = random.Random(scheduler.chance.random())

    def began(call: Callable[..., object], args: tuple[Any, ...]) -> int:
        scheduler.spawn(functools.partial(call, *args), name="thread")
        return 0

    return {
        "threading": types.SimpleNamespace(
            Lock=make(_Lock),
            RLock=make(_RLock),
            Condition=make(_Condition),
            Event=make(_Event),
            Semaphore=make(_Semaphore),
            Thread=make(_Thread),
            local=make(_Local),
            TIMEOUT_MAX=threading.TIMEOUT_MAX,
            get_ident=lambda: id(scheduler.running),
            current_thread=lambda: scheduler.running,
        ),
        "_thread": types.SimpleNamespace(start_new_thread=began),
        "queue": types.SimpleNamespace(SimpleQueue=make(_SimpleQueue), Empty=queue.Empty),
        "time": types.SimpleNamespace(
            monotonic=scheduler.clock, time=scheduler.clock, perf_counter=scheduler.clock, sleep=scheduler.sleep
        ),
        "secrets": types.SimpleNamespace(
            token_hex=lambda count=32: chance.randbytes(count).hex(),
            token_bytes=lambda count=32: chance.randbytes(count),
            randbits=chance.getrandbits,
            randbelow=chance.randrange,
        ),
    }


@contextlib.contextmanager
def installed(scheduler: Scheduler) -> Iterator[None]:
    """Have all modules of both packages run on a scheduler for a block."""
    replaced = _modules(scheduler)
    with pytest.MonkeyPatch.context() as patched:
        for name, module in list(sys.modules.items()):
            if name.split(".")[0] in ("stepwire", "stepwire_server"):
                for attribute, stand_in in replaced.items():
                    if isinstance(vars(module).get(attribute), types.ModuleType):
                        patched.setattr(module, attribute, stand_in)
        patched.setattr(errands, "_threads", OwnThreads())
        patched.setattr(stream, "Watchdog", functools.partial(Watchdog, clock=scheduler.clock))
        with _ends_of_their_own(patched):
            try:
                yield
            finally:
                scheduler.end()


@contextlib.contextmanager
def _ends_of_their_own(patched: pytest.MonkeyPatch) -> Iterator[None]:
    """Keep the ends of the real process apart from those of a history, each of which begins without any."""
    real = dict(vars(ENDINGS))
    patched.setattr(line._gate, "_ends", True)
    patched.setattr(ENDINGS, "_open", {})
    ENDINGS.forget()
    try:
        yield
    finally:
        vars(ENDINGS).update(real)
