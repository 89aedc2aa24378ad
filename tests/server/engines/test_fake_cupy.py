"""The stand-in for CuPy catches what it is for: missing waits, pageable memory, memory freed too early."""

from __future__ import annotations

import gc
import random
import re
import threading
import weakref

import numpy as np
import pytest

from tests.support import cuda_shim as shim
from tests.support import fake_cupy

ORDERS = ["eager", "lazy", "greedy", *(("random", seed) for seed in range(20))]
SIZE = 16


TWICE = 'extern "C" __global__ void twice(float *x, long long n) { if (threadIdx.x < n) x[threadIdx.x] *= 2; }'


class Kernels:
    """Kernels in Python, in the place of compiled ones."""

    names = ("add_one", "add")

    def launch(self, name: str, blocks: int, threads: int, arguments: tuple) -> None:
        source, target = (argument.view(np.float32) for argument in arguments[:2])
        target[...] = source + (1 if name == "add_one" else target)


@pytest.fixture
def make(tmp_path):
    return lambda **options: fake_cupy.FakeCupy(tmp_path, library=Kernels(), **options)


def pinned(cupy, size: int = SIZE) -> np.ndarray:
    pointer = cupy.cuda.PinnedMemoryPointer(cupy.cuda.PinnedMemory(4 * size), 0)
    return np.frombuffer(pointer, np.uint8, 4 * size).view(np.float32)


def on_device(cupy, size: int = SIZE):
    return cupy.ndarray(size, np.float32, cupy.cuda.MemoryPointer(cupy.cuda.Memory(4 * size), 0))


def load(cupy, code: bytes):
    module = cupy.cuda.Module()
    module.load(code)
    return module


def kernel(cupy, name: str = "add_one"):
    return load(cupy, cupy.cuda.compiler.compile_using_nvrtc("")[0]).get_function(name)


def upload(array, host: np.ndarray, stream=None) -> None:
    array.data.copy_from_host_async(host.ctypes.data, host.nbytes, stream)


def download(array, host: np.ndarray, stream=None) -> None:
    array.data.copy_to_host_async(host.ctypes.data, host.nbytes, stream)


# --- a pipeline with every wait that one needs, and without each of them ----------------------------------------

WAITS = {
    "upload before its slot is written again": "the pinned slot is refilled before its copy ran",
    "kernel before its gradient is overwritten": "the upload overtakes the kernel two chunks before",
    "upload before the kernel": "the kernel reads before the upload",
    "download before its result is overwritten": "the kernel overtakes the download two chunks before",
    "kernel before the download": "the download overtakes the kernel",
    "download before the host reads": "the host reads before the download",
}


def pipeline(cupy, forgotten: str | None = None, chunks: int = 7) -> list[float]:
    """Add one to chunks, through two slots and three streams; returns the first element of each answer."""
    cuda, answers = cupy.cuda, []

    def wait(name: str, how, event) -> None:
        assert name in WAITS
        if name != forgotten:
            how(event)

    def synchronize(event) -> None:
        event.synchronize()

    up, work, down = (cuda.Stream(non_blocking=True) for _ in range(3))
    sent, got = [pinned(cupy) for _ in range(2)], [pinned(cupy) for _ in range(2)]
    gradients, results = [on_device(cupy) for _ in range(2)], [on_device(cupy) for _ in range(2)]
    uploaded, used, downloaded = ([cuda.Event(disable_timing=True) for _ in range(2)] for _ in range(3))
    add_one = kernel(cupy)
    for chunk in range(chunks + 2):
        slot = chunk % 2
        if chunk < chunks:
            wait("upload before its slot is written again", synchronize, uploaded[slot])
            sent[slot][...] = chunk
            wait("kernel before its gradient is overwritten", up.wait_event, used[slot])
            upload(gradients[slot], sent[slot], up)
            uploaded[slot].record(up)
            wait("upload before the kernel", work.wait_event, uploaded[slot])
            wait("download before its result is overwritten", work.wait_event, downloaded[slot])
            with work:
                add_one((1,), (256,), (gradients[slot], results[slot]))
                used[slot].record()
        if chunk >= 2:
            wait("download before the host reads", synchronize, downloaded[slot])
            answers.append(float(got[slot][0]))
        if chunk < chunks:
            wait("kernel before the download", down.wait_event, used[slot])
            download(results[slot], got[slot], down)
            down.record(downloaded[slot])
    for stream in (up, work, down):
        stream.synchronize()
    return answers


