"""A training run in a process of its own, which may be killed."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

__all__ = ["TrainingProcess"]


class TrainingProcess:
    """Runs `train(*arguments, report=…, **options)` elsewhere; hands over what it reports, and at last what it returns.

    The process is started anew, not forked: it has nothing of this one, like one on another day or another machine.

    It is never more than one report ahead of who reads them. So one that is killed at a report is hit somewhere in the
    work that leads to the next, and never at its end because the reader was slow.
    """

    def __init__(self, train: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        """Start."""
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_run, args=(theirs, train, arguments, options))
        self._process.start()
        theirs.close()  # so that the pipe ends when the process does, however it does
        self._returned: list[Any] = []
        self._killed = False

    def reports(self) -> Iterator[Any]:
        """Yield what the function reports until it returns or its process ends."""
        while True:
            try:
                kind, value = self._pipe.recv()
            except (EOFError, OSError):  # OSError: it ended while it wrote
                return
            if kind == "returned":
                self._returned.append(value)
                return
            yield value
            if not self._killed:
                with contextlib.suppress(OSError):  # it has ended, which the next turn finds
                    self._pipe.send("read")

    def kill(self) -> None:
        """Kill the process with SIGKILL, wherever it is; what it has reported already is still there to be read."""
        self._killed = True
        self._process.kill()

    @property
    def outcome(self) -> Any:
        """What the function returned, once `reports` is exhausted."""
        if not self._returned:
            raise RuntimeError(
                f"the training process returned nothing (exit code {self.exit_code}); see its own message"
            )
        return self._returned[0]

    @property
    def exit_code(self) -> int | None:
        """Negative: the number of the signal that ended it."""
        self._process.join()
        return self._process.exitcode

    def __enter__(self) -> TrainingProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._process.kill()
        self._process.join()
        self._pipe.close()


def _run(pipe: Connection, train: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    first = True

    def report(value: Any) -> None:
        nonlocal first
        pipe.send(("reported", value))
        if not first:
            pipe.recv()  # the one before has been read
        first = False

    pipe.send(("returned", train(*arguments, report=report, **options)))
