"""Items are lent to one thread at a time, and nobody who waits is missed."""

from __future__ import annotations

import threading

import pytest

from stepwire_server.engines.cuda.pool import Pool


def test_items_come_back_in_the_order_of_their_release() -> None:
    pool = Pool("ab")
    assert [pool.acquire(), pool.try_acquire(), pool.try_acquire()] == ["a", "b", None]
    pool.add("cd")
    pool.release("a")
    assert len(pool) == 3
    assert [pool.acquire() for _ in range(3)] == ["c", "d", "a"]


def test_who_waits_gets_the_item_that_is_released(together) -> None:
    """The waiter has counted itself before the release, which is seen by the lock that a wait gives back."""
    pool: Pool[str] = Pool()
    got: list[str] = []

    class Waited(threading.Condition):
        def wait(self, timeout: float | None = None) -> bool:
            waits.set()
            return super().wait(timeout)

    waits = threading.Event()
    pool._released = Waited()

    def give() -> None:
        assert waits.wait(60.0)
        pool.release("it")

    together(lambda: got.append(pool.acquire()), give)
    assert got == ["it"] and len(pool) == 0


@pytest.mark.parametrize("items", [1, 2, 3])
def test_no_two_threads_have_the_same_item(together, items) -> None:
    pool, held, clashes = Pool(range(items)), set[int](), list[int]()

    def work() -> None:
        for _ in range(2000):
            item = pool.acquire()
            if item in held:
                clashes.append(item)
            held.add(item)
            held.discard(item)
            pool.release(item)

    together(work, work, work, work)
    assert clashes == [] and sorted(pool.acquire() for _ in range(items)) == list(range(items))