def run_pipeline(cupy, forgotten: str | None = None) -> bool:
    """Tell whether the answers are right, and nothing was found fault with."""
    with cupy.cuda.Device(0):
        right = pipeline(cupy, forgotten) == [chunk + 1.0 for chunk in range(7)]
    cupy.check()
    return right


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_a_pipeline_with_all_its_waits_is_right_in_every_order(make, order) -> None:
    cupy = make(order=order)
    assert run_pipeline(cupy)
    assert (cupy.used_bytes, cupy.pinned_bytes, cupy.allocations) == (0, 0, 4)


@pytest.mark.parametrize("forgotten", WAITS)
def test_a_pipeline_without_one_of_them_is_wrong_in_some_order(make, forgotten) -> None:
    assert run_pipeline(make(order="eager"), forgotten), "a device that is infinitely fast hides it"
    wrong = [order for order in ORDERS if not run_pipeline(make(order=order), forgotten)]
    assert {"lazy", "greedy"} & set(wrong), f"{WAITS[forgotten]}: one of the plain orders should show it"
    assert sum(isinstance(order, tuple) for order in wrong) >= 5, f"{WAITS[forgotten]}: chance should show it often"


def test_random_orders_are_repeated_by_their_seed(make) -> None:
    forgotten = "kernel before the download"

    def answers(seed: int) -> list[float]:
        cupy = make(order=("random", seed))
        with cupy.cuda.Device(0):
            return [-1.0 if np.isnan(answer) else answer for answer in pipeline(cupy, forgotten)]

    tried = [answers(seed) for seed in range(8)]
    assert tried == [answers(seed) for seed in range(8)]
    assert len({tuple(each) for each in tried}) > 3


# --- streams and events -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_a_stream_keeps_its_order(make, order) -> None:
    cupy = make(order=order)
    with cupy.cuda.Device(1):
        stream, array, host = cupy.cuda.Stream(non_blocking=True), on_device(cupy), pinned(cupy)
        host[...] = 2.0
        with stream:
            assert cupy.cuda.get_current_stream() is stream
            add, total = kernel(cupy, "add"), on_device(cupy)
            upload(array, host)
            total.data.memset_async(0, total.nbytes)
            for _ in range(3):
                add((1,), (32,), (array, total))
            array.data.copy_from_device_async(total.data, total.nbytes)
            download(array, host)
        cupy.cuda.Device(1).synchronize()
    assert host.tolist() == [6.0] * SIZE


def test_nothing_runs_before_a_synchronise_needs_it(make) -> None:
    cupy = make(order="lazy")
    with cupy.cuda.Device(0):
        first, second = (cupy.cuda.Stream(non_blocking=True) for _ in range(2))
        arrays, hosts, events = [on_device(cupy) for _ in range(3)], [pinned(cupy) for _ in range(3)], []
        for k, stream in enumerate([first, second, first]):
            hosts[k][...] = 0.0
            arrays[k].data.memset_async(1, arrays[k].nbytes, stream)
            download(arrays[k], hosts[k], stream)
            events.append(stream.record())
            if k == 1:
                stream.wait_event(events[0])
        assert [event.done for event in events] == [False] * 3
        events[1].synchronize()
        assert ([event.done for event in events], hosts[0][0]) == ([False, True, False], 0.0)
        second.synchronize()
        assert [event.done for event in events] == [True, True, False], "it waited for the first"
        first.synchronize()
        assert events[2].done


def test_greedy_runs_the_others_first(make) -> None:
    cupy = make(order="greedy")
    with cupy.cuda.Device(0):
        first, second = (cupy.cuda.Stream(non_blocking=True) for _ in range(2))
        early, late, other = first.record(), cupy.cuda.Event(), second.record()
        second.wait_event(early)
        late.record(second)
        early.synchronize()
        assert (other.done, late.done) == (True, False)


