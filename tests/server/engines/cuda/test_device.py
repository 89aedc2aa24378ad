"""One GPU: its memory is accounted for to the byte, and a shortage is told from what else goes wrong."""

from __future__ import annotations

import gc

import numpy as np
import pytest

from stepwire.errors import DataLossError, Reason, ResourceExhaustedError
from stepwire_server.engines.cuda.device import ALIGNMENT, CudaDevice, round_up

ORDERS = ["eager", "lazy", "greedy", *(("random", seed) for seed in range(4))]


def test_streams_are_three_and_their_own(fake) -> None:
    cupy = fake(processors=132)
    device, other = CudaDevice(cupy, 0), CudaDevice(cupy, 1)
    streams = [each for owner in (device, other) for each in (owner.up, owner.compute, owner.down)]
    assert len({stream.ptr for stream in streams} | {0}) == 7, "none of them is the null stream, or another's"
    assert device.multiprocessors == 132
    assert (device.name, other.name, device.description) == ("cuda:0", "cuda:1", "Pretended GPU")


def test_the_device_stays_current_after_a_block(fake) -> None:
    cupy = fake()
    device, other = CudaDevice(cupy, 0), CudaDevice(cupy, 1)
    with device.current():
        assert cupy.cuda.runtime.getDevice() == 0
    with other.current():
        assert cupy.cuda.get_current_stream().ptr == 0, "every call names its stream"
    assert cupy.cuda.runtime.getDevice() == 1, "the device before is not restored"
    assert cupy.contexts == {0, 1}


