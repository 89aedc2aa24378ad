"""The variants of a step: its transport, its encodings, and its reply."""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

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
        name: the name of its figures.
        transport: the transport of the connection.
        gradient_dtype: the wire dtype of gradients.
        reply_dtype: the wire dtype of parameters in replies.
        array_dtype: the dtype of the user's gradient; None for the wire dtype, or float32 if NumPy does not have it.
        options: the options of every step.
        in_place: True if the gradient and the parameters are in memory that the server shares.
        servers: the number of server processes that the model is partitioned over.
        lr: Adam's learning rate.
        durability: the level of the session's durability.
    """

    name: str
    transport: str = "tcp"
    gradient_dtype: str = "float32"
    reply_dtype: str = "float32"
    array_dtype: str | None = None
    options: Mapping[str, Any] = _NO_OPTIONS
    in_place: bool = False
    servers: int = 1
    lr: float = 1e-3
    durability: Literal["memory", "checkpoint", "journal"] = "memory"


class Job(NamedTuple):
    """A session that is ready to step.

    Attributes:
        session: the session.
        step: a function that applies one step.
        arrays: the user's arrays: the gradient, and the parameters if they are the user's own.
    """

    session: Any
    step: Action
    arrays: tuple[Any, ...]


_HALVES: Any = {"gradient_dtype": "bfloat16", "reply_dtype": "bfloat16"}
_OVERLAP = types.MappingProxyType({"overlap": True})
# A learning rate of fine-tuning, at which most steps do not change a bfloat16 parameter: the case of replies of
# changes.
_FINE_LR = 1e-6

VARIANTS: tuple[Variant, ...] = (
    Variant("tcp"),
    Variant("uds", "uds"),
    Variant("shm", "shm"),
    Variant("shm in place", "shm", in_place=True),
    Variant("tcp overlap", options=_OVERLAP),
    Variant("uds overlap", "uds", options=_OVERLAP),
    Variant("tcp bfloat16", **_HALVES),
    Variant("tcp bfloat16 of float32 arrays", **_HALVES, array_dtype="float32"),
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
    """Return a step of some size by a variant, against the first servers that the variant needs."""

    def prepare(stack: contextlib.ExitStack, size: int) -> Action:
        return open_job(stack, variant, targets, size).step

    return Contender(variant.name, prepare)


def open_job(stack: contextlib.ExitStack, variant: Variant, targets: Sequence[str], size: int) -> Job:
    """Return a session with its step and its arrays; all end with the stack."""
    target: Any = targets[0] if variant.servers == 1 else list(targets[: variant.servers])
    client = stack.enter_context(stepwire.connect(target, transport=variant.transport))
    session: Any = client.create_session(
        {"w": parameters_of(size)},
        optimizer=stepwire.Adam(lr=variant.lr),
        gradient_dtype=variant.gradient_dtype,
        reply_dtype=variant.reply_dtype,
        non_finite="allow" if variant.options.get("overlap") else "reject",  # a step with overlap cannot be refused
        durability=variant.durability,
    )
    stack.enter_context(session)
    session.attach(transport=variant.transport)
    return _in_place(session, variant, size) if variant.in_place else _with_arrays(session, variant, size)


def parameters_of(size: int) -> np.ndarray[Any, Any]:
    """Return the initial parameters of a model: normal, with the deviation of common initialisers."""
    return np.random.default_rng(1).standard_normal(size, np.float32) * np.float32(_DEVIATION)


@functools.lru_cache(maxsize=2)
def gradient_of(size: int, dtype: str = "float32") -> np.ndarray[Any, Any]:
    """Return a gradient, the same one at every call."""
    values = np.random.default_rng(0).standard_normal(size, np.float32)
    return values if dtype == "float32" else values.astype(BFLOAT16)


def _with_arrays(session: Any, variant: Variant, size: int) -> Job:
    """Return a job with the user's own arrays, with copies in each step."""
    array_dtype = variant.array_dtype or ("float32" if variant.gradient_dtype == "int8" else variant.gradient_dtype)
    gradient = {"w": gradient_of(size, array_dtype)}
    if variant.options.get("reply") == "none":
        return Job(session, lambda: session.step(gradient, **variant.options), (gradient,))
    out = {"w": parameters_of(size).astype(FLOAT32 if variant.reply_dtype == "float32" else BFLOAT16)}
    return Job(session, lambda: session.step(gradient, out=out, **variant.options), (gradient, out))


def _in_place(session: Any, variant: Variant, size: int) -> Job:
    """Return a job with a gradient and parameters in shared memory."""
    gradient, parameters = session.shared_gradients(), session.shared_parameters()
    np.copyto(gradient["w"], gradient_of(size))
    step = functools.partial(session.step, gradient, out=parameters, **variant.options)
    return Job(session, step, (gradient, parameters))