def test_an_event_stands_for_its_last_record(make) -> None:
    cupy = make(order="lazy")
    with cupy.cuda.Device(0):
        stream, array, host = cupy.cuda.Stream(non_blocking=True), on_device(cupy), pinned(cupy)
        event = cupy.cuda.Event(block=True, disable_timing=True)
        assert event.done
        event.synchronize()
        event.record(stream)
        array.data.memset_async(0, array.nbytes, stream)
        download(array, host, stream)
        event.record(stream)
        event.synchronize()
        assert not host.any()
        array.data.memset_async(0xFF, array.nbytes, stream)
        download(array, host, stream)
        event.synchronize()
        assert not host.any(), "what came after the record is not waited for"
        waits = cupy.cuda.Stream(non_blocking=True)
        waits.wait_event(event)
        event.record(stream)
        waits.synchronize()
        assert not event.done, "the wait was for the record before"


def test_long_chains_of_waits_do_not_recurse(make) -> None:
    cupy = make(order="lazy")
    with cupy.cuda.Device(0):
        streams = [cupy.cuda.Stream(non_blocking=True) for _ in range(2)]
        for turn in range(5000):
            streams[turn % 2].wait_event(streams[1 - turn % 2].record())
        streams[1].synchronize()


def test_the_current_device_and_stream_are_those_of_the_thread(make) -> None:
    cupy, seen = make(), []

    def look() -> None:
        with pytest.raises(AssertionError, match="no device is current in this thread"):
            cupy.cuda.get_current_stream()
        with cupy.cuda.Device(0):
            seen.append(cupy.cuda.get_current_stream().ptr)

    with cupy.cuda.Device(0), cupy.cuda.Stream(non_blocking=True) as stream:
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
        assert (seen, cupy.cuda.get_current_stream()) == ([0], stream)
        event = stream.record()
        with cupy.cuda.Device(1):
            assert cupy.cuda.get_current_stream().ptr == 0
            for attempt in (stream.synchronize, event.record, stream.record, stream.__enter__, event.synchronize):
                with pytest.raises(AssertionError, match="is of device 0"):
                    attempt()
        assert not event.done
        event.synchronize()
        assert event.done
        assert cupy.cuda.get_current_stream() is stream


@pytest.mark.parametrize("order", ["lazy", "greedy", ("random", 0)], ids=str)
def test_threads_share_a_device(make, order) -> None:
    cupy, problems = make(order=order), []

    def work(seed: int) -> None:
        choice = random.Random(seed)
        try:
            for _ in range(5):
                with cupy.cuda.Device(choice.randrange(2)):
                    assert pipeline(cupy) == [chunk + 1.0 for chunk in range(7)]
        except BaseException as problem:
            problems.append(problem)

    with cupy.cuda.Device(0):
        kernel(cupy)
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    cupy.check()
    assert (cupy.used_bytes, cupy.pinned_bytes) == (0, 0)


# --- memory -----------------------------------------------------------------------------------------------------


def test_memory_is_counted_and_runs_out_as_cudas_does(make) -> None:
    cupy = make(memory_bytes=1000)
    with pytest.raises(AssertionError, match="no device is current"):
        cupy.cuda.Memory(1)
    with cupy.cuda.Device(0) as device:
        memories = [cupy.cuda.Memory(600), cupy.cuda.Memory(400), cupy.cuda.Memory(0)]
        assert all(memory.ptr % 512 == 0 for memory in memories)
        assert [memory.size for memory in memories] == [600, 400, 0]
        with pytest.raises(
            cupy.cuda.runtime.CUDARuntimeError, match="cudaErrorMemoryAllocation: out of memory"
        ) as caught:
            cupy.cuda.Memory(1)
        assert caught.value.status == 2
        assert device.mem_info == cupy.cuda.runtime.memGetInfo() == (0, 1000)
        with cupy.cuda.Device(1):
            other = cupy.cuda.Memory(1000)
            assert cupy.used_bytes == 2000
        del memories, other
        block = cupy.cuda.PinnedMemory(77)
        assert (cupy.used_bytes, cupy.allocations, cupy.pinned_bytes) == (0, 3, 77)
        del block
    assert cupy.pinned_bytes == 0
    cupy.check()


