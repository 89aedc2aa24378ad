"""Configs for tests of the domain: the contract's defaults, but for the fields that a test names."""

from __future__ import annotations

import dataclasses
from typing import Any

from stepwire.layout import TensorSpec, place
from stepwire.optimizers import Adam
from stepwire.optimizers.gradient_treatment import GradientTreatment
from stepwire.wire.dtypes import FLOAT32
from stepwire_server.records.session_config import SessionConfig
from stepwire_server.rules import Precision, Recipe


def recipes_of(config: SessionConfig) -> list[Recipe]:
    """Return the arithmetic of a session's steps with its own numbers."""
    return list(dict.fromkeys(config.recipe(hyper) for hyper in config.groups))


def make_config(*specs: TensorSpec, **fields: Any) -> SessionConfig:
    """Make the config of a session that starts from zeros; schedules and bounds are None for each group.

    With a precision other than float32, all tensors have it.
    """
    optimizer = fields.pop("optimizer", Adam())
    groups = fields.pop("groups", (optimizer.hyperparameters(),))
    precision = fields.get("precision", Precision.FLOAT32)
    if precision is not Precision.FLOAT32:
        specs = tuple(dataclasses.replace(spec, state_precision=precision.value) for spec in specs)
    defaults: dict[str, Any] = {
        "layout": place(specs, len(groups)),
        "optimizer": optimizer,
        "groups": groups,
        "schedules": (None,) * len(groups),
        "group_clips": (None,) * len(groups),
        "treatment": GradientTreatment(),
        "precision": precision,
        "group_precisions": (precision,) * len(groups),
        "measures": True,
        "gradient_dtype": FLOAT32,
        "reply_dtype": FLOAT32,
        "start_at_zero": True,
        "lease_seconds": 60.0,
        "label": "",
    }
    return SessionConfig(**defaults | fields)
