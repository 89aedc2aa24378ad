"""Adam and AdamW of Keras, with numbers at their edges."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from conformance.keras_reference import keras, keras_build
from conformance.sweep.variant import Variant
from stepwire.optimizers import Adam, AdamW, Optimizer

__all__ = ["keras_variants"]


def _variant(name: str, optimizer: Optimizer, kind: Any, options: Any, **fields: Any) -> Variant:
    build = keras_build(lambda: kind(**options))
    return Variant(name=f"{name} keras", framework="keras", optimizer=optimizer, build=build, **fields)


def keras_variants() -> Iterator[Variant]:
    """Yield all of them."""
    adam, adamw = keras.optimizers.Adam, keras.optimizers.AdamW
    yield _variant("adam", Adam(formula="keras"), adam, {})
    yield _variant("amsgrad", Adam(formula="keras", amsgrad=True), adam, {"amsgrad": True})
    yield _variant("adam, beta1=0", Adam(formula="keras", betas=(0.0, 0.999)), adam, {"beta_1": 0.0})
    for decay in (4e-3, 1e-5):
        yield _variant(
            f"adamw, weight_decay={decay}",
            AdamW(formula="keras", weight_decay=decay),
            adamw,
            {"weight_decay": decay},
            bank="long",
            steps=300,
            long_steps=8_000,
        )
