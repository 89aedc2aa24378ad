"""The command, run as the script runs it."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator

import pytest

from stepwire_server.cli import main as cli
from tests.server.cli.outcome import Outcome


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], logging_as_it_was: None
) -> Callable[..., Outcome]:
    """Run the command as the script does: arguments in, exit code and both outputs back."""
    for name in ("STEPWIRE_TARGET", "STEPWIRE_CONFIG", "STEPWIRE_BIND"):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["stepwire", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return Outcome(int(ended.value.code or 0), captured.out, captured.err)

    return run


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    """Give the process its handlers of signals back: the command keeps its own until the process ends."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    signal.set_wakeup_fd(-1)
    for number, handler in before.items():
        signal.signal(number, handler)
