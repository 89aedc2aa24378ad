"""The log lines of a server: readable on a terminal, JSON elsewhere, and never two lines from one event.

Every line passes `without_secrets` on its way out, traces and the lines of Python's `logging` included. So no call has
to think of it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import structlog
import structlog.stdlib

from stepwire_server.observability.digests import without_secrets

__all__ = ["configure_logging", "discard_unwritten_lines", "logging_to_stderr"]


def configure_logging(level: str, as_json: bool | None) -> None:
    """Send the log lines of this process to standard output, lines of Python's own `logging` included.

    Errors of the command are no log lines. Both renderings escape control characters in values, so a client cannot
    forge lines with a label or a name.

    Args:
        level: the least level that is logged; other packages log nothing below warnings.
        as_json: True for JSON, False for text; None means JSON unless standard output is a terminal.
    """
    colors = sys.stdout is not None and not sys.stdout.closed and sys.stdout.isatty()
    json = not colors if as_json is None else as_json
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    rendering: list[structlog.typing.Processor] = [
        structlog.processors.format_exc_info,
        _escape,
        structlog.processors.JSONRenderer() if json else structlog.dev.ConsoleRenderer(colors=colors),
    ]
    structlog.configure(
        processors=[*shared, *rendering],
        wrapper_class=_from_level(level),
        # In one write, end of line included: several processes may share a standard output.
        logger_factory=structlog.WriteLoggerFactory(_Output()),  # type: ignore[arg-type]  # it writes and flushes
    )
    _adopt_logging(level, shared, rendering)


def _from_level(level: str) -> type[structlog.typing.FilteringBoundLogger]:
    return structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()])


def _adopt_logging(
    level: str, shared: Sequence[structlog.typing.Processor], rendering: Sequence[structlog.typing.Processor]
) -> None:
    """Give `logging` the same lines and stream; the engines use `logging`, because they know nothing of a server."""
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler, _Lines)]:
        root.removeHandler(handler)  # of an earlier call: never two lines from one event
    handler = _Lines()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *rendering],
        )
    )
    root.addHandler(handler)
    logging.getLogger("stepwire_server").setLevel(level.upper())


class _Output:
    """The standard output of the moment, which tests and programs replace.

    A line that cannot be written is dropped: a full disk, a pipe without a reader, or an output that was never open
    stops no server and no step.
    """

    def write(self, text: str) -> None:
        if sys.stdout is not None:
            with contextlib.suppress(OSError, ValueError):  # ValueError: it was closed
                sys.stdout.write(without_secrets(text))

    def flush(self) -> None:
        if sys.stdout is not None:
            with contextlib.suppress(OSError, ValueError):
                sys.stdout.flush()


def discard_unwritten_lines() -> None:
    """Discard lines that the standard output has refused: written at the end again, they would change the exit code."""
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):  # it has no descriptor, or none that is open
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Lines(logging.Handler):
    """Writes the lines of `logging` to the standard output."""

    _output = _Output()

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line in one piece."""
        try:
            self._output.write(self.format(record) + "\n")
            self._output.flush()
        except Exception:
            self.handleError(record)


def _escape(logger: object, method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    for key, value in event.items():
        if isinstance(value, str) and key != "exception":
            event[key] = value.encode("unicode_escape").decode("ascii") if not value.isprintable() else value
    return event


class _BlockLevels:
    """The levels of the blocks that log to standard error. Thread-safe, because servers start and end in any order."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._levels: list[str] = []
        self._handler = _ErrorLines()
        self._level_before = logging.NOTSET

    def add(self, level: str) -> None:
        with self._lock:
            self._levels.append(level)
            self._configure()

    def remove(self, level: str) -> None:
        with self._lock:
            self._levels.remove(level)
            self._configure()

    def _configure(self) -> None:
        self._configure_logging()
        ours = structlog.get_config()["logger_factory"] is _stderr_logger
        if structlog.is_configured() and not ours:
            return  # the program has configured structlog, before a block or in it
        if self._levels:
            wrapper = structlog.make_filtering_bound_logger(self._least())
            structlog.configure(wrapper_class=wrapper, logger_factory=_stderr_logger)
        elif ours:
            processors = structlog.get_config()["processors"]
            structlog.reset_defaults()
            if processors != structlog.get_config()["processors"]:  # the program has set them in the block
                structlog.configure(processors=processors)

    def _configure_logging(self) -> None:
        """Send the engines' lines, which are of Python's `logging`, the same way."""
        logger = logging.getLogger("stepwire_server")
        if not self._levels:
            logger.removeHandler(self._handler)
            logger.setLevel(self._level_before)
            return
        if self._handler not in logger.handlers:
            self._level_before = logger.level
            logger.addHandler(self._handler)
        logger.setLevel(self._least())

    def _least(self) -> int:
        return min(logging.getLevelNamesMapping()[level.upper()] for level in self._levels)


class _ErrorLines(logging.Handler):
    """Writes to the standard error of the moment, unless the program has handlers of its own for all lines."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line in one piece."""
        if not logging.getLogger().handlers:
            print(without_secrets(f"{record.levelname.lower()}: {self.format(record)}"), file=sys.stderr)


class _ErrorLogger(structlog.PrintLogger):
    """Writes lines without secrets."""

    def msg(self, message: str) -> None:
        """Write a line."""
        super().msg(without_secrets(message))

    log = debug = info = warn = warning = fatal = failure = err = error = critical = exception = msg


def _stderr_logger(*names: Any) -> structlog.PrintLogger:
    """Return a logger to the standard error of the moment; structlog asks for one for each line."""
    return _ErrorLogger(sys.stderr)


_BLOCK_LEVELS = _BlockLevels()


@contextlib.contextmanager
def logging_to_stderr(level: str) -> Iterator[None]:
    """Send the log lines of servers to standard error for a block, and none of them to standard output.

    The configuration of a program that has configured structlog stays, and the lines go through it. Of several blocks
    at the same time the most talkative decides the level.

    Args:
        level: the least level that is logged.
    """
    _BLOCK_LEVELS.add(level)
    try:
        yield
    finally:
        _BLOCK_LEVELS.remove(level)
