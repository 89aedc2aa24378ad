"""A training run in a process of its own, which a program may kill."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

__all__ = ["TrainingProcess"]


class TrainingProcess:
    """Runs `train(*arguments, report=…, **options)` in another process, and returns its reports and its value.

    The process is started anew, not forked: it has nothing of this process, as on another day or another machine.

    The process is never more than one report ahead of the reader. So a kill at a report hits the work for the next
    report, and never the end of the run because of a slow reader.
    """

    def __init__(self, train: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        """Start."""
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_run, args=(theirs, train, arguments, options))
        self._process.start()
        theirs.close()  # so that the pipe ends with the process, after any kind of end
        self._values: list[Any] = []
        self._killed = False

    def reports(self) -> Iterator[Any]:
        """Yield the reports of the function until it returns or its process ends."""
        while True:
            try:
                kind, value = self._pipe.recv()
            except (EOFError, OSError):  # OSError: the process ended during a write
                return
            if kind == "returned":
                self._values.append(value)
                return
            yield value
            if not self._killed:
                with contextlib.suppress(OSError):  # the process has ended; the next iteration returns
                    self._pipe.send("read")

    def kill(self) -> None:
        """Kill the process with SIGKILL; `reports` still yields the reports that it has sent."""
        self._killed = True
        self._process.kill()

    @property
    def returned(self) -> Any:
        """The value of the function, once `reports` is exhausted."""
        if not self._values:
            raise RuntimeError(
                f"the training process returned nothing (exit code {self.exit_code}); see its own message"
            )
        return self._values[0]

    @property
    def exit_code(self) -> int | None:
        """The exit code of the process; negative for the number of a signal."""
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
            pipe.recv()  # the reader has the report before
        first = False

    pipe.send(("returned", train(*arguments, report=report, **options)))
