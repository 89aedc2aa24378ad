"""Registers, stack and blocks of the GPU's kernels, as nvcc's assembler tells them; no device is needed.

    python benchmarks/gpu_kernels.py [--arch 75 90 100] [--only WORD …]

Needs nvcc: on the path, or installed beside by `pip install 'cuda-toolkit[nvcc,cudart]==13.*'`. The blocks of threads
that a multiprocessor holds at a time follow from registers, shared memory and threads. A device tells the same number
to the engine, which makes its grids of it.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import importlib.util
import itertools
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from typing import NamedTuple

from stepwire.optimizers import LAMB, SGD, Adam, Lion, Optimizer
from stepwire_server.engines.cuda.source import (
    COMPILE_OPTIONS,
    THREADS,
    Kernel,
    block_kernels,
    gradient_kernels,
    measure_kernel,
    module_source,
    update_kernel,
)
from stepwire_server.rules import EIGHT_BIT_SLOTS, Precision, Recipe, rule_for

__all__ = ["ARCHITECTURES", "Figures", "figures_of", "find_nvcc", "kernels", "main"]


class Multiprocessor(NamedTuple):
    """The limits of a multiprocessor.

    Attributes:
        registers: the registers of all threads.
        shared_bytes: the shared memory of all blocks.
        threads: the threads at a time.
        reserved_bytes: the shared memory that the system takes of each block.
    """

    registers: int
    shared_bytes: int
    threads: int
    reserved_bytes: int


# The tables of compute capabilities in the CUDA programming guide.
ARCHITECTURES = {
    "75": Multiprocessor(65_536, 64 << 10, 1024, 0),
    "90": Multiprocessor(65_536, 228 << 10, 2048, 1024),
    "100": Multiprocessor(65_536, 228 << 10, 2048, 1024),
}
_FIGURES = re.compile(
    r"entry function '(\w+)' for.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    r".*?Used (\d+) registers(?:[^\n]*?(\d+) bytes smem)?",
    re.DOTALL,
)


_OPTIONS: dict[str, dict[str, bool]] = {"": {}, "telemetry": {"measures": True}, "average": {"averages": True}}


class Figures(NamedTuple):
    """The assembler's figures of one kernel.

    Attributes:
        registers: the registers of a thread.
        stack_bytes: the stack of a thread.
        spilled_bytes: the bytes that are stored and loaded because registers ran out.
        shared_bytes: the shared memory of a block.
    """

    registers: int
    stack_bytes: int
    spilled_bytes: int
    shared_bytes: int

    def blocks(self, limits: Multiprocessor) -> int:
        """Return the blocks of threads that a multiprocessor holds at a time; registers come in eights."""
        by_registers = limits.registers // (-(-self.registers // 8) * 8 * THREADS)
        by_memory = limits.shared_bytes // max(self.shared_bytes + limits.reserved_bytes, 1)
        return min(by_registers, by_memory, limits.threads // THREADS)


def find_nvcc() -> str | None:
    """Return nvcc's path: that of the command, or of NVIDIA's packages beside."""
    if (found := shutil.which("nvcc")) is not None:
        return found
    spec = importlib.util.find_spec("nvidia")
    folders = [] if spec is None else [pathlib.Path(folder) for folder in spec.submodule_search_locations or ()]
    return next((str(path) for folder in folders for path in folder.glob("cu*/bin/nvcc")), None)


def kernels() -> dict[str, Kernel]:
    """Return a choice of kernels by names in words: each kind, in each precision of the moments."""
    chosen = {f"{'/'.join(words)}": kernel for words, kernel in _updates()}
    chosen |= {kernel.name: kernel for kernel in [*gradient_kernels(), *block_kernels()]}
    layerwise = Recipe(rule_for(LAMB(), momentum=False)[0])
    for precision in Precision:
        chosen[f"measure/lamb/{precision.name.lower()}"] = measure_kernel(layerwise.held(precision), "float32")
    return chosen


def _updates() -> Iterable[tuple[list[str], Kernel]]:
    rules: list[Optimizer] = [Adam(), Adam(amsgrad=True), Lion(), SGD(), LAMB()]
    for optimizer, precision, options in itertools.product(rules, Precision, _OPTIONS.items()):
        rule = rule_for(optimizer, momentum=True)[0]
        if precision is Precision.INT8 and not set(rule.slots) <= EIGHT_BIT_SLOTS.keys():
            continue
        word, flags = options
        for gradient in ("float32", "int8"):
            described = [rule.name, f"{precision.name.lower()} moments", *word.split(), f"{gradient} gradient"]
            yield described, update_kernel(Recipe(rule, precision=precision, **flags), gradient, "float32")


def figures_of(nvcc: str, chosen: Iterable[Kernel], arch: str) -> dict[str, Figures]:
    """Compile kernels for one architecture, and return their figures by the names of their entry points."""
    with tempfile.TemporaryDirectory() as folder:
        source = pathlib.Path(folder) / "kernels.cu"
        source.write_text(module_source(chosen))
        command = [nvcc, *COMPILE_OPTIONS, f"-arch=sm_{arch}", "-Xptxas=-v", "-cubin", "-o", os.devnull, str(source)]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"nvcc failed for sm_{arch}: {done.stderr.strip()}")
    found = _FIGURES.findall(done.stdout + done.stderr)
    return {
        name: Figures(int(registers), int(stack), int(stored) + int(loaded), int(shared or 0))
        for name, stack, stored, loaded, registers, shared in found
    }


def main() -> None:
    """Compile, and print a table for each architecture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--only", nargs="+", default=[], help="kernels whose name has all of these words")
    asked = parser.parse_args()
    if (nvcc := find_nvcc()) is None:
        sys.exit("nvcc is neither on the path nor installed: pip install 'cuda-toolkit[nvcc,cudart]==13.*'")
    chosen = {name: kernel for name, kernel in kernels().items() if all(word in name for word in asked.only)}
    print(f"{'kernel':<64}{'sm':>5}{'registers':>11}{'stack':>7}{'spilled':>9}{'shared':>8}{'blocks':>8}")
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        compiled = pool.map(lambda arch: figures_of(nvcc, chosen.values(), arch), asked.arch)
        for arch, found in zip(asked.arch, compiled, strict=True):
            for name, kernel in chosen.items():
                figures = found[kernel.name]
                blocks = figures.blocks(ARCHITECTURES[arch])
                print(
                    f"{name:<64}{arch:>5}{figures.registers:>11}{figures.stack_bytes:>7}{figures.spilled_bytes:>9}"
                    f"{figures.shared_bytes:>8}{blocks:>8}"
                )


if __name__ == "__main__":
    main()
