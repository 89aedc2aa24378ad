"""One thread, virtual time, and a seed that chooses the next event.

Tasks are greenlets. One runs until it blocks; then the scheduler chooses one of those that can go on, or lets time pass
until the next timer. So a seed is a whole history, and a history can be repeated.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from typing import Any, Final

import greenlet

__all__ = ["Killed", "Process", "Scheduler", "Stuck", "Task"]

_MOST_EVENTS: Final = 300_000


class Killed(BaseException):
    """The end of a process, raised in each of its tasks."""


class Stuck(AssertionError):
    """Nothing can go on, and nothing is awaited."""


class Process:
    """A process: its tasks end with it, and stand still while it is paused.

    Attributes:
        name: its name.
        dead: it was killed.
        paused: its tasks stand still.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.dead = self.paused = False


class Task:
    """One thread of a process.

    Attributes:
        process: the process.
        name: its name.
        locals: the values of its `threading.local` objects.
        done: it has ended.
    """

    def __init__(self, process: Process, name: str, run: greenlet.greenlet) -> None:
        self.process = process
        self.name = name
        self.greenlet = run
        self.locals: dict[int, dict[str, Any]] = {}
        self.done = self.waiting = self.timed_out = False
        self.token = 0
        self.joiners: list[Task] = []


class Scheduler:
    """The order of events.

    Attributes:
        chance: the source of every choice.
        now: the virtual seconds.
        events: the number of events so far.
        running: the task that runs; None in the scheduler itself.
        failures: the exceptions that ended a task, with its name.
        trace: a number made of all choices: equal numbers mean equal histories.
        each: called after each event.
    """

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.now = 0.0
        self.events = 0
        self.running: Task | None = None
        self.failures: list[tuple[str, BaseException]] = []
        self.trace = 0
        self.each: Callable[[], object] = lambda: None
        self.outside = Process("outside")
        self._is_ending = False
        self._hub = greenlet.getcurrent()
        self._ready: list[Task] = []
        self._tasks: dict[Task, None] = {}
        self._timers: list[tuple[float, int, Callable[[], object]]] = []
        self._numbers = itertools.count(1)

    def clock(self) -> float:
        """Return the virtual seconds."""
        return self.now

    @property
    def process(self) -> Process:
        """The process of the running task."""
        return self.outside if self.running is None else self.running.process

    def spawn(self, call: Callable[[], object], process: Process | None = None, name: str = "task") -> Task:
        """Begin a task, in the process of the running one by default."""
        task = Task(process or self.process, name, greenlet.greenlet(lambda: self._run(task, call), self._hub))
        self._tasks[task] = None
        self._ready.append(task)
        return task

    def after(self, seconds: float, call: Callable[[], object]) -> None:
        """Make a call in the scheduler when virtual seconds have passed."""
        heapq.heappush(self._timers, (self.now + max(seconds, 0.0), next(self._numbers), call))

    def block(self, seconds: float | None = None) -> bool:
        """Stand still until `wake`, or until virtual seconds have passed; then return False."""
        task = self.running
        if task is None:
            raise Stuck("the scheduler itself would have to wait")
        if task.process.dead:
            self.now += 1.0 if self._is_ending else 0.0  # some wait for a while, whatever happens
            raise Killed
        task.waiting, task.timed_out = True, False
        task.token = token = next(self._numbers)
        if seconds is not None:
            self.after(seconds, lambda: self._expire(task, token))
        self._hub.switch()
        if task.process.dead:
            raise Killed
        return not task.timed_out

    def wake(self, task: Task) -> None:
        """Let a task go on that stands still."""
        if task.waiting:
            task.waiting = False
            self._ready.append(task)

    def sleep(self, seconds: float) -> None:
        """Stand still for virtual seconds."""
        self.block(max(seconds, 0.0))

    def give_way(self, likelihood: float = 1.0) -> None:
        """Let others go on first, with a likelihood."""
        if self.running is not None and (likelihood >= 1.0 or self.chance.random() < likelihood):
            self.block(0.0)

    def kill(self, process: Process) -> None:
        """End a process: each of its tasks gets `Killed` where it stands."""
        process.dead, process.paused = True, False
        for task in list(self._tasks):
            if task.process is process:
                self.wake(task)
        if self.running is not None and self.running.process is process:
            raise Killed

    def run(self, until: Callable[[], bool]) -> None:
        """Let events happen until a condition holds.

        Raises:
            Stuck: nothing can go on, or there were too many events.
        """
        while not until():
            able = [index for index, task in enumerate(self._ready) if not task.process.paused]
            if able:
                self._resume(self._ready.pop(able[self.chance.randrange(len(able)) if len(able) > 1 else 0]))
            elif self._timers:
                at, _, call = heapq.heappop(self._timers)
                self.now = max(self.now, at)
                call()
            else:
                raise Stuck(f"nothing can go on at {self.now:.3f} s: {self.standing()}")
            self.events += 1
            self.each()
            if self.events > _MOST_EVENTS:
                raise Stuck(f"{self.events} events, and no end: {self.standing()}")

    def standing(self) -> str:
        """Name the tasks that stand still."""
        return ", ".join(f"{task.process.name}/{task.name}" for task in self._tasks)

    def end(self) -> None:
        """End all tasks."""
        self._is_ending = True
        for process in {task.process for task in self._tasks}:
            process.dead, process.paused = True, False
        while self._tasks:
            for task in list(self._tasks):
                self.wake(task)
            self._timers.clear()
            while self._ready:
                self._resume(self._ready.pop())

    def _resume(self, task: Task) -> None:
        self.trace = hash((self.trace, len(self._ready), round(self.now * 1e6)))
        self.running = task
        try:
            task.greenlet.switch()
        finally:
            self.running = None

    def _run(self, task: Task, call: Callable[[], object]) -> None:
        try:
            if not task.process.dead:
                call()
        except Killed:
            pass
        except BaseException as failure:
            if not task.process.dead:
                self.failures.append((f"{task.process.name}/{task.name}", failure))
        finally:
            task.done = True
            self._tasks.pop(task, None)
            for joiner in task.joiners:
                self.wake(joiner)

    def _expire(self, task: Task, token: int) -> None:
        if task.waiting and task.token == token:
            task.timed_out = True
            self.wake(task)
