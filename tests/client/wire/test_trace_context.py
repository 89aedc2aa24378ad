"""W3C trace contexts: those of the recommendation, and everything else refused."""

from __future__ import annotations

import pytest

from stepwire.errors import InvalidRequestError
from stepwire.wire.trace_context import TraceContext

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
GOOD = f"00-{TRACE}-{SPAN}-01"


@pytest.mark.parametrize(
    ("text", "sampled"),
    [
        (GOOD, True),
        (f"00-{TRACE}-{SPAN}-00", False),
        (f"00-{TRACE}-{SPAN}-02", False),  # the second flag says that the trace's number is random
        (f"cc-{TRACE}-{SPAN}-03", True),
        (f"cc-{TRACE}-{SPAN}-01-what-the-future-will-be-like", True),
    ],
)
def test_a_context_of_any_version_is_read(text: str, sampled: bool) -> None:
    context = TraceContext.parse(text, "traceparent")
    assert context == (int(TRACE, 16), int(SPAN, 16), sampled)
    assert str(context) == f"00-{TRACE}-{SPAN}-{sampled:02d}"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "00-1-2-01",
        GOOD.upper(),
        f"{GOOD}\n",
        f"{GOOD}-more",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"cc-{TRACE}-{SPAN}-01-{'x' * 201}",
        f"cc-{TRACE}-{SPAN}-01-\x1b[2J",
        f"00-{TRACE}-{SPAN}-٠١",
        "٠" * 55,
    ],
)
def test_anything_else_is_refused_by_name_and_value(text: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        TraceContext.parse(text, "begin.traceparent")
    assert refused.value.metadata == {"field": "begin.traceparent"}
    assert repr(text)[:40] in str(refused.value)


def test_a_new_span_is_of_its_parents_trace_and_has_a_number_of_its_own() -> None:
    parent = TraceContext.parse(GOOD, "traceparent")
    children = {TraceContext.new(parent, sampled=False) for _ in range(100)}
    assert {(child.trace_id, child.sampled) for child in children} == {(parent.trace_id, False)}
    assert len({child.span_id for child in children} - {0, parent.span_id}) == 100
    alone = {TraceContext.new(None, sampled=True).trace_id for _ in range(100)}
    assert len(alone - {0}) == 100 and max(alone) < 1 << 128
