"""A server in a container: healthy, trained against from outside, confined, and gone cleanly."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from typing import Any, Final

from commands import run
from containers import STRICT, Container, running
from half_step import HalfStep
from report import Report, require

__all__ = ["ACCURACY", "check_server", "train"]

ACCURACY: Final = 0.95
_GRACE_SECONDS: Final = 20

# Everything below which a process of the container could write without the confinement.
_TRY_TO_WRITE: Final = """
import os, tempfile
wrote = []
for folder in ("/", "/tmp", "/var/tmp", "/etc", "/opt/stepwire", "/run/stepwire", "/var/lib/stepwire"):
    try:
        tempfile.TemporaryFile(dir=folder).close()
        wrote.append(folder)
    except OSError:
        pass
print(" ".join(wrote))
"""
_COUNT_KERNELS: Final = """
import os, pathlib
count = lambda *at: sum(1 for _ in pathlib.Path(*at).rglob("*.nbc"))
(cache,) = pathlib.Path(os.environ["STEPWIRE_CACHE_DIR"]).iterdir()
print(cache.name, count(cache), count(os.environ["STEPWIRE_KERNELS"], cache.name.partition("-numba-")[0]))
"""


def train(target: str) -> dict[str, Any]:
    """Train the digits from here; returns the demo's report."""
    with tempfile.TemporaryDirectory() as folder:
        command = (sys.executable, "-m", "stepwire_server", "demo", "--json", "--output", folder)
        report: dict[str, Any] = json.loads(run(*command, "--target", target))
    return report


def check_server(report: Report, image: str) -> None:
    """Run one under the strictest flags, and one whose root file system could be written."""
    with running(image, INSECURE="1") as server:
        _check_health(report, server)
        _check_training(report, server)
        _check_kernels(report, server)
        _check_confinement(report, server)
        _check_drain(report, server)
    with running(image, flags=(), INSECURE="1") as server:
        _check_traces(report, server)
    _check_another_user(report, image)
    _check_processes(report, image)


def _check_health(report: Report, server: Container) -> None:
    with report.showing("the container becomes healthy, and logs JSON on standard output alone") as figures:
        seconds = server.await_health()
        events = server.events()
        require("listening" in [event["event"] for event in events], events)
        figures += [f"{seconds:.1f} s", f"{len(events)} lines"]


def _check_training(report: Report, server: Container) -> None:
    with report.showing("digits are trained from outside") as figures:
        told = train(server.target())
        figures += [f"accuracy {told['test_accuracy']:.4f}", f"{told['steps']} steps", f"over {told['transport']}"]
        figures += [f"difference to a local Adam {told['largest_difference']:.1e}"]
        require(told["test_accuracy"] >= ACCURACY and told["largest_difference"] < 1e-5, told)


def _check_kernels(report: Report, server: Container) -> None:
    with report.showing("kernels come from the image: none was compiled for the training") as figures:
        level, cached, stocked = server.python(_COUNT_KERNELS).split()
        require(cached == stocked != "0", (level, cached, stocked))
        require(all(event["level"] == "info" for event in server.events()), server.events())
        figures += [f"{stocked} of {level}"]


def _check_confinement(report: Report, server: Container) -> None:
    with report.showing("the server is no root, has no capability, and writes below its volume alone") as figures:
        status = dict(
            line.split(":\t", 1) for line in server.python("print(open('/proc/1/status').read())").splitlines()
        )
        users = set(status["Uid"].split())
        powers = {int(status[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")}
        require((users, powers, status["NoNewPrivs"]) == ({"10001"}, {0}, "1"), status)
        wrote = server.python(_TRY_TO_WRITE)
        require(wrote == "/var/lib/stepwire", wrote)
        figures += ["user 10001", "capabilities 0", f"writes {wrote}"]


def _check_traces(report: Report, server: Container) -> None:
    with report.showing("also where the root file system could be written, nothing of it is") as figures:
        server.await_health()
        train(server.target())
        changed = run("docker", "diff", server.name).split("\n")
        require(not any(changed), changed)
        figures.append("0 files changed")


def _check_another_user(report: Report, image: str) -> None:
    """As where a platform chooses users, and mounts what holds nothing of the image's."""
    with report.showing("any other user serves too, on a volume that is empty") as figures:
        other = ("--user", "4242:4242", "--tmpfs", "/var/lib/stepwire:mode=1777")
        with running(image, flags=(*STRICT, *other), INSECURE="1") as server:
            server.await_health()
            train(server.target())
            _, cached, stocked = server.python(_COUNT_KERNELS).split()
            require(cached == stocked, (cached, stocked))
            figures += [f"user {server.python('import os; print(os.getuid())')}", f"{cached} kernels from the image"]


def _check_processes(report: Report, image: str) -> None:
    with report.showing("several server processes under one parent end with it") as figures:
        with running(image, INSECURE="1", PROCESSES="2") as server:
            server.await_health()
            run("docker", "stop", "--time", str(_GRACE_SECONDS), server.name)
            events = [event["event"] for event in server.events()]
            require(server.state["ExitCode"] == 0 and events.count("stopped") == 2, (server.state, events))
            figures += ["2 processes", "exit code 0"]


def _check_drain(report: Report, server: Container) -> None:
    with report.showing("on SIGTERM a step under way finishes, and the container ends with 0") as figures:
        with HalfStep(server.target()) as step:
            started = time.monotonic()
            stop = subprocess.Popen(
                ["docker", "stop", "--time", str(_GRACE_SECONDS), server.name], stdout=subprocess.DEVNULL
            )
            step.await_drain()
            error = step.finish()
        stop.wait()
        seconds, state = time.monotonic() - started, server.state
        require(state["ExitCode"] == 0 and seconds < _GRACE_SECONDS and error < 1e-6, (state, seconds, error))
        figures += [f"exit code {state['ExitCode']}", f"{seconds:.1f} of {_GRACE_SECONDS} s"]
        figures += [f"the step's largest error {error:.0e}"]
