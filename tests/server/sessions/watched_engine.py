"""A CPU engine whose calls are noted, and fail or wait where a test says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from stepwire_server.engines import CpuEngine


class Failure(Exception):
    """The error of a broken device."""


class WatchedEngine(CpuEngine):
    """An engine whose calls are noted, and fail or wait where a test says so.

    Attributes:
        calls: names of the calls that change or prepare something.
        trouble: called with each name before the call.
    """

    def __init__(self) -> None:
        super().__init__(threads=1, use_numba=False)
        self.calls: list[str] = []
        self.trouble: Callable[[str], None] = lambda name: None

    def note(self, name: str) -> None:
        self.trouble(name)
        self.calls.append(name)

    def break_at(self, broken: str) -> None:
        """Let every call of a name fail from now on."""

        def trouble(name: str) -> None:
            if name == broken:
                raise Failure

        self.trouble = trouble

    def allocate(self, *arguments: Any) -> Any:
        self.note("allocate")
        return WatchedState(self, super().allocate(*arguments))

    def prepare(self, *arguments: Any) -> None:
        self.note("prepare")
        super().prepare(*arguments)


class WatchedState:
    """A CPU state behind an engine that watches."""

    def __init__(self, engine: WatchedEngine, state: Any) -> None:
        self._engine = engine
        self._state = state

    def __getattr__(self, name: str) -> Any:
        return getattr(self._state, name)

    def receive(self, size: int | None = None) -> Any:
        self._engine.note("receive")
        return self._state.receive(size)

    def update(self, *arguments: Any) -> Any:
        self._engine.note("update")
        return self._state.update(*arguments)

    def adopt(self, other: Any) -> None:
        self._engine.note("adopt")
        self._state.adopt(other._state)
