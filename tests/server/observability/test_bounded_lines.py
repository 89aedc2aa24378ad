"""Lines up to a rate, and the number of those left out."""

from __future__ import annotations

from typing import Any

from stepwire_server.observability.bounded_lines import BoundedLines


def test_lines_beyond_the_rate_are_counted_in_the_next_one() -> None:
    now, lines = [0.0], list[dict[str, Any]]()
    bounded = BoundedLines(lambda event, **values: lines.append({"event": event, **values}), lambda: now[0])
    for number in range(150):
        bounded.write("refused", number=number)
    assert [line["number"] for line in lines] == list(range(100))
    now[0] += 0.049
    bounded.write("refused", number=150)
    assert len(lines) == 100
    now[0] += 0.002
    bounded.write("refused", number=151)
    bounded.write("refused", number=152)
    assert lines[100:] == [{"event": "refused", "number": 151, "lines_left_out": 51}]
    now[0] += 1000.0
    for number in range(200):
        bounded.write("refused", number=number)
    assert len(lines) == 201
    assert lines[101] == {"event": "refused", "number": 0, "lines_left_out": 1}
