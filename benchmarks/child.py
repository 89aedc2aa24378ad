"""Child processes of a benchmark: the other side of a connection, or a client whose memory is looked at."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator, Sequence

__all__ = ["Child", "answer", "child", "python"]

_END_SECONDS = 10.0


class Child:
    """A process that is spoken to in lines."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        """Speak to a process whose standard input and output are pipes."""
        self._process = process
        self.pid = process.pid

    def read(self) -> str:
        """Wait for the next line that it prints.

        Raises:
            RuntimeError: it ended instead; what it had to say is on standard error.
        """
        assert self._process.stdout is not None
        if not (line := self._process.stdout.readline()):
            raise RuntimeError(f"{self._process.args!r} ended with exit code {self._process.wait()}")
        return line.strip()

    def ask(self, line: str) -> str:
        """Send a line and wait for the one it answers."""
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


def answer(command: Sequence[str]) -> str:
    """Run a process to its end and return what it printed.

    Raises:
        subprocess.CalledProcessError: it failed; what it had to say is on standard error.
    """
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
