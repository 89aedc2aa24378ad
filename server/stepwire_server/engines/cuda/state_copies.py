"""State arrays in and out of GPU memory, converted on the device where fewer bytes cross the bus then.

Unverified on a GPU.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from stepwire_server.engines.cuda.bus import Crossings
from stepwire_server.engines.cuda.ipc_memory import DeviceArray
from stepwire_server.engines.cuda.kernels import launch
from stepwire_server.engines.cuda.resources import CudaResources, Together
from stepwire_server.engines.cuda.state_arrays import CudaBlockSlot, CudaFlatSlot, CudaSlot
from stepwire_server.engines.int8_moments import BLOCK, block_count
from stepwire_server.engines.payloads import STORED, bits_of, convert
from stepwire_server.engines.protocol import Done, HostArray, Pending

__all__ = ["bring_bytes", "bring_values", "encode", "read_scale", "read_slot", "replace_slot", "write_slot"]

_FLOAT32 = np.dtype(np.float32)


def bring_values(
    resources: CudaResources, crossings: Crossings, values: Any, dtype: np.dtype[Any], out: HostArray
) -> Pending[None]:
    """Encode device memory `(n,)` into `out`, `(n,)` of any wire dtype.

    Args:
        resources: the resources of the device.
        crossings: the crossings of the session.
        values: the elements as they are stored.
        dtype: the wire dtype of the elements.
        out: the place of the encoded elements, which are there when the wait ends.

    Returns:
        The copy on its way.
    """
    most = resources.bus.buffer_bytes // out.dtype.itemsize

    def ask(part: Any, target: HostArray) -> Pending[None]:
        return crossings.bring(
            0, lambda memory: _convert(resources, part, dtype, memory, out.dtype), _bytes(bits_of(target))
        )

    ranges = [slice(low, min(low + most, len(out))) for low in range(0, len(out), most)]
    return Together([ask(values[each], out[each]) for each in ranges], lambda _: None)


def bring_bytes(resources: CudaResources, crossings: Crossings, memory: Any, out: HostArray) -> Pending[None]:
    """Copy device memory into `out`, `(n,) uint8` both, before the wait ends."""

    def ask(part: Any, target: HostArray) -> Pending[None]:
        return crossings.bring(0, lambda slot: slot.data.copy_from_device_async(part.data, part.nbytes, None), target)

    most = resources.bus.buffer_bytes
    ranges = [slice(low, min(low + most, len(out))) for low in range(0, len(out), most)]
    return Together([ask(memory[each], out[each]) for each in ranges], lambda _: None)


def read_slot(
    resources: CudaResources, crossings: Crossings, slot: CudaSlot, start: int, out: HostArray
) -> Pending[None]:
    """Encode elements `[start, start + len(out))` of a slot into `out`; 8-bit ones at once."""
    if isinstance(slot, CudaFlatSlot):
        return bring_values(resources, crossings, slot.values[start : start + len(out)], slot.dtype, out)
    most = (resources.bus.buffer_bytes // _FLOAT32.itemsize // BLOCK - 1) * BLOCK
    for low in range(start, start + len(out), most):
        high = min(low + most, start + len(out))
        convert(_decoded(resources, crossings, slot, low, high), out[low - start : high - start])
    return Done(None)


def read_scale(
    resources: CudaResources, crossings: Crossings, slot: CudaBlockSlot, start: int, out: HostArray
) -> Pending[None]:
    """Encode the maximum of each element's block into `out`; zero for elements that are float32."""
    first, last = start // BLOCK, block_count(start + len(out))
    maxima = np.empty(last - first, np.float32)
    bring_values(resources, crossings, slot.absmax[first:last], _FLOAT32, maxima).wait()
    values = maxima[np.arange(start, start + len(out)) // BLOCK - first]
    for low, high, _ in slot.kept.within(start, start + len(out)):
        values[low - start : high - start] = 0.0
    convert(values, out)
    return Done(None)


def write_slot(resources: CudaResources, slot: CudaSlot, start: int, values: HostArray) -> None:
    """Decode values of a wire dtype into elements `[start, start + len(values))`.

    Raises:
        TypeError: the slot is held in 8 bits: blocks are replaced as a whole.
    """
    if isinstance(slot, CudaBlockSlot):
        raise TypeError("8-bit elements are replaced all at once")
    most = resources.bus.buffer_bytes // values.dtype.itemsize
    for low in range(0, len(values), most):
        part = values[low : low + most]
        target = _as_bytes(slot.values[start + low : start + low + len(part)])

        def use(memory: Any, target: Any = target) -> None:
            source = memory.view(STORED[values.dtype])
            _convert(resources, source, values.dtype, target, slot.dtype)

        resources.bus.hand(_bytes(bits_of(part)), use)


def encode(resources: CudaResources, source: Any, held: np.dtype[Any], out: DeviceArray) -> None:
    """Encode device memory into exported memory, in a thread whose stream is `compute`."""
    _convert(resources, source, held, out.memory, out.dtype)


def replace_slot(resources: CudaResources, slot: CudaSlot, staged: CudaSlot, scale: CudaSlot | None) -> None:
    """Replace a slot by one held as float32, which is used up; `scale` as in `cpu.state_arrays.BlockSlot.replace`."""
    assert isinstance(staged, CudaFlatSlot)
    if isinstance(slot, CudaFlatSlot):
        with resources.device.computing():
            _convert(resources, staged.values, staged.dtype, _as_bytes(slot.values), slot.dtype)
        return
    with resources.device.computing():
        for low, high, at in slot.kept.within(0, len(staged.values)):
            moved = staged.values[low:high]
            slot.values[at : at + high - low].data.copy_from_device_async(moved.data, moved.nbytes, None)
            moved.data.memset_async(0, moved.nbytes, None)
        kernel = resources.kernels.of_blocks(f"encode_{slot.sign}_{'blocks' if scale is None else 'with'}")
        given = [] if scale is None else [scale.range(0, len(staged.values))[0]]
        arrays = [staged.values, *given, slot.codes, slot.absmax, resources.tables]
        size = len(staged.values)
        if size:
            launch(kernel, resources.kernels.blocks_of_eight_bits(size), *arrays, np.int64(size))


def _decoded(resources: CudaResources, crossings: Crossings, slot: CudaBlockSlot, start: int, end: int) -> HostArray:
    """Return elements of an 8-bit slot as float32: as many as a buffer of the bus holds."""
    first = start // BLOCK * BLOCK
    codes, absmax = slot.range(first, end - first)
    kernel = resources.kernels.of_blocks(f"decode_{slot.sign}_blocks")

    def make(memory: Any) -> None:
        values = memory.view(np.float32)
        blocks = resources.kernels.blocks_of_eight_bits(len(values))
        launch(kernel, blocks, codes, absmax, values, resources.tables, np.int64(len(values)))
        for low, high, at in slot.kept.within(first, end):
            kept = slot.values[at : at + high - low]
            values[low - first : high - first].data.copy_from_device_async(kept.data, kept.nbytes, None)

    values = np.empty(end - first, np.float32)
    crossings.bring(0, make, _bytes(values)).wait()
    return values[start - first :]


def _convert(resources: CudaResources, source: Any, held: np.dtype[Any], target: Any, wanted: np.dtype[Any]) -> None:
    """Encode device memory into other, `(n,) uint8`, in a thread whose stream is `compute`."""
    if held == wanted:
        target.data.copy_from_device_async(source.data, source.nbytes, None)
    elif len(source):
        kernel = resources.kernels.of_gradients(f"convert_{held.name}_to_{wanted.name}")
        values = target.view(STORED[wanted])
        launch(kernel, resources.kernels.blocks(len(source)), source, values, np.int64(len(source)))


def _as_bytes(values: Any) -> Any:
    return values.view(np.uint8)


def _bytes(values: HostArray) -> HostArray:
    view: HostArray = values.view(np.uint8)
    return view
