"""Full jitter inside one deadline, on a clock of the test's own."""

from __future__ import annotations

import pytest

from stepwire import errors
from stepwire.connection.retry import Deadline, Retry
from stepwire.errors import Reason


class World:
    """A clock that only sleeping moves, and draws of a random number that always fall where `luck` says.

    Attributes:
        now: the clock.
        slept: the length of each pause.
        drawn: the bounds of each draw.
    """

    def __init__(self, luck: float = 1.0) -> None:
        self.now = 100.0
        self.slept: list[float] = []
        self.drawn: list[tuple[float, float]] = []
        self._luck = luck

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds

    def uniform(self, low: float, high: float) -> float:
        self.drawn.append((low, high))
        return low + self._luck * (high - low)

    def retry(self, initial_seconds: float = 0.05, max_seconds: float = 2.0) -> Retry:
        return Retry(
            initial_seconds=initial_seconds,
            max_seconds=max_seconds,
            clock=self.clock,
            sleep=self.sleep,
            uniform=self.uniform,
        )


class Attempts:
    """Fails with the given errors in turn, then succeeds; counts how often it was asked."""

    def __init__(self, *failures: errors.StepwireError) -> None:
        self._failures = list(failures)
        self.count = 0

    def __call__(self, deadline: Deadline) -> str:
        self.count += 1
        if self._failures:
            raise self._failures.pop(0)
        return "done"


def unreachable() -> errors.UnavailableError:
    return errors.UnavailableError("connection refused")


def test_a_call_that_succeeds_is_made_once() -> None:
    world, attempts = World(), Attempts()
    retry = world.retry()
    assert retry.call(attempts, retry.deadline(1.0)) == "done"
    assert (attempts.count, world.slept) == (1, [])


def test_pauses_are_drawn_from_ceilings_that_double_up_to_the_longest() -> None:
    world, attempts = World(), Attempts(*(unreachable() for _ in range(7)))
    retry = world.retry(initial_seconds=0.125, max_seconds=1.0)
    assert retry.call(attempts, retry.deadline(60.0)) == "done"
    assert world.drawn == [(0.0, ceiling) for ceiling in (0.125, 0.25, 0.5, 1.0, 1.0, 1.0, 1.0)]
    assert world.slept == [ceiling for _, ceiling in world.drawn]


def test_jitter_is_full() -> None:
    """A pause may be nothing at all: a crowd of clients is spread over the whole interval."""
    world, attempts = World(luck=0.0), Attempts(unreachable(), unreachable())
    retry = world.retry()
    retry.call(attempts, retry.deadline(1.0))
    assert world.slept == [0.0, 0.0]


def test_the_servers_advice_is_waited_out() -> None:
    advised = errors.UnavailableError("draining", reason=Reason.SHUTTING_DOWN, retry_after_seconds=3.0)
    world, attempts = World(luck=0.0), Attempts(advised)
    retry = world.retry()
    retry.call(attempts, retry.deadline(10.0))
    assert world.slept == [3.0]


def test_advice_makes_any_error_worth_repeating() -> None:
    passing = errors.ResourceExhaustedError("no room just now", retry_after_seconds=0.5)
    world, attempts = World(luck=0.0), Attempts(passing, passing)
    retry = world.retry()
    assert retry.call(attempts, retry.deadline(10.0)) == "done"
    assert world.slept == [0.5, 0.5]


@pytest.mark.parametrize("reason", [reason for reason, row in errors.ERROR_TABLE.items() if not row.retryable])
def test_a_final_error_is_never_repeated(reason: Reason) -> None:
    world, attempts = World(), Attempts(errors.error_from_reason(reason, "no", {}))
    retry = world.retry()
    with pytest.raises(errors.StepwireError) as failed:
        retry.call(attempts, retry.deadline(60.0))
    assert failed.value.reason is reason
    assert (attempts.count, world.slept) == (1, [])


def test_a_passed_deadline_is_final_whatever_its_class_inherits() -> None:
    late = errors.DeadlineExceededError("late", reason=Reason.UNREACHABLE, retry_after_seconds=0.0)
    world, attempts = World(), Attempts(late)
    retry = world.retry()
    with pytest.raises(errors.DeadlineExceededError):
        retry.call(attempts, retry.deadline(60.0))
    assert attempts.count == 1


@pytest.mark.parametrize("timeout", [0.01, 0.3, 1.0, 7.0])
def test_the_deadline_is_never_outlasted(timeout: float) -> None:
    world, attempts = World(), Attempts(*(unreachable() for _ in range(1000)))
    retry = world.retry()
    with pytest.raises(errors.UnavailableError, match="connection refused"):
        retry.call(attempts, retry.deadline(timeout))
    assert world.now < 100.0 + timeout
    assert attempts.count == len(world.slept) + 1


def test_advice_beyond_the_deadline_ends_the_call_at_once() -> None:
    advised = errors.UnavailableError("draining", reason=Reason.SHUTTING_DOWN, retry_after_seconds=5.0)
    world, attempts = World(), Attempts(advised)
    retry = world.retry()
    with pytest.raises(errors.UnavailableError) as failed:
        retry.call(attempts, retry.deadline(5.0))
    assert failed.value is advised
    assert world.slept == []


def test_an_error_of_the_program_passes_through() -> None:
    def broken(deadline: Deadline) -> None:
        raise ZeroDivisionError

    retry = World().retry()
    with pytest.raises(ZeroDivisionError):
        retry.call(broken, retry.deadline(1.0))


def test_every_attempt_sees_the_same_deadline() -> None:
    world, seen = World(), []
    retry = world.retry(initial_seconds=0.25)

    def attempt(deadline: Deadline) -> float:
        seen.append(deadline.remaining())
        if len(seen) < 3:
            raise unreachable()
        return deadline.timeout_seconds

    assert retry.call(attempt, retry.deadline(2.0)) == 2.0
    assert seen == [2.0, 1.75, 1.25]


def test_a_deadline_runs_down_to_nothing_and_not_below() -> None:
    world = World()
    deadline = Deadline(1.5, world.clock)
    world.now += 1.0
    assert deadline.remaining() == 0.5
    world.now += 9.0
    assert deadline.remaining() == 0.0
