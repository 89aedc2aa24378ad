"""Histories by their seeds: `python -m tests.simulation.main --seeds 10000`."""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from stepwire_server.observability.logs import configure_logging
from tests.simulation.faults import shrunk
from tests.simulation.history import Broken, faults_of, run, shape_of
from tests.simulation.move_history import moving_faults_of, moving_shape_of, run_moving
from tests.simulation.pair_history import pair_faults_of, pair_shape_of, run_pair

_IN_ONE_PROCESS = 25
"""The histories of one process: each leaves a little memory behind."""


HISTORIES: dict[str, tuple[Any, Any, Any]] = {
    "clusters": (shape_of, faults_of, run),
    "pairs": (pair_shape_of, pair_faults_of, run_pair),
    "moves": (moving_shape_of, moving_faults_of, run_moving),
}
"""By the kind of a history: its shape and its faults, by the seed, and the function that lets it happen."""


def failure_of(seed: int, histories: str = "clusters") -> str:
    """Let the history of a seed happen; return an account of its failure, empty without one."""
    configure_logging("critical", True)
    shapes, chosen, happen = HISTORIES[histories]
    shape, faults = shapes(seed), chosen(seed)
    try:
        happen(seed, shape, faults)
    except Broken as broken:
        kind = _kind(broken)

        def fails(fewer: Sequence[Any]) -> bool:
            try:
                happen(seed, shape, fewer)
            except Broken as other:
                return _kind(other) == kind
            return False

        lines = [f"seed {seed}, {shape}:", f"  {broken}", *(f"  {fault}" for fault in shrunk(faults, fails))]
        return "\n".join(lines)
    return ""


def _kind(broken: Broken) -> str:
    """Return the account of a failure without its numbers: with fewer faults it may be the same at another step."""
    return re.sub(r"[0-9.]+|\{[^}]*\}|'[^']*'", "", str(broken))


def main() -> int:
    """Run histories, and print those that fail with the faults that matter."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=100, help="the number of histories")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="histories at a time")
    parser.add_argument("--histories", choices=HISTORIES, default="clusters", help="the kind of the histories")
    chosen = parser.parse_args()
    seeds, began = range(chosen.first, chosen.first + chosen.seeds), time.monotonic()
    if len(seeds) <= _IN_ONE_PROCESS:
        accounts = [account for seed in seeds if (account := failure_of(seed, chosen.histories))]
        print("\n".join(accounts), end="\n" if accounts else "")
        return 1 if accounts else 0
    failed = 0
    with concurrent.futures.ThreadPoolExecutor(chosen.jobs) as pool:
        blocks = [seeds[start : start + _IN_ONE_PROCESS] for start in range(0, len(seeds), _IN_ONE_PROCESS)]
        for block, done in zip(blocks, pool.map(functools.partial(_elsewhere, chosen.histories), blocks), strict=True):
            print(done.stdout, end="", flush=True)
            if done.returncode:
                failed += 1
                print(f"seeds {block[0]} to {block[-1]}: exit code {done.returncode}\n{done.stderr}", flush=True)
    print(f"seeds {seeds[0]} to {seeds[-1]}: {failed} of {len(blocks)} blocks failed, {time.monotonic() - began:.0f} s")
    return 1 if failed else 0


def _elsewhere(histories: str, block: range) -> subprocess.CompletedProcess[str]:
    """Run a block of histories in a process of its own, since each leaves a little memory behind."""
    command = [sys.executable, "-m", "tests.simulation.main", "--first", str(block[0]), "--seeds", str(len(block))]
    command += ["--histories", histories]
    return subprocess.run(command, capture_output=True, text=True, check=False)


if __name__ == "__main__":
    sys.exit(main())
