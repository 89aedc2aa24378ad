"""How a command ended."""

from __future__ import annotations

from typing import NamedTuple


class Outcome(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str
