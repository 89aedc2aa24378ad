"""A new process on the GPU, as `gpu_sections.creation` starts it: seconds until it has a session's kernels, as JSON."""

from __future__ import annotations

import importlib
import json
import time
from typing import Any

from stepwire.optimizers import Adam
from stepwire.wire.dtypes import FLOAT32
from stepwire_server.engines import CudaEngine
from stepwire_server.rules import Recipe, rule_for

__all__ = ["seconds"]


def seconds(cupy: Any) -> dict[str, float]:
    """Start an engine, and make what a session of Adam with telemetry asks for."""
    started = time.perf_counter()
    engine = CudaEngine(0, cupy)
    running = time.perf_counter()
    engine.prepare(Recipe(rule_for(Adam(), momentum=False)[0], measures=True), FLOAT32, FLOAT32)
    done = time.perf_counter()
    engine.close()
    return {"engine": running - started, "kernels": done - running}


if __name__ == "__main__":
    print(json.dumps(seconds(importlib.import_module("cupy"))))