def test_fresh_memory_is_not_zero(make) -> None:
    cupy = make()
    with cupy.cuda.Device(0):
        array, host = on_device(cupy), pinned(cupy)
        assert np.isnan(host).all()
        host[...] = 0.0
        download(array, host)
        cupy.cuda.get_current_stream().synchronize()
        assert np.isnan(host).all()


def test_pinned_memory_lives_as_long_as_what_is_made_of_it(make) -> None:
    cupy = make()
    with cupy.cuda.Device(0):
        memory = cupy.cuda.PinnedMemory(100)
    pointer = cupy.cuda.PinnedMemoryPointer(memory, 40)
    assert pointer.ptr == memory.ptr + 40
    part = np.frombuffer(pointer, np.uint8, 60)
    assert part.flags.writeable and part.ctypes.data == pointer.ptr
    with pytest.raises(ValueError, match="smaller than requested"):
        np.frombuffer(pointer, np.uint8, 61)
    del memory, pointer
    part[...] = 1
    assert cupy.pinned_bytes == 100
    del part
    assert cupy.pinned_bytes == 0


def test_registered_memory_may_be_copied_and_pageable_memory_may_not(make) -> None:
    cupy, values = make(), np.arange(SIZE, dtype=np.float32)
    runtime, (ptr, size) = cupy.cuda.runtime, (values.ctypes.data, values.nbytes)
    with cupy.cuda.Device(0):
        array, host = on_device(cupy), pinned(cupy)
        for move in (upload, download):
            with pytest.raises(AssertionError, match="pageable memory in an asynchronous copy"):
                move(array, values)
        runtime.hostRegister(ptr, size, 0)
        for begin, count, status in [(ptr + 4, 4, 712), (ptr, 0, 1), (host.ctypes.data, 1, 712)]:
            with pytest.raises(runtime.CUDARuntimeError) as caught:
                runtime.hostRegister(begin, count, 0)
            assert caught.value.status == status
        upload(array, values)
        download(array, host)
        cupy.cuda.get_current_stream().synchronize()
        assert (host.tolist(), cupy.registered_bytes) == (values.tolist(), size)
        runtime.hostUnregister(ptr)
        with pytest.raises(runtime.CUDARuntimeError, match="HostMemoryNotRegistered"):
            runtime.hostUnregister(ptr)
        with pytest.raises(AssertionError, match="pageable"):
            upload(array, values)
    cupy.check()
    assert cupy.registered_bytes == 0


def test_copies_stay_inside_the_memory_of_their_device(make) -> None:
    cupy = make()
    with cupy.cuda.Device(1):
        other = on_device(cupy)
    with cupy.cuda.Device(0):
        array, host = on_device(cupy), pinned(cupy)
        for attempt, message in [
            (lambda: array.data.copy_from_host_async(host.ctypes.data, 65), "no memory of a device"),
            (lambda: (array.data + 61).copy_from_host_async(host.ctypes.data, 4), "no memory of a device"),
            (lambda: array.data.copy_from_host_async(host.ctypes.data + 1, 64), "pageable"),
            (lambda: array.data.copy_to_host_async(array.data.ptr, 4), "not on the host"),
            (lambda: array.data.copy_from_host_async(host.ctypes, 4), "an address is an int"),
            (lambda: (array.data + 32).memset_async(0, 33), "no memory of a device"),
            (lambda: array.data.copy_from_device_async(other.data, 4), "on device 1, not on 0"),
            (lambda: kernel(cupy)((1,), (1,), (array, other)), "on device 1, not on 0"),
        ]:
            with pytest.raises(AssertionError, match=message):
                attempt()
        (array.data + 64).copy_from_host_async(0, 0)
    cupy.check()


FREED = ["device memory", "pinned memory", "registered memory", "argument of a kernel"]


