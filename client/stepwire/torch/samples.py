"""Samples of a model's values, which reveal most changes that torch does not count.

A write through `.data` moves no version counter. A comparison of all values would cost a pass over the model in every
step, as much as the step of a local optimizer. So some values of each parameter are kept: all values of a small one, a
value of every page of a large one. A write that covers a parameter, such as a copy of an average or a clamp, changes
some of them. A write of single elements may change none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import torch

from stepwire.torch.tensors import ParameterTensor

__all__ = ["Samples"]

_FEWEST: Final = 1024
"""The samples of a parameter; a parameter with fewer elements is kept as a whole."""

_LONGEST_STEP: Final = 1021
"""The largest distance of two samples in elements: a page of float32, and a prime, which meets every column."""

_BITS: Final = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Samples:
    """Samples of some parameters, as of the last `note`."""

    def __init__(self, tensors: Sequence[ParameterTensor]) -> None:
        """Sample these parameters; nothing is noted yet."""
        groups: dict[tuple[Any, int], list[ParameterTensor]] = {}
        for tensor in tensors:
            groups.setdefault((tensor.parameter.device, tensor.dtype.itemsize), []).append(tensor)
        self._groups = [_Group(group) for group in groups.values()]

    def note(self) -> None:
        """Keep the present samples."""
        for group in self._groups:
            group.note()

    def changed(self) -> list[ParameterTensor]:
        """Return the parameters whose samples differ from those of `note`.

        A parameter that lies elsewhere since then is left out: its mark tells.
        """
        return [tensor for group in self._groups for tensor in group.changed()]


class _Group:
    """The samples of parameters on one device with elements of one size, in one array: on the CPU NumPy's."""

    def __init__(self, tensors: Sequence[ParameterTensor]) -> None:
        self._tensors = tensors
        self._locations: list[Any] = [None] * len(tensors)
        self._sources: list[Callable[[], Any]] = []
        self._noted: Any = None

    def note(self) -> None:
        locations = [tensor.followed_location for tensor in self._tensors]
        if locations != self._locations:
            self._sources = [_source(tensor) for tensor in self._tensors]
            self._locations = locations
        self._noted = self._present()

    def _present(self) -> Any:
        samples = [source() for source in self._sources]
        return np.concatenate(samples) if isinstance(samples[0], np.ndarray) else torch.cat(samples)

    def changed(self) -> list[ParameterTensor]:
        if self._noted is None or _equal(now := self._present(), self._noted):
            return []
        ends = np.cumsum([len(source()) for source in self._sources])
        parts = np.split(_on_host(now != self._noted), ends[:-1])
        return [tensor for tensor, part in zip(self._tensors, parts, strict=True) if part.any()]


def _source(tensor: ParameterTensor) -> Callable[[], Any]:
    """Return a function that returns the present samples of a parameter, `(n,)` integers of its bits.

    They are an array of a parameter on the CPU, and a tensor of another one.
    """
    real = tensor.real()
    bits = real.view(_BITS[real.element_size()])
    step = max(1, min(bits.numel() // _FEWEST, _LONGEST_STEP)) | 1
    on_cpu = bits.device.type == "cpu"
    if not _is_dense(bits):
        return lambda: _on_host(bits.reshape(-1)[::step]) if on_cpu else bits.reshape(-1)[::step]
    count = -(-bits.numel() // step)
    view = torch.as_strided(bits, (count,), (step,), bits.storage_offset())
    samples = _on_host(view) if on_cpu else view
    return lambda: samples


def _on_host(values: Any) -> Any:
    """Return an array as it is, and a tensor as an array: over the same memory, if that is the host's."""
    return values if isinstance(values, np.ndarray) else values.cpu().numpy()


def _equal(one: Any, other: Any) -> bool:
    return bool(np.array_equal(one, other) if isinstance(one, np.ndarray) else torch.equal(one, other))


def _is_dense(tensor: Any) -> bool:
    """Tell whether the elements of a tensor fill one area of memory, in whatever order."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True
