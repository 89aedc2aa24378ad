"""Runs one case of a sweep three times: in the framework in float64, in the framework in float32, and in stepwire."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import warnings
from collections.abc import Iterator, Mapping

import numpy as np

from conformance.inputs import Tensors
from conformance.sweep.regimes import make_inputs
from conformance.sweep.session import LocalSession
from conformance.sweep.variant import Variant
from stepwire_server.engines import Engine

__all__ = ["Runs", "run"]

_TOGETHER = "all"


@dataclasses.dataclass(frozen=True)
class Runs:
    """The numbers of one case after every step, `(steps + 1, elements)`; the first are those before.

    Attributes:
        exact: of the framework in float64.
        framework: of the framework in float32.
        stepwire: of stepwire.
        regimes: the elements of each regime.
    """

    exact: np.ndarray
    framework: np.ndarray
    stepwire: np.ndarray
    regimes: Mapping[str, slice]


def run(variant: Variant, engine: Engine, steps: int, seed: int) -> Runs:
    """Run a case.

    Args:
        variant: the case.
        engine: the engine that steps stepwire's session.
        steps: the number of steps.
        seed: of the inputs.
    """
    initial, gradients = make_inputs(variant.bank, steps, seed)
    regimes, at = {}, 0
    for name, values in initial.items():
        regimes[name] = slice(at, at + len(values))
        at += len(values)
    if variant.loss_scale != 1.0:
        gradients = {name: values * np.float32(variant.loss_scale) for name, values in gradients.items()}
    if not (variant.layerwise or variant.precision == "int8"):
        initial = {_TOGETHER: np.concatenate(list(initial.values()))}
        gradients = {_TOGETHER: np.concatenate(list(gradients.values()), axis=1)}
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Runs(
            _of_framework(variant, initial, gradients, "float64"),
            _of_framework(variant, initial, gradients, "float32"),
            _of_stepwire(variant, initial, gradients, engine),
            regimes,
        )


def _of_framework(variant: Variant, initial: Tensors, gradients: Tensors, dtype: str) -> np.ndarray:
    with _own_torch():
        reference = variant.build(initial, dtype)
        (steps, *_) = next(iter(gradients.values())).shape
        rows = [np.concatenate(list(initial.values())).astype(dtype)]
        for step in range(steps):
            reference.step(step + 1, {name: values[step].astype(dtype) for name, values in gradients.items()})
            tensors = reference.parameters() if variant.slot == "param" else reference.slots()[variant.slot]
            rows.append(np.concatenate([tensors[name] for name in initial]))
    return np.stack(rows)


def _of_stepwire(variant: Variant, initial: Tensors, gradients: Tensors, engine: Engine) -> np.ndarray:
    treatment = {"non_finite": "allow", **variant.treatment}
    with LocalSession(engine, variant.optimizer, initial, treatment, variant.precision) as session:
        flat = session.packed(gradients)
        rows = [np.concatenate(list(initial.values()))]
        for step, gradient in enumerate(flat, 1):
            session.step(step, gradient, variant.numbers.get(step, {}), variant.loss_scale)
            values = session.values if variant.slot == "param" else session.slot(variant.slot)
            rows.append(np.concatenate(list(session.unpacked(values).values())))
    return np.stack(rows)


@contextlib.contextmanager
def _own_torch() -> Iterator[None]:
    """Leave torch's default precision, which its references set, as it was; its threads would only wait."""
    if importlib.util.find_spec("torch") is None:
        yield
        return
    import torch

    precision, threads = torch.get_default_dtype(), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_default_dtype(precision)
        torch.set_num_threads(threads)
