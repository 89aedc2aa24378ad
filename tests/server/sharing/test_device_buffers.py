"""Device memory of a stream: freed when the stream and its importer have both ended, in whichever order."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import structlog.testing

from stepwire.errors import ResourceExhaustedError, UnsupportedFeatureError
from stepwire.layout import TensorSpec
from stepwire.wire.dtypes import BFLOAT16, FLOAT32, INT8
from stepwire_server.devices.budget import MemoryBudget
from stepwire_server.engines import CpuEngine
from stepwire_server.sharing.device_buffers import DeviceBuffers
from stepwire_server.sharing.loans import Loans
from tests.server.configs import make_config
from tests.server.session_driver import make_session

SIZE = 5000
STATE_BYTES = 3 * 4 * SIZE
BLOCK_BYTES = 2 << 20
PATIENCE_SECONDS = 120.0


class Exported:
    """An engine's exported memory, on the host.

    Attributes:
        closed: how often it was.
    """

    def __init__(self, nbytes: int, closing: threading.Event | None = None) -> None:
        self.memory = np.zeros(nbytes, np.uint8)
        self.handle, self.device_uuid = b"h" * 64, b"u" * 16
        self.closed = 0
        self._closing = closing

    def array(self, offset: int, dtype: np.dtype[Any], items: int) -> Any:
        return self.memory[offset : offset + items * dtype.itemsize].view(dtype)

    def read(self, offset: int, nbytes: int) -> bytes:
        return self.memory[offset : offset + nbytes].tobytes()

    def close(self) -> None:
        if self._closing is not None:
            assert self._closing.wait(PATIENCE_SECONDS)
        self.closed += 1


class Exporting(CpuEngine):
    """The CPU's engine, which says that its memory can be opened by others."""

    exported: list[Exported]
    closing: threading.Event | None = None

    def export(self, nbytes: int) -> Any:
        self.exported.append(Exported(nbytes, self.closing))
        return self.exported[-1]


class Lent:
    """A session whose memory is lent."""

    def __init__(self, budget_bytes: int = 1 << 30, most_kept: int = 4, **fields: Any) -> None:
        self.engine = Exporting(threads=1, use_numba=False)
        self.engine.exported = []
        self.budget = MemoryBudget(budget_bytes)
        config = make_config(TensorSpec("w", (SIZE,)), **fields)
        self.session = make_session(config, self.engine, budget=self.budget)
        self.loans = Loans(most_kept)

    def lend(self) -> DeviceBuffers:
        self.loans.check_room()
        return DeviceBuffers(self.session, self.loans)

    @property
    def lent_bytes(self) -> int:
        return self.budget.reserved_bytes - STATE_BYTES

    def settle(self, left: int = 0) -> None:
        """Wait for all that was given back."""
        with self.loans._changed:
            assert self.loans._changed.wait_for(lambda: len(self.loans._kept) == left, PATIENCE_SECONDS)


@pytest.mark.parametrize(
    ("gradient", "reply", "parts"),
    [(FLOAT32, FLOAT32, (20480, 20480)), (BFLOAT16, FLOAT32, (12288, 20480)), (INT8, BFLOAT16, (8192, 12288))],
    ids=str,
)
def test_gradient_and_parameters_lie_in_one_allocation_of_whole_blocks(
    gradient: Any, reply: Any, parts: tuple[int, int]
) -> None:
    lent = Lent(gradient_dtype=gradient, reply_dtype=reply)
    buffers = lent.lend()
    (exported,) = lent.engine.exported
    assert (buffers.gradient_bytes, buffers.parameter_bytes) == parts
    assert (exported.memory.nbytes, lent.lent_bytes) == (BLOCK_BYTES, BLOCK_BYTES)
    assert (buffers.gradient.dtype, buffers.parameters.dtype, len(buffers.parameters)) == (gradient, reply, SIZE)
    response = buffers.response()
    assert (response.cuda_ipc_handle, response.cuda_device_uuid) == (exported.handle, exported.device_uuid)
    assert (list(buffers.descriptors()), buffers.in_place, buffers.on_device) == ([], False, True)
    buffers.released()
    buffers.close()
    assert (lent.lent_bytes, exported.closed) == (0, 1)


