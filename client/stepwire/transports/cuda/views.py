"""Views of tensors in device memory, which CuPy and torch turn into arrays without a copy.

Unverified on a GPU.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from stepwire.transports.cuda.memory import DeviceMapping, device_failures
from stepwire.wire.dtypes import BFLOAT16

__all__ = ["DeviceView", "shows_parameters"]


class DeviceView:
    """A tensor in memory of the GPU that client and server share; see `__cuda_array_interface__`.

    `cupy.asarray(view)` and `torch.as_tensor(view, device="cuda")` make arrays of the same memory, which they keep.
    bfloat16 is shown as uint16, because the interface has no name for it: add `.view(torch.bfloat16)`.

    Attributes:
        mapping: the device memory.
        shape: the shape of the tensor.
        dtype: NumPy's dtype of an element.
        offset: the byte of the mapping at which the tensor begins.
        of_parameters: True for a view of parameters, which nobody but the server should write.
    """

    def __init__(
        self,
        mapping: DeviceMapping,
        offset: int,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        *,
        of_parameters: bool = False,
    ) -> None:
        """View elements from byte `offset` of a mapping on."""
        self.mapping = mapping
        self.offset = offset
        self.shape = shape
        self.dtype = dtype
        self.of_parameters = of_parameters

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """Version 3: https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html.

        `stream` is None: parameters are there when a step returns. `data` says that they may be written, too, because
        torch refuses read-only arrays.
        """
        return {
            "version": 3,
            "shape": self.shape,
            "typestr": "<u2" if self.dtype == BFLOAT16 else self.dtype.str,
            "data": (self.mapping.address + self.offset if self.size else 0, False),
            "strides": None,
            "stream": None,
        }

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[Any]:
        """Copy to the host, as NumPy asks for it.

        Raises:
            ValueError: NumPy asked for an array without a copy.
            UnavailableError: the device failed.
        """
        if copy is False:
            raise ValueError("an array of the host is always a copy of device memory")
        values = np.empty(self.shape, self.dtype)
        self.copy_to(values)
        return values if dtype is None else values.astype(dtype, copy=False)

    def copy_to(self, out: npt.NDArray[Any]) -> None:
        """Copy to a contiguous array of the same shape and dtype, after all work of this process on the device.

        Raises:
            UnavailableError: the device failed.
        """
        with device_failures():
            self.mapping.synchronize()
            self.mapping.read(self.offset, out)

    def is_same(self, other: DeviceView) -> bool:
        """Tell whether both show the same memory in the same way."""
        mine, others = ((view.mapping, view.offset, view.shape, view.dtype) for view in (self, other))
        return mine == others

    def __repr__(self) -> str:
        """Return the shape and the dtype in words."""
        return f"DeviceView(shape={self.shape}, dtype={self.dtype.name})"


def shows_parameters(array: Any) -> bool:
    """Tell whether an array is a view of parameters that a server shares, or shared before a connection broke."""
    return isinstance(array, DeviceView) and array.of_parameters
