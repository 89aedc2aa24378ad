"""`make gpu`: the CUDA engine beside the copy speed of the same device, and torch's fused Adam. Unverified on a GPU.

    python benchmarks/gpu.py [--quick]

Needs a CUDA device with CuPy, NumPy, grpcio, protobuf and ml_dtypes; installs nothing. torch is compared with where it
is installed. Writes results/<device>.json after every section, so that nothing is lost when the machine is.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pathlib
import re
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

import machine
from gpu_bus import bus
from gpu_clock import Clock, Extent, Gpu, Skipped
from gpu_ipc import StartClient, ipc
from gpu_sections import GUARD_ERROR, Figures, creation, guard, kernel, many_small, memory, moments
from gpu_torch import TorchSide
from stepwire_server.engines import CudaEngine

__all__ = ["GOALS", "Results", "main", "report", "run"]

QUICK = Extent(sizes=(1_000_000, 10_000_000), bus_sizes=(10_000_000,), rounds=5, bus_rounds=2, pipeline_steps=4)
_NO_TORCH = "torch is not installed"


class Goal(NamedTuple):
    """A bound for a figure of a section, at every size of it."""

    section: str
    figure: str
    bound: float
    at_least: bool = False

    def met(self, value: float) -> bool:
        """Tell whether a figure keeps the bound."""
        return value >= self.bound if self.at_least else value <= self.bound


GOALS = (
    Goal("kernel", "fraction_of_copy", 0.92, at_least=True),
    Goal("kernel", "telemetry_fraction_of_copy", 0.92, at_least=True),
    Goal("kernel", "ratio_torch", 1.0),
    Goal("kernel", "ratio_torch_bfloat16", 0.75),
    Goal("moments", "ratio_int8", 0.65),
    Goal("many_small", "ratio_torch", 0.5),
    Goal("bus", "pinned_two_sessions_by_slower_copy", 1.1),
    Goal("bus", "pinned_step_by_both_copies", 1.1),
    Goal("memory", "rest_bytes", 12.5),
)


class Results:
    """Figures by section, and reasons where there are none.

    Attributes:
        figures: of each section, in the order in which they ran; none of one that did not.
        reasons: why a section has no figures.
        failed: a section ended in an error, which has been printed.
    """

    def __init__(self) -> None:
        """Start with nothing."""
        self.figures: dict[str, Figures] = {}
        self.reasons: dict[str, str] = {}
        self.failed = False

    def reason(self, section: str) -> str:
        """Say why a figure is missing; in a section that has others, only torch's can be."""
        return self.reasons.get(section, _NO_TORCH)


def run(
    gpu: Gpu,
    keep: Callable[[Results], None] = lambda results: None,
    child: Any = None,
    client: StartClient | None = None,
) -> Results:
    """Run every section, as long as time is left.

    Args:
        gpu: the device with its extent.
        keep: called with the results after each section.
        child: see `creation`.
        client: see `ipc`.
    """
    results, end = Results(), time.monotonic() + gpu.extent.seconds
    for name, section in _sections(gpu, child, client):
        try:
            if time.monotonic() > end:
                raise Skipped(f"the benchmark's {gpu.extent.seconds:.0f} seconds were over")
            results.figures[name] = section()
        except Skipped as skipped:
            results.figures[name], results.reasons[name] = {}, str(skipped)
        except Exception as problem:  # the sections after it are worth having all the same
            traceback.print_exc()
            results.failed = True
            results.figures[name], results.reasons[name] = {}, f"{type(problem).__name__}: {problem}"
        keep(results)
        error = results.figures[name].get("relative_error") if name == "guard" else None
        if error is not None and not error <= GUARD_ERROR:
            sys.exit(f"ten steps are {error:.2g} off, more than {GUARD_ERROR}: a wrong kernel is not measured")
    return results


