"""A process whose device fails for good, and what becomes of its sessions: `python -m tests.support.sticky_child`.

An illegal address ends all work of a process on its GPU, so it needs a process of its own. The outcomes are one line of
JSON.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from stepwire.errors import StepwireError
from stepwire_server.engines import CudaEngine
from stepwire_server.engines.cuda.gradient import CudaChunk
from stepwire_server.engines.protocol import PARAM
from stepwire_server.rules import Precision, Recipe
from tests.support import cuda_cases as cases

__all__ = ["outcomes", "read_nowhere"]

_SIZE = 100_003
_NOWHERE = 0xDEAD0000000


def read_nowhere(state: Any) -> None:
    """Ask for an update with a gradient at an address that no memory has."""
    chunk = CudaChunk(np.dtype(np.float32), _NOWHERE, _SIZE, None, state.receive())
    state.update(cases.step_of(Recipe(cases.RULES[0])), 0, chunk, 0, _SIZE, None).wait()


def outcomes(engine: Any, break_device: Callable[[Any], None]) -> dict[str, str]:
    """Break the device of two sessions, and return the outcome of each call afterwards.

    Args:
        engine: the engine; it is closed.
        break_device: does what the device does not survive, with one of the sessions.

    Returns:
        The reason of the error by the name of the call; "done" for a call that returns, "slow" for one that took more
        than seconds. The value of "told" is how often the loss was told.
    """
    told: list[Any] = []
    engine.on_lost(told.append)
    slots, values = cases.slots_of(Recipe(cases.RULES[0])), np.ones(_SIZE, np.float32)
    broken, beside = (engine.allocate(slots, _SIZE) for _ in range(2))
    calls: dict[str, Callable[[], Any]] = {
        "break": lambda: (break_device(broken), broken.settle()),
        "settle": broken.settle,
        "put beside": lambda: beside.receive().put(0, values),
        "write beside": lambda: beside.write(PARAM, 0, values),
        "settle beside": beside.settle,
        "allocate": lambda: engine.allocate({PARAM: Precision.FLOAT32}, 1000),
        "export": lambda: engine.export(2 << 20),
        "close": broken.close,
        "close beside": beside.close,
        "close engine": engine.close,
    }
    found = {name: _outcome(call) for name, call in calls.items()}
    return found | {"told": str(len(told))}


def _outcome(call: Callable[[], Any]) -> str:
    begun = time.monotonic()
    try:
        call()
    except StepwireError as problem:
        return problem.reason.name
    except Exception as problem:
        return f"{type(problem).__name__}: {problem}"
    return "done" if time.monotonic() - begun < 10.0 else "slow"


def main() -> None:
    """Break the first GPU of this process."""
    print(json.dumps(outcomes(CudaEngine(0), read_nowhere)))
    sys.stdout.flush()
    os._exit(0)  # the context is beyond repair, and freeing its memory fails


if __name__ == "__main__":
    main()
