"""The W3C trace context of a step, as `StepBegin.traceparent` has it: https://www.w3.org/TR/trace-context."""

from __future__ import annotations

import os
import re
from typing import Final, NamedTuple

from stepwire.errors import InvalidRequestError

__all__ = ["TraceContext"]

# A later version may have more fields behind the flags. All zeros are no id, and ff is no version.
_FORM: Final = re.compile(
    r"(?!ff)[0-9a-f]{2}-(?!0{32})(?P<trace>[0-9a-f]{32})-(?!0{16})(?P<span>[0-9a-f]{16})-(?P<flags>[0-9a-f]{2})"
    r"(?P<more>-[!-~]{0,200})?"
)
_SAMPLED: Final = 1


class TraceContext(NamedTuple):
    """The place of a span in its trace.

    Attributes:
        trace_id: the number of the trace, 128 bits, not 0.
        span_id: the number of the span, 64 bits, not 0.
        sampled: the span is recorded.
    """

    trace_id: int
    span_id: int
    sampled: bool

    def __str__(self) -> str:
        """Return the value of `traceparent`."""
        return f"00-{self.trace_id:032x}-{self.span_id:016x}-{int(self.sampled):02x}"

    @classmethod
    def parse(cls, text: str, field: str) -> TraceContext:
        """Read the value of `traceparent`.

        Args:
            text: the value.
            field: the name of the field, for the error.

        Raises:
            InvalidRequestError: it has another form.
        """
        found = _FORM.fullmatch(text)
        if found is None or (text.startswith("00") and found["more"]):
            raise InvalidRequestError.of(
                field,
                f"{text!r:.80} is no W3C trace context such as "
                "'00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01'; leave it out for none",
            )
        return cls(int(found["trace"], 16), int(found["span"], 16), bool(int(found["flags"], 16) & _SAMPLED))

    @classmethod
    def new(cls, parent: TraceContext | None, *, sampled: bool) -> TraceContext:
        """Return the context of a new span: of the trace of `parent`, or of a new trace.

        The numbers are the system's: a program that seeds its own random numbers gets no trace twice.
        """
        numbers = int.from_bytes(os.urandom(24), "little")
        trace_id = (numbers >> 64 or 1) if parent is None else parent.trace_id
        return cls(trace_id, numbers & (1 << 64) - 1 or 1, sampled)