def _sections(gpu: Gpu, child: Any, client: StartClient | None) -> Iterator[tuple[str, Callable[[], Figures]]]:
    yield "guard", lambda: guard(gpu)
    yield "creation", lambda: creation(child)
    yield "many_small", lambda: many_small(gpu)
    for size in gpu.extent.sizes:
        yield f"kernel {_millions(size)}", lambda size=size: kernel(gpu, size)
    for size in gpu.extent.sizes:
        yield f"moments {_millions(size)}", lambda size=size: moments(gpu, size)
    for size in gpu.extent.sizes:
        yield f"ipc {_millions(size)}", lambda size=size: ipc(gpu, size, client)
    for size in gpu.extent.bus_sizes:
        yield f"bus {_millions(size)}", lambda size=size: bus(gpu, size)
    yield "memory", lambda: memory(gpu)


def report(described: dict[str, dict[str, Any]], results: Results) -> str:
    """Lay the figures out, and the goals with what was reached."""
    lines = [f"{name:>20}  {value}" for values in described.values() for name, value in values.items()]
    for section, figures in results.figures.items():
        lines += ["", section if figures else f"{section}: not measured, {results.reason(section)}"]
        for name, value in figures.items():
            lines.append(f"  {name:<40} {results.reason(section) if value is None else f'{value:,.3f}'}")
    return "\n".join([*lines, "", "goals", *_judged(results)])


def _judged(results: Results) -> Iterator[str]:
    for goal in GOALS:
        for section, figures in results.figures.items():
            if section.split()[0] == goal.section:
                value, name = figures.get(goal.figure), f"{section}.{goal.figure}"
                if value is None:
                    yield f"  {name:<50} not measured: {results.reason(section)}"
                else:
                    sign, status = ">=" if goal.at_least else "<=", "met" if goal.met(value) else "missed"
                    yield f"  {name:<50} {value:.3f} {sign} {goal.bound}  {status}"


def main() -> None:
    """Measure, print, and write the results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a short form, to check the benchmark itself")
    extent = QUICK if parser.parse_args().quick else Extent()
    try:
        cupy = importlib.import_module("cupy")
    except ImportError as problem:
        sys.exit(f"no GPU benchmark: CuPy cannot be imported ({problem})")
    if not cupy.cuda.is_available():
        sys.exit("no GPU benchmark: CUDA sees no device")
    engine = CudaEngine(0, cupy)
    device = engine._resources.device
    torch = TorchSide.installed(device.index, device.compute.ptr)
    gpu = Gpu(engine, Clock(device, extent.wiped_bytes), torch, extent)
    described = {"machine": machine.describe(), "device": _describe(gpu)}
    results = run(gpu, lambda results: _write(described, results))
    print(report(described, results))
    engine.close()
    sys.exit(1 if results.failed else 0)


def _describe(gpu: Gpu) -> dict[str, Any]:
    cupy, torch = gpu.device.cupy, gpu.torch
    runtime = cupy.cuda.runtime
    return {
        "name": gpu.device.description,
        "compute_capability": cupy.cuda.Device(gpu.device.index).compute_capability,
        "multiprocessors": gpu.device.multiprocessors,
        "free_memory_bytes": gpu.engine.device.memory_bytes,
        "driver": _driver(),
        "driver_cuda": runtime.driverGetVersion(),
        "runtime": runtime.runtimeGetVersion(),
        "cupy": cupy.__version__,
        "numpy": np.__version__,
        "torch": None if torch is None else torch.torch.__version__,
    }


def _driver() -> str | None:
    """Return the driver's own version, which CUDA does not tell."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    told = subprocess.run(query, capture_output=True, text=True, timeout=60).stdout.split()
    return told[0] if told else None


def _write(described: dict[str, dict[str, Any]], results: Results) -> None:
    folder = pathlib.Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    name = re.sub(r"[^a-z0-9]+", "-", described["device"]["name"].lower()).strip("-")
    text = json.dumps({**described, **results.figures, "reasons": results.reasons}, indent=2)
    (folder / f"{name}.json").write_text(text + "\n")


def _millions(size: int) -> str:
    return f"{size / 1e6:g}M"


if __name__ == "__main__":
    main()
