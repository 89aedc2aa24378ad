"""What was shown, a line each, with its figure."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

__all__ = ["Failed", "Report", "require"]


class Failed(Exception):
    """Something is not as it must be; the text says what was seen."""


def require(condition: bool, seen: object) -> None:
    """Fail with what was seen unless a condition holds."""
    if not condition:
        raise Failed(str(seen))


class Report:
    """Prints as it goes, and counts.

    Attributes:
        passed: what was shown.
        failed: what was not.
    """

    def __init__(self) -> None:
        """Start the clock."""
        self.passed = self.failed = 0
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._started

    def heading(self, text: str) -> None:
        """Begin a part."""
        print(f"\n-- {text} ({self.seconds:.0f} s)", flush=True)

    @contextlib.contextmanager
    def showing(self, what: str) -> Iterator[list[str]]:
        """Show one thing in the block; what is put into the list is printed beside it. The rest goes on if it fails."""
        figures: list[str] = []
        try:
            yield figures
        except Exception as problem:
            self.failed += 1
            print(f"FAILED  {what}: {type(problem).__name__}: {problem}", flush=True)
        else:
            self.passed += 1
            print(f"ok      {what}{': ' if figures else ''}{', '.join(figures)}", flush=True)
