"""Histories by their seeds: `python -m tests.simulation.main --seeds 10000`."""

from __future__ import annotations

import argparse
import concurrent.futures
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Sequence

from stepwire_server.observability.logs import configure_logging
from tests.simulation.faults import Fault, shrunk
from tests.simulation.history import Broken, faults_of, run, shape_of


def failure_of(seed: int) -> str:
    """Let the history of a seed happen; return an account of its failure, empty without one."""
    configure_logging("critical", True)
    shape, faults = shape_of(seed), faults_of(seed)
    try:
        run(seed, shape, faults)
    except Broken as broken:
        kind = _kind(broken)

        def fails(fewer: Sequence[Fault]) -> bool:
            try:
                run(seed, shape, fewer)
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
    chosen = parser.parse_args()
    seeds, began, failed = range(chosen.first, chosen.first + chosen.seeds), time.monotonic(), 0
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(chosen.jobs, context, max_tasks_per_child=4) as pool:
        for account in pool.map(failure_of, seeds, chunksize=max(1, min(50, chosen.seeds // chosen.jobs // 4))):
            if account:
                failed += 1
                print(account, flush=True)
    print(f"seeds {seeds[0]} to {seeds[-1]}: {failed} failed, {time.monotonic() - began:.0f} s")
    return 1 if failed else 0


__all__ = ["failure_of", "main"]

if __name__ == "__main__":
    sys.exit(main())
