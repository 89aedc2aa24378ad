"""Every rule of torch: its defaults, and each option where it can be seen."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from conformance.case import Case, session_config
from conformance.torch_case import ADAM, torch_case
from conformance.torch_reference import VERSION, DecayAfter, torch_build

__all__ = ["torch_rule_cases"]

_DECAY = {"weight_decay": 0.1}
_ASCENT = {"maximize": True}
_RAW = {"amsgrad": "AMSGRAD_RAW"}
_DECOUPLED = {"decoupled_weight_decay": True}


def torch_rule_cases() -> Iterator[Case]:
    """Yield the cases of every rule, without treatment of gradients or groups."""
    yield from _adam()
    yield from _adamw()
    yield from _decay_after()
    yield from _relatives()
    yield from _sgd()
    yield from _rmsprop()
    yield from _sums()


def _adam() -> Iterator[Case]:
    def case(name: str, hyper: Any = None, **optimizer: Any) -> Case:
        return torch_case(f"adam-torch{name}", "adam", "ADAM", hyper, optimizer=optimizer)

    yield case("-defaults")
    yield case("", ADAM, formula="FORMULA_TORCH")
    yield case("-l2", ADAM | _DECAY)
    yield case("-maximize", ADAM | _ASCENT)
    yield case("-amsgrad", ADAM, **_RAW)
    yield case("-amsgrad-l2-maximize", ADAM | _DECAY | _ASCENT, **_RAW)
    yield case("-no-first-moment", ADAM | {"beta1": 0.0})
    yield case("-no-second-moment", ADAM | {"beta2": 0.0})
    yield case("-lr-zero", ADAM | {"lr": 0.0})


def _adamw() -> Iterator[Case]:
    def case(name: str, hyper: Any = None, **optimizer: Any) -> Case:
        return torch_case(f"adamw-torch{name}", "adamw", "ADAM", hyper, optimizer=_DECOUPLED | optimizer)

    yield case("-defaults")
    yield case("", ADAM | _DECAY, formula="FORMULA_TORCH")
    yield case("-amsgrad", ADAM | _DECAY, **_RAW)
    yield case("-maximize", ADAM | _DECAY | _ASCENT)
    yield case("-amsgrad-maximize", ADAM | _DECAY | _ASCENT, **_RAW)
    yield case("-decay-zero", ADAM | {"weight_decay": 0.0})


def _decay_after() -> Iterator[Case]:
    options = {"lr": 0.01, "betas": (0.85, 0.98), "eps": 1e-3}
    yield Case(
        name="adamw-decay-after",
        family="adamw",
        reference=f"torch {VERSION}: torch.optim.Adam(lr=0.01, betas=(0.85, 0.98), eps=0.001); then, written by hand, "
        "p = p (1 - lr 0.1), the order of bitsandbytes",
        config=session_config("ADAM", ADAM | _DECAY, formula="FORMULA_DECAY_AFTER", decoupled_weight_decay=True),
        build=torch_build(lambda params: DecayAfter(params, 0.1, **options)),
    )


def _relatives() -> Iterator[Case]:
    for rule, hyper in (
        ("NADAM", ADAM | {"decay": 0.01}),
        ("RADAM", ADAM | {"beta2": 0.99}),
        ("ADAMAX", ADAM),
    ):
        name = rule.lower()
        yield torch_case(f"{name}-defaults", name, rule)
        yield torch_case(name, name, rule, hyper)
        yield torch_case(f"{name}-l2", name, rule, hyper | _DECAY)
        yield torch_case(f"{name}-maximize", name, rule, hyper | _ASCENT)
        if rule != "ADAMAX":
            yield torch_case(f"{name}-decoupled", name, rule, hyper | _DECAY, optimizer=_DECOUPLED)
            yield torch_case(f"{name}-decoupled-maximize", name, rule, hyper | _DECAY | _ASCENT, optimizer=_DECOUPLED)


def _sgd() -> Iterator[Case]:
    def case(name: str, hyper: Any = None, **optimizer: Any) -> Case:
        return torch_case(f"sgd{name}", "sgd", "SGD", hyper, optimizer=optimizer)

    plain = {"lr": 0.02}
    moving = plain | {"momentum": 0.8}
    yield case("-defaults")
    yield case("", plain)
    yield case("-l2", plain | _DECAY)
    yield case("-maximize", plain | _ASCENT)
    yield case("-momentum", moving)
    yield case("-momentum-l2", moving | _DECAY)
    yield case("-momentum-l2-maximize", moving | _DECAY | _ASCENT)
    yield case("-dampening", moving | {"dampening": 0.3})
    yield case("-dampening-l2-maximize", moving | {"dampening": 0.3} | _DECAY | _ASCENT)
    yield case("-nesterov", moving, nesterov=True)
    yield case("-nesterov-l2", moving | _DECAY, nesterov=True)


def _rmsprop() -> Iterator[Case]:
    def case(name: str, hyper: Any = None, **optimizer: Any) -> Case:
        return torch_case(f"rmsprop{name}", "rmsprop", "RMSPROP", hyper, optimizer=optimizer)

    plain = {"lr": 0.005, "alpha": 0.95, "eps": 1e-3}
    moving = plain | {"momentum": 0.6}
    yield case("-defaults")
    yield case("", plain)
    yield case("-l2", plain | _DECAY)
    yield case("-maximize", plain | _ASCENT)
    yield case("-momentum", moving)
    yield case("-centered", plain, centered=True)
    yield case("-centered-momentum-l2", moving | _DECAY, centered=True)


def _sums() -> Iterator[Case]:
    plain = {"lr": 0.05, "eps": 1e-3}
    yield torch_case("adagrad-defaults", "adagrad", "ADAGRAD")
    yield torch_case("adagrad", "adagrad", "ADAGRAD", plain)
    yield torch_case("adagrad-lr-decay", "adagrad", "ADAGRAD", plain | {"decay": 0.01})
    start = {"initial_accumulator_value": 0.25}
    yield torch_case("adagrad-initial", "adagrad", "ADAGRAD", plain, optimizer=start)
    yield torch_case("adagrad-l2", "adagrad", "ADAGRAD", plain | _DECAY)
    yield torch_case("adagrad-maximize", "adagrad", "ADAGRAD", plain | _ASCENT)
    rho = {"lr": 0.5, "alpha": 0.85, "eps": 1e-4}
    yield torch_case("adadelta-defaults", "adadelta", "ADADELTA")
    yield torch_case("adadelta", "adadelta", "ADADELTA", rho)
    yield torch_case("adadelta-l2", "adadelta", "ADADELTA", rho | _DECAY)
    yield torch_case("adadelta-maximize", "adadelta", "ADADELTA", rho | _ASCENT)
