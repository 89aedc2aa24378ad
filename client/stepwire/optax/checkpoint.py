"""The state of a session as arrays for checkpoints, and back. NumPy alone.

The form is one flat dict, since every library of checkpoints saves such a dict and gives it back unchanged: orbax,
flax, safetensors, `numpy.savez`. Lists and named tuples come back from some of them as dicts.

    "count"            () int64, the number of applied steps
    "tensor_steps"     (n,) int64, the updates that each tensor has had, in the order of the sorted names
    "loss_scale"       (2,) float64, the loss scale and its clean steps; of a session that scales losses alone
    "param/encoder/w"  float32, the slot "param" of the tensor "encoder/w", and so on for every slot
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from stepwire.arrays.trees import SEPARATOR
from stepwire.errors import InvalidRequestError
from stepwire.results import Snapshot

__all__ = ["PARAM", "arrays_of", "snapshot_of"]

PARAM: Final = "param"
_COUNT: Final = "count"
_TENSOR_STEPS: Final = "tensor_steps"
_LOSS_SCALE: Final = "loss_scale"


def arrays_of(state: Snapshot) -> dict[str, npt.NDArray[Any]]:
    """Return a snapshot as a flat dict of arrays."""
    arrays: dict[str, npt.NDArray[Any]] = {
        _COUNT: np.array(state.step, np.int64),
        _TENSOR_STEPS: np.array([state.tensor_steps[name] for name in sorted(state.tensor_steps)], np.int64),
    }
    if state.loss_scale is not None:
        arrays[_LOSS_SCALE] = np.array(state.loss_scale, np.float64)
    for slot, named in state.slots.items():
        arrays |= {slot + SEPARATOR + name: array for name, array in named.items()}
    return arrays


def snapshot_of(arrays: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Snapshot:
    """Return the snapshot in a flat dict of arrays.

    Args:
        arrays: the arrays, as `arrays_of` returns them; also arrays of JAX's.
        shapes: the shapes of the parameters, by name.

    Raises:
        InvalidRequestError: the arrays are no such dict, or are those of other tensors.
    """
    if not isinstance(arrays, Mapping) or not {_COUNT, _TENSOR_STEPS} <= arrays.keys():
        raise InvalidRequestError.of(
            "arrays", f"there is no {_COUNT!r} and {_TENSOR_STEPS!r} in them; pass the dict that tx.to_arrays returned"
        )
    slots: dict[str, dict[str, npt.NDArray[Any]]] = {}
    for key, array in arrays.items():
        slot, separator, name = key.partition(SEPARATOR)
        if separator:
            slots.setdefault(slot, {})[name] = np.asarray(array)
    found = {name: array.shape for name, array in slots.get(PARAM, {}).items()}
    if found != shapes:
        differing = [name for name in {**shapes, **found} if found.get(name) != shapes.get(name)]
        raise InvalidRequestError.of(
            "arrays",
            f"tensor {differing[0]!r} has the shape {found.get(differing[0])} in them, and "
            f"{shapes.get(differing[0])} among the parameters",
        )
    steps = np.asarray(arrays[_TENSOR_STEPS])
    if steps.shape != (len(shapes),):
        raise InvalidRequestError.of(
            "arrays['tensor_steps']", f"shape {steps.shape}, and there are {len(shapes)} tensors"
        )
    scale = np.asarray(arrays[_LOSS_SCALE]) if _LOSS_SCALE in arrays else None
    return Snapshot(
        step=int(arrays[_COUNT]),
        slots=slots,
        tensor_steps=dict(zip(sorted(shapes), map(int, steps), strict=True)),
        loss_scale=None if scale is None else (float(scale[0]), int(scale[1])),
    )
