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
from stepwire_server.engines.cuda.state_arrays import CudaBlockSlot, CudaFlatSlot, CudaMixedSlot, CudaSlot
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
    if isinstance(slot, CudaMixedSlot):
        out[...] = 0
        parts = slot.within(start, start + len(out))
        asked = [
            read_slot(resources, crossings, own, at, out[low - start : high - start]) for low, high, own, at in parts
        ]
        return Together(asked, lambda _: None)
    most = (resources.bus.buffer_bytes // _FLOAT32.itemsize // BLOCK - 1) * BLOCK
    for low in range(start, start + len(out), most):
        high = min(low + most, start + len(out))
        convert(_decoded(resources, crossings, slot, low, high), out[low - start : high - start])
    return Done(None)


def read_scale(
    resources: CudaResources, crossings: Crossings, slot: CudaSlot, start: int, out: HostArray
) -> Pending[None]:
    """Encode the maximum of each element's block into `out`; zero for elements in another precision than 8 bits."""
    if not isinstance(slot, CudaBlockSlot):
        out[...] = 0
        for low, high, own, at in slot.within(start, start + len(out)) if isinstance(slot, CudaMixedSlot) else ():
            read_scale(resources, crossings, own, at, out[low - start : high - start])
        return Done(None)
    first, last = start // BLOCK, block_count(start + len(out))
    maxima = np.empty(last - first, np.float32)
    bring_values(resources, crossings, slot.absmax[first:last], _FLOAT32, maxima).wait()
    convert(maxima[np.arange(start, start + len(out)) // BLOCK - first], out)
    return Done(None)


def write_slot(resources: CudaResources, slot: CudaSlot, start: int, values: HostArray) -> None:
    """Decode values of a wire dtype into elements `[start, start + len(values))`.

    Raises:
        TypeError: the slot is held in 8 bits: blocks are replaced as a whole.
    """
    if isinstance(slot, CudaBlockSlot):
        raise TypeError("8-bit elements are replaced all at once")
    if isinstance(slot, CudaMixedSlot):
        for low, high, own, at in slot.within(start, start + len(values)):
            write_slot(resources, own, at, values[low - start : high - start])
        return
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
    """Replace a slot by one held as float32; `scale` as in `cpu.state_arrays.Slot.replace`."""
    assert isinstance(staged, CudaFlatSlot) and (scale is None or isinstance(scale, CudaFlatSlot))
    given = None if scale is None else scale.values
    parts = (
        slot.within(0, len(staged.values)) if isinstance(slot, CudaMixedSlot) else [(0, len(staged.values), slot, 0)]
    )
    with resources.device.computing():
        for low, high, own, at in parts:
            if low == high:
                continue
            values, maxima = staged.values[low:high], None if given is None else given[low:high]
            if isinstance(own, CudaFlatSlot):
                _convert(resources, values, staged.dtype, _as_bytes(own.values[at : at + high - low]), own.dtype)
            else:
                _encode_blocks(resources, own, at, values, maxima)


def _encode_blocks(resources: CudaResources, slot: CudaBlockSlot, start: int, values: Any, maxima: Any | None) -> None:
    """Encode elements that begin a block of a slot; `maxima` is that of each element's block, None to find it."""
    kernel = resources.kernels.of_blocks(f"encode_{slot.sign}_{'blocks' if maxima is None else 'with'}")
    given, size = [] if maxima is None else [maxima], len(values)
    arrays = [values, *given, *slot.held(start, size).arrays, resources.tables]
    launch(kernel, resources.kernels.blocks_of_eight_bits(size), *arrays, np.int64(size))


def _decoded(resources: CudaResources, crossings: Crossings, slot: CudaBlockSlot, start: int, end: int) -> HostArray:
    """Return elements of an 8-bit slot as float32: as many as a buffer of the bus holds."""
    first = start // BLOCK * BLOCK
    codes, absmax = slot.held(first, end - first).arrays
    kernel = resources.kernels.of_blocks(f"decode_{slot.sign}_blocks")

    def make(memory: Any) -> None:
        values = memory.view(np.float32)
        blocks = resources.kernels.blocks_of_eight_bits(len(values))
        launch(kernel, blocks, codes, absmax, values, resources.tables, np.int64(len(values)))

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
