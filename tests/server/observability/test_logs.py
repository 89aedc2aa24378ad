"""Log lines: one event, one line, whatever a client put into it (facts: attack 14)."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
from typing import Any

import pytest
import structlog

from stepwire_server.observability.logs import configure_logging, discard_unwritten_lines

pytestmark = pytest.mark.usefixtures("logging_as_it_was")

FORGERIES = {
    "line feed": "x\n2026-01-01 [error] root logged in",
    "carriage return": "x\rroot",
    "escape": "\x1b[2J\x1b[31mred",
    "NUL": "a\0b",
    "DEL": "a\x7fb",
    "C1": "a\x9b31mb",
    "line separator": "a\u2028b",
    "text turned round": "a\u202eb",
    "JSON": '","level":"error","x":"\n',
}


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out.splitlines()


@pytest.mark.parametrize("as_json", [True, False])
@pytest.mark.parametrize("forgery", FORGERIES.values(), ids=FORGERIES)
def test_a_value_cannot_forge_a_line(capsys: Any, forgery: str, as_json: bool) -> None:
    configure_logging("info", as_json)
    structlog.get_logger().info("call refused", label=forgery)
    (line,) = lines(capsys)
    assert line.isprintable()
    if as_json:
        entry = json.loads(line)
        assert (entry["event"], entry["level"]) == ("call refused", "info")
        assert entry["label"] == forgery.encode("unicode_escape").decode("ascii")


@pytest.mark.parametrize("as_json", [True, False])
def test_printable_text_of_any_script_stays_as_it_is(capsys: Any, as_json: bool) -> None:
    configure_logging("info", as_json)
    structlog.get_logger().info("created", label="naïve 漢字 run")
    (line,) = lines(capsys)
    assert "naïve 漢字 run" in (json.loads(line)["label"] if as_json else line)


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        ("debug", ["debug", "info", "warning", "error"]),
        ("info", ["info", "warning", "error"]),
        ("warning", ["warning", "error"]),
        ("error", ["error"]),
    ],
)
def test_only_the_level_and_above_is_logged(capsys: Any, level: str, expected: list[str]) -> None:
    configure_logging(level, True)
    log = structlog.get_logger()
    for name in ("debug", "info", "warning", "error"):
        getattr(log, name)("it")
    assert [json.loads(line)["level"] for line in lines(capsys)] == expected


def test_without_a_terminal_lines_are_json(capsys: Any) -> None:
    configure_logging("info", None)
    structlog.get_logger().info("listening", target="127.0.0.1:1", port=5)
    (line,) = lines(capsys)
    entry = json.loads(line)
    assert (entry["event"], entry["target"], entry["port"]) == ("listening", "127.0.0.1:1", 5)
    assert entry["timestamp"].endswith("Z")


def test_an_exception_is_told_with_its_trace_and_without_its_variables(capsys: Any) -> None:
    configure_logging("info", True)
    session_id = "0123456789abcdef"
    try:
        raise ValueError("broken")
    except ValueError as error:
        structlog.get_logger().error("unexpected error", exc_info=error)
    (line,) = lines(capsys)
    trace = json.loads(line)["exception"]
    assert trace.startswith("Traceback (most recent call last)")
    assert trace.endswith("ValueError: broken")
    assert session_id not in trace


class Broken(io.StringIO):
    """An output that takes nothing, such as a pipe without a reader."""

    def write(self, text: str) -> int:
        raise OSError(32, "Broken pipe")

    def flush(self) -> None:
        raise OSError(32, "Broken pipe")


def closed() -> io.StringIO:
    output = io.StringIO()
    output.close()
    return output


@pytest.mark.parametrize("output", [None, Broken(), closed()], ids=["none", "broken", "closed"])
def test_lines_that_cannot_be_written_are_dropped(monkeypatch: pytest.MonkeyPatch, capsys: Any, output: Any) -> None:
    monkeypatch.setattr(sys, "stdout", output)
    configure_logging("info", True)
    structlog.get_logger().info("listening")
    logging.getLogger("stepwire_server.engines").warning("no kernel cache")
    discard_unwritten_lines()
    assert capsys.readouterr().err == ""


def test_an_output_that_is_full_does_not_change_the_exit_code() -> None:
    program = (
        "import structlog; from stepwire_server.observability import logs\n"
        "logs.configure_logging('info', True); structlog.get_logger().info('x'); logs.discard_unwritten_lines()"
    )
    with open("/dev/full", "w") as full:
        assert subprocess.run([sys.executable, "-c", program], stdout=full, timeout=60, check=False).returncode == 0


@pytest.mark.parametrize("as_json", [True, False])
def test_lines_of_the_standard_library_are_the_same(capsys: Any, as_json: bool) -> None:
    """The engines log that way."""
    configure_logging("debug", as_json)
    configure_logging("info", as_json)
    log = logging.getLogger("stepwire_server.engines.compiled.cache")
    log.debug("not asked for")
    log.warning("no kernel cache: %s", "x\nforged")
    logging.getLogger("numba.core").info("not ours")
    (line,) = lines(capsys)
    assert line.isprintable()
    if as_json:
        entry = json.loads(line)
        assert (entry["event"], entry["level"]) == ("no kernel cache: x\\nforged", "warning")
        assert entry["timestamp"].endswith("Z")
