"""Calls made by other threads: their outcomes, their callers who leave, and what is left of both."""

from __future__ import annotations

import contextlib
import contextvars
import gc
import logging
import os
import queue
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from typing import Any, NoReturn

import pytest

from stepwire.connection import errands
from stepwire.connection.errands import by_errand, by_errands, each_by_errand, later, run, together, undelivered
from stepwire.connection.own_threads import MOST_IDLE, OwnThreads
from stepwire.connection.retry import Deadline, Retry
from tests.support.interrupts import Arrival, require_traces, signalled

PATIENCE_SECONDS = 120.0


class Gate:
    """A call that goes on until it is let go.

    Attributes:
        begun: set once the call goes on.
        ended: set once it is over.
    """

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.ended = threading.Event()
        self._open = threading.Event()

    def __call__(self) -> str:
        self.begun.set()
        assert self._open.wait(PATIENCE_SECONDS)
        self.ended.set()
        return "done"

    def open(self) -> None:
        self._open.set()


class Interrupted(BaseException):
    """The exception of a handler of a signal."""


def test_another_thread_makes_the_call_and_its_result_comes_back() -> None:
    def call() -> tuple[str, threading.Thread]:
        return "result", threading.current_thread()

    result, thread = run(call)
    assert (result, thread.name, thread.daemon) == ("result", "stepwire-errands", True)


def test_an_error_comes_back_and_leaves_no_circle() -> None:
    class Held:
        pass

    held = Held()
    known = weakref.ref(held)

    def fail(held: Held) -> NoReturn:
        raise ValueError("no")

    gc.disable()
    try:
        with pytest.raises(ValueError, match="no") as failed:
            run(lambda held=held: fail(held))
        del failed, held
        assert known() is None
    finally:
        gc.enable()


def test_nothing_is_held_once_the_result_is_there() -> None:
    class Held:
        pass

    gc.disable()
    try:
        for _ in range(20):
            held = Held()
            known = weakref.ref(held)
            run(lambda held=held: held)
            del held
            assert known() is None
    finally:
        gc.enable()


def test_the_call_sees_the_context_of_its_caller() -> None:
    number = contextvars.ContextVar[int]("number", default=0)
    number.set(7)
    assert run(number.get) == 7


def test_an_errand_makes_its_own_errands_itself() -> None:
    own, within = run(lambda: (threading.get_ident(), run(threading.get_ident)))
    assert own == within != threading.get_ident()


