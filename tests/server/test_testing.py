"""The server that tests of others run in their own process."""

from __future__ import annotations

import json
import logging
import subprocess
import sys

import pytest
import structlog

import stepwire
import stepwire_server.testing
from stepwire_server.observability import logs


def test_a_server_serves_for_a_block() -> None:
    with stepwire_server.testing.serving(max_sessions=2) as target, stepwire.connect(target) as client:
        assert list(client.info().devices) == ["cpu"]
        assert target.startswith("127.0.0.1:")
    with stepwire.connect(target, timeout=0.1) as client, pytest.raises(stepwire.UnavailableError):
        client.info()


def test_settings_are_the_servers() -> None:
    with stepwire_server.testing.serving(max_chunk_bytes=65536) as target, stepwire.connect(target) as client:
        assert client.info().max_chunk_bytes == 65536
    with pytest.raises(TypeError, match="max_sesions"), stepwire_server.testing.serving(max_sesions=1):
        raise AssertionError("served")


def test_servers_of_one_process_are_apart() -> None:
    with (
        stepwire_server.testing.serving() as one,
        stepwire_server.testing.serving() as other,
        stepwire.connect(one) as here,
        stepwire.connect(other) as there,
    ):
        assert one != other
        assert here.info().instance_id != there.info().instance_id


_PROGRAM = """
import json, sys
import structlog, stepwire, stepwire_server.testing
from stepwire_server.testing import serving

def ask(**settings):
    with serving(**settings) as target, stepwire.connect(target) as client:
        client.info()

ask()
print("served", file=sys.stderr)
ask(log_level="info")
print(json.dumps(structlog.is_configured()))
"""


def test_the_log_goes_to_standard_error_and_is_quiet_by_default() -> None:
    done = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, text=True, check=True, timeout=120)
    assert json.loads(done.stdout) is False, "and structlog is as it was"
    quiet, told = done.stderr.split("served\n")
    assert quiet == ""
    assert "listening" in told
    assert "stopped" in told


@pytest.fixture
def unconfigured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that has not configured structlog and runs no server yet, whatever other tests of this process do.

    The configuration of the tests comes back by itself.
    """
    monkeypatch.setattr(logs, "_BLOCK_LEVELS", logs._BlockLevels())
    structlog.reset_defaults()


@pytest.mark.usefixtures("unconfigured")
def test_of_several_servers_the_most_talkative_decides(capsys: pytest.CaptureFixture[str]) -> None:
    quiet, talkative = stepwire_server.testing.serving(), stepwire_server.testing.serving(log_level="info")
    quiet.__enter__()
    assert capsys.readouterr() == ("", "")
    talkative.__enter__()
    assert "listening" in capsys.readouterr().err
    quiet.__exit__(None, None, None)
    assert "stopped" in capsys.readouterr().err
    talkative.__exit__(None, None, None)
    captured = capsys.readouterr()
    assert (captured.out, "stopped" in captured.err, structlog.is_configured()) == ("", True, False)


@pytest.mark.usefixtures("unconfigured")
@pytest.mark.parametrize(
    ("level", "told"), [("error", ""), ("warning", "warning: slow\n"), ("info", "warning: slow\n")]
)
def test_lines_of_the_engines_have_the_level_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, level: str, told: str
) -> None:
    """They are of Python's `logging`, which writes warnings to standard error by itself."""
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    logger = logging.getLogger("stepwire_server")
    before = logger.level, list(logger.handlers)
    with stepwire_server.testing.serving(log_level=level):
        capsys.readouterr()
        logging.getLogger("stepwire_server.engines.cpu").debug("never")
        logging.getLogger("stepwire_server.engines.cpu").warning("slow")
        assert capsys.readouterr() == ("", told)
    assert (logger.level, logger.handlers) == before


@pytest.mark.usefixtures("unconfigured")
def test_a_program_with_handlers_of_its_own_has_the_lines_of_the_engines_there(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    own = logging.Handler()
    monkeypatch.setattr(own, "emit", lambda record: lines.append(record.getMessage()))
    monkeypatch.setattr(logging.getLogger(), "handlers", [own])
    with stepwire_server.testing.serving():
        logging.getLogger("stepwire_server.engines.cpu").warning("slow")
    assert (lines, capsys.readouterr().err) == (["slow"], "")


@pytest.mark.usefixtures("unconfigured")
def test_a_program_that_configures_structlog_keeps_its_configuration() -> None:
    lines: list[str] = []

    def keep(logger: object, method: str, event: structlog.typing.EventDict) -> str:
        lines.append(event["event"])
        raise structlog.DropEvent

    with stepwire_server.testing.serving(log_level="info"):
        structlog.configure(processors=[keep])
    assert lines == ["stopped"]
    assert structlog.get_config()["processors"] == [keep]
    with stepwire_server.testing.serving():
        assert "listening" in lines, "whatever the level: the lines are the program's"
    assert structlog.get_config()["processors"] == [keep]