@pytest.mark.parametrize("nbytes", [1, 255, 256, 4097])
def test_memory_is_what_was_asked_for_until_its_last_reference(fake, nbytes) -> None:
    cupy = fake(memory_bytes=1 << 20)
    device = CudaDevice(cupy, 0)
    memory = device.allocate(nbytes)
    assert (memory.nbytes, memory.dtype, cupy.used_bytes) == (nbytes, np.uint8, nbytes)
    assert device.free_bytes() == (1 << 20) - nbytes
    assert memory.data.ptr % ALIGNMENT == 0
    part = memory[nbytes // 2 :]
    del memory
    assert cupy.used_bytes == nbytes, "a view keeps it"
    del part
    assert (cupy.used_bytes, device.free_bytes(), cupy.allocations) == (0, 1 << 20, 1)


def test_no_bytes_at_all_have_an_address(fake) -> None:
    device = CudaDevice(fake(), 0)
    memory = device.allocate(0)
    assert memory.nbytes == 0 and memory.data.ptr


def test_memory_is_that_of_its_device(fake) -> None:
    cupy = fake(memory_bytes=1000)
    devices = [CudaDevice(cupy, index) for index in range(2)]
    held = [device.allocate(600 + 100 * device.index) for device in devices]
    assert [device.free_bytes() for device in devices] == [400, 300]
    with pytest.raises(ResourceExhaustedError, match=r"no memory on cuda:1 \(Pretended GPU\) for 301 bytes; 300 are"):
        devices[1].allocate(301)
    assert devices[0].allocate(301).nbytes == 301
    assert len(held) == 2


def test_a_shortage_is_mended_by_what_can_be_given_back(fake) -> None:
    cupy, calls = fake(memory_bytes=1000), []
    device = CudaDevice(cupy, 0)
    spare = [device.allocate(600)]

    def reclaim() -> None:
        calls.append(device.free_bytes())
        spare.clear()

    device.on_shortage(reclaim)
    memory = device.allocate(900)
    assert (calls, cupy.used_bytes, memory.nbytes) == ([400], 900, 900)
    small = device.allocate(100)
    assert (calls, small.nbytes) == ([400], 100), "nobody is asked while there is enough"


def test_a_shortage_that_lasts_is_told_and_nothing_is_held(fake) -> None:
    cupy, calls = fake(memory_bytes=1000), []
    device = CudaDevice(cupy, 0)
    held = device.allocate(600)
    device.on_shortage(lambda: calls.append(cupy.used_bytes))
    with pytest.raises(ResourceExhaustedError) as caught:
        device.allocate(401)
    assert calls == [600], "once"
    assert caught.value.metadata == {"needed_bytes": "401", "device": "cuda:0"}
    assert "401 bytes; 400 are free; close a session" in str(caught.value)
    assert (cupy.used_bytes, device.free_bytes(), held.nbytes) == (600, 400, 600)
    assert device.allocate(400).nbytes == 400


def test_a_shortage_without_anybody_to_ask_is_told_too(fake) -> None:
    with pytest.raises(ResourceExhaustedError, match="no memory on cuda:0"):
        CudaDevice(fake(memory_bytes=10), 0).allocate(11)


@pytest.mark.parametrize("again", [False, True], ids=["at first", "after reclaiming"])
def test_other_errors_of_cuda_are_no_shortage(fake, again) -> None:
    cupy, calls = fake(memory_bytes=1000), []
    device, error = CudaDevice(cupy, 0), cupy.cuda.runtime.CUDARuntimeError
    device.on_shortage(lambda: calls.append(True))
    if again:
        cupy.fail_next("malloc", error(2))
    broken = error(98)
    cupy.fail_next("malloc", broken)
    with pytest.raises(error, match="invalid device function") as caught:
        device.allocate(10)
    assert caught.value is broken
    assert (calls, cupy.used_bytes) == ([True] * again, 0)
    assert device.allocate(10).nbytes == 10


def test_an_error_of_who_gives_back_passes_through(fake) -> None:
    device, broken = CudaDevice(fake(memory_bytes=10), 0), ValueError("it broke")

    def reclaim() -> None:
        raise broken

    device.on_shortage(reclaim)
    with pytest.raises(ValueError) as caught:
        device.allocate(11)
    assert caught.value is broken


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_pinned_memory_is_crossed_to_and_from(fake, order) -> None:
    cupy = fake(order)
    device = CudaDevice(cupy, 1)
    host = device.pinned(1000)
    assert (host.shape, host.dtype, cupy.pinned_bytes) == ((1000,), np.uint8, 1000)
    host[:] = np.arange(1000) % 251
    back, memory = device.pinned(1000), device.allocate(1000)
    with device.current():
        memory.data.copy_from_host_async(host.ctypes.data, 1000, device.up)
        device.up.synchronize()
        memory.data.copy_to_host_async(back.ctypes.data, 1000, device.down)
        device.down.synchronize()
    assert (back == host).all()
    part = host[10:]
    del host, back
    gc.collect()
    assert cupy.pinned_bytes == 1000, "a view keeps it"
    del part
    gc.collect()
    assert cupy.pinned_bytes == 0


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_zeros_come_in_the_order_of_the_kernels(fake, read, order) -> None:
    device = CudaDevice(fake(order), 0)
    memory = device.allocate(64)
    with device.current():
        memory.data.memset_async(7, 64, device.compute)
    device.zero(memory[:16])
    with device.current():
        memory[8:12].data.memset_async(9, 4, device.compute)
    assert read(device, memory).tolist() == [0] * 8 + [9] * 4 + [0] * 4 + [7] * 48


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_copies_have_a_direction_and_a_stream_each(fake, order) -> None:
    device = CudaDevice(fake(order), 0)
    memory, host, back = device.allocate(16), device.pinned(8), device.pinned(8)
    host[:] = range(8)
    with device.current():
        device.copy_up(memory.data.ptr, host.ctypes.data, 8)
        device.compute.wait_event(device.up.record())
        device.copy_across(memory.data.ptr + 8, memory.data.ptr, 8)
        device.down.wait_event(device.compute.record())
        device.copy_down(back.ctypes.data, memory.data.ptr + 8, 8)
        for copy in (device.copy_up, device.copy_across, device.copy_down):
            copy(0, 0, 0)
    device.settle(device.down)
    assert back.tolist() == list(range(8))


def test_a_view_has_its_offset_count_and_type(fake, read) -> None:
    device = CudaDevice(fake(), 0)
    memory = device.allocate(64)
    device.zero(memory)
    view = device.view(memory, 16, 3, np.float32)
    assert (view.size, view.nbytes, view.dtype, view.data.ptr - memory.data.ptr) == (3, 12, np.float32, 16)
    with device.current():
        view.data.memset_async(0x40, view.nbytes, device.compute)
    assert read(device, memory).tolist() == [0] * 16 + [0x40] * 12 + [0] * 36
    assert device.view(memory, 64, 0, np.float32).size == 0


def test_everything_works_in_a_thread_where_no_device_is_current(fake, together) -> None:
    cupy = fake()
    device = CudaDevice(cupy, 1)

    def work() -> None:
        memory, host, event = device.allocate(8), device.pinned(8), device.event()
        device.zero(memory)
        device.settle(device.compute)
        with device.current():
            device.copy_down(host.ctypes.data, memory.data.ptr, 8)
            event.record(device.down)
        event.synchronize()
        assert host.tolist() == [0] * 8
        assert device.view(memory, 4, 1, np.float32).nbytes == 4
        assert device.free_bytes() == (1 << 30) - cupy.used_bytes == (1 << 30) - 8
        assert device.description == "Pretended GPU"

    together(work)
    together(work)
    assert (cupy.used_bytes, cupy.pinned_bytes) == (0, 0)


@pytest.mark.parametrize(("nbytes", "rounded"), [(0, 0), (1, 256), (255, 256), (256, 256), (257, 512)])
def test_bytes_are_rounded_up(nbytes, rounded) -> None:
    assert round_up(nbytes) == rounded


# --- a device that fails for good ---------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [700, 716, 719])
def test_a_fatal_status_loses_the_device(fake, status) -> None:
    cupy, told = fake(), []
    device = CudaDevice(cupy, 0)
    device.on_lost(told.append)
    cupy.poison(cupy.cuda.runtime.CUDARuntimeError(status))
    for _ in range(2):
        with pytest.raises(DataLossError, match="cuda:0 failed: .*; its sessions are lost") as caught:
            device.allocate(10)
        assert caught.value.reason is Reason.DEVICE_LOST
        assert caught.value.metadata == {"device": "cuda:0", "status": str(status)}
    assert [error.metadata for error in told] == [caught.value.metadata], "told once"
    device.on_lost(told.append)
    assert len(told) == 2, "who asks later is told at once"


def test_a_fatal_status_of_the_driver_loses_the_device_too(fake) -> None:
    cupy = fake()
    device = CudaDevice(cupy, 0)
    with pytest.raises(DataLossError, match="illegal address"), device.current():
        raise cupy.cuda.driver.CUDADriverError(700)
    assert device.lost is not None


def test_a_wait_finds_the_loss(fake) -> None:
    cupy = fake()
    device = CudaDevice(cupy, 0)
    event = device.event()
    cupy.poison(cupy.cuda.runtime.CUDARuntimeError(719))
    with pytest.raises(DataLossError, match="launch failure"):
        device.wait(event)


def test_no_wait_takes_a_core(fake) -> None:
    cupy = fake("lazy")
    device = CudaDevice(cupy, 0)
    memory = device.allocate(8)
    device.zero(memory)
    device.settle(device.compute)
    assert device.to_host(memory.data.ptr, 8) == bytes(8)
    assert cupy.spinning_waits == 0


def test_a_device_makes_no_context_on_another(fake) -> None:
    cupy = fake()
    device = CudaDevice(cupy, 1)
    memory = device.allocate(8)
    device.zero(memory)
    device.settle(device.compute)
    assert device.free_bytes() > 0
    assert cupy.contexts == {1}