def test_a_pattern_is_looked_for_where_the_client_writes_it() -> None:
    buffers = Lent().lend()
    pattern = bytes(range(64))
    assert buffers.check(pattern) is None
    buffers.gradient.view(np.uint8)[:64] = np.frombuffer(pattern, np.uint8)
    buffers.parameters[:16] = 2.0
    assert buffers.check(pattern) == np.full(16, 2.0, np.float32).tobytes()
    buffers.close()


def test_what_nobody_has_fetched_ends_with_its_stream() -> None:
    lent = Lent()
    buffers = lent.lend()
    buffers.close()
    buffers.close()
    assert (lent.lent_bytes, lent.engine.exported[0].closed, len(lent.loans)) == (0, 1, 0)


def test_a_client_that_ends_first_leaves_it_to_the_stream() -> None:
    lent = Lent()
    buffers = lent.lend()
    buffers.response()
    buffers.released()
    assert (lent.lent_bytes, lent.engine.exported[0].closed) == (BLOCK_BYTES, 0), "a step may be under way in it"
    buffers.close()
    assert (lent.lent_bytes, lent.engine.exported[0].closed, len(lent.loans)) == (0, 1, 0)


def test_a_stream_that_ends_first_leaves_it_to_the_client() -> None:
    lent = Lent()
    buffers = lent.lend()
    buffers.response()
    buffers.close()
    assert (lent.lent_bytes, lent.engine.exported[0].closed, len(lent.loans)) == (BLOCK_BYTES, 0, 1)
    lent.session.close()
    buffers.released()
    lent.settle()
    assert (lent.budget.reserved_bytes, lent.engine.exported[0].closed) == (0, 1)


def test_who_hears_of_the_end_of_a_client_waits_for_nothing() -> None:
    lent = Lent()
    lent.engine.closing = threading.Event()
    buffers = lent.lend()
    buffers.response()
    buffers.close()
    buffers.released()
    assert lent.engine.exported[0].closed == 0
    lent.engine.closing.set()
    lent.settle()
    assert lent.engine.exported[0].closed == 1


def test_a_server_that_ends_frees_what_is_left_and_says_so() -> None:
    lent = Lent()
    kept = [lent.lend() for _ in range(2)]
    for buffers in kept:
        buffers.response()
        buffers.close()
    kept[0].released()
    lent.settle(left=1)
    with structlog.testing.capture_logs() as logs:
        lent.loans.close(0.0)
        lent.loans.close()
    assert ([exported.closed for exported in lent.engine.exported], lent.lent_bytes) == ([1, 1], 0)
    kept[1].released()
    assert [line["event"] for line in logs] == ["device memory is freed while its client maps it"]
    assert [exported.closed for exported in lent.engine.exported] == [1, 1]


def test_what_waits_is_bounded() -> None:
    lent = Lent(most_kept=2)
    kept = [lent.lend() for _ in range(2)]
    for buffers in kept:
        buffers.response()
        buffers.close()
    with pytest.raises(
        ResourceExhaustedError, match="2 clients still map device memory after the end of their streams"
    ) as full:
        lent.lend()
    assert full.value.metadata["kept"] == "2"
    kept[0].released()
    lent.settle(left=1)
    lent.lend().close()
    kept[1].released()
    lent.settle()


def test_a_refusal_leaves_nothing() -> None:
    lent = Lent(budget_bytes=STATE_BYTES + BLOCK_BYTES - 1)
    with pytest.raises(ResourceExhaustedError, match="device memory that is shared with the client needs 2097152"):
        lent.lend()
    assert (lent.lent_bytes, lent.engine.exported) == (0, [])


def test_a_session_on_the_cpu_has_none() -> None:
    engine, budget = CpuEngine(threads=1, use_numba=False), MemoryBudget(1 << 30)
    config = make_config(TensorSpec("w", (SIZE,)))
    session = make_session(config, engine, budget=budget)
    with pytest.raises(UnsupportedFeatureError, match="the session lives on cpu"):
        DeviceBuffers(session, Loans())
    assert budget.reserved_bytes == STATE_BYTES
    engine.close()
