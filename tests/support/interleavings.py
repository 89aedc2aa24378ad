"""Every interleaving of a few threads, which change what they share at points that they name."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

__all__ = ["Interleaving", "Turnstile", "every_interleaving"]

PATIENCE_SECONDS = 120.0


class Interleaving:
    """One run of some threads, of which one at a time goes on from point to point."""

    def __init__(self, choices: Sequence[int]) -> None:
        """Take these choices among the threads that may go on, and then always the first."""
        self._choices = choices
        self.options: list[int] = []
        self._waiting: dict[str, Callable[[], bool]] = {}
        self._gates: dict[str, threading.Semaphore] = {}
        self._arrived = threading.Semaphore(0)
        self._names = threading.local()
        self._failure: BaseException | None = None
        self._over = False

    def unnamed(self, work: Callable[[], object]) -> None:
        """Do some work, before or after the threads, at whose points nobody else goes on."""
        self._names.name = None
        work()

    def point(self, may_go_on: Callable[[], bool] = lambda: True) -> None:
        """Wait for the turn of this thread, which comes only when it may go on."""
        if (name := self._names.name) is None:
            assert may_go_on()
            return
        self._waiting[name] = may_go_on
        self._arrived.release()
        assert self._gates[name].acquire(timeout=PATIENCE_SECONDS)
        if self._over:
            raise SystemExit

    def run(self, threads: Mapping[str, Callable[[], object]]) -> None:
        """Run all threads to their end.

        Raises:
            AssertionError: those that are left wait for each other.
            BaseException: what the first of them raised.
        """
        self._gates = {name: threading.Semaphore(0) for name in threads}
        alive = [threading.Thread(target=self._body, args=each, daemon=True) for each in threads.items()]
        for thread in alive:
            thread.start()
        left = len(alive)
        for _ in range(left):
            assert self._arrived.acquire(timeout=PATIENCE_SECONDS)
        while self._waiting and self._failure is None:
            ready = [name for name, may_go_on in sorted(self._waiting.items()) if may_go_on()]
            if not ready:
                self._failure = AssertionError(f"{sorted(self._waiting)} wait for each other: {self.options}")
                break
            at = len(self.options)
            self.options.append(len(ready))
            name = ready[self._choices[at] if at < len(self._choices) else 0]
            del self._waiting[name]
            self._gates[name].release()
            assert self._arrived.acquire(timeout=PATIENCE_SECONDS)
        self._over = True
        for name in self._waiting:
            self._gates[name].release()
        if self._failure is not None:
            raise self._failure

    def _body(self, name: str, work: Callable[[], object]) -> None:
        self._names.name = name
        try:
            self.point()
            work()
        except SystemExit:
            return
        except BaseException as failure:
            self._failure = self._failure or failure
        self._arrived.release()


class Turnstile:
    """A lock whose acquisition is a point. A context manager."""

    def __init__(self, run: Interleaving) -> None:
        self._run = run
        self.held = False

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        self._run.point(lambda: not self.held)
        self.held = True
        return True

    def release(self) -> None:
        self.held = False

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


def every_interleaving(scene: Callable[[Interleaving], Mapping[str, Callable[[], Any]]]) -> int:
    """Run a scene in every order of its points, each with threads of its own; return the number of orders.

    Args:
        scene: makes the threads of one run, by name.
    """
    choices: list[int] = []
    count = 0
    while True:
        run = Interleaving(choices)
        run.run(scene(run))
        count += 1
        taken = [choices[at] if at < len(choices) else 0 for at in range(len(run.options))]
        while taken and taken[-1] + 1 >= run.options[len(taken) - 1]:
            taken.pop()
        if not taken:
            return count
        choices = [*taken[:-1], taken[-1] + 1]
