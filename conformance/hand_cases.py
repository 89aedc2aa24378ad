"""Adam without bias correction, which no framework here offers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from conformance.case import Case, session_config
from conformance.hand_reference import uncorrected_build

__all__ = ["hand_cases"]

_ADAM = {"lr": 0.002, "beta1": 0.85, "beta2": 0.98, "eps": 1e-3}
_EQUATIONS = "m = m + (1 - beta1)(g - m); v = beta2 v + (1 - beta2) g^2; p = p - lr m / (sqrt(v) + eps)"


def hand_cases() -> Iterator[Case]:
    """Yield all of them."""

    def case(name: str, hyper: Any, words: str = "", **optimizer: Any) -> Case:
        options = dict(hyper) | ({"decoupled": True} if optimizer else {})
        return Case(
            name=f"adam-uncorrected{name}",
            family="adam_uncorrected",
            reference=f"no framework; written by hand: {words}{_EQUATIONS}",
            config=session_config("ADAM", hyper, formula="FORMULA_NO_BIAS_CORRECTION", **optimizer),
            build=uncorrected_build(**options),
        )

    yield case("-defaults", {})
    yield case("", _ADAM)
    yield case("-maximize", _ADAM | {"maximize": True}, "g = -g; ")
    yield case("-l2", _ADAM | {"weight_decay": 0.1}, "g = g + wd p; ")
    yield case("-decoupled", _ADAM | {"weight_decay": 0.1}, "p = p (1 - lr wd); ", decoupled_weight_decay=True)
