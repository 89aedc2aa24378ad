"""Short experiments on a GPU, whose outcomes decide constants and open questions of the engine. Unverified on a GPU.

    python benchmarks/gpu_experiments.py [--only NAME …] [--seconds SECONDS]

Needs what `gpu.py` needs. Each outcome is one line of JSON, on the output and in results/<device>-experiments.jsonl. An
experiment for which the time is too short is named with the reason, and one that fails leaves the others.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import pathlib
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TextIO

import gpu_trials
from gpu_clock import Clock
from gpu_trials import Outcome, Workbench
from stepwire_server.engines import CudaEngine

__all__ = ["EXPERIMENTS", "main", "run"]

Experiment = Callable[[Workbench], Outcome]

# By weight: what changes the code most comes first.
EXPERIMENTS: Mapping[str, Experiment] = {
    "environment": gpu_trials.environment,
    "sums": gpu_trials.sums,
    "pieces": gpu_trials.pieces,
    "grids": gpu_trials.grids,
    "stalls": gpu_trials.stalls,
    "pinning": gpu_trials.pinning,
    "waits": gpu_trials.waits,
    "shortage": gpu_trials.shortage,
}


def run(
    bench: Workbench, chosen: Mapping[str, Experiment], seconds: float, outputs: list[TextIO]
) -> Iterator[tuple[str, Outcome]]:
    """Run experiments as long as time is left, write a line of each, and yield it."""
    end = time.monotonic() + seconds
    for name, experiment in chosen.items():
        outcome: Outcome
        begun = time.perf_counter()
        try:
            if time.monotonic() > end:
                outcome = {"left_out": f"the {seconds:.0f} seconds were over"}
            else:
                outcome = experiment(bench) | {"seconds": round(time.perf_counter() - begun, 2)}
        except Exception as problem:  # the experiments after it are worth having all the same
            traceback.print_exc()
            outcome = {"error": f"{type(problem).__name__}: {problem}"}
        bench.tidy()
        for output in outputs:
            print(json.dumps({"experiment": name, **outcome}), file=output, flush=True)
        yield name, outcome


def main() -> None:
    """Run the experiments, and write their outcomes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS), metavar="NAME")
    parser.add_argument("--seconds", type=float, default=120.0, help="no experiment is begun after these")
    asked = parser.parse_args()
    try:
        cupy: Any = importlib.import_module("cupy")
    except ImportError as problem:
        sys.exit(f"no experiments: CuPy cannot be imported ({problem})")
    if not cupy.cuda.is_available():
        sys.exit("no experiments: CUDA sees no device")
    engine = CudaEngine(0, cupy)
    with contextlib.closing(engine), _results(engine).open("w") as file:
        bench = Workbench(engine, Clock(engine._resources.device, 256 << 20))
        chosen = {name: EXPERIMENTS[name] for name in EXPERIMENTS if name in asked.only}
        outcomes = dict(run(bench, chosen, asked.seconds, [sys.stdout, file]))
    sys.exit(1 if any("error" in outcome for outcome in outcomes.values()) else 0)


def _results(engine: CudaEngine) -> pathlib.Path:
    folder = pathlib.Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    name = re.sub(r"[^a-z0-9]+", "-", engine.device.description.lower()).strip("-")
    return folder / f"{name}-experiments.jsonl"


if __name__ == "__main__":
    main()
