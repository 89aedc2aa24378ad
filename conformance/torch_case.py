"""How a case of torch is written: stepwire's options once, torch's arguments derived from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch

from conformance.case import Case, session_config
from conformance.torch_reference import VERSION, torch_build

__all__ = ["ADAM", "keywords", "torch_case"]

ADAM: Final = {"lr": 0.01, "beta1": 0.85, "beta2": 0.98, "eps": 1e-3}
"""Numbers of most cases: no defaults, and an eps that cannot hide."""

_CLASSES: Final = {
    "ADAM": "Adam",
    "NADAM": "NAdam",
    "RADAM": "RAdam",
    "ADAMAX": "Adamax",
    "SGD": "SGD",
    "RMSPROP": "RMSprop",
    "ADAGRAD": "Adagrad",
    "ADADELTA": "Adadelta",
}
_RENAMED: Final = {
    ("ADADELTA", "alpha"): "rho",
    ("ADAGRAD", "decay"): "lr_decay",
    ("NADAM", "decay"): "momentum_decay",
}


def keywords(rule: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return torch's keyword arguments for hyper-parameters and options named as in the contract."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if name == "beta1":
            found["betas"] = (value, values["beta2"])
        elif name == "amsgrad":
            found["amsgrad"] = value == "AMSGRAD_RAW"
        elif name not in ("beta2", "formula"):
            found[_RENAMED.get((rule, name), name)] = value
    return found


def torch_case(
    name: str,
    family: str,
    rule: str,
    hyper: Mapping[str, Any] | None = None,
    *,
    optimizer: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    reference: Mapping[str, Any] | None = None,
    words: str = "",
    **case: Any,
) -> Case:
    """Return a case with torch as reference.

    Args:
        name: the name of the case.
        family: the name of the file of the case.
        rule: the rule, without its prefix.
        hyper: the hyper-parameters that are set.
        optimizer: further fields of `Optimizer`.
        config: further arguments of `session_config`.
        reference: further arguments of `TorchReference`.
        words: the description of further operations of `TorchReference`.
        case: further fields of `Case`.

    Returns:
        The case.
    """
    options = dict(optimizer or {})
    arguments = keywords(rule, {**(hyper or {}), **options})
    kind = _CLASSES[rule]
    if rule == "ADAM" and arguments.pop("decoupled_weight_decay", False):
        kind = "AdamW"
    make = getattr(torch.optim, kind)
    # Decay and ascent pull apart: with the signs turned they do not, and the first steps stay exact to a few ulps.
    if arguments.get("maximize") and arguments.get("weight_decay"):
        case.setdefault("bank", "opposed")
    written = ", ".join(f"{key}={value}" for key, value in arguments.items())
    return Case(
        name=name,
        family=family,
        reference=f"torch {VERSION}: torch.optim.{kind}({written}){words and '; ' + words}",
        config=session_config(rule, hyper, **(config or {}), **options),
        build=torch_build(lambda params: make(params, **arguments), **(reference or {})),
        **case,
    )