@pytest.mark.parametrize("freed", FREED)
def test_memory_freed_before_its_work_ran_is_a_fault(make, freed) -> None:
    cupy = make(order="lazy")
    with cupy.cuda.Device(0):
        stream, array, host = cupy.cuda.Stream(non_blocking=True), on_device(cupy), pinned(cupy)
        values, other = np.ones(SIZE, np.float32), on_device(cupy)
        if freed == "argument of a kernel":
            with stream:
                kernel(cupy)((1,), (1,), (other[4:8], array[4:8]))
            del other
        elif freed == "registered memory":
            cupy.cuda.runtime.hostRegister(values.ctypes.data, values.nbytes, 0)
            upload(array, values, stream)
            cupy.cuda.runtime.hostUnregister(values.ctypes.data)
        else:
            upload(array, host, stream)
            if freed == "device memory":
                del array
            else:
                del host
        (fault,) = cupy.faults
        assert re.fullmatch(r"\w+ memory of 64 bytes freed while pending: (upload of 64 bytes|kernel add_one)", fault)
        with pytest.raises(AssertionError, match=r"runs after the \w+ memory of 64 bytes was freed"):
            stream.synchronize()
        stream.synchronize()
    with pytest.raises(AssertionError, match="freed while pending"):
        cupy.check()
    assert values[0] == 1.0, "registered memory belongs to its owner"


@pytest.mark.parametrize("freed", FREED)
def test_memory_freed_after_its_work_ran_is_none(make, freed) -> None:
    cupy = make(order="lazy")
    with cupy.cuda.Device(0):
        array, host = on_device(cupy), pinned(cupy)
        upload(array, host)
        kernel(cupy)((1,), (1,), (array, array))
        cupy.cuda.get_current_stream().synchronize()
        del array, host
    cupy.check()


def test_kernels_that_write_beyond_memory_are_found(make) -> None:
    cupy = make(order="eager")
    with cupy.cuda.Device(0):
        array = on_device(cupy)
        np.ctypeslib.as_array((np.ctypeslib.ctypes.c_ubyte * 1).from_address(array.data.ptr + array.nbytes))[0] = 0
        with pytest.raises(AssertionError, match="written beyond the ends of the device memory of 64 bytes"):
            cupy.check()


def test_arrays_are_views_of_memory(make) -> None:
    cupy = make()
    with cupy.cuda.Device(0):
        memory = cupy.cuda.MemoryPointer(cupy.cuda.Memory(400), 0)
        array = cupy.ndarray((100,), np.float32, memory)
        assert (array.size, len(array), array.nbytes, array.dtype) == (100, 100, 400, np.float32)
        part = array[10:20]
        assert (part.data.ptr - memory.ptr, part.size) == (40, 10)
        assert [array[90:200].size, array[50:20].size, array[200:300].data.ptr - memory.ptr] == [10, 0, 400]
        assert (array.view(np.uint8).size, part.view(np.uint16).data.ptr - memory.ptr) == (400, 40)
        with pytest.raises(ValueError, match="must be a divisor"):
            array.view(np.uint8)[:5].view(np.float32)
        for attempt in (lambda: array[-1:], lambda: array[::2], lambda: array[3], lambda: cupy.ndarray(3)):
            with pytest.raises(AssertionError):
                attempt()
        with pytest.raises(AssertionError, match="ends beyond its memory"):
            cupy.ndarray(101, np.float32, memory)


# --- kernels ----------------------------------------------------------------------------------------------------


def test_kernels_take_what_cupy_takes(make) -> None:
    cupy = make()
    with cupy.cuda.Device(0):
        array, add_one = on_device(cupy), kernel(cupy)
        (skewed,) = (cupy.ndarray(4, np.float32, array.data + 2),)
        for arguments, message in [
            ((skewed, array), "not aligned"),
            ((array, 1.0), "float'> is no argument"),
            ((array, np.ones(3)), "is no argument"),
            ([array, array], "are no tuple"),
        ]:
            with pytest.raises(AssertionError, match=message):
                add_one((1,), (1,), arguments)
        with pytest.raises(AssertionError):
            add_one((0,), (1,), (array, array))
        with pytest.raises(RuntimeError, match="named symbol not found"):
            kernel(cupy, "unknown")
        with cupy.cuda.Device(1), pytest.raises(AssertionError, match="loaded on device 0"):
            add_one((1,), (1,), (array, array))


