"""The ways in which a step can be asked for: over which transport, in which encoding, and what comes back."""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

import stepwire
from contest import Action, Contender
from stepwire.wire.dtypes import BFLOAT16, FLOAT32

__all__ = ["TRANSPORTS", "VARIANTS", "Job", "Variant", "contender", "gradient_of", "named", "open_job", "parameters_of"]

_NO_OPTIONS: Mapping[str, Any] = types.MappingProxyType({})
_DEVIATION = 0.02


class Variant(NamedTuple):
    """One way to step.

    Attributes:
        name: what figures are called by.
        transport: of the connection.
        gradient_dtype: how gradients travel.
        reply_dtype: how parameters travel, and the dtype of the answer.
        held: the dtype of the user's gradient; None for the one that travels, where NumPy has it.
        options: of every step.
        in_place: the gradient is made in memory that the server shares, and the parameters are read there.
        servers: processes that the model is cut over.
        lr: Adam's learning rate.
    """

    name: str
    transport: str = "tcp"
    gradient_dtype: str = "float32"
    reply_dtype: str = "float32"
    held: str | None = None
    options: Mapping[str, Any] = _NO_OPTIONS
    in_place: bool = False
    servers: int = 1
    lr: float = 1e-3


class Job(NamedTuple):
    """A session that is ready to step.

    Attributes:
        session: the session.
        step: takes one step.
        arrays: what the user holds: the gradient, and the parameters where they are the user's own.
    """

    session: Any
    step: Action
    arrays: tuple[Any, ...]


_HALVES: Any = {"gradient_dtype": "bfloat16", "reply_dtype": "bfloat16"}
_OVERLAP = types.MappingProxyType({"overlap": True})
# A learning rate at which most steps leave a parameter where it was in bfloat16: that of fine-tuning, and what replies
# of changes are for.
_FINE_LR = 1e-6

VARIANTS: tuple[Variant, ...] = (
    Variant("tcp"),
    Variant("uds", "uds"),
    Variant("shm", "shm"),
    Variant("shm in place", "shm", in_place=True),
    Variant("tcp overlap", options=_OVERLAP),
    Variant("uds overlap", "uds", options=_OVERLAP),
    Variant("tcp bfloat16", **_HALVES),
    Variant("tcp bfloat16 of float32 arrays", **_HALVES, held="float32"),
    Variant("tcp bfloat16 overlap", **_HALVES, options=_OVERLAP),
    Variant("tcp int8 up, bfloat16 down", gradient_dtype="int8", reply_dtype="bfloat16"),
    Variant("tcp no reply", options=types.MappingProxyType({"reply": "none"})),
    Variant("tcp bfloat16, changes only", **_HALVES, options=types.MappingProxyType({"reply": "changed"}), lr=_FINE_LR),
    Variant("tcp 2 servers", servers=2),
)
TRANSPORTS = ("tcp", "uds", "shm", "shm in place")
"""The variants that differ in nothing but the transport."""


def named(name: str) -> Variant:
    """Return a variant by its name."""
    return next(variant for variant in VARIANTS if variant.name == name)


def contender(variant: Variant, targets: Sequence[str]) -> Contender:
    """Return a step of some size by a variant, against as many of the servers as it takes."""

    def prepare(stack: contextlib.ExitStack, size: int) -> Action:
        return open_job(stack, variant, targets, size).step

    return Contender(variant.name, prepare)


def open_job(stack: contextlib.ExitStack, variant: Variant, targets: Sequence[str], size: int) -> Job:
    """Make a session and what it steps with; both end with the stack."""
    target: Any = targets[0] if variant.servers == 1 else list(targets[: variant.servers])
    client = stack.enter_context(stepwire.connect(target, transport=variant.transport))
    session: Any = client.create_session(
        {"w": parameters_of(size)},
        optimizer=stepwire.Adam(lr=variant.lr),
        gradient_dtype=variant.gradient_dtype,
        reply_dtype=variant.reply_dtype,
        non_finite="allow"
        if variant.options.get("overlap")
        else "reject",  # what is applied as it comes is not refused
    )
    stack.enter_context(session)
    session.attach(transport=variant.transport)
    return _in_place(session, variant, size) if variant.in_place else _with_arrays(session, variant, size)


def parameters_of(size: int) -> np.ndarray[Any, Any]:
    """Return what a model starts from: normal, of a deviation that initialisers use."""
    return np.random.default_rng(1).standard_normal(size, np.float32) * np.float32(_DEVIATION)


@functools.lru_cache(maxsize=2)
def gradient_of(size: int, dtype: str = "float32") -> np.ndarray[Any, Any]:
    """Return a gradient, the same one to all who ask."""
    values = np.random.default_rng(0).standard_normal(size, np.float32)
    return values if dtype == "float32" else values.astype(BFLOAT16)


def _with_arrays(session: Any, variant: Variant, size: int) -> Job:
    """Step with the user's own arrays: what is copied on the way is a part of the step."""
    held = variant.held or ("float32" if variant.gradient_dtype == "int8" else variant.gradient_dtype)
    gradient = {"w": gradient_of(size, held)}
    if variant.options.get("reply") == "none":
        return Job(session, lambda: session.step(gradient, **variant.options), (gradient,))
    out = {"w": parameters_of(size).astype(FLOAT32 if variant.reply_dtype == "float32" else BFLOAT16)}
    return Job(session, lambda: session.step(gradient, out=out, **variant.options), (gradient, out))


def _in_place(session: Any, variant: Variant, size: int) -> Job:
    """Step with a gradient that was made in shared memory; the parameters are read where the server wrote them."""
    gradient, parameters = session.shared_gradients(), session.shared_parameters()
    np.copyto(gradient["w"], gradient_of(size))
    step = functools.partial(session.step, gradient, out=parameters, **variant.options)
    return Job(session, step, (gradient, parameters))
