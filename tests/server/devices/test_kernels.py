"""The account of compiled kernels: a most of them, for a server and for a tenant, and bytes of the budget."""

from __future__ import annotations

import contextlib
import pathlib

import numpy as np
import pytest

from stepwire.errors import Reason, ResourceExhaustedError
from stepwire.optimizers import SGD
from stepwire_server.devices.budget import MemoryBudget
from stepwire_server.devices.kernels import KERNEL_BYTES, KernelAccount, KernelLimits
from stepwire_server.rules import Recipe, rule_for

FIRST = 64
"""The kernels that no budget counts."""


def make(account: KernelAccount, count: int = 1, tenant: str | None = None) -> None:
    with contextlib.nullcontext() if tenant is None else account.asked_by(tenant):
        for _ in range(count):
            with account.admitted():
                pass


def test_a_kernel_beyond_the_most_is_refused_with_the_limits_name() -> None:
    account = KernelAccount(MemoryBudget(0), KernelLimits(most=2))
    make(account, 2)
    with pytest.raises(
        ResourceExhaustedError, match="the server has 2 compiled kernels, its most.*larger --max-kernels"
    ) as refused:
        make(account)
    assert (refused.value.reason, refused.value.retry_after_seconds) == (Reason.MEMORY_EXHAUSTED, None)
    assert refused.value.metadata == {"limit": "max_kernels", "most": "2"}
    assert account.count == 2


def test_a_tenant_has_kernels_of_its_own_and_nobodys_count_for_nobody() -> None:
    account = KernelAccount(MemoryBudget(0), KernelLimits(most=9, tenant=2))
    make(account, 3)
    make(account, 2, "a")
    with pytest.raises(ResourceExhaustedError, match="this tenant has 2 compiled kernels.*--tenant-max-kernels"):
        make(account, 1, "a")
    make(account, 2, "b")
    assert account.count == 7


def test_kernels_beyond_the_first_are_in_the_budget_for_good() -> None:
    budget = MemoryBudget(KERNEL_BYTES)
    account = KernelAccount(budget, KernelLimits())
    make(account, FIRST)
    assert budget.reserved_bytes == 0
    make(account)
    assert budget.reserved_bytes == KERNEL_BYTES
    budget.on_shortage(lambda: pytest.fail("the engine's lock is held: nothing may be parked for a kernel"))
    with pytest.raises(ResourceExhaustedError, match=f"a compiled kernel needs {KERNEL_BYTES} bytes and 0 of"):
        make(account)
    assert account.count == FIRST + 1


def test_a_kernel_that_cannot_be_made_counts_no_longer() -> None:
    budget = MemoryBudget(KERNEL_BYTES)
    account = KernelAccount(budget, KernelLimits())
    make(account, FIRST)
    with pytest.raises(MemoryError), account.asked_by("a"), account.admitted():
        raise MemoryError
    assert (account.count, budget.reserved_bytes) == (FIRST, 0)


def test_nothing_is_compiled_where_there_is_no_room(tmp_path: pathlib.Path) -> None:
    numba_kernels = pytest.importorskip("stepwire_server.engines.cpu.numba_kernels")
    kernels = numba_kernels.NumbaKernels(tmp_path)
    kernels.bound(KernelAccount(MemoryBudget(0), KernelLimits(most=0)))
    float32 = np.dtype(np.float32)
    with pytest.raises(ResourceExhaustedError, match="its most"):
        kernels.update(Recipe(rule_for(SGD(), momentum=False)[0]), float32, float32)
    assert list(tmp_path.iterdir()) == []