def test_modules_take_the_code_of_their_device(make) -> None:
    cupy = make()
    compile_source = cupy.cuda.compiler.compile_using_nvrtc
    with cupy.cuda.Device(0):
        for code, message in [
            (b"", "CUDA_ERROR_INVALID_IMAGE"),
            (b"\x7fELF", "CUDA_ERROR_INVALID_IMAGE"),
            (compile_source("one", arch="80")[0], "CUDA_ERROR_NO_BINARY_FOR_GPU"),
        ]:
            with pytest.raises(RuntimeError, match=message):
                load(cupy, code)
        code, _ = compile_source("one")
        module, array = load(cupy, code), on_device(cupy)
        for name in Kernels.names:
            module.get_function(name)((1,), (1,), (array, array))
        with pytest.raises(AssertionError):
            load(cupy, bytearray(code))
    assert cupy.compiled == ["one", "one"]


def test_compiling(make) -> None:
    compile_source = make().cuda.compiler.compile_using_nvrtc
    code, mapping = compile_source("text", ("--fmad=false",), "90", cache_in_memory=True)
    assert (code, mapping) == (b"fake cubin sm_90\ntext", None)
    for option in ("-ftz=true", "--ftz=true", "--use_fast_math"):
        with pytest.raises(AssertionError, match="subnormals must survive"):
            compile_source("text", (option,), "90")
    with pytest.raises(AssertionError, match="no device is current"):
        compile_source("text")
    with pytest.raises(RuntimeError, match=r"CuPy failed to load libnvrtc\.so\.13"):
        make(broken_compiler=True).cuda.compiler.compile_using_nvrtc("text", arch="90")


@pytest.mark.skipif(shim.COMPILER is None, reason="g++ is not installed; it compiles for the processor")
@pytest.mark.parametrize("kind", ["array", "address", "mapped"])
def test_a_compiled_kernel_runs(tmp_path, kind) -> None:
    cupy, values = fake_cupy.FakeCupy(tmp_path), np.arange(SIZE, dtype=np.float32)
    with cupy.cuda.Device(0):
        twice = load(cupy, cupy.cuda.compiler.compile_using_nvrtc(TWICE)[0]).get_function("twice")
        assert cupy.cuda.driver.occupancyMaxActiveBlocksPerMultiprocessor(twice.ptr, 32, 0) == 1
        array, host = on_device(cupy), cupy.cuda.PinnedMemory(64, 2)
        mapped = np.frombuffer(cupy.cuda.PinnedMemoryPointer(host, 0), np.uint8, 64).view(np.float32)
        mapped[:] = values
        cupy.cuda.runtime.memcpy(array.data.ptr, values.ctypes.data, 64, cupy.cuda.runtime.memcpyHostToDevice)
        argument = {"array": array, "address": array.data.ptr, "mapped": host.ptr}[kind]
        twice((1,), (32,), (argument, SIZE))
        cupy.cuda.runtime.deviceSynchronize()
        cupy.cuda.runtime.memcpy(values.ctypes.data, array.data.ptr, 64, cupy.cuda.runtime.memcpyDeviceToHost)
    assert (mapped if kind == "mapped" else values).tolist() == [2.0 * k for k in range(SIZE)]
    cupy.check()


@pytest.mark.skipif(shim.COMPILER is None, reason="g++ is not installed; it compiles for the processor")
def test_a_declared_kernel_takes_what_it_declares(tmp_path) -> None:
    cupy = fake_cupy.FakeCupy(tmp_path)
    with cupy.cuda.Device(0):
        twice = load(cupy, cupy.cuda.compiler.compile_using_nvrtc(TWICE)[0]).get_function("twice")
        array, host = on_device(cupy), cupy.cuda.PinnedMemory(64)
        for arguments, message in [
            ((host.ptr, SIZE), "are no memory of a device"),
            ((array.data.ptr + 64, SIZE), "are no memory of a device"),
            ((np.float32(1.0), SIZE), "is no address"),
            ((array, np.float32(SIZE)), "float32'> for 'long long n'"),
        ]:
            with pytest.raises(AssertionError, match=message):
                twice((1,), (32,), arguments)
        with pytest.raises(ValueError):
            twice((1,), (32,), (array,))


