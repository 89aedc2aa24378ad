"""Adam without bias correction, which no framework here offers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from conformance.hand_reference import uncorrected_build
from conformance.sweep.variant import Variant
from stepwire.optimizers import Adam

__all__ = ["hand_variants"]


def hand_variants() -> Iterator[Variant]:
    """Yield all of them."""
    cases: list[tuple[str, dict[str, Any]]] = [
        ("", {}),
        (", beta1=0", {"betas": (0.0, 0.999)}),
        (", weight_decay=0.1", {"weight_decay": 0.1}),
        (", decoupled weight_decay=1e-5", {"weight_decay": 1e-5, "decoupled_weight_decay": True}),
    ]
    for name, options in cases:
        optimizer = Adam(formula="no_bias_correction", **options)
        build = uncorrected_build(
            lr=optimizer.lr,
            beta1=optimizer.betas[0],
            beta2=optimizer.betas[1],
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
            decoupled=optimizer.decoupled_weight_decay,
        )
        yield Variant(
            name=f"adam no_bias_correction{name}", framework="hand", optimizer=optimizer, build=build, short=not name
        )
