"""Every form that optax publishes: Adam, AMSGrad, Lion, LAMB and LARS, and its clipping."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import optax

from conformance.case import Case, Steps, session_config
from conformance.long_runs import ALTERNATING, ALTERNATING_WORDS, LONG, LONG_WORDS
from conformance.optax_reference import VERSION, optax_build

__all__ = ["optax_cases"]

_ADAM = {"lr": 0.01, "beta1": 0.85, "beta2": 0.98, "eps": 1e-3}
_B = {"b1": 0.85, "b2": 0.98, "eps": 1e-3}
_FORM = {"formula": "FORMULA_OPTAX"}
_DECOUPLED = _FORM | {"decoupled_weight_decay": True}
_CORRECTED = _FORM | {"amsgrad": "AMSGRAD_CORRECTED"}


def _case(
    name: str,
    family: str,
    rule: str,
    hyper: Mapping[str, Any],
    words: str,
    make: Callable[[], optax.GradientTransformation],
    gradient: Any = None,
    states: bool = True,
    steps: Steps = (),
    **optimizer: Any,
) -> Case:
    return Case(
        name=name,
        family=family,
        reference=f"optax {VERSION}: {words}",
        config=session_config(rule, hyper, gradient=gradient, **optimizer),
        build=optax_build(make),
        states=states,
        steps=steps,
    )


def optax_cases() -> Iterator[Case]:
    """Yield all of them."""
    yield from _adam()
    yield from _amsgrad()
    yield from _adamw()
    yield from _lion()
    yield from _lamb()
    yield from _lars()
    yield from _clipping()
    yield from _small_decay()
    yield from _extremes()


def _adam() -> Iterator[Case]:
    def case(name: str, hyper: Any, words: str, make: Any, **optimizer: Any) -> Case:
        return _case(f"adam-optax{name}", "adam_optax", "ADAM", hyper, words, make, **(_FORM | optimizer))

    yield case("-defaults", {}, "optax.adam(1e-3)", lambda: optax.adam(1e-3))
    arguments = "0.01, b1=0.85, b2=0.98, eps=0.001"
    yield case("", _ADAM, f"optax.adam({arguments})", lambda: optax.adam(0.01, **_B))
    root = {"eps_root": 1e-4}
    yield case(
        "-eps-root", _ADAM | root, f"optax.adam({arguments}, eps_root=1e-4)", lambda: optax.adam(0.01, **_B, **root)
    )
    yield case(
        "-nesterov",
        _ADAM,
        f"optax.adam({arguments}, nesterov=True)",
        lambda: optax.adam(0.01, **_B, nesterov=True),
        nesterov=True,
    )
    yield case(
        "-l2",
        _ADAM | {"weight_decay": 0.1},
        f"optax.chain(optax.add_decayed_weights(0.1), optax.adam({arguments}))",
        lambda: optax.chain(optax.add_decayed_weights(0.1), optax.adam(0.01, **_B)),
    )
    yield case(
        "-maximize",
        _ADAM | {"maximize": True},
        f"optax.chain(optax.scale(-1), optax.adam({arguments}))",
        lambda: optax.chain(optax.scale(-1.0), optax.adam(0.01, **_B)),
    )


def _amsgrad() -> Iterator[Case]:
    def case(name: str, hyper: Any, words: str, make: Any, **optimizer: Any) -> Case:
        return _case(f"amsgrad-optax{name}", "adam_optax", "ADAM", hyper, words, make, **(_CORRECTED | optimizer))

    yield case("-defaults", {}, "optax.amsgrad(1e-3)", lambda: optax.amsgrad(1e-3))
    arguments = "0.01, b1=0.85, b2=0.98, eps=0.001"
    yield case("", _ADAM, f"optax.amsgrad({arguments})", lambda: optax.amsgrad(0.01, **_B))
    root = {"eps_root": 1e-4}
    yield case(
        "-eps-root",
        _ADAM | root,
        f"optax.amsgrad({arguments}, eps_root=1e-4)",
        lambda: optax.amsgrad(0.01, **_B, **root),
    )
    yield case(
        "-decoupled",
        _ADAM | {"weight_decay": 0.1},
        "optax.chain(optax.scale_by_amsgrad(b1=0.85, b2=0.98, eps=0.001), optax.add_decayed_weights(0.1), "
        "optax.scale_by_learning_rate(0.01))",
        lambda: optax.chain(
            optax.scale_by_amsgrad(**_B), optax.add_decayed_weights(0.1), optax.scale_by_learning_rate(0.01)
        ),
        decoupled_weight_decay=True,
    )


def _adamw() -> Iterator[Case]:
    def case(name: str, hyper: Any, words: str, make: Any, **optimizer: Any) -> Case:
        return _case(f"adamw-optax{name}", "adam_optax", "ADAM", hyper, words, make, **(_DECOUPLED | optimizer))

    decayed, arguments = _ADAM | {"weight_decay": 0.1}, "0.01, b1=0.85, b2=0.98, eps=0.001, weight_decay=0.1"
    options: Any = _B | {"weight_decay": 0.1}
    yield case("-defaults", {}, "optax.adamw(1e-3)", lambda: optax.adamw(1e-3))
    yield case("", decayed, f"optax.adamw({arguments})", lambda: optax.adamw(0.01, **options))
    yield case(
        "-nesterov-eps-root",
        decayed | {"eps_root": 1e-4},
        f"optax.adamw({arguments}, eps_root=1e-4, nesterov=True)",
        lambda: optax.adamw(0.01, **options, eps_root=1e-4, nesterov=True),
        nesterov=True,
    )


def _lion() -> Iterator[Case]:
    def case(name: str, hyper: Any, words: str, make: Any) -> Case:
        return _case(f"lion{name}", "lion", "LION", hyper, words, make)

    yield case(
        "-defaults",
        {},
        "optax.lion(1e-4, weight_decay=0); optax's own default decay is 1e-3",
        lambda: optax.lion(1e-4, weight_decay=0.0),
    )
    yield case(
        "",
        {"lr": 0.003, "beta1": 0.8, "beta2": 0.95},
        "optax.lion(0.003, b1=0.8, b2=0.95, weight_decay=0)",
        lambda: optax.lion(0.003, b1=0.8, b2=0.95, weight_decay=0.0),
    )
    yield case(
        "-decay",
        {"lr": 0.003, "beta1": 0.8, "beta2": 0.95, "weight_decay": 0.1},
        "optax.lion(0.003, b1=0.8, b2=0.95, weight_decay=0.1)",
        lambda: optax.lion(0.003, b1=0.8, b2=0.95, weight_decay=0.1),
    )


def _lamb() -> Iterator[Case]:
    def case(name: str, hyper: Any, words: str, make: Any) -> Case:
        return _case(f"lamb{name}", "lamb", "LAMB", hyper, words, make)

    arguments = "0.01, b1=0.85, b2=0.98, eps=0.001"
    yield case("-defaults", {}, "optax.lamb(1e-3)", lambda: optax.lamb(1e-3))
    yield case("", _ADAM, f"optax.lamb({arguments})", lambda: optax.lamb(0.01, **_B))
    yield case(
        "-decay-eps-root",
        _ADAM | {"weight_decay": 0.1, "eps_root": 1e-4},
        f"optax.lamb({arguments}, eps_root=1e-4, weight_decay=0.1)",
        lambda: optax.lamb(0.01, **_B, eps_root=1e-4, weight_decay=0.1),
    )
    yield case(
        "-trust",
        _ADAM | {"trust_coefficient": 0.5},
        "optax.chain(optax.scale_by_adam(b1=0.85, b2=0.98, eps=0.001), "
        "optax.scale_by_trust_ratio(trust_coefficient=0.5), optax.scale_by_learning_rate(0.01))",
        lambda: optax.chain(
            optax.scale_by_adam(**_B),
            optax.scale_by_trust_ratio(trust_coefficient=0.5),
            optax.scale_by_learning_rate(0.01),
        ),
    )


def _lars() -> Iterator[Case]:
    def case(name: str, hyper: Any, words: str, make: Any, **optimizer: Any) -> Case:
        return _case(f"lars{name}", "lars", "LARS", hyper, words, make, **optimizer)

    yield case("-defaults", {}, "optax.lars(1.0)", lambda: optax.lars(1.0))
    hyper = {"lr": 0.1, "weight_decay": 0.05, "trust_coefficient": 0.02, "eps": 1e-3, "momentum": 0.8}
    arguments = "0.1, weight_decay=0.05, trust_coefficient=0.02, eps=1e-3, momentum=0.8"
    options: Any = {name: value for name, value in hyper.items() if name != "lr"}
    yield case("", hyper, f"optax.lars({arguments})", lambda: optax.lars(0.1, **options))
    yield case(
        "-nesterov",
        hyper,
        f"optax.lars({arguments}, nesterov=True)",
        lambda: optax.lars(0.1, **options, nesterov=True),
        nesterov=True,
    )
    still = hyper | {"momentum": 0.0}
    yield case(
        "-no-momentum",
        still,
        "optax.lars(0.1, weight_decay=0.05, trust_coefficient=0.02, eps=1e-3, momentum=0)",
        lambda: optax.lars(0.1, **(options | {"momentum": 0.0})),
        states=False,
    )


def _clipping() -> Iterator[Case]:
    for bound, name, factor in ((0.5, "above", 1.0), (1000.0, "below", 1.0), (1e-4, "tiny", 2.0**-13)):
        gradient = {"clip_grad_norm": bound, "clip_formula": "CLIP_FORMULA_OPTAX"}
        words = f"optax.clip_by_global_norm({bound})"
        yield _case(
            f"clip-optax-{name}",
            "clipping",
            "SGD",
            {"lr": 0.02},
            f"optax.chain({words}, optax.sgd(0.02))",
            lambda bound=bound: optax.chain(optax.clip_by_global_norm(bound), optax.sgd(0.02)),
            gradient,
            steps=[{"first": 1, "gradient_factor": factor}] if factor != 1.0 else (),
        )
    yield _case(
        "clip-optax-adam",
        "clipping",
        "ADAM",
        _ADAM,
        "optax.chain(optax.clip_by_global_norm(0.5), optax.adam(0.01, b1=0.85, b2=0.98, eps=0.001))",
        lambda: optax.chain(optax.clip_by_global_norm(0.5), optax.adam(0.01, **_B)),
        {"clip_grad_norm": 0.5, "clip_formula": "CLIP_FORMULA_OPTAX"},
        **_FORM,
    )


def _small_decay() -> Iterator[Case]:
    """Yield decays that are far below the rounding of a parameter at each step, over as many steps as show them."""

    def case(name: str, rule: str, hyper: Any, words: str, make: Any, run: Any = LONG, **optimizer: Any) -> Case:
        return Case(
            name=name,
            family="decay",
            reference=f"optax {VERSION}: {words}; {LONG_WORDS}",
            config=session_config(rule, hyper, **optimizer),
            build=optax_build(make),
            **run,
        )

    adamw, looking = optax.adamw, optax.nadamw
    yield case("decay-adamw-optax", "ADAM", {}, "optax.adamw(1e-3)", lambda: adamw(1e-3), **_DECOUPLED)
    slow = {"lr": 1e-4}
    make, near = lambda: adamw(1e-4), LONG | {"bank": "near", "tolerance": {"relative": 3.5e-6}}
    yield case("decay-adamw-optax-slow", "ADAM", slow, "optax.adamw(1e-4)", make, near, **_DECOUPLED)
    nesterov = _DECOUPLED | {"nesterov": True}
    yield case("decay-nadamw-optax", "ADAM", {}, "optax.nadamw(1e-3)", lambda: looking(1e-3), **nesterov)
    yield case("decay-none-optax", "ADAM", {}, "optax.adam(1e-3)", lambda: optax.adam(1e-3), **_FORM)
    # Steps of one size would be rounded alike: the rate falls.
    yield case(
        "decay-lion",
        "LION",
        {"weight_decay": 1e-3},
        "optax.lion(optax.exponential_decay(1e-4, 1, 0.9995))",
        lambda: optax.lion(optax.exponential_decay(1e-4, 1, 0.9995)),
        groups=[{"schedule": {"kind": "SCHEDULE_KIND_EXPONENTIAL", "gamma": 0.9995}}],
    )


def _extremes() -> Iterator[Case]:
    """Yield a trust ratio that float32 has not."""
    yield Case(
        name="lars-tiny",
        family="extremes",
        reference=f"optax {VERSION}: optax.lars(0.1, momentum=0.8); gradients of whole numbers times 2^-149",
        config=session_config("LARS", {"lr": 0.1, "momentum": 0.8}),
        build=optax_build(lambda: optax.lars(0.1, momentum=0.8)),
        bank="whole",
        steps=[{"first": 1, "gradient_factor": 2.0**-149}],
    )
    no_memory, words = {"lr": 0.01, "beta1": 0.0, "beta2": 0.0, "eps": 1e-3}, "0.01, b1=0, b2=0, eps=0.001"
    yield Case(
        name="no-memory-optax",
        family="extremes",
        reference=f"optax {VERSION}: optax.adam({words}); {ALTERNATING_WORDS}",
        config=session_config("ADAM", no_memory, **_FORM),
        build=optax_build(lambda: optax.adam(0.01, b1=0.0, b2=0.0, eps=1e-3)),
        steps=ALTERNATING,
    )
