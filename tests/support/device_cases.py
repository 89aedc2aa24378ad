"""Cases of a device beyond single kernels: under load, out of memory, and with state that comes and goes.

`test_gpu` tries a GPU with full sizes, `test_device_cases` the stand-in with small ones.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import pytest

from stepwire.errors import ResourceExhaustedError
from stepwire_server.engines.protocol import PARAM, Engine, EngineState
from stepwire_server.rules import Precision, Recipe
from tests.support import cuda_cases as cases
from tests.support import ipc_child

ADAM = Recipe(cases.RULES[0])
FLOAT32 = Precision.FLOAT32
CHUNK_ELEMENTS = 1 << 20
GRANULE_BYTES = 2 << 20
"""The size that a driver rounds allocations up to."""


def numbers(size: int, seed: int) -> np.ndarray:
    """Make `(size,) float32` of a seed; they repeat, so that making them is quick."""
    tile = np.random.default_rng(seed).standard_normal(min(size, 100_003), np.float32)
    return np.resize(tile, size)


def stepped(state: EngineState, recipe: Recipe, t: int, gradient: np.ndarray, out: np.ndarray, most: int) -> float:
    """Step once in chunks, as a commit does; returns the gradient's sum of squares."""
    step, asked = cases.step_of(recipe, t)._replace(seed=t), deque[Any]()
    with contextlib.closing(state.receive()) as received:
        chunks = [(low, received.put(low, gradient[low : low + most])) for low in range(0, len(gradient), most)]
        sums = [state.sum_of_squares(chunk, 0, len(chunk), 0.7) for _, chunk in chunks]
        total = sum(pending.wait() for pending in sums)
        for low, chunk in chunks:
            asked.append(state.update(step, low, chunk, 0, len(chunk), out[low : low + len(chunk)]))
            while len(asked) >= state.depth:
                asked.popleft().wait()
        while asked:
            asked.popleft().wait()
        state.settle()
    return total


def run(engine: Engine, recipe: Recipe, size: int, seed: int, steps: int, most: int) -> tuple[np.ndarray, list[float]]:
    """Step in a session of its own; returns the last reply, and the gradients' sums of squares."""
    gradient, out = numbers(size, seed), np.empty(size, np.float32)
    with contextlib.closing(engine.allocate(cases.slots_of(recipe), size)) as state:
        state.write(PARAM, 0, numbers(size, seed + 1))
        sums = [stepped(state, recipe, t, gradient, out, most) for t in range(1, steps + 1)]
    return out, sums


def check_load(
    engine: Engine, reference: Engine, size: int, *, threads: int = 4, steps: int = 3, most: int = CHUNK_ELEMENTS
) -> None:
    """Compare sessions that step at once, a thread each, with the same sessions one after another."""
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        asked = [pool.submit(run, engine, ADAM, size, seed, steps, most) for seed in range(threads)]
        for seed, future in enumerate(asked):
            (got, sums), (want, wanted) = future.result(), run(reference, ADAM, size, seed, steps, most)
            assert sums == wanted
            cases.assert_same_bits(got, want, f"session {seed}")


