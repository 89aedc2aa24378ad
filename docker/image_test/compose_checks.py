"""The compose files as they are: a server and a client in containers of their own, over the network and over memory."""

from __future__ import annotations

import json
import pathlib
from typing import Any, Final

from commands import attempt, run
from containers import Container
from report import Report, require
from server_checks import ACCURACY

__all__ = ["check_compose"]

_PROJECT: Final = "stepwire-test"


class _Compose:
    """One or more compose files, as a project of this test's."""

    def __init__(self, *files: pathlib.Path) -> None:
        named = [part for file in files for part in ("--file", str(file))]
        self._command = ("docker-compose", "--project-name", _PROJECT, *named)

    def profile(self, name: str, *words: str) -> str:
        return run(*self._command, "--profile", name, *words)

    def client(self) -> dict[str, Any]:
        """Run the client to its end; returns its report."""
        words = ("run", "--rm", "-T", "client", "demo", "--target", "server:50051", "--json")
        told: dict[str, Any] = json.loads(run(*self._command, *words))
        return told

    def down(self) -> None:
        attempt(*self._command, "--profile", "cpu", "--profile", "client", "down", "--volumes")


def check_compose(report: Report, folder: pathlib.Path) -> None:
    """Bring the CPU profile up from each file, train, and take it down; look at the GPU profile."""
    plain, shared = folder / "compose.yaml", folder / "compose.shared-memory.yaml"
    _check_training(report, _Compose(plain), "compose.yaml trains in two containers", "tcp")
    _check_training(
        report, _Compose(plain, shared), "compose.shared-memory.yaml trains through shared memory", "packets"
    )
    with report.showing("the profile gpu is understood"):
        said = _Compose(plain, shared).profile("gpu", "config")
        require("capabilities:" in said and "STEPWIRE_DEVICE: cuda" in said, said)


def _check_training(report: Report, compose: _Compose, what: str, transport: str) -> None:
    with report.showing(what) as figures:
        try:
            compose.profile("cpu", "up", "--detach", "--no-build")
            server = Container(compose.profile("cpu", "ps", "-q", "server-cpu").strip())
            seconds = server.await_health()
            told = compose.client()
            require(told["test_accuracy"] >= ACCURACY and told["transport"] == transport, told)
            compose.profile("cpu", "stop")
            require(server.state["ExitCode"] == 0, server.state)
        finally:
            compose.down()
        figures += [f"accuracy {told['test_accuracy']:.4f}", f"over {transport}", f"healthy after {seconds:.0f} s"]
        figures += ["exit code 0"]
