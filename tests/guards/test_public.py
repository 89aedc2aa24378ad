"""Guards of what is public: names, their order, their documentation."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

import stepwire
import stepwire_server
from tests.guards.source import modules_of

PUBLIC = [
    "LAMB",
    "LARS",
    "SGD",
    "TLS",
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "Aggregation",
    "AuthenticationError",
    "CheckpointInfo",
    "Client",
    "Contributor",
    "DataLossError",
    "DeadlineExceededError",
    "Durability",
    "FencedError",
    "GroupResult",
    "Hyperparameters",
    "InvalidRequestError",
    "Lion",
    "LossScaling",
    "Member",
    "NAdam",
    "NonFiniteGradientError",
    "NotEnoughWorkersError",
    "Optimizer",
    "PastStep",
    "PermissionDeniedError",
    "RAdam",
    "RMSprop",
    "Reason",
    "ResourceExhaustedError",
    "Retry",
    "RoundResult",
    "Rows",
    "Schedule",
    "ServerError",
    "ServerInfo",
    "ServerLoad",
    "Session",
    "SessionConfig",
    "SessionInfo",
    "SessionMovedError",
    "SessionNotFoundError",
    "SessionNotReadyError",
    "SessionProgress",
    "SessionStatistics",
    "Snapshot",
    "StateChangedError",
    "StateLossError",
    "Statistics",
    "StepMismatchError",
    "StepResult",
    "StepwireError",
    "Table",
    "TransportChoice",
    "UnavailableError",
    "UnsupportedFeatureError",
    "__version__",
    "connect",
    "move_session",
]


def order(name: str) -> tuple[bool, bool, str]:
    """Sort as ruff's RUF022 does: constants, classes, everything else."""
    return not name.isupper(), not name[0].isupper(), name


MODULES = [name for package in (stepwire, stepwire_server) for name in modules_of(package) if "_pb2" not in name]


@pytest.mark.parametrize("name", MODULES)
def test_every_module_says_what_it_offers(name: str) -> None:
    if name == "stepwire.v1":
        return  # a folder of generated code
    if "numba" in name:
        pytest.importorskip("numba")
    module = importlib.import_module(name)
    assert isinstance(module.__all__, list)
    assert module.__all__ == sorted(set(module.__all__), key=order)
    for public in module.__all__:
        assert getattr(module, public) is not None
        assert not public.startswith("_") or public == "__version__"


def test_the_public_names_are_these() -> None:
    assert stepwire.__all__ == PUBLIC
    assert dir(stepwire) == sorted(PUBLIC)
    namespace: dict[str, Any] = {}
    exec("from stepwire import *", namespace)
    assert set(PUBLIC) <= set(namespace)


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_is_documented_where_it_lives(name: str) -> None:
    value = getattr(stepwire, name)
    assert getattr(value, "__doc__", None)
    if name != "__version__":
        assert value.__module__.partition(".")[0] == "stepwire"


def test_a_name_that_is_none_is_told() -> None:
    with pytest.raises(AttributeError, match="module 'stepwire' has no attribute 'Sgd'"):
        stepwire.Sgd  # noqa: B018
