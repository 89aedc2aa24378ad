"""State arrays in and out of GPU memory, converted on the device where fewer bytes cross the bus then.

Unverified on a GPU.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from stepwire_server.engines.cuda.bus import Crossings
from stepwire_server.engines.cuda.ipc_memory import DeviceArray
from stepwire_server.engines.cuda.resources import CudaResources, Together
from stepwire_server.engines.cuda.state_arrays import CudaBlockSlot, CudaFlatSlot, CudaMixedSlot, CudaSlot
from stepwire_server.engines.int8_moments import BLOCK, block_count
from stepwire_server.engines.payloads import convert
from stepwire_server.engines.protocol import Done, HostArray, Pending

__all__ = ["bring_bytes", "bring_values", "encode", "read_scale", "read_slot", "replace_slot", "write_slot"]

_FLOAT32 = np.dtype(np.float32)


def bring_values(
    resources: CudaResources, crossings: Crossings, source: int, dtype: np.dtype[Any], out: HostArray
) -> Pending[None]:
    """Encode device memory into `out`, `(n,)` of any wire dtype.

    Args:
        resources: the resources of the device.
        crossings: the crossings of the session.
        source: the address of the first of n elements, as they are stored.
        dtype: the wire dtype of the elements.
        out: the place of the encoded elements, which are there when the wait ends.

    Returns:
        The copy on its way.
    """
    most = resources.bus.buffer_bytes // out.dtype.itemsize

    def ask(low: int, target: HostArray) -> Pending[None]:
        origin = _Elements(source + low * dtype.itemsize, dtype)
        return crossings.bring(
            0, lambda place: _convert(resources, origin, _Elements(place, out.dtype), len(target)), target
        )

    return Together([ask(low, out[low : low + most]) for low in range(0, len(out), most)], lambda _: None)


def bring_bytes(resources: CudaResources, crossings: Crossings, source: int, out: HostArray) -> Pending[None]:
    """Copy device memory into `out`, `(n,) uint8`, before the wait ends."""

    def ask(low: int, target: HostArray) -> Pending[None]:
        return crossings.bring(
            0, lambda place: resources.device.copy_across(place, source + low, target.nbytes), target
        )

    most = resources.bus.buffer_bytes
    return Together([ask(low, out[low : low + most]) for low in range(0, len(out), most)], lambda _: None)


def read_slot(
    resources: CudaResources, crossings: Crossings, slot: CudaSlot, start: int, out: HostArray
) -> Pending[None]:
    """Encode elements `[start, start + len(out))` of a slot into `out`; 8-bit ones at once."""
    if isinstance(slot, CudaFlatSlot):
        return bring_values(resources, crossings, slot.address_of(start), slot.dtype, out)
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
    bring_values(resources, crossings, slot.held(first * BLOCK, 0).addresses[1], _FLOAT32, maxima).wait()
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
        target = _Elements(slot.address_of(start + low), slot.dtype)

        def use(place: int, target: _Elements = target, count: int = len(part)) -> None:
            _convert(resources, _Elements(place, values.dtype), target, count)

        resources.bus.hand(part.view(np.uint8), use)


def encode(resources: CudaResources, source: int, held: np.dtype[Any], out: DeviceArray) -> None:
    """Encode device memory into exported memory, in a thread whose device is current."""
    _convert(resources, _Elements(source, held), _Elements(out.address, out.dtype), len(out))


def replace_slot(resources: CudaResources, slot: CudaSlot, staged: CudaSlot, scale: CudaSlot | None) -> None:
    """Replace a slot by one held as float32; `scale` as in `cpu.state_arrays.Slot.replace`."""
    assert isinstance(staged, CudaFlatSlot) and (scale is None or isinstance(scale, CudaFlatSlot))
    parts = (
        slot.within(0, len(staged.values)) if isinstance(slot, CudaMixedSlot) else [(0, len(staged.values), slot, 0)]
    )
    with resources.device.current():
        for low, high, own, at in parts:
            if low == high:
                continue
            values = staged.address_of(low)
            if isinstance(own, CudaFlatSlot):
                target = _Elements(own.address_of(at), own.dtype)
                _convert(resources, _Elements(values, staged.dtype), target, high - low)
            else:
                maxima = None if scale is None else scale.address_of(low)
                _encode_blocks(resources, own.held(at, high - low).addresses, own.sign, (values, maxima), high - low)


def _encode_blocks(
    resources: CudaResources, target: tuple[int, ...], sign: str, source: tuple[int, int | None], size: int
) -> None:
    """Encode elements that begin a block of a slot.

    Args:
        resources: the resources of the device.
        target: the addresses of the codes and of the maxima.
        sign: the sign of the code.
        source: the address of the elements, and that of each one's maximum, None to find it.
        size: the number of elements.
    """
    values, maxima = source
    kernel = resources.kernels.of_blocks(f"encode_{sign}_{'blocks' if maxima is None else 'with'}")
    given = () if maxima is None else (maxima,)
    kernel.launch(kernel.blocks_of_eight_bits(size), (values, *given, *target, resources.tables_address, size))


def _decoded(resources: CudaResources, crossings: Crossings, slot: CudaBlockSlot, start: int, end: int) -> HostArray:
    """Return elements of an 8-bit slot as float32: as many as a buffer of the bus holds."""
    first = start // BLOCK * BLOCK
    size, origin = end - first, slot.held(first, end - first).addresses
    kernel = resources.kernels.of_blocks(f"decode_{slot.sign}_blocks")

    def make(place: int) -> None:
        kernel.launch(kernel.blocks_of_eight_bits(size), (*origin, place, resources.tables_address, size))

    values = np.empty(size, np.float32)
    crossings.bring(0, make, values).wait()
    return values[start - first :]


class _Elements(NamedTuple):
    """The address of elements on the device, and their wire dtype."""

    address: int
    dtype: np.dtype[Any]


def _convert(resources: CudaResources, source: _Elements, target: _Elements, count: int) -> None:
    """Encode device memory into other, in a thread whose device is current."""
    if source.dtype == target.dtype:
        resources.device.copy_across(target.address, source.address, count * source.dtype.itemsize)
    elif count:
        kernel = resources.kernels.of_gradients(f"convert_{source.dtype.name}_to_{target.dtype.name}")
        kernel.launch(kernel.blocks(count), (source.address, target.address, count))
