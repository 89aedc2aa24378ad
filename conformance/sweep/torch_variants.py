"""Every rule of torch with its options, its numbers changed in the middle of a run, and its treatment of gradients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

import numpy as np
import torch

import stepwire.optimizers
from conformance.case import Json, Reference
from conformance.inputs import Tensors
from conformance.sweep.variant import CHANGES, Variant, changing, changing_among
from conformance.torch_reference import DecayAfter, TorchReference

__all__ = ["torch_variants"]

_LONGEST: Final = 8_000

_RULES: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "adam": ("Adam", {}),
    "amsgrad": ("Adam", {"amsgrad": True}),
    "adamw": ("AdamW", {}),
    "nadam": ("NAdam", {}),
    "nadamw": ("NAdam", {"weight_decay": 0.01, "decoupled_weight_decay": True}),
    "radam": ("RAdam", {}),
    "radamw": ("RAdam", {"weight_decay": 0.01, "decoupled_weight_decay": True}),
    "adamax": ("Adamax", {}),
    "sgd": ("SGD", {"lr": 0.02}),
    "sgd momentum": ("SGD", {"lr": 0.02, "momentum": 0.9}),
    "sgd dampening": ("SGD", {"lr": 0.02, "momentum": 0.9, "dampening": 0.5}),
    "sgd nesterov": ("SGD", {"lr": 0.02, "momentum": 0.9, "nesterov": True}),
    "rmsprop": ("RMSprop", {}),
    "rmsprop momentum": ("RMSprop", {"momentum": 0.9}),
    "rmsprop centered": ("RMSprop", {"centered": True}),
    "rmsprop centered momentum": ("RMSprop", {"centered": True, "momentum": 0.9}),
    "adagrad": ("Adagrad", {}),
    "adagrad decay": ("Adagrad", {"lr_decay": 0.01, "initial_accumulator_value": 0.1}),
    "adadelta": ("Adadelta", {}),
}
_SHORT: Final = ("adam", "sgd momentum")
"""Rules that are in the short form with every option."""

_BETAS: Final = ("adam", "amsgrad", "adamw", "nadam", "radam", "adamax")


class _Unscaled:
    """A reference whose gradients come multiplied, and are unscaled as `torch.amp.GradScaler` does, by a factor."""

    def __init__(self, reference: Reference, scale: float, dtype: str) -> None:
        self._reference = reference
        self._factor = np.dtype(dtype).type(1.0 / scale)

    def step(self, number: int, gradients: Mapping[str, np.ndarray | None]) -> Json:
        """Unscale, and apply one step."""
        unscaled = {name: None if value is None else value * self._factor for name, value in gradients.items()}
        return self._reference.step(number, unscaled)

    def parameters(self) -> Tensors:
        """Return the parameters."""
        return self._reference.parameters()

    def slots(self) -> dict[str, Tensors]:
        """Return the state."""
        return self._reference.slots()

    def tensor_steps(self) -> dict[str, int]:
        """Return the updates of each tensor."""
        return self._reference.tensor_steps()


def _variant(name: str, rule: str, more: Mapping[str, Any] | None = None, **fields: Any) -> Variant:
    """Return a case with torch as reference.

    Args:
        name: the part of its name after the rule's.
        rule: one of `_RULES`.
        more: further arguments of the optimizer.
        fields: of `Variant`; `reference` has further arguments of `TorchReference`.
    """
    kind, options = _RULES[rule]
    arguments = options | dict(more or {})
    make = getattr(torch.optim, kind)
    reference = {"tells": False} | fields.pop("reference", {})
    scale = fields.get("loss_scale", 1.0)
    reference["overrides"] = {number: [values] for number, values in fields.get("numbers", {}).items()}

    def build(initial: Tensors, dtype: str) -> Reference:
        made = TorchReference(initial, dtype, lambda params: make(params, foreach=False, **arguments), **reference)
        return made if scale == 1.0 else _Unscaled(made, scale, dtype)

    fields.setdefault("optimizer", getattr(stepwire.optimizers, kind)(**arguments))
    return Variant(name=f"{rule} torch{name and ', ' + name}", framework="torch", build=build, **fields)


def torch_variants() -> Iterator[Variant]:
    """Yield all of them."""
    for rule in _RULES:
        yield _variant("", rule, short=True)
        yield _variant("long", rule, bank="long", steps=400, long_steps=8_000, short=rule in _SHORT)
        yield _variant("maximize", rule, {"maximize": True}, steps=30)
    yield from _numbers()
    yield from _decays()
    yield from _changes()
    yield from _treatments()
    yield from _precisions()


def _numbers() -> Iterator[Variant]:
    for rule in _BETAS:
        beta2 = 0.999
        yield _variant("beta1=0", rule, {"betas": (0.0, beta2)}, short=True)
        yield _variant("beta1=0.3", rule, {"betas": (0.3, beta2)})
        yield _variant("betas=(0.99, 0.99999)", rule, {"betas": (0.99, 0.99999)}, short=rule in _SHORT)
        yield _variant("betas=(0.9, 0.5)", rule, {"betas": (0.9, 0.5)})
        yield _variant("eps=1", rule, {"eps": 1.0})
        yield _variant("eps=1e-30", rule, {"eps": 1e-30})
    for rule in ("rmsprop", "rmsprop centered"):
        yield _variant("alpha=0", rule, {"alpha": 0.0})
        yield _variant("alpha=0.9999", rule, {"alpha": 0.9999})
    yield _variant("rho=0", "adadelta", {"rho": 0.0})
    yield _variant("lr=1e30", "sgd", {"lr": 1e30})
    yield _variant("lr=1e-30", "sgd momentum", {"lr": 1e-30})


def _decays() -> Iterator[Variant]:
    for rule in _RULES:
        if rule not in ("adamw", "nadamw", "radamw"):
            yield _variant("weight_decay=0.1", rule, {"weight_decay": 0.1}, steps=40, short=rule in _SHORT)
    for rule in ("adamw", "nadamw", "radamw"):
        for lr, decay in ((1e-4, 1e-4), (1e-3, 1e-4), (1e-3, 3e-5), (1e-2, 0.1)):
            numbers = {"lr": lr, "weight_decay": decay}
            words = f"lr={lr}, weight_decay={decay}"
            yield _variant(words, rule, numbers, bank="long", steps=300, long_steps=8_000, short=decay == 1e-4)
    options = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8}
    for decay in (0.1, 1e-5):
        yield Variant(
            name=f"adamw decay_after torch, weight_decay={decay}",
            framework="torch",
            optimizer=stepwire.optimizers.AdamW(formula="decay_after", weight_decay=decay, **options),
            build=lambda initial, dtype, decay=decay: TorchReference(
                initial, dtype, lambda params: DecayAfter(params, decay, foreach=False, **options), tells=False
            ),
            short=True,
        )


def _changes() -> Iterator[Variant]:
    for rule in _RULES:
        changes = ["lr changes", "decay changes"]
        changes += ["betas change"] if rule in _BETAS else []
        changes += ["eps changes"] if not rule.startswith("sgd") else []
        changes += ["momentum changes"] if rule == "sgd momentum" else []
        changes += ["momentum pauses"] if rule.endswith("momentum") else []
        changes += ["momentum varies"] if rule == "sgd nesterov" else []
        for change in changes:
            own = change not in ("lr changes", "eps changes")
            yield _variant(change, rule, numbers=changing(change, _LONGEST), short=own or rule in _SHORT)
    half = [values | {"dampening": 0.5 if values["momentum"] else 0.0} for values in CHANGES["momentum changes"]]
    numbers = changing_among(half, _LONGEST)
    yield _variant("momentum and dampening change", "sgd dampening", numbers=numbers, short=True)


def _treatments() -> Iterator[Variant]:
    for rule in ("adam", "sgd momentum", "rmsprop", "adagrad"):
        short: dict[str, Any] = {"short": rule in _SHORT}
        moderate = {"bank": "moderate"} | short
        yield _variant(
            "accumulation_steps=4", rule, treatment={"accumulation_steps": 4}, reference={"accumulate": 4}, **moderate
        )
        for scale in (1024.0, 1000.0):
            yield _variant(f"loss_scale={scale:g}", rule, loss_scale=scale, **moderate)
        for clip in (1.0, 1e-6):
            yield _variant(
                f"clip_grad_norm={clip}", rule, treatment={"clip_grad_norm": clip}, reference={"clip": clip}, **moderate
            )
        yield _variant(
            "clip_grad_value=0.01", rule, treatment={"clip_grad_value": 0.01}, reference={"clip_value": 0.01}, **short
        )
        for decay in (0.9, 0.9999, 0.99999):
            yield _variant(
                f"parameter_average_decay={decay}",
                rule,
                treatment={"parameter_average_decay": decay},
                reference={"average": decay},
                slot="param_average",
                **moderate,
            )


def _precisions() -> Iterator[Variant]:
    for rule in _RULES:
        if rule != "sgd" and "centered" not in rule:  # which have no moments, and need float32
            yield _variant("bfloat16", rule, precision="bfloat16", steps=60, long_steps=2_000, short=rule in _SHORT)
    for rule in ("adam", "adamw", "nadam", "radam", "sgd momentum", "sgd nesterov", "rmsprop", "rmsprop momentum"):
        short = rule in ("adam", "rmsprop momentum")
        yield _variant("int8", rule, precision="int8", bank="blocks", steps=100, long_steps=400, short=short)
    numbers = {"betas": (0.0, 0.999)}
    yield _variant("beta1=0, int8", "adam", numbers, precision="int8", bank="blocks", steps=100, long_steps=400)
