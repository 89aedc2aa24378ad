"""Waiting for the ends of objects that were dropped."""

from __future__ import annotations

import threading

from stepwire.lifetimes.endings import ENDINGS


class Owner:
    """An object that owns something."""


def all_made() -> None:
    """Wait until the ends of everything that was collected before are made: they are made in order."""
    made, owner = threading.Event(), Owner()
    ENDINGS.with_owner(owner, lambda seconds: made.set())
    del owner
    made.wait()
