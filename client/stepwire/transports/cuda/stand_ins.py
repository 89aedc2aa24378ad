"""Host arrays that stand in for arrays of a device, until a step needs the values on the host."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from stepwire.arrays.packing import Arrays
from stepwire.transports.cuda.views import DeviceView

__all__ = ["StandIn", "stood_in"]


class StandIn:
    """A host array in the place of a view, without the view's values until `fill`.

    Attributes:
        view: the tensor on the device.
        array: an array of the view's shape and dtype, on the host.
    """

    def __init__(self, view: DeviceView) -> None:
        """Stand in for a view. Pages that nobody touches cost nothing."""
        self.view = view
        self.array: npt.NDArray[Any] = np.empty(view.shape, view.dtype)
        self._filled = False

    def fill(self) -> None:
        """Copy the values to the host, once: a step that is repeated keeps its first gradient.

        Raises:
            UnavailableError: the device failed.
        """
        if not self._filled:
            self.view.copy_to(self.array)
            self._filled = True


def stood_in(arrays: Arrays) -> tuple[Arrays, dict[str, StandIn]]:
    """Put host arrays in the place of views; a container without views comes back as it is.

    Returns:
        The arrays, and the stand-ins by name.
    """
    if isinstance(arrays, Mapping):
        found = {name: StandIn(value) for name, value in arrays.items() if isinstance(value, DeviceView)}
        if not found:
            return arrays, {}
        return {name: found[name].array if name in found else value for name, value in arrays.items()}, found
    if not isinstance(arrays, (list, tuple)):
        return arrays, {}
    found = {str(at): StandIn(value) for at, value in enumerate(arrays) if isinstance(value, DeviceView)}
    if not found:
        return arrays, {}
    return [found[str(at)].array if str(at) in found else value for at, value in enumerate(arrays)], found
