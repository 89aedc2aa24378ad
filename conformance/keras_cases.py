"""Keras: Adam and AdamW with epsilon-hat, decoupled decay only, and global-norm clipping."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from conformance.case import Case, session_config
from conformance.keras_reference import VERSION, keras, keras_build
from conformance.long_runs import LONG, LONG_WORDS

__all__ = ["keras_cases"]

_ADAM = {"lr": 0.01, "beta1": 0.85, "beta2": 0.98, "eps": 1e-3}
_OPTIONS: Any = {"beta_1": 0.85, "beta_2": 0.98, "epsilon": 1e-3}
_WORDS = "0.01, beta_1=0.85, beta_2=0.98, epsilon=0.001"


def _case(
    name: str,
    hyper: Mapping[str, Any],
    words: str,
    make: Callable[[], keras.optimizers.Optimizer],
    family: str = "adam_keras",
    rule: str = "ADAM",
    gradient: Any = None,
    **optimizer: Any,
) -> Case:
    return Case(
        name=name,
        family=family,
        reference=f"Keras {VERSION} on jax: keras.optimizers.{words}",
        config=session_config(rule, hyper, gradient=gradient, **optimizer),
        build=keras_build(make),
    )


def keras_cases() -> Iterator[Case]:
    """Yield all of them."""
    yield from _adam()
    yield from _adamw()
    yield from _clipping()
    yield Case(
        name="decay-adamw-keras",
        family="decay",
        reference=f"Keras {VERSION} on jax: keras.optimizers.AdamW(); {LONG_WORDS}",
        config=session_config("ADAM", formula="FORMULA_KERAS", decoupled_weight_decay=True),
        build=keras_build(keras.optimizers.AdamW),
        # Keras rounds the decay of a step apart, to the last place of the parameter: nearly alike at every step.
        **LONG | {"tolerance": {"relative": 1e-4}},
    )


def _adam() -> Iterator[Case]:
    def case(name: str, hyper: Any, words: str, make: Any, **optimizer: Any) -> Case:
        return _case(f"adam-keras{name}", hyper, words, make, formula="FORMULA_KERAS", **optimizer)

    adam = keras.optimizers.Adam
    yield case("-defaults", {}, "Adam()", adam)
    yield case("", _ADAM, f"Adam({_WORDS})", lambda: adam(0.01, **_OPTIONS))
    yield case(
        "-amsgrad",
        _ADAM,
        f"Adam({_WORDS}, amsgrad=True)",
        lambda: adam(0.01, **_OPTIONS, amsgrad=True),
        amsgrad="AMSGRAD_RAW",
    )


def _adamw() -> Iterator[Case]:
    def case(name: str, hyper: Any, words: str, make: Any, **optimizer: Any) -> Case:
        options = {"formula": "FORMULA_KERAS", "decoupled_weight_decay": True}
        return _case(f"adamw-keras{name}", hyper, words, make, **(options | optimizer))

    adamw, decayed = keras.optimizers.AdamW, _ADAM | {"weight_decay": 0.1}
    yield case("-defaults", {}, "AdamW()", adamw)
    words = f"AdamW({_WORDS}, weight_decay=0.1)"
    yield case("", decayed, words, lambda: adamw(0.01, weight_decay=0.1, **_OPTIONS))
    yield case(
        "-amsgrad",
        decayed,
        f"AdamW({_WORDS}, weight_decay=0.1, amsgrad=True)",
        lambda: adamw(0.01, weight_decay=0.1, amsgrad=True, **_OPTIONS),
        amsgrad="AMSGRAD_RAW",
    )


def _clipping() -> Iterator[Case]:
    def case(name: str, hyper: Any, words: str, make: Any, rule: str, bound: float, **optimizer: Any) -> Case:
        gradient = {"clip_grad_norm": bound, "clip_formula": "CLIP_FORMULA_KERAS"}
        return _case(f"clip-keras-{name}", hyper, words, make, "clipping", rule, gradient, **optimizer)

    sgd = keras.optimizers.SGD
    for bound, name in ((0.5, "above"), (1000.0, "below")):
        yield case(
            name,
            {"lr": 0.02},
            f"SGD(0.02, global_clipnorm={bound})",
            lambda bound=bound: sgd(0.02, global_clipnorm=bound),
            "SGD",
            bound,
        )
    yield case(
        "adam",
        _ADAM,
        f"Adam({_WORDS}, global_clipnorm=0.5)",
        lambda: keras.optimizers.Adam(0.01, global_clipnorm=0.5, **_OPTIONS),
        "ADAM",
        0.5,
        formula="FORMULA_KERAS",
    )
