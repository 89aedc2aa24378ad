"""stepwire: the optimizer as a service.

    with stepwire.connect("localhost:50051") as client:
        session = client.create_session({"w": w}, optimizer=stepwire.Adam(lr=1e-3))
        params = session.step({"w": gradient})

Names are loaded when first used. So the server's domain, which uses the errors and the layout of this package, never
loads gRPC through this package.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from stepwire.lifetimes import endings as _endings  # noqa: F401 - registers before functions of the program
from stepwire.version import __version__

if TYPE_CHECKING:
    from stepwire.arrays.rows import Rows, Table
    from stepwire.client import Client
    from stepwire.connecting import connect, move_session
    from stepwire.connection.retry import Retry
    from stepwire.connection.security import TLS
    from stepwire.errors import (
        AuthenticationError,
        DataLossError,
        DeadlineExceededError,
        FencedError,
        InvalidRequestError,
        NonFiniteGradientError,
        NotEnoughWorkersError,
        PermissionDeniedError,
        Reason,
        ResourceExhaustedError,
        ServerError,
        SessionMovedError,
        SessionNotFoundError,
        SessionNotReadyError,
        StateChangedError,
        StateLossError,
        StepMismatchError,
        StepwireError,
        UnavailableError,
        UnsupportedFeatureError,
    )
    from stepwire.optimizers import (
        LAMB,
        LARS,
        SGD,
        Adadelta,
        Adagrad,
        Adam,
        Adamax,
        AdamW,
        Hyperparameters,
        Lion,
        NAdam,
        Optimizer,
        RAdam,
        RMSprop,
    )
    from stepwire.optimizers.aggregation import Aggregation
    from stepwire.optimizers.durability import Durability
    from stepwire.optimizers.gradient_treatment import LossScaling
    from stepwire.optimizers.schedules import Schedule
    from stepwire.results import (
        CheckpointInfo,
        Member,
        ServerInfo,
        SessionConfig,
        SessionInfo,
        SessionStatistics,
        Snapshot,
        TransportChoice,
    )
    from stepwire.session import Session
    from stepwire.statistics import ServerLoad, SessionProgress, Statistics
    from stepwire.step_result import Contributor, GroupResult, PastStep, RoundResult, StepResult

__all__ = [
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

_HOMES = {
    "Client": "client",
    "connect": "connecting",
    "move_session": "connecting",
    **dict.fromkeys(("Adam", "AdamW", "NAdam", "RAdam", "Adamax", "SGD", "Lion", "RMSprop"), "optimizers"),
    **dict.fromkeys(("Adagrad", "Adadelta", "LAMB", "LARS", "Optimizer", "Hyperparameters"), "optimizers"),
    "CheckpointInfo": "results",
    **dict.fromkeys(("Contributor", "GroupResult", "PastStep", "RoundResult", "StepResult"), "step_result"),
    "Member": "results",
    **dict.fromkeys(("Rows", "Table"), "arrays.rows"),
    "ServerInfo": "results",
    "SessionConfig": "results",
    "SessionInfo": "results",
    "SessionStatistics": "results",
    "Snapshot": "results",
    "TransportChoice": "results",
    **dict.fromkeys(("ServerLoad", "SessionProgress", "Statistics"), "statistics"),
    "Retry": "connection.retry",
    "TLS": "connection.security",
    "Aggregation": "optimizers.aggregation",
    "Durability": "optimizers.durability",
    "Schedule": "optimizers.schedules",
    "Session": "session",
    "LossScaling": "optimizers.gradient_treatment",
}


def __getattr__(name: str) -> object:
    """Load a public name from its module on first use."""
    if name not in __all__:
        raise AttributeError(f"module 'stepwire' has no attribute {name!r}")
    value: object = getattr(importlib.import_module(f"stepwire.{_HOMES.get(name, 'errors')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names."""
    return __all__