def test_many_callers_wait_for_each_other_nowhere() -> None:
    """Each call ends only after all others have begun, so each needs a thread; few are left after them."""
    barrier = threading.Barrier(20)
    callers = [threading.Thread(target=run, args=(lambda: barrier.wait(PATIENCE_SECONDS),)) for _ in range(20)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(PATIENCE_SECONDS)
        assert not caller.is_alive()
    while errands._threads._count > MOST_IDLE + 1:  # the last caller's may not be idle yet
        run(int)


def test_elements_are_fetched_by_other_threads() -> None:
    def threads() -> Iterator[tuple[int, int | None]]:
        for number in range(3):
            yield number, threading.get_ident()

    found = list(each_by_errand(threads()))
    assert [number for number, _ in found] == [0, 1, 2]
    assert threading.get_ident() not in [thread for _, thread in found]


def test_calls_that_are_made_together_wait_for_each_other_and_share_an_errand() -> None:
    barrier, threads, ended = threading.Barrier(4), dict[int, int](), list[int]()

    def call(number: int) -> None:
        barrier.wait(PATIENCE_SECONDS)
        threads[number] = threading.get_ident()
        undelivered(lambda: ended.append(number))

    def make() -> int:
        together(call, 4)
        return threading.get_ident()

    assert run(make) == threads[0]
    assert len(set(threads.values())) == 4

    def fail() -> NoReturn:
        make()
        raise ValueError

    with pytest.raises(ValueError):
        run(fail)
    assert sorted(ended) == [0, 1, 2, 3]


def test_an_errand_of_an_own_thread_tells_of_its_failure() -> None:
    """A thread of the client's own, as those of asyncio are, has errands that nobody can leave."""
    told: list[int] = []

    def fail() -> NoReturn:
        undelivered(lambda: told.append(threading.get_ident()))
        raise ValueError

    def work() -> None:
        errands.adopt_thread()
        with pytest.raises(ValueError):
            run(fail)
        assert told == [threading.get_ident()]

    worker = threading.Thread(target=work)
    worker.start()
    worker.join(PATIENCE_SECONDS)
    assert len(told) == 1


def test_functions_and_methods_keep_their_names_and_documentation() -> None:
    @by_errand
    def doubled(number: int, *, times: int = 2) -> int:
        """Return a multiple."""
        return number * times

    @by_errands(but=["own"])
    class Owner:
        def name(self) -> str | None:
            """Return a name."""
            return threading.current_thread().name

        def own(self) -> str:
            return threading.current_thread().name

    assert (doubled(4), doubled(4, times=3), doubled.__doc__) == (8, 12, "Return a multiple.")
    assert (Owner().name(), Owner.name.__doc__) == ("stepwire-errands", "Return a name.")
    assert Owner().own() == threading.current_thread().name


def test_a_caller_who_is_interrupted_ends_the_deadlines_of_its_errand() -> None:
    """The handler may raise anything: Ctrl-C, an exit at SIGTERM, the time-out of an alarm."""
    waiting, cancelled, told = threading.Event(), threading.Event(), threading.Event()

    def call() -> None:
        undelivered(told.set)
        deadline = Retry().deadline(PATIENCE_SECONDS)
        with deadline.within(cancelled.set):
            waiting.set()
            assert cancelled.wait(PATIENCE_SECONDS)
        assert deadline.remaining() == 0.0

    with pytest.raises(Interrupted), signalled(Interrupted(), waiting.wait):
        run(call)
    assert cancelled.is_set()
    assert told.is_set()


def test_a_deadline_of_an_errand_that_was_left_ends_as_it_begins() -> None:
    waiting, left, seen = threading.Event(), threading.Event(), list[float]()

    def call() -> None:
        Retry().deadline(PATIENCE_SECONDS)
        errands.ends_with(left.set)
        waiting.set()
        assert left.wait(PATIENCE_SECONDS)
        seen.append(Retry().deadline(PATIENCE_SECONDS).remaining())

    with pytest.raises(Interrupted), signalled(Interrupted(), waiting.wait):
        run(call)
    assert seen == [0.0]


def test_a_lasting_call_goes_on_without_its_caller() -> None:
    gate = Gate()
    with pytest.raises(Interrupted), signalled(Interrupted(), gate.begun.wait):
        run(gate, lasting=True)
    assert not gate.ended.is_set()
    gate.open()
    assert gate.ended.wait(PATIENCE_SECONDS)


def test_the_last_of_several_interrupts_is_raised() -> None:
    errand = errands.Errand(int)

    class Bell:
        def __init__(self) -> None:
            self.left: list[BaseException] = [KeyboardInterrupt(), SystemExit(3)]

        def get(self, timeout: float) -> bool:
            if self.left:
                raise self.left.pop(0)
            return True

    errand.bell = Bell()  # type: ignore[assignment]
    second = errand.outlived()
    assert isinstance(second, SystemExit)
    assert second.code == 3


def test_an_outcome_is_told_exactly_where_nobody_gets_it() -> None:
    told: list[str] = []

    def call(fails: bool) -> None:
        undelivered(lambda: told.append("untold"))
        if fails:
            raise ValueError

    run(lambda: call(False))
    assert told == []
    with pytest.raises(ValueError):
        run(lambda: call(True))
    assert told == ["untold"]
    undelivered(lambda: told.append("without an errand"))
    assert told == ["untold"]


def test_interrupts_at_every_point_leave_what_the_call_did_or_tell_of_it() -> None:
    """The call was never made, or its outcome came, or the call was told that it did not."""
    run(int)  # which starts the first thread, and later calls do not
    counting = Arrival()
    with counting:
        run(int)
    assert counting.points > 5
    for point in range(counting.points):
        made, told, got = list[int](), list[int](), list[int]()

        def call(made: list[int] = made, told: list[int] = told) -> int:
            undelivered(lambda: told.append(1))
            made.append(1)
            return 1

        with contextlib.suppress(KeyboardInterrupt), (arrival := Arrival(point)):
            got.append(run(call))
        assert arrival.arrived or point > 5, "a call that need not wait has fewer points"
        assert len(made) == len(told) + len(got), point


def test_exceptions_set_by_other_threads_arrive_likewise() -> None:
    require_traces()

    class Ended(Exception):
        pass

    made, told = list[int](), list[int]()

    def call() -> None:
        undelivered(lambda: told.append(1))
        made.append(1)

    arrived, got = list[int](), list[int]()

    def work() -> None:
        run(int)  # which starts the first thread, and later calls do not
        with (counting := Arrival()):
            run(int)
        for point in range(counting.points):
            try:
                with Arrival(point, exception=Ended):
                    run(call)
                got.append(point)
            except Ended:
                arrived.append(point)

    worker = threading.Thread(target=work)
    worker.start()
    worker.join(PATIENCE_SECONDS)
    assert arrived[:6] == list(range(6)), "a call that need not wait has fewer points"
    assert len(made) == len(told) + len(got)


def test_a_call_for_nobody_is_made_and_its_error_is_logged() -> None:
    logged = queue.SimpleQueue[logging.LogRecord]()
    handler = logging.Handler()
    handler.emit = logged.put  # type: ignore[method-assign]

    def fail() -> NoReturn:
        raise ValueError("unseen")

    logging.getLogger("stepwire").addHandler(handler)
    try:
        later(fail)
        record = logged.get(timeout=PATIENCE_SECONDS)
    finally:
        logging.getLogger("stepwire").removeHandler(handler)
    assert record.exc_info is not None
    assert str(record.exc_info[1]) == "unseen"


def test_without_threads_to_spare_the_caller_makes_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(*arguments: Any) -> NoReturn:
        raise RuntimeError("can't start new thread")

    threads = OwnThreads()
    monkeypatch.setattr(errands, "_threads", threads)
    monkeypatch.setattr("_thread.start_new_thread", none_left)
    assert run(threading.get_ident) == threading.get_ident()


FORKING = """
import os
from stepwire.connection.errands import run
assert run(os.getpid) == os.getpid()
if (child := os.fork()) == 0:
    os._exit(7 if run(os.getpid) == os.getpid() else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_has_threads_of_its_own() -> None:
    """In a process of its own: the servers of other tests do not outlive a fork."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", FORKING], env=environment, timeout=PATIENCE_SECONDS, check=False)
    assert done.returncode == 7


def test_a_pause_ends_with_its_deadline() -> None:
    deadline = Deadline(PATIENCE_SECONDS)
    deadline.end()
    deadline.pause(PATIENCE_SECONDS)
    assert deadline.remaining() == 0.0
