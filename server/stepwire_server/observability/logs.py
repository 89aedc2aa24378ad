"""Log lines: readable on a terminal, JSON elsewhere, and never two lines from one event."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

import structlog
import structlog.stdlib

__all__ = ["configure_logging"]


def configure_logging(level: str, as_json: bool | None) -> None:
    """Send log lines to standard output, those of Python's own `logging` too; errors of the command are not among them.

    Both renderings escape control characters in values, so a client cannot forge lines with a label or a name.

    Args:
        level: least level logged; of other packages' loggers, nothing below warnings.
        as_json: None means when standard output is not a terminal.
    """
    json = not sys.stdout.isatty() if as_json is None else as_json
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    rendering: list[structlog.typing.Processor] = [
        structlog.processors.format_exc_info,
        _escape,
        structlog.processors.JSONRenderer() if json else structlog.dev.ConsoleRenderer(colors=sys.stdout.isatty()),
    ]
    structlog.configure(
        processors=[*shared, *rendering],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        # In one write, end of line included: several processes may share a standard output.
        logger_factory=structlog.WriteLoggerFactory(sys.stdout),
    )
    _take_in_others(level, shared, rendering)


def _take_in_others(
    level: str, shared: Sequence[structlog.typing.Processor], rendering: Sequence[structlog.typing.Processor]
) -> None:
    """Give `logging`, which the engines use because they know nothing of a server, the same lines and stream."""
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


class _Lines(logging.Handler):
    """Writes to what standard output is at that time."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line in one piece."""
        try:
            sys.stdout.write(self.format(record) + "\n")
            sys.stdout.flush()
        except Exception:
            self.handleError(record)


def _escape(logger: object, method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    for key, value in event.items():
        if isinstance(value, str) and key != "exception":
            event[key] = value.encode("unicode_escape").decode("ascii") if not value.isprintable() else value
    return event
