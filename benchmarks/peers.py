"""`make bench-peers`: stepwire beside other software for the same job, in one run on one described machine.

    python benchmarks/peers.py [--quick] [--json FILE]

A peer that is not installed is left out, with the reason. Quick mode is for checking the benchmark, not for quoting.
"""

from __future__ import annotations

import argparse
import contextlib
import pathlib
import sys
from typing import Any

import arrow_flight
import contest
import floors
import flower_messages
import local_torch
import ray_actor
import report
import variants
from contest import Contender, Ratios
from echo import echo_process
from goals import Goal
from sockets import socket_server
from stepwire_server.processes.spawn import server_process
from transports import section_name

__all__ = ["GOALS", "OURS", "RATIOS", "peers", "run"]

_SIZES = (1_000, 10_000, 1_000_000, 32_000_000)
_QUICK_SIZES = (1_000, 100_000)
_KIND = "peers"
OURS = ("tcp", "shm", "shm in place", "tcp overlap", "tcp bfloat16")
RATIOS: Ratios = {"local torch default to shm in place": ("local torch default", ("shm in place",))} | {
    f"{ours} to {peer}": (ours, (peer,))
    for ours in OURS
    for peer in (
        "local torch fused",
        "local torch default",
        "Ray actor",
        "Ray actor, read in place",
        "Arrow Flight duplex",
        "Flower messages",
    )
}
GOALS = (
    Goal("peers 32M", "shm in place to local torch fused", 1.15),
    Goal("peers 32M", "shm in place to Ray actor", 0.4),
    Goal("peers 32M", "local torch default to shm in place", 4.0, at_least=True),
    Goal("peers 1k", "tcp to Ray actor", 0.2),
)


def run(*, quick: bool) -> dict[str, dict[str, Any]]:
    """Run a contest at every size and return the sections."""
    results = {}
    with contextlib.ExitStack() as stack:
        server, echo = stack.enter_context(server_process("--device", "cpu")), stack.enter_context(echo_process())
        entrants = [
            *floors.socket_floors(stack.enter_context(socket_server())),
            *floors.grpc_floors(echo),
            *(variants.contender(variants.named(name), [server.target]) for name in OURS),
            *peers(),
        ]
        for size in _QUICK_SIZES if quick else _SIZES:
            result = contest.run_contest(entrants, size, rounds=2 if quick else 9, batch=contest.batch_of(size))
            results[section_name(_KIND, size)] = result.figures() | result.ratios(RATIOS)
    return results


def peers() -> list[Contender]:
    """Return the contenders of other software."""
    return [
        *local_torch.contenders(),
        *arrow_flight.contenders(),
        *ray_actor.contenders(),
        *flower_messages.contenders(),
    ]


def main() -> None:
    """Run, print, and write JSON with `--json`; exit with 1 if an installed contender failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a short form, to check the benchmark itself")
    parser.add_argument("--json", type=pathlib.Path, help="also write the figures here")
    arguments = parser.parse_args()
    results = run(quick=arguments.quick)
    print(report.text(results, GOALS))
    if arguments.json:
        report.keep(results, arguments.json)
    failed = report.failures(results)
    print(*(f"failed: {name}" for name in failed), sep="\n", end="\n" if failed else "", file=sys.stderr)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