def test_modules_are_unloaded_where_their_context_is_current(make) -> None:
    """The driver's call has no context in a thread that has called nothing yet, unlike the runtime's."""
    cupy = make()
    with cupy.cuda.Device(0):
        modules = [load(cupy, cupy.cuda.compiler.compile_using_nvrtc("")[0]) for _ in range(2)]
        modules.pop()
    assert not cupy.faults

    def clear() -> None:
        assert cupy.cuda.runtime.getDevice() == 0, "which binds no context"
        modules.clear()

    thread = threading.Thread(target=clear)
    thread.start()
    thread.join()
    assert cupy.faults == ["a module of device 0 is unloaded without its context"]


# --- failures on demand, and what the devices say of themselves ---------------------------------------------------


def test_operations_fail_on_demand(make) -> None:
    cupy, values = make(), np.zeros(4, np.float32)
    with cupy.cuda.Device(0):
        array, host, add_one, error = on_device(cupy), pinned(cupy), kernel(cupy), RuntimeError("as asked")
        attempts = {
            "malloc": lambda: on_device(cupy),
            "PinnedMemory": lambda: pinned(cupy),
            "hostRegister": lambda: cupy.cuda.runtime.hostRegister(values.ctypes.data, 4, 0),
            "copy": lambda: upload(array, host),
            "memset": lambda: array.data.memset_async(0, 4),
            "kernel": lambda: add_one((1,), (1,), (array, array)),
            "Module": lambda: kernel(cupy),
            "synchronize": cupy.cuda.get_current_stream().synchronize,
            "ipcGetMemHandle": lambda: cupy.cuda.runtime.ipcGetMemHandle(array.data.ptr),
        }
        assert set(attempts) == set(cupy._driver.failures.OPERATIONS)
        for operation, attempt in attempts.items():
            cupy.fail_next(operation, error)
            with pytest.raises(RuntimeError, match="as asked"):
                attempt()
            attempt()
        cupy.fail_next("malloc", cupy.cuda.runtime.CUDARuntimeError(2), after=2)
        kept = [on_device(cupy), on_device(cupy)]
        with pytest.raises(cupy.cuda.runtime.CUDARuntimeError):
            on_device(cupy)
        with pytest.raises(AssertionError, match="is none of malloc"):
            cupy.fail_next("free", error)
        error.__traceback__ = None
        assert len(kept) == 2


def test_devices_describe_themselves(make) -> None:
    cupy = make(devices=3, processors=7, capability="75")
    runtime, device = cupy.cuda.runtime, cupy.cuda.Device(2)
    assert (cupy.cuda.is_available(), runtime.getDeviceCount()) == (True, 3)
    assert (device.id, device.compute_capability, device.attributes["MultiProcessorCount"]) == (2, "75", 7)
    assert runtime.getDeviceProperties(2)["name"] == b"Pretended GPU"
    for attempt in (lambda: runtime.getDeviceProperties(3), cupy.cuda.Device(3).__enter__):
        with pytest.raises(runtime.CUDARuntimeError, match="invalid device ordinal"):
            attempt()
    with device:
        array = on_device(cupy)
        handle = runtime.ipcGetMemHandle(array.data.ptr)
    assert len(handle) == 64
    none = make(devices=0)
    assert not none.cuda.is_available()
    with pytest.raises(runtime.CUDARuntimeError, match="no CUDA-capable device"):
        none.cuda.runtime.getDeviceCount()


def test_nothing_else_is_there(make) -> None:
    cupy = make()
    for owner, name in [
        (cupy, "zeros"),
        (cupy, "RawModule"),
        (cupy, "get_default_memory_pool"),
        (cupy.cuda, "alloc_pinned_memory"),
        (cupy, "copy"),
        (cupy.cuda, "memory"),
        (cupy.cuda.runtime, "errorMemoryAllocation"),
        (cupy.cuda.Stream, "null"),
        (cupy.ndarray, "get"),
    ]:
        with pytest.raises(AttributeError):
            getattr(owner, name)


def test_a_stand_in_leaves_nothing_behind(make) -> None:
    cupy = make()
    run_pipeline(cupy)
    left = weakref.ref(cupy)
    del cupy
    gc.collect()
    assert left() is None
