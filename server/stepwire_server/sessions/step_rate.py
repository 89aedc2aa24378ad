"""The rate of a tenant's steps: a bucket that fills with time, and that each step takes one from.

The bucket is one number, the moment at which it is full again, so a step compares and adds. A step that is refused has
begun nothing, and its client sends it again under the same number.
"""

from __future__ import annotations

import threading
import weakref
from typing import Final

from stepwire.errors import Reason, ResourceExhaustedError

__all__ = ["StepRate", "StepRates"]

_BURST_SECONDS: Final = 1.0
"""The steps of so much time may come at once."""

_PRUNED_FROM: Final = 1024
"""Beyond so many tenants, full buckets that no session has are forgotten; a new bucket is full too."""


class StepRate:
    """The bucket of one tenant. Thread-safe.

    It has no lock, which would cost more than all the rest. Where a switch of threads falls between the comparison and
    the sum, one step is not counted: the interpreter switches once in milliseconds, and the comparison takes a
    ten-thousandth of one.
    """

    __slots__ = ("__weakref__", "_burst_seconds", "_full_at", "_interval_seconds")

    def __init__(self, per_second: int) -> None:
        """Have a full bucket.

        Args:
            per_second: the most steps in a second, from 1 on.
        """
        self._interval_seconds = 1.0 / per_second
        self._burst_seconds = _BURST_SECONDS - self._interval_seconds
        self._full_at = 0.0

    def admit(self, now: float) -> None:
        """Admit a step, which is one less in the bucket.

        Args:
            now: the clock reading.

        Raises:
            ResourceExhaustedError: the bucket is empty; it tells the time until the next step.
        """
        full_at = self._full_at
        if full_at <= now:
            self._full_at = now + self._interval_seconds
        elif full_at - now <= self._burst_seconds:
            self._full_at = full_at + self._interval_seconds
        else:
            raise _too_many_steps(round(1.0 / self._interval_seconds), full_at - now - self._burst_seconds)

    def is_full(self, now: float) -> bool:
        """Tell whether nobody has stepped for so long that nothing is missing."""
        return self._full_at <= now


class StepRates:
    """The buckets of all tenants. Thread-safe."""

    def __init__(self, per_second: int) -> None:
        """Give each tenant so many steps a second; 0 for no limit."""
        self._per_second = per_second
        self._rates = weakref.WeakValueDictionary[str, StepRate]()  # sessions have their buckets
        self._kept: dict[str, StepRate] = {}  # those that may miss something, also without a session
        self._lock = threading.Lock()

    def of(self, tenant: str, now: float) -> StepRate | None:
        """Return the bucket that a tenant's sessions share; None without a limit."""
        if not self._per_second:
            return None
        with self._lock:
            if (rate := self._rates.get(tenant)) is None:
                rate = self._rates[tenant] = StepRate(self._per_second)
            if len(self._kept) >= _PRUNED_FROM:
                self._kept = {name: each for name, each in self._kept.items() if not each.is_full(now)}
            self._kept[tenant] = rate
            return rate


def _too_many_steps(most: int, wait_seconds: float) -> ResourceExhaustedError:
    return ResourceExhaustedError(
        f"this tenant makes {most} steps a second, its most; send the step again in {wait_seconds:.3f} s, or have the "
        "server started with a larger --tenant-steps-per-second",
        reason=Reason.TOO_MANY_STEPS,
        metadata={"limit": "tenant_steps_per_second", "most": most},
        retry_after_seconds=max(wait_seconds, 0.001),
    )
