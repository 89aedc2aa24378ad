"""Adam without bias correction, which no framework here offers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from conformance.case import Case, session_config
from conformance.hand_reference import uncorrected_build
from conformance.long_runs import LONG, LONG_WORDS

__all__ = ["hand_cases"]

_ADAM = {"lr": 0.002, "beta1": 0.85, "beta2": 0.98, "eps": 1e-3}
_MOMENTS = "m = m + (1 - beta1)(g - m); v = beta2 v + (1 - beta2) g^2"
_EQUATIONS = f"{_MOMENTS}; p = p - lr m / (sqrt(v) + eps)"
_DECAYED = f"{_MOMENTS}; p = p - lr (m / (sqrt(v) + eps) + wd p)"


def hand_cases() -> Iterator[Case]:
    """Yield all of them."""

    def case(name: str, hyper: Any, words: str = _EQUATIONS, **optimizer: Any) -> Case:
        options = dict(hyper) | ({"decoupled": True} if optimizer else {})
        return Case(
            name=f"adam-uncorrected{name}",
            family="adam_uncorrected",
            reference=f"no framework; written by hand: {words}",
            config=session_config("ADAM", hyper, formula="FORMULA_NO_BIAS_CORRECTION", **optimizer),
            build=uncorrected_build(**options),
        )

    yield case("-defaults", {})
    yield case("", _ADAM)
    yield case("-maximize", _ADAM | {"maximize": True}, f"g = -g; {_EQUATIONS}")
    yield case("-l2", _ADAM | {"weight_decay": 0.1}, f"g = g + wd p; {_EQUATIONS}")
    yield case("-decoupled", _ADAM | {"weight_decay": 0.1}, _DECAYED, decoupled_weight_decay=True)
    yield Case(
        name="decay-adamw-uncorrected",
        family="decay",
        reference=f"no framework; written by hand: {_DECAYED}; {LONG_WORDS}",
        config=session_config(
            "ADAM", {"weight_decay": 1e-4}, formula="FORMULA_NO_BIAS_CORRECTION", decoupled_weight_decay=True
        ),
        build=uncorrected_build(weight_decay=1e-4, decoupled=True),
        **LONG,
    )
