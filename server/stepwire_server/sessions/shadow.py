"""The shadow of a state: the norm of a step that it would make, on a small range and beside the state.

A checkpoint has the norm, and a restored state must have the same one. So a state whose checksums are good and that
would step otherwise all the same, such as one without its second moment or its t, is found before it steps.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np

from stepwire.layout import GROUP_ALIGNMENT, SCALE_SUFFIX
from stepwire.wire.int8_blocks import INT8, encode_blocks
from stepwire_server.devices.pool import Device
from stepwire_server.durability.manifest import Shadow
from stepwire_server.engines.protocol import PARAM, EngineState, HostArray
from stepwire_server.records.session_config import SessionConfig
from stepwire_server.records.snapshot import Snapshot
from stepwire_server.rules import Precision, RowSemantics
from stepwire_server.steps.tensor_steps import CountedSegment
from stepwire_server.steps.update import passes

__all__ = ["ProbedValues", "differs", "read_probe", "shadow_of"]

_MOST_ELEMENTS: Final = 4096
# Small beside the moments of most trainings: so the step tells of the moments, and little of this gradient.
_MAGNITUDE: Final = 2.0**-14
_SEED: Final = 20
_TOLERANCE: Final = 1e-6

ProbedValues: TypeAlias = Mapping[str, HostArray]
"""The values of each visible slot on the range, `(n,) float32`."""


class _Probe(NamedTuple):
    """The range of a session's tensors that shadow steps move.

    Attributes:
        tensor: the index of the tensor.
        start: the first flat element, a multiple of 256.
        elements: the number of elements.
    """

    tensor: int
    start: int
    elements: int


def read_probe(config: SessionConfig, read: Callable[[str, int, HostArray], None]) -> ProbedValues | None:
    """Read the range that a shadow step moves; None where there is none. Under the session's lock.

    Args:
        config: the session's config.
        read: reads a range of a slot into an array.
    """
    if (probe := _probe(config)) is None:
        return None
    values: dict[str, HostArray] = {}
    for slot in config.visible_slots:
        values[slot] = np.empty(probe.elements, np.float32)
        read(slot, probe.start, values[slot])
    return values


def shadow_of(config: SessionConfig, device: Device, numbers: Snapshot, values: ProbedValues | None) -> Shadow | None:
    """Make the shadow step of a state, by the session's own recipe, numbers, t and precision.

    Args:
        config: the session's config.
        device: the session's device, whose kernels are there since the session began.
        numbers: t and scalar of each tensor.
        values: the values on the range; None for none.

    Returns:
        The shadow; None for a layerwise rule, whose step is of whole tensors, and where no tensor has a range.
    """
    if values is None or (probe := _probe(config)) is None:
        return None
    spec = config.layout.tensors[probe.tensor].spec
    scalar = numbers.tensor_scalars[probe.tensor] if numbers.tensor_scalars else 0.0
    segment = CountedSegment(0, probe.elements, spec.group, numbers.tensor_steps[probe.tensor] + 1, scalar)
    (moved,) = passes(config, config.groups, [segment], 1.0, [1.0] * len(config.groups))
    gradient = _gradient(config.gradient_dtype, probe.elements)
    out = np.empty(probe.elements, config.reply_dtype)
    after = np.empty(probe.elements, np.float32)
    precision = Precision(spec.held_precision) if config.rule.slots else Precision.FLOAT32
    with contextlib.ExitStack() as stack:
        scratch = stack.enter_context(contextlib.closing(_scratch(config, device, precision, values)))
        buffer = stack.enter_context(contextlib.closing(scratch.receive()))
        scratch.update(moved.step, 0, buffer.put(0, gradient, probe.elements), 0, probe.elements, out).wait()
        scratch.read(PARAM, 0, after).wait()
        scratch.settle()
    with np.errstate(over="ignore", invalid="ignore"):
        way = after.astype(np.float64) - values[PARAM]
        return Shadow(start=probe.start, elements=probe.elements, update_norm=math.sqrt(float(np.dot(way, way))))


def differs(found: Shadow | None, recorded: Shadow) -> bool:
    """Tell whether a restored state would step otherwise than the one that was saved."""
    if found is None or (found.start, found.elements) != (recorded.start, recorded.elements):
        return True
    one, other = found.update_norm, recorded.update_norm
    if not (math.isfinite(one) and math.isfinite(other)):
        return repr(one) != repr(other)
    return abs(one - other) > _TOLERANCE * max(one, other)


def _probe(config: SessionConfig) -> _Probe | None:
    if config.rule.direction is not None:
        return None
    for index, tensor in enumerate(config.layout.tensors):
        if config.tables.get(index) is RowSemantics.ROW_WISE:  # no dense step of it exists
            continue
        if tensor.count and not tensor.spec.frozen and tensor.offset % GROUP_ALIGNMENT == 0:
            return _Probe(index, tensor.offset, min(tensor.count, _MOST_ELEMENTS))
    return None


def _scratch(config: SessionConfig, device: Device, precision: Precision, values: ProbedValues) -> EngineState:
    """Return a small state with the values, held as the session holds them; the caller closes it."""
    engine, count = device.engine, len(values[PARAM])
    held = {slot: precision if slot in config.rule.slots else Precision.FLOAT32 for slot in config.slots}
    scaled = precision is Precision.INT8
    with contextlib.ExitStack() as undo:
        scratch = undo.enter_context(contextlib.closing(engine.allocate(held, count)))
        staged = [slot for slot in values if slot in held or (scaled and slot.endswith(SCALE_SUFFIX))]
        other = undo.enter_context(contextlib.closing(engine.allocate(dict.fromkeys(staged, Precision.FLOAT32), count)))
        for slot in staged:
            other.write(slot, 0, values[slot])
        scratch.adopt(other)
        scratch.settle()
        undo.pop_all()
    return scratch


@functools.lru_cache(16)
def _gradient(dtype: np.dtype[Any], count: int) -> HostArray:
    """Return the gradient of every shadow step, in a wire dtype; the pattern is the same everywhere and for ever."""
    words = (np.arange(1, count + 1, dtype=np.uint64) * 2_654_435_761 + _SEED) % 2**32
    values = ((words.astype(np.float64) / 2**31 - 1.0) * _MAGNITUDE).astype(np.float32)
    if dtype == INT8:
        blocks = np.zeros(-(-count // GROUP_ALIGNMENT), INT8)
        encode_blocks(values, blocks)
        return blocks
    return values.astype(dtype)
