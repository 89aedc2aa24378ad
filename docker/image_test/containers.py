"""Containers under the strictest flags, and what can be seen of them from outside."""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

from commands import attempt, run
from report import Failed, require

__all__ = ["STRICT", "Container", "Outcome", "once", "running"]

STRICT: Final = ("--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--pids-limit", "512")
_HEALTHY_SECONDS: Final = 60.0
_numbers = itertools.count(1)


class Outcome(NamedTuple):
    """How a container ended."""

    code: int
    out: str
    err: str
    seconds: float


def once(image: str, *command: str, flags: tuple[str, ...] = STRICT, **settings: str) -> Outcome:
    """Run a container to its end."""
    started = time.monotonic()
    done = attempt("docker", "run", "--rm", *flags, *_variables(settings), image, *command)
    return Outcome(done.returncode, done.stdout, done.stderr, time.monotonic() - started)


class Container:
    """One that runs a server.

    Attributes:
        name: as Docker knows it.
    """

    def __init__(self, name: str) -> None:
        """Look at the container of this name."""
        self.name = name

    @property
    def state(self) -> dict[str, Any]:
        """What Docker says of it now."""
        state: dict[str, Any] = json.loads(run("docker", "inspect", "--format", "{{json .State}}", self.name))
        return state

    def await_health(self) -> float:
        """Wait until Docker calls it healthy; returns the seconds since it was started.

        Raises:
            Failed: it ended, or takes too long.
        """
        started = time.monotonic()
        while (state := self.state)["Health"]["Status"] != "healthy":
            if not state["Running"] or time.monotonic() - started > _HEALTHY_SECONDS:
                raise Failed(f"not healthy: {state}; {self.logs()}")
            time.sleep(0.2)
        return time.monotonic() - started

    def target(self) -> str:
        """Return where clients on the host reach it."""
        return run("docker", "port", self.name, "50051/tcp").split()[0]

    def logs(self) -> tuple[list[str], list[str]]:
        """Return the lines of standard output and of standard error."""
        done = attempt("docker", "logs", self.name)
        return done.stdout.splitlines(), done.stderr.splitlines()

    def events(self) -> list[dict[str, Any]]:
        """Return the log lines.

        Raises:
            Failed: one is no JSON, or something came on standard error.
        """
        lines, others = self.logs()
        require(not others, f"on standard error: {others}")
        return [json.loads(line) for line in lines]

    def python(self, code: str) -> str:
        """Run Python inside, as the container's user."""
        return run("docker", "exec", self.name, "python3", "-c", code).strip()


@contextlib.contextmanager
def running(image: str, *, flags: tuple[str, ...] = STRICT, **settings: str) -> Iterator[Container]:
    """Run a server for a block, its port published on a free one of loopback; it is removed with its volumes."""
    name = f"stepwire-{next(_numbers)}"
    often = ("--health-interval", "1s", "--publish", "127.0.0.1:0:50051")
    run("docker", "run", "--detach", "--name", name, *often, *flags, *_variables(settings), image)
    try:
        yield Container(name)
    finally:
        attempt("docker", "rm", "--force", "--volumes", name)


def _variables(settings: dict[str, str]) -> list[str]:
    return [part for name, value in settings.items() for part in ("--env", f"STEPWIRE_{name}={value}")]
