"""The account of compiled kernels: each is admitted before it is made, since clients choose what is compiled.

The machine code of a kernel, and what its compiler keeps beside it, stays until the process ends: dropping a kernel of
Numba's gave nothing back when it was tried. So there is a most of them, and no eviction: a session that needs one more
is refused. A GPU gives the memory of machine code back, so its engine unloads the least recently used kernel instead.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Final, NamedTuple

from stepwire.errors import Reason, ResourceExhaustedError
from stepwire_server.devices.budget import MemoryBudget, Reservation

__all__ = ["KERNEL_BYTES", "KernelAccount", "KernelLimits"]

KERNEL_BYTES: Final = 2 << 20
"""The resident bytes of a kernel that was just compiled; one from the cache on disk takes less."""

_BESIDE_THE_BUDGET: Final = 64
"""The kernels that a budget does not count: those of some dozens of recipes, which every server has."""


class KernelLimits(NamedTuple):
    """The most compiled kernels.

    Attributes:
        most: of a server, on each device.
        tenant: of those, the ones that sessions of one tenant were the first to need; 0 for no limit of its own.
    """

    most: int = 512
    tenant: int = 0


class KernelAccount:
    """Counts the kernels of one engine. Thread-safe.

    Attributes:
        most: the most kernels; an engine that unloads kernels keeps so many.
        count: the kernels that were made.
    """

    def __init__(self, budget: MemoryBudget, limits: KernelLimits) -> None:
        """Count none yet; `budget` has the bytes of those beyond the first ones."""
        self.most = limits.most
        self.count = 0
        self._limits = limits
        self._budget = budget
        self._reservations: list[Reservation] = []
        self._of_tenants = Counter[str]()
        self._asking = threading.local()
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def asked_by(self, tenant: str) -> Iterator[None]:
        """Count the kernels that this thread makes within a block for a tenant."""
        before = getattr(self._asking, "tenant", None)
        self._asking.tenant = tenant
        try:
            yield
        finally:
            self._asking.tenant = before

    @contextlib.contextmanager
    def admitted(self) -> Iterator[None]:
        """Count a kernel that is made within a block; one that cannot be made counts no longer.

        Raises:
            ResourceExhaustedError: it is one too many, or the budget has no room for it.
        """
        tenant = getattr(self._asking, "tenant", None)
        reservation = self._admit(tenant)
        try:
            yield
        except BaseException:
            self._withdraw(tenant, reservation)
            raise
        if reservation is not None:
            self._reservations.append(reservation)

    def _admit(self, tenant: str | None) -> Reservation | None:
        with self._lock:
            if self.count >= self._limits.most:
                raise _too_many("the server", "max_kernels", self._limits.most)
            if tenant is not None and self._limits.tenant and self._of_tenants[tenant] >= self._limits.tenant:
                raise _too_many("this tenant", "tenant_max_kernels", self._limits.tenant)
            beyond = self.count >= _BESIDE_THE_BUDGET
            self._count(tenant, 1)
        try:
            if not beyond:
                return None
            # The engine's lock of kernels is held here, and a session that is parked may wait for a creation, which
            # may wait for that lock.
            return self._budget.reserve(KERNEL_BYTES, "a compiled kernel", makes_room=False)
        except BaseException:
            self._withdraw(tenant, None)
            raise

    def _withdraw(self, tenant: str | None, reservation: Reservation | None) -> None:
        with self._lock:
            self._count(tenant, -1)
        if reservation is not None:
            reservation.release()

    def _count(self, tenant: str | None, change: int) -> None:
        self.count += change
        if tenant is not None:
            self._of_tenants[tenant] += change


def _too_many(whose: str, limit: str, most: int) -> ResourceExhaustedError:
    return ResourceExhaustedError(
        f"{whose} has {most} compiled kernels, its most, and the session's options need another one; the memory of "
        "kernels comes back with the process alone. Use the rule, the options and the dtypes of a session that exists, "
        f"or have the server started with a larger --{limit.replace('_', '-')}",
        reason=Reason.MEMORY_EXHAUSTED,
        metadata={"limit": limit, "most": most},
    )
