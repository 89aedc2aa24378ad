"""Turns in a thread, and calls that nobody waits for any more."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest

from stepwire.aio.worker import Worker
from stepwire.errors import UnavailableError

PATIENCE_SECONDS = 120.0


class Call:
    """A blocking call that begins and ends when a test says so."""

    def __init__(self, outcome: Any = None) -> None:
        self.begun = threading.Event()
        self.ends = threading.Event()
        self.outcome = outcome

    def __call__(self) -> Any:
        self.begun.set()
        assert self.ends.wait(PATIENCE_SECONDS)
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        return self.outcome


async def begun(call: Call) -> None:
    """Wait in another thread until a call is under way."""
    assert await asyncio.to_thread(call.begun.wait, PATIENCE_SECONDS)


async def cancelled(task: asyncio.Task[Any]) -> bool:
    """Cancel a task and tell whether that is how it ended."""
    task.cancel()
    await asyncio.wait([task])
    return task.cancelled()


def with_worker(body: Callable[[Worker], Coroutine[Any, Any, None]]) -> None:
    """Run a test in a loop of its own, and see that the worker's thread ends."""

    async def run() -> None:
        worker = Worker("stepwire-test-worker")
        try:
            await asyncio.wait_for(body(worker), PATIENCE_SECONDS)
        finally:
            worker.close()

    asyncio.run(run())
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("stepwire-test-worker")] == []


def test_calls_are_made_in_order_in_one_thread() -> None:
    made: list[tuple[int, int]] = []

    async def body(worker: Worker) -> None:
        def call(number: int) -> Callable[[], int]:
            return lambda: made.append((number, threading.get_ident())) or number  # type: ignore[func-returns-value]

        calls = [worker.step(call(number)) if number % 2 else worker.run(call(number)) for number in range(20)]
        assert await asyncio.gather(*calls) == list(range(20))

    with_worker(body)
    assert [number for number, _ in made] == list(range(20))
    assert len({thread for _, thread in made}) == 1
    assert made[0][1] != threading.get_ident()


def test_the_loop_runs_while_a_call_blocks() -> None:
    async def body(worker: Worker) -> None:
        call = Call("done")
        task = asyncio.create_task(worker.run(call))
        await begun(call)
        assert not task.done()
        call.ends.set()
        assert await task == "done"

    with_worker(body)


def test_a_call_before_its_turn_is_taken_back() -> None:
    async def body(worker: Worker) -> None:
        first, second = Call(1), Call(2)
        running = asyncio.create_task(worker.step(first))
        await begun(first)
        waiting = asyncio.create_task(worker.step(second))
        await asyncio.sleep(0)  # so that it is handed in
        assert await cancelled(waiting)
        first.ends.set()
        assert await running == 1
        assert await worker.run(lambda: 3) == 3
        assert not second.begun.is_set()

    with_worker(body)


def test_a_call_under_way_goes_on_when_its_await_is_cancelled() -> None:
    async def body(worker: Worker) -> None:
        call, seen = Call(1), []
        task = asyncio.create_task(worker.step(lambda: seen.append(call())))
        await begun(call)
        assert await cancelled(task)
        call.ends.set()
        assert await worker.step(lambda: 2) == 2
        assert seen == [1]

    with_worker(body)


def test_a_failure_that_nobody_saw_is_told_by_the_next_step_once() -> None:
    async def body(worker: Worker) -> None:
        failure = UnavailableError("gone")
        call = Call(failure)
        task = asyncio.create_task(worker.step(call))
        await begun(call)
        assert await cancelled(task)
        call.ends.set()
        assert await worker.run(lambda: "a pull") == "a pull"
        with pytest.raises(UnavailableError, match="gone") as told:
            await worker.step(lambda: 2)
        assert told.value is failure
        assert told.value.__notes__ == ["(This happened to a step whose await had been cancelled.)"]
        assert await worker.step(lambda: 3) == 3

    with_worker(body)


@pytest.mark.parametrize("seen", [True, False])
def test_steps_behind_one_that_fails_are_not_taken(seen: bool) -> None:
    """Whether or not somebody saw it fail: their gradients belong to parameters that never were."""

    async def body(worker: Worker) -> None:
        failure = UnavailableError("gone")
        first, taken = Call(failure), []
        running = asyncio.create_task(worker.step(first))
        await begun(first)
        behind = [asyncio.create_task(worker.step(lambda: taken.append(1))) for _ in range(2)]
        await asyncio.sleep(0)
        if not seen:
            assert await cancelled(running)
        first.ends.set()
        await asyncio.wait([running, *behind])
        if seen:
            assert running.exception() is failure
        for each in behind:
            error = each.exception()
            assert isinstance(error, UnavailableError)
            assert "the one before it failed; repeat that one" in str(error)
            assert error.__cause__ is failure
        assert taken == []
        assert await worker.step(lambda: 3) == 3

    with_worker(body)


def test_a_failure_that_was_seen_is_over() -> None:
    async def body(worker: Worker) -> None:
        with pytest.raises(ValueError, match="wrong"):
            await worker.step(Exploding())
        assert await worker.step(lambda: 2) == 2

    class Exploding:
        def __call__(self) -> None:
            raise ValueError("wrong")

    with_worker(body)


def test_an_iterator_is_asked_in_turn() -> None:
    async def body(worker: Worker) -> None:
        threads: set[int] = set()

        def numbers() -> Iterator[int]:
            for number in range(3):
                threads.add(threading.get_ident())
                yield number

        assert [number async for number in worker.iterate(numbers)] == [0, 1, 2]
        assert len(threads) == 1

    with_worker(body)


def test_the_context_of_the_caller_is_that_of_the_call() -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="none")

    async def body(worker: Worker) -> None:
        variable.set("mine")
        assert await worker.run(variable.get) == "mine"

    with_worker(body)


def test_a_last_call_is_made_whatever_happens_to_its_await() -> None:
    async def body(worker: Worker) -> None:
        call = Call()
        task = asyncio.create_task(worker.finish(call))
        await begun(call)
        assert await cancelled(task)
        with pytest.raises(RuntimeError, match="it is closed, and makes no more calls"):
            await worker.run(lambda: 1)
        call.ends.set()
        await worker.finish(call)  # twice is harmless

    with_worker(body)


def test_nothing_is_left_after_the_last_call() -> None:
    async def run() -> int:
        worker = Worker("stepwire-test-last")
        await worker.run(lambda: None)
        await worker.finish(lambda: None)
        return len([thread for thread in threading.enumerate() if thread.name.startswith("stepwire-test-last")])

    assert asyncio.run(run()) == 0
