"""Limits of each tenant: others have theirs, and what was refused leaves nothing."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from stepwire.errors import Reason, ResourceExhaustedError
from stepwire_server.devices.kernels import KernelLimits
from stepwire_server.devices.pool import DevicePool
from stepwire_server.engines import CpuEngine
from stepwire_server.engines.kernel_room import KernelRoom
from stepwire_server.sessions.registry import Registry
from stepwire_server.sessions.registry_limits import RegistryLimits, TenantLimits
from stepwire_server.sessions.tenants import TenantSessions
from tests.server.sessions.test_registry import config, make_registry

__all__ = ["make_registry"]


def test_a_tenant_has_so_many_sessions_and_others_have_theirs(make_registry: Any) -> None:
    registry = make_registry(tenant=TenantLimits(sessions=2))
    one, other = TenantSessions(registry, "one"), TenantSessions(registry, "other")
    first = one.create("a", config())
    one.create("b", config())
    reserved = registry.pool.choose("").budget.reserved_bytes
    with pytest.raises(ResourceExhaustedError, match="this tenant has 2 sessions, its most") as refused:
        one.create("c", config())
    assert refused.value.reason is Reason.TOO_MANY_SESSIONS
    assert {"limit": "tenant_max_sessions", "most": "2"}.items() <= refused.value.metadata.items()
    assert registry.pool.choose("").budget.reserved_bytes == reserved
    assert one.create("a", config()).replayed
    other.create("c", config())
    one.delete(first.session.session_id)
    assert not one.create("c", config()).replayed


def test_a_tenant_has_so_many_bytes(make_registry: Any) -> None:
    size = make_registry().create("a", config()).session.memory_bytes
    registry = make_registry(tenant=TenantLimits(state_bytes=2 * size))
    one = TenantSessions(registry, "one")
    for name in ("a", "b"):
        one.create(name, config())
    with pytest.raises(
        ResourceExhaustedError, match=f"needs {size} bytes and 0 of this tenant's {2 * size}"
    ) as refused:
        one.create("c", config())
    assert refused.value.reason is Reason.MEMORY_EXHAUSTED
    TenantSessions(registry, "other").create("c", config())
    assert (one.statistics().sessions, registry.statistics().sessions) == (2, 3)


def test_a_tenant_has_so_many_streams_and_comes_back_to_its_own(make_registry: Any) -> None:
    registry = make_registry(tenant=TenantLimits(streams=1))
    mine, second = (registry.create(f"one/{name}", config()).session for name in "ab")
    other = registry.create("other/a", config()).session
    with contextlib.ExitStack() as stack:
        streams = [stack.enter_context(registry.streams.stream(lambda: None)) for _ in range(4)]
        registry.streams.admit(streams[0], mine.tenant, returns=0 in mine.ledger.members.attached)
        stack.enter_context(mine.attached(streams[0], 0, 0))
        with pytest.raises(ResourceExhaustedError, match="this tenant has 1 attached streams, its most") as refused:
            registry.streams.admit(streams[1], second.tenant, returns=0 in second.ledger.members.attached)
        assert (refused.value.reason, refused.value.retry_after_seconds) == (Reason.TOO_MANY_STREAMS, 1.0)
        registry.streams.admit(streams[2], other.tenant, returns=0 in other.ledger.members.attached)
        registry.streams.admit(streams[3], mine.tenant, returns=0 in mine.ledger.members.attached)


class CompilingEngine(CpuEngine):
    """An engine that says that each update dtype is a kernel."""

    def __init__(self) -> None:
        super().__init__(threads=1, use_numba=False)
        self.made: list[Any] = []

    def bound_kernels(self, room: KernelRoom) -> None:
        self.room = room

    def prepare(self, recipe: Any, gradient: Any, reply: Any) -> None:
        if (key := (recipe.key, gradient, reply)) not in self.made:
            with self.room.admitted():
                self.made.append(key)


def test_a_tenant_whose_sessions_need_too_many_kernels_keeps_to_those_that_there_are(clock: Any) -> None:
    pool = DevicePool.of([CompilingEngine()], 10_000, kernels=KernelLimits(3, tenant=1))
    registry = Registry(pool, RegistryLimits(10, 3, 5.0), clock)
    one, other = TenantSessions(registry, "one"), TenantSessions(registry, "other")
    bfloat16 = dataclasses.replace(config(), gradient_dtype=np.dtype(ml_dtypes.bfloat16))
    one.create("a", config())
    reserved = registry.pool.choose("").budget.reserved_bytes
    with pytest.raises(ResourceExhaustedError, match="this tenant has 1 compiled kernels, its most") as refused:
        one.create("b", bfloat16)
    assert {"limit": "tenant_max_kernels", "most": "1"}.items() <= refused.value.metadata.items()
    assert registry.pool.choose("").budget.reserved_bytes == reserved
    other.create("b", bfloat16)
    one.create("b", bfloat16)  # which another tenant has paid for
    assert one.statistics().sessions == 2
