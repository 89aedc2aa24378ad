"""Child processes of a benchmark: the other side of a connection, or a client whose memory is looked at."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator, Sequence

__all__ = ["Child", "child", "output_of", "python"]

_END_SECONDS = 10.0


class Child:
    """A process that is spoken to in lines."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        """Speak to a process whose standard input and output are pipes."""
        self._process = process
        self.pid = process.pid

    def read(self) -> str:
        """Wait for the next line that the process prints.

        Raises:
            RuntimeError: the process ended instead; its message is on standard error.
        """
        assert self._process.stdout is not None
        if not (line := self._process.stdout.readline()):
            raise RuntimeError(f"{self._process.args!r} ended with exit code {self._process.wait()}")
        return line.strip()

    def ask(self, line: str) -> str:
        """Send a line and wait for the line of the reply."""
        assert self._process.stdin is not None
        print(line, file=self._process.stdin, flush=True)
        return self.read()


def python(*arguments: object) -> list[str]:
    """Return the command that runs this interpreter with arguments."""
    return [sys.executable, *map(str, arguments)]


@contextlib.contextmanager
def child(command: Sequence[str]) -> Iterator[Child]:
    """Run a process for a block; at the end its input is closed, and it is killed if that does not end it."""
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield Child(process)
    finally:
        assert process.stdin is not None and process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        try:
            process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


def output_of(command: Sequence[str]) -> str:
    """Run a process to its end and return its output.

    Raises:
        subprocess.CalledProcessError: the process failed; its message is on standard error.
    """
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
