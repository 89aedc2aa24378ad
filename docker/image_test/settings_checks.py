"""Settings that are wrong stop a container at once, with one line and exit code 2."""

from __future__ import annotations

import pathlib
import socket
import tempfile
from typing import NamedTuple

from containers import STRICT, Outcome, once
from report import Report, require

__all__ = ["check_settings"]

_PORT = 50051


class _Wrong(NamedTuple):
    """A setting, and what must be in the line."""

    what: str
    settings: dict[str, str]
    says: str


_WRONG = (
    _Wrong("an unknown name", {"THREDS": "2"}, "environment variable STEPWIRE_THREDS is unknown; use one of: "),
    _Wrong("a wrong type", {"THREADS": "many"}, "STEPWIRE_THREADS is 'many'"),
    _Wrong("plaintext beyond loopback, not accepted", {"INSECURE": "0"}, "accept it with --insecure or STEPWIRE_INSE"),
    _Wrong("a device that is none", {"DEVICE": "tpu"}, "STEPWIRE_DEVICE is 'tpu'"),
)


def check_settings(report: Report, image: str) -> None:
    """Try each wrong setting."""
    for wrong in _WRONG:
        with report.showing(f"{wrong.what} stops the container") as figures:
            figures += _stopped(once(image, **{"INSECURE": "1", **wrong.settings}), wrong.says)
    _check_volume(report, image)
    _check_port(report, image)


def _check_volume(report: Report, image: str) -> None:
    with report.showing("a volume that cannot be written stops the container") as figures:
        with tempfile.TemporaryDirectory() as folder:
            pathlib.Path(folder).chmod(0o755)
            mount = ("--volume", f"{folder}:/var/lib/stepwire")
            outcome = once(image, flags=(*STRICT, *mount), INSECURE="1")
        figures += _stopped(outcome, "'/var/lib/stepwire/cache' cannot be used by user 10001: [Errno 13] Permission")


def _check_port(report: Report, image: str) -> None:
    with report.showing("a port that is taken stops the container") as figures:
        with socket.create_server(("0.0.0.0", _PORT)):
            outcome = once(image, flags=(*STRICT, "--network", "host"), INSECURE="1", LOG_LEVEL="warning")
        figures += _stopped(outcome, f"cannot listen on '0.0.0.0:{_PORT}': the port is taken")


def _stopped(outcome: Outcome, says: str) -> list[str]:
    """Hold an end to the rule; returns its figures."""
    lines = outcome.err.splitlines()
    require(outcome.code == 2 and len(lines) == 1 and not outcome.out, outcome)
    require(lines[0].startswith("stepwire: ") and says in lines[0], lines[0])
    return [f"exit code {outcome.code}", f"{outcome.seconds:.1f} s", f"“{lines[0][:90]}…”"]
