"""The two forms of Adam that no framework here offers, written from their equations.

Without bias correction (Devlin et al. 2019, BERT):

    m = m + (1 - beta1)(g - m),  v = beta2 v + (1 - beta2) g²,  p = p - lr (m / (sqrt(v) + eps) + wd p)

Decay after the update (bitsandbytes): torch's update, then p = p (1 - lr wd). Here torch itself makes the update.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from conformance.case import Build, Json
from conformance.inputs import Tensors

__all__ = ["UncorrectedAdam", "uncorrected_build"]


class UncorrectedAdam:
    """Adam with c1 = c2 = 1.

    Args:
        initial: the parameters.
        dtype: "float64" or "float32".
        lr, beta1, beta2, eps, weight_decay: as in the equations.
        decoupled: the decay is added to the update, as BERT does, instead of g = g + wd p.
        maximize: g = -g comes first.
    """

    def __init__(
        self,
        initial: Tensors,
        dtype: str,
        *,
        lr: float = 1e-3,
        beta1: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        decoupled: bool = False,
        maximize: bool = False,
    ) -> None:
        """Start from zero moments."""
        self._p = {name: value.astype(dtype) for name, value in initial.items()}
        self._m = {name: np.zeros_like(value) for name, value in self._p.items()}
        self._v = {name: np.zeros_like(value) for name, value in self._p.items()}
        self._lr, self._beta1, self._beta2, self._eps = lr, beta1, beta2, eps
        self._decay, self._decoupled, self._sign = weight_decay, decoupled, -1.0 if maximize else 1.0

    def step(self, number: int, gradients: Mapping[str, np.ndarray | None]) -> Json:
        """Apply one step."""
        for name, p in self._p.items():
            g = self._sign * np.asarray(gradients[name], p.dtype)
            if not self._decoupled:
                g = g + self._decay * p
            m = self._m[name] = self._m[name] + (1 - self._beta1) * (g - self._m[name])
            v = self._v[name] = self._beta2 * self._v[name] + (1 - self._beta2) * g * g
            update = m / (np.sqrt(v) + self._eps)
            self._p[name] = p - self._lr * (update + self._decay * p if self._decoupled else update)
        return {}

    def parameters(self) -> Tensors:
        """Return the parameters."""
        return dict(self._p)

    def slots(self) -> dict[str, Tensors]:
        """Return the moments."""
        return {"exp_avg": dict(self._m), "exp_avg_sq": dict(self._v)}

    def tensor_steps(self) -> dict[str, int]:
        """Return nothing: this form needs no count."""
        return {}


def uncorrected_build(**options: float | bool) -> Build:
    """Return a function that builds this reference from parameters and a precision."""
    return lambda initial, dtype: UncorrectedAdam(initial, dtype, **options)  # type: ignore[arg-type]
