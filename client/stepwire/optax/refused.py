"""The transformations of optax that this package lacks: functions that refuse with the reason and the remedy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NoReturn

from stepwire.errors import UnsupportedFeatureError

__all__ = ["refusal"]

# The rules of optax that differ from the server's rules of the same names.
_DIFFERENT: Final = {
    "adagrad": "optax adds eps inside the root, the server's rule (torch's) outside; "
    "`remote(stepwire.Adagrad(...), learning_rate)` is that one",
    "adamaxw": "the server's Adamax has L2 decay and no decoupled one; use adamax or adamw",
    "radam": "optax adds eps to the corrected root, the server's rule (torch's) to the uncorrected one; "
    "`remote(stepwire.RAdam(...), learning_rate)` is that one",
    "lbfgs": "it evaluates the loss several times in one update, and a step has one gradient; use optax.lbfgs",
}

_NO_RULE: Final = frozenset(
    "adabelief adafactor adan fromage noisy_sgd novograd optimistic_adam optimistic_adam_v2 "
    "optimistic_gradient_descent polyak_sgd rprop sign_sgd signum sm3 yogi".split()
)

_SCALE_BY: Final = "scale_by_"
_WHOLE: Final = {
    "scale_by_adadelta": "adadelta(learning_rate)",
    "scale_by_adam": "adam(learning_rate)",
    "scale_by_adamax": "adamax(learning_rate)",
    "scale_by_amsgrad": "amsgrad(learning_rate)",
    "scale_by_lion": "lion(learning_rate)",
    "scale_by_rms": "rmsprop(learning_rate, eps_in_sqrt=False)",
    "scale_by_stddev": "rmsprop(learning_rate, eps_in_sqrt=False, centered=True)",
    "trace": "sgd(learning_rate, momentum)",
}


def refusal(name: str) -> Callable[..., NoReturn] | None:
    """Return a function that refuses a transformation of optax when it is called; None for other names."""
    if (reason := _reason(name)) is None:
        return None

    def refused(*args: Any, **kwargs: Any) -> NoReturn:
        raise UnsupportedFeatureError(
            f"{name}: stepwire.optax does not have it: {reason}", metadata={"field": name, "feature": name}
        )

    refused.__name__ = refused.__qualname__ = name
    refused.__doc__ = f"Refuse `optax.{name}`: {reason}."
    return refused


def _reason(name: str) -> str | None:
    if name in _DIFFERENT:
        return _DIFFERENT[name]
    if name in _NO_RULE:
        return f"a server has no such rule; use optax.{name}, with its state in the program"
    if name in _WHOLE:
        return (
            "it scales gradients and leaves the step to others, and a server applies whole steps; use "
            f"stepwire.optax.{_WHOLE[name]}, and scale by other factors before it in a chain"
        )
    if name.startswith(_SCALE_BY):
        return f"it scales in the program; use optax.{name} in an optax.chain with a transformation of stepwire.optax"
    return None
