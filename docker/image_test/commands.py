"""Commands of the system, and what they print when they fail."""

from __future__ import annotations

import os
import pathlib
import subprocess
from collections.abc import Mapping
from typing import Final

__all__ = ["CommandFailed", "attempt", "run"]

_PATIENCE_SECONDS: Final = 400.0
_LAST_LINES: Final = 25


class CommandFailed(Exception):
    """A command ended with another exit code than 0; the text has its last lines."""


def attempt(
    *command: str | pathlib.Path, cwd: pathlib.Path | None = None, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command whatever its exit code; `env` comes on top of this process's own."""
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=_PATIENCE_SECONDS,
        check=False,
    )


def run(*command: str | pathlib.Path, cwd: pathlib.Path | None = None, env: Mapping[str, str] | None = None) -> str:
    """Run a command and return its standard output.

    Raises:
        CommandFailed: its exit code is not 0.
    """
    done = attempt(*command, cwd=cwd, env=env)
    if done.returncode:
        lines = f"{done.stdout}\n{done.stderr}".strip().splitlines()[-_LAST_LINES:]
        words = " ".join(str(part) for part in command)
        raise CommandFailed("\n    ".join([f"{words} (exit code {done.returncode})", *lines]))
    return done.stdout