def check_shortage(engine: Engine, reference: Engine, size: int) -> None:
    """Let memory run out before a session, and before a gradient; whoever holds memory goes on as if nothing was."""
    want, _ = run(reference, ADAM, size, 0, 3, CHUNK_ELEMENTS)
    gradient, out = numbers(size, 0), np.empty(size, np.float32)
    device = engine._resources.device
    with contextlib.closing(engine.allocate(cases.slots_of(ADAM), size)) as state:
        state.write(PARAM, 0, numbers(size, 1))
        stepped(state, ADAM, 1, gradient, out, CHUNK_ELEMENTS)
        with pytest.raises(ResourceExhaustedError):
            engine.allocate({PARAM: FLOAT32}, device.free_bytes())
        stepped(state, ADAM, 2, gradient, out, CHUNK_ELEMENTS)
        engine.rest()
        with contextlib.ExitStack() as hogs:
            for left in (4 * size, 2 * size):  # the second takes what the first's rounding has left
                if (nbytes := device.free_bytes() - left) > 0:
                    hogs.enter_context(contextlib.closing(engine.allocate({PARAM: FLOAT32}, nbytes // 4)))
            with contextlib.closing(state.receive()) as received, pytest.raises(ResourceExhaustedError):
                received.put(0, gradient)
        stepped(state, ADAM, 3, gradient, out, CHUNK_ELEMENTS)
    cases.assert_same_bits(out, want)


def bytes_of(engine: Any, memory: Any) -> np.ndarray:
    """Copy device memory to the host, whoever it belongs to."""
    device = engine._resources.device
    host = device.pinned(memory.nbytes)
    with device.current():
        memory.data.copy_to_host_async(host.ctypes.data, memory.nbytes, device.compute)
        device.compute.synchronize()
    return host


def check_zeroed(engine: Any, size: int) -> None:
    """Look at memory that a session and its gradient have given back; it is free only without these references."""
    state = engine.allocate(cases.slots_of(ADAM), size)
    state.write(PARAM, 0, np.full(size, 2.0, np.float32))
    gradient = state.receive()
    chunk = gradient.put(0, np.full(size, 3.0, np.float32))
    state.update(cases.step_of(ADAM), 0, chunk, 0, size, None).wait()
    state.settle()
    slab, received = state._memory, gradient._block.memory
    assert bytes_of(engine, slab).any() and bytes_of(engine, received).any()
    gradient.close()
    state.close()
    engine.rest()
    assert not bytes_of(engine, slab).any()
    assert not bytes_of(engine, received).any()


def check_accounting(engine: Any, recipe: Recipe, size: int) -> None:
    """Compare the bytes that a session names with the bytes that the driver has less."""
    device, slots = engine._resources.device, cases.slots_of(recipe)
    engine.rest()
    before = device.free_bytes()
    state = engine.allocate(slots, size)
    taken = before - device.free_bytes()
    assert state.nbytes == engine.state_bytes(slots, size)
    assert 0 <= taken - state.nbytes <= GRANULE_BYTES
    state.close()
    assert state.nbytes == 0 and device.free_bytes() == before


def moved(state: EngineState, recipe: Recipe, size: int, engine: Engine) -> EngineState:
    """Bring a session to another engine as pull and load do, and close it here."""
    pulled = cases.everything_of(state, recipe, size)
    state.close()
    target = engine.allocate(cases.slots_of(recipe), size)
    loaded = engine.allocate(dict.fromkeys(pulled, FLOAT32), size)
    for slot, values in pulled.items():
        loaded.write(slot, 0, values)
    target.adopt(loaded)
    return target


def check_moves(engine: Engine, reference: Engine, precision: Precision, size: int) -> None:
    """Step on the reference, on the device and on the reference again, beside a session that stays."""
    recipe, gradient = Recipe(cases.RULES[0], precision=precision), numbers(size, 3)
    arrays, out = cases.make_arrays(recipe, size, odd=False), np.empty(size, np.float32)
    stays, goes = (cases.filled(reference, recipe, arrays) for _ in range(2))
    for t in range(1, 10):
        if t == 4:
            goes = moved(goes, recipe, size, engine)
        if t == 7:
            goes = moved(goes, recipe, size, reference)
        for state in (stays, goes):
            stepped(state, recipe, t, gradient, out, 256 * 40)
    got, want = (cases.everything_of(state, recipe, size) for state in (goes, stays))
    for name in want:
        cases.assert_same_bits(got[name], want[name], f"{name} in {precision.value}")
    stays.close()
    goes.close()


def check_mixed(engine: Engine, reference: Engine, size: int) -> None:
    """Step 8-bit moments beside some in other precisions, one tensor after another, over many blocks."""
    recipe = Recipe(cases.RULES[0], precision=Precision.INT8, measures=True)
    runs = ((0, 1024), (1024, 2000), (2000, 3000), (3072, size))
    regions = cases.regions_of(size, [(*runs[1], Precision.FLOAT32), (*runs[2], Precision.BFLOAT16)])
    gradient, results = numbers(size, 5), []
    for each in (engine, reference):
        out = np.zeros(size, np.float32)
        with contextlib.closing(each.allocate(cases.slots_of(recipe, regions), size)) as state:
            state.write(PARAM, 0, numbers(size, 6))
            for t in range(1, 4):
                step = cases.step_of(recipe, t)._replace(seed=t)
                with contextlib.closing(state.receive()) as received:
                    chunk = received.put(0, gradient)
                    for low, high in runs:
                        state.update(step, low, chunk, low, high, out[low:high]).wait()
            results.append(cases.everything_of(state, recipe, size) | {"out": out})
    for name in results[1]:
        cases.assert_same_bits(results[0][name], results[1][name], name)


def check_lost(found: dict[str, str]) -> None:
    """Compare what `sticky_child.outcomes` found: every call names the loss, closing returns, and one call tells it."""
    calls = ("break", "settle", "put beside", "write beside", "settle beside", "allocate", "export")
    expected = dict.fromkeys(calls, "DEVICE_LOST") | dict.fromkeys(("close", "close beside", "close engine"), "done")
    assert found == expected | {"told": "1"}


class SharingClient(Protocol):
    """A client that has opened memory and written `ipc_child.gradient_of` into it."""

    def parameters(self) -> np.ndarray:
        """Return the parameters as the client sees them, `(size,) float32`."""
        ...

    def close(self) -> None:
        """Let go of the memory."""
        ...


def check_shared(
    engine: Engine, reference: Engine, size: int, start: Callable[[dict[str, Any]], SharingClient]
) -> None:
    """Step with a gradient that a client wrote on the device, and compare the parameters that the client reads there.

    Args:
        engine: the engine of the device.
        reference: the engine that computes the same on the host.
        size: the number of elements.
        start: starts a client with a description of the memory, as `ipc_child` is told.
    """
    nbytes, at, out = 2 << 20, 1 << 20, np.empty(size, np.float32)
    with contextlib.closing(engine.export(nbytes)) as exported:
        told = {"handle": exported.handle.hex(), "uuid": exported.device_uuid.hex(), "nbytes": nbytes}
        with contextlib.closing(start(told | {"size": size, "at": at})) as client:
            target = exported.array(at, out.dtype, size)
            sent = exported.array(0, out.dtype, size)
            for each, gradient, reply in ((engine, sent, target), (reference, ipc_child.gradient_of(size), out)):
                with contextlib.closing(each.allocate(cases.slots_of(ADAM), size)) as state:
                    with contextlib.closing(state.receive()) as received:
                        state.update(cases.step_of(ADAM), 0, received.put(0, gradient), 0, size, reply).wait()
                        state.settle()
            cases.assert_same_bits(client.parameters(), out)
