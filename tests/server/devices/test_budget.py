"""The byte budget: reserved before, given back once."""

from __future__ import annotations

import threading

import pytest

from stepwire.errors import Reason, ResourceExhaustedError
from stepwire_server.devices.budget import MemoryBudget, Reservation


def test_bytes_are_reserved_and_released() -> None:
    budget = MemoryBudget(100)
    first, second = budget.reserve(60, "a"), budget.reserve(40, "b")
    assert budget.reserved_bytes == 100
    first.release()
    assert (budget.reserved_bytes, first.nbytes, second.nbytes) == (40, 0, 40)


def test_releasing_twice_gives_back_once() -> None:
    budget = MemoryBudget(100)
    reservation = budget.reserve(60, "a")
    reservation.release()
    reservation.release()
    assert budget.reserved_bytes == 0


def test_a_block_gives_back_at_its_end_and_when_it_fails() -> None:
    budget = MemoryBudget(100)
    with pytest.raises(ZeroDivisionError), budget.reserve(60, "a") as reservation:
        assert (budget.reserved_bytes, reservation.nbytes) == (60, 60)
        raise ZeroDivisionError
    assert budget.reserved_bytes == 0


@pytest.mark.parametrize("retry_after", [None, 0.5])
def test_what_does_not_fit_is_refused_with_all_numbers(retry_after: float | None) -> None:
    budget = MemoryBudget(100)
    budget.reserve(70, "a")
    with pytest.raises(ResourceExhaustedError, match="the model needs 31 bytes and 30 of 100 are free") as refused:
        budget.reserve(31, "the model", retry_after_seconds=retry_after)
    assert refused.value.reason is Reason.MEMORY_EXHAUSTED
    assert refused.value.metadata == {"requested_bytes": "31", "available_bytes": "30"}
    assert refused.value.retry_after_seconds == retry_after
    assert budget.reserved_bytes == 70


def test_the_last_byte_may_be_taken_and_nothing_always_fits() -> None:
    budget = MemoryBudget(100)
    budget.reserve(100, "all")
    budget.reserve(0, "none")
    assert budget.reserved_bytes == 100


def test_what_could_never_fit_is_told_apart() -> None:
    budget = MemoryBudget(100)
    budget.reserve(90, "a")
    budget.require_possible(100, "the step")
    with pytest.raises(ResourceExhaustedError, match="the step needs 101 bytes") as refused:
        budget.require_possible(101, "the step")
    assert refused.value.retry_after_seconds is None
    assert budget.reserved_bytes == 90


def test_threads_do_not_lose_a_byte() -> None:
    budget = MemoryBudget(1000)

    def work() -> None:
        for _ in range(2000):
            with budget.reserve(7, "a"):
                pass

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert budget.reserved_bytes == 0


def test_statistics_are_a_record_of_one_moment() -> None:
    budget = MemoryBudget(100)
    reservation = budget.reserve(60, "a")
    before = budget.statistics()
    reservation.release()
    assert before == (100, 60, 0)
    assert budget.statistics() == (100, 0, 60)


def test_a_reservation_may_end_in_the_middle_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """The collector ends abandoned streams in whatever thread it runs, and that one may have the lock."""
    budget = MemoryBudget(100)
    first, made = budget.reserve(60, "a"), []

    def collecting(owner: MemoryBudget, nbytes: int) -> Reservation:
        first.release()
        made.append(Reservation(owner, nbytes))
        return made[-1]

    monkeypatch.setattr("stepwire_server.devices.budget.Reservation", collecting)
    reserving = threading.Thread(target=budget.reserve, args=(40, "b"), daemon=True)
    reserving.start()
    reserving.join(60.0)
    assert not reserving.is_alive(), "it waits for itself"
    assert (budget.reserved_bytes, made[0].nbytes) == (40, 40)
