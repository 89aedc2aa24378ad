"""Installs and fetches what the test needs; done beforehand, it can go on beside other work.

Knows nothing of the package that is tested, so any Python of the right version runs it.
"""

from __future__ import annotations

import pathlib
import sys
from typing import Final

from materials import Materials
from surroundings import Unfit, equip

__all__ = ["FOLDER", "REPOSITORY", "SKIPPED", "prepare"]

REPOSITORY: Final = pathlib.Path(__file__).resolve().parents[2]
FOLDER: Final = REPOSITORY / "build" / "image-test"
SKIPPED: Final = 77
"""Exit code where the machine does not allow the test."""


def prepare() -> int:
    """Return 0, or `SKIPPED` with the reason printed."""
    try:
        equip()
    except Unfit as problem:
        print(f"SKIPPED: the images were neither built nor run. {problem}", flush=True)
        return SKIPPED
    Materials(FOLDER, REPOSITORY).gather()
    return 0


if __name__ == "__main__":
    sys.exit(prepare())
