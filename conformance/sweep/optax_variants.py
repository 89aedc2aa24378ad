"""Every form that optax publishes, with numbers at their edges, and changed in the middle of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import jax.numpy as jnp
import optax

from conformance.optax_reference import optax_build
from conformance.sweep.variant import Numbers, Variant, changing
from stepwire.optimizers import LAMB, LARS, Adam, AdamW, Lion, Optimizer

__all__ = ["optax_variants"]

_LONGEST: Final = 8_000
_OWN_NAMES: Final = {"lr": "learning_rate", "momentum": "momentum", "weight_decay": "weight_decay", "eps": "eps"}

Make = Callable[..., optax.GradientTransformation]


def _variant(name: str, make: Make, optimizer: Optimizer, numbers: Numbers | None = None, **fields: Any) -> Variant:
    """Return a case with optax as reference.

    Args:
        name: the name of the case.
        make: a constructor of optax.
        optimizer: stepwire's.
        numbers: the numbers that change.
        fields: of `Variant`; `options` has the arguments of `make`.
    """
    options: Mapping[str, Any] = fields.pop("options", {})
    arrays = _by_count(optimizer, numbers or {})

    def transformation() -> optax.GradientTransformation:
        if not arrays:
            return make(**options)
        schedules = {key: _schedule(values) for key, values in arrays.items()}
        return optax.inject_hyperparams(make)(**{**options, **schedules})

    return Variant(
        name=name,
        framework="optax",
        optimizer=optimizer,
        build=optax_build(transformation),
        numbers=numbers or {},
        **fields,
    )


def _schedule(values: list[float]) -> Callable[[Any], Any]:
    """Return a schedule of optax, in the precision that jax has when it is first asked."""
    return lambda count: jnp.asarray(values)[count]


def _by_count(optimizer: Optimizer, numbers: Numbers) -> dict[str, list[float]]:
    """Return the values of each number that changes, by optax's names, from the first step on."""
    found: dict[str, list[float]] = {}
    for _, values in sorted(numbers.items()):
        for name, value in values.items():
            pairs = zip(("b1", "b2"), value, strict=True) if name == "betas" else [(_OWN_NAMES[name], value)]
            for own, number in pairs:
                found.setdefault(own, []).append(number)
    return found


def optax_variants() -> Iterator[Variant]:
    """Yield all of them."""
    yield from _adam()
    yield from _adamw()
    yield from _others()
    yield from _layerwise()


def _adam() -> Iterator[Variant]:
    rate: dict[str, Any] = {"learning_rate": 1e-3}
    yield _variant("adam optax", optax.adam, Adam(formula="optax"), options=rate, short=True)
    yield _variant(
        "adam optax, beta1=0", optax.adam, Adam(formula="optax", betas=(0.0, 0.999)), options=rate | {"b1": 0.0}
    )
    root = {"eps_root": 1e-8}
    yield _variant("adam optax, eps_root", optax.adam, Adam(formula="optax", **root), options=rate | root)
    yield _variant(
        "adam optax, betas change", optax.adam, Adam(formula="optax"), changing("betas change", _LONGEST), options=rate
    )
    looking: dict[str, Any] = {"nesterov": True}
    yield _variant("adam optax, nesterov", optax.adam, Adam(formula="optax", **looking), options=rate | looking)
    zero = Adam(formula="optax", betas=(0.0, 0.999), **looking)
    yield _variant("adam optax, nesterov, beta1=0", optax.adam, zero, options=rate | looking | {"b1": 0.0}, short=True)
    largest = Adam(formula="optax", amsgrad="corrected")
    yield _variant("amsgrad optax", optax.amsgrad, largest, options=rate)
    for precision in ("bfloat16", "int8"):
        yield _variant(
            f"adam optax, {precision}",
            optax.adam,
            Adam(formula="optax"),
            options=rate,
            precision=precision,
            bank="blocks" if precision == "int8" else "all",
            steps=20,
            long_steps=400,
        )


def _adamw() -> Iterator[Variant]:
    for lr, decay in ((1e-3, 1e-4), (1e-4, 1e-4), (1e-2, 0.1)):
        yield _variant(
            f"adamw optax, lr={lr}, weight_decay={decay}",
            optax.adamw,
            AdamW(formula="optax", lr=lr, weight_decay=decay),
            options={"learning_rate": lr, "weight_decay": decay},
            bank="long",
            steps=300,
            long_steps=8_000,
            short=decay > 1e-4 or lr == 1e-3,
        )
    yield _variant(
        "adamw optax, decay changes",
        optax.adamw,
        AdamW(formula="optax"),
        changing("decay changes", _LONGEST),
        options={"learning_rate": 1e-3},
    )


def _others() -> Iterator[Variant]:
    for decay in (0.0, 1e-5, 0.1):
        yield _variant(
            f"lion optax, weight_decay={decay}",
            optax.lion,
            Lion(weight_decay=decay),
            options={"learning_rate": 1e-4, "weight_decay": decay},
            short=decay == 0.1,
        )
    yield _variant(
        "lion optax, beta1=0",
        optax.lion,
        Lion(betas=(0.0, 0.99)),
        options={"learning_rate": 1e-4, "b1": 0.0, "weight_decay": 0.0},
    )


def _layerwise() -> Iterator[Variant]:
    for name, optimizer, make, options in (
        ("lamb optax", LAMB(), optax.lamb, {"learning_rate": 1e-3, "weight_decay": 0.0}),
        (
            "lamb optax, weight_decay=0.1",
            LAMB(weight_decay=0.1),
            optax.lamb,
            {"learning_rate": 1e-3, "weight_decay": 0.1},
        ),
        ("lars optax", LARS(lr=0.1), optax.lars, {"learning_rate": 0.1}),
        (
            "lars optax, nesterov, weight_decay=1e-4",
            LARS(lr=0.1, nesterov=True, weight_decay=1e-4),
            optax.lars,
            {"learning_rate": 0.1, "nesterov": True, "weight_decay": 1e-4},
        ),
        ("lars optax, momentum=0", LARS(lr=0.1, momentum=0.0), optax.lars, {"learning_rate": 0.1, "momentum": 0.0}),
    ):
        short = name in ("lamb optax", "lars optax")
        yield _variant(name, make, optimizer, options=options, bank="norms", layerwise=True, short=short)
