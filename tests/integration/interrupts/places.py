"""The number of places that the tests of interrupts try: some, or every one with `make interrupts`."""

from __future__ import annotations

import os

__all__ = ["EVERY", "SOME"]

EVERY = "STEPWIRE_INTERRUPTS" in os.environ
SOME = 6
