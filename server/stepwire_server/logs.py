"""Log lines: readable on a terminal, JSON elsewhere, and never two lines from one event."""

from __future__ import annotations

import logging
import sys

import structlog

__all__ = ["configure_logging"]


def configure_logging(level: str, as_json: bool | None) -> None:
    """Send log lines to standard error.

    Both renderings escape control characters in values, so a client cannot forge lines with a label or a name.

    Args:
        level: least level logged.
        as_json: None means when standard error is not a terminal.
    """
    json = not sys.stderr.isatty() if as_json is None else as_json
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer() if json else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            _escape,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        # In one write, end of line included: several processes may share a standard error.
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
    )


def _escape(logger: object, method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    for key, value in event.items():
        if isinstance(value, str) and key != "exception":
            event[key] = value.encode("unicode_escape").decode("ascii") if not value.isprintable() else value
    return event
