"""`make bench`: stepwire beside its floors, in one run on one described machine.

    python benchmarks/main.py [--quick] [--json FILE] [--data-dir DIR] [--only SECTION …]

Quick mode runs every section in a short form; its figures are for checking the benchmark, not for quoting. A section
that fails prints its error and does not stop the others; the exit code is then 1. `peers.py` compares with other
projects, `wire_encodings.py` and `convergence.py` measure the cost of rounding in training, and
`workers_convergence.py` that of several workers.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import pathlib
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import durability
import fairness
import floods
import footprint
import kernels
import lane
import lane_many
import lane_python
import lane_torch
import many
import messages
import metrics
import moves
import occupancy
import own_arrays
import report
import row_steps
import sections
import security
import shards
import standby
import transports
from contest import Contender, failure
from doorbell import doorbell_process
from echo import echo_process
from goals import Goal
from shaped_link import shaped_link
from sockets import socket_server
from stepwire_server.processes.spawn import ServerProcess, server_process
from torch_step import torch_step
from variants import TRANSPORTS
from workers import straggler, workers

__all__ = ["GOALS", "Run"]

Figures = dict[str, Any]
_LARGE = 32_000_000
_SIZES = (1_000, 10_000, 1_000_000, _LARGE)
_TORCH = 25_000_000
_OWN_ARRAYS = 23_000_000
_QUICK_LARGE = 1_000_000
_QUICK_SIZES = (1_000, 100_000)
_QUICK_VARIANTS = ("tcp", "shm in place")
_OCCUPIED = (*TRANSPORTS, "tcp overlap", "tcp bfloat16", "tcp int8 up, bfloat16 down")
# The largest memory of a step beyond its need, and the largest growth after 10,000 steps: pages that the allocator
# keeps.
_EXCESS_MIB = 64.0
_GROWTH_KIB = 1024.0
_LARGE_STEPS, _SMALL_STEPS, _LARGE_WORKERS = "transports 32M", "transports 1k", "workers 32M"

GOALS = (
    Goal("small_step", "ratio_p50", 1.25),
    Goal("small_step", "ratio_p99", 1.5),
    Goal("large_step", "ratio", 1.05),
    Goal("memory", "rest_bytes", 12.5),
    Goal("memory", "peak_bytes", 17.0),
    Goal("lane", lane.ECHO_GOAL, 0.9),
    Goal("lane", lane.COMPILED_ECHO_GOAL, 0.25),
    Goal("lane", lane.COMPILED_DOORBELL_GOAL, 1.5),
    Goal("lane", lane.COMPILED_TORCH_GOAL, 1.3),
    Goal("lane many", lane_many.COMPILED_TO_TCP, 20.0, at_least=True),
    Goal("lane many", lane_many.COMPILED_JAIN, 0.95, at_least=True),
    Goal("lane python", lane_python.DICT_GOAL, 15.0),
    Goal("lane torch", lane_torch.VIEWS_GOAL, 1.5),
    Goal("lane torch", lane_torch.DEFAULT_GOAL, 1.0),
    Goal(_LARGE_STEPS, "tcp to its parts", 1.05),
    Goal(_LARGE_STEPS, "tcp overlap to its parts", 1.05),
    Goal(_LARGE_STEPS, "bfloat16 to tcp", 0.55),
    Goal(_SMALL_STEPS, "shm to tcp", 1.0),
    Goal("own arrays", "new arrays to fused", 2.0),
    Goal("own arrays", "in place to fused", 1.15),
    Goal("torch step", "shm views to fused", 1.25),
    Goal("torch step", "tcp to its parts", 1.2),
    Goal("durability", durability.JOURNAL_TO_PARTS, 0.95),
    Goal("durability", "small journalled step to its parts", 1.0),
    Goal("durability", "64 sessions, sync delayed to 2 ms", 8.0, at_least=True),
    Goal("durability", "checkpoint stall to copy", 0.3),
    Goal("durability", "checkpoint growth MiB", _EXCESS_MIB),
    Goal("durability", "recovery to its parts", 0.7, at_least=True),
    Goal("metrics", "scrape p50 ms", 20.0),
    Goal("metrics", "counting to a step", 0.01),
    Goal(_LARGE_WORKERS, "accumulate to a copy", 2.2),
    Goal(_LARGE_WORKERS, "tcp bfloat16 to 4 pushes, a step, 4 pulls", 1.1),
    Goal(_LARGE_WORKERS, "shm to its copies and passes", 1.5),
    Goal(_LARGE_WORKERS, "shm to gloo float32", 0.35),
    Goal("workers 10k", "shm to gloo float32", 0.35),
    Goal(_LARGE_WORKERS, "shm to Ray actor", 0.25),
    Goal("workers 10k", "shm to Ray actor", 0.25),
    Goal(_LARGE_WORKERS, "tcp bfloat16 to gloo bfloat16", 1.0),
    Goal("straggler", "rounds beside a straggler to rounds without", 1.1),
    Goal("rows", row_steps.DENSE_TO_ROWS, 20.0, at_least=True),
    Goal("rows", row_steps.TO_PARTS, 1.2),
    Goal("rows", row_steps.TO_TORCH, 1.5),
    Goal("rows", row_steps.BESIDE, 8.0),
    Goal("fairness", fairness.JAIN, 0.95, at_least=True),
    Goal("fairness", fairness.P99_TO_P50, 5.0),
    Goal("fairness", fairness.LARGE_SHARE, 0.3, at_least=True),
    Goal("floods", floods.WORST_RATIO, 2.0),
    Goal("floods", floods.SLOWEST_HEALTH, 1000.0),
    Goal("many", many.ERRORS, 0.0),
    Goal("security", security.AUTHENTICATION, 2.0),
    Goal("shards", shards.OVERHEAD_GOAL, 0.05),
    Goal("standby", standby.REPLICATED_GOAL, 1.15),
    Goal("shaped link", "tcp to its link time", 1.05),
    Goal("shaped link", "tcp overlap to tcp", 0.6),
    Goal("shaped link", "tcp bfloat16 to tcp", 0.52),
    Goal("shaped link", "tcp int8 up, bfloat16 down to tcp", 0.4),
    Goal("occupancy", "tcp client_excess_mib", _EXCESS_MIB),
    Goal("occupancy", "shm in place client_excess_mib", _EXCESS_MIB),
    *(Goal("occupancy", f"{variant} server_excess_mib", _EXCESS_MIB) for variant in _OCCUPIED),
    *(
        Goal("growth", f"{variant} {who}_growth_{unit}", bound)
        for variant in TRANSPORTS
        for who in ("client", "server")
        for unit, bound in (("kib", _GROWTH_KIB), ("descriptors", 0.0))
    ),
)


class Run:
    """One run.

    Attributes:
        results: figures by section, as they come.
    """

    def __init__(
        self,
        *,
        quick: bool,
        only: Sequence[str] = (),
        path: pathlib.Path | None = None,
        data_dir: pathlib.Path | None = None,
    ) -> None:
        """Prepare a run.

        Args:
            quick: a short form.
            only: beginnings of the names of the sections that are wanted; empty for all.
            path: the file of the figures, written after every section.
            data_dir: the place of the data directories of durable sessions; None for the system's temporary folder.
        """
        self.results: dict[str, Figures] = {}
        self._quick = quick
        self._only = tuple(only)
        self._path = path
        self._data_dir = data_dir or pathlib.Path(tempfile.gettempdir())

    def everything(self) -> None:
        """Run every section that is wanted, each against a server of its own where memory is measured."""
        quick = self._quick
        self._section("footprint", lambda: footprint.footprint(rounds=1 if quick else 5))
        sizes = (1_000_000,) if quick else (1_000_000, 32_000_000, 128_000_000)
        self._section("kernels", lambda: kernels.kernels(sizes=sizes))
        self._section("many_small", lambda: kernels.many_small(rounds=20 if quick else 200))
        self._steps()
        self._lane()
        self._transports()
        self._torch()
        self._own_arrays()
        self._workers()
        self._rows()
        self._section(
            "memory", lambda: _with_server(lambda server: sections.memory(server, size=self._large, looks=self._looks))
        )
        self._section("occupancy", lambda: _by_variant(_QUICK_VARIANTS if quick else _OCCUPIED, self._memory))
        self._section("growth", lambda: _by_variant(_QUICK_VARIANTS if quick else TRANSPORTS, self._growth))
        cut = (100_000, 2) if quick else (_LARGE, 7)
        watched = {"sessions": 8, "scrapes": 3, "rounds": 2} if quick else {}
        self._section("metrics", lambda: metrics.metrics(**watched))
        self._section("messages", lambda: messages.messages(size=cut[0], rounds=cut[1]))
        scale = durability.Scale.quick() if quick else durability.Scale()
        self._section("durability", lambda: durability.durability(self._data_dir, scale))
        self._section("fairness", lambda: fairness.fairness(fairness.Scale.quick() if quick else fairness.Scale()))
        self._section("floods", lambda: floods.floods(floods.Scale.quick() if quick else floods.Scale()))
        self._section("lane many", lambda: lane_many.lane_many((lane_many.Scale.quick if quick else lane_many.Scale)()))
        turns = {"rounds": 3, "batch": 20} if quick else {"rounds": 50, "batch": 200}
        self._section("lane python", lambda: lane_python.lane_python(**turns))
        self._section("many", lambda: many.many(many.Scale.quick() if quick else many.Scale()))
        protected = (2, 3) if quick else (30, 20)
        self._section("security", lambda: security.security(rounds=protected[0], batch=protected[1]))
        self._section("shards", lambda: shards.shards(shards.Scale.quick() if quick else shards.Scale()))
        self._section("moves", lambda: moves.moves(moves.Scale.quick() if quick else moves.Scale()))
        self._section("standby", lambda: standby.standby(standby.Scale.quick() if quick else standby.Scale()))
        link = (100_000, 2) if quick else (_LARGE, 7)
        self._section("shaped link", lambda: shaped_link(size=link[0], rounds=link[1]))

    @property
    def _large(self) -> int:
        return _QUICK_LARGE if self._quick else _LARGE

    @property
    def _looks(self) -> int:
        return 1 if self._quick else 16

    def _steps(self) -> None:
        quick = self._quick
        if not any(map(self._wants, ("small_step", "large_step", "concurrency"))):
            return
        with echo_process() as echo, server_process("--device", "cpu") as server:
            self._section("small_step", lambda: sections.small_step(server, echo.tcp, rounds=4 if quick else 40))
            self._section(
                "large_step", lambda: sections.large_step(server, echo.tcp, size=self._large, rounds=3 if quick else 9)
            )
            self._section("concurrency", lambda: sections.concurrency(server, echo.tcp, steps=200 if quick else 6000))

    def _lane(self) -> None:
        if not any(map(self._wants, ("lane", "lane torch"))):
            return
        scale = lane.Scale.quick() if self._quick else lane.Scale()
        with (
            echo_process() as echo,
            doorbell_process() as doorbell,
            server_process("--device", "cpu", "--no-compiled-lanes") as plain,
            server_process("--device", "cpu") as compiled,
            server_process("--device", "cpu", "--lane-spin-microseconds", "50") as spinning,
        ):
            targets = lane.Targets(plain.target, compiled.target, spinning.target, echo.tcp, doorbell)
            self._section("lane", lambda: lane.lane(targets, scale))
            turns = {"rounds": 2, "batch": 5, "compiling_seconds": 0.1} if self._quick else {"rounds": 25, "batch": 60}
            self._section("lane torch", lambda: lane_torch.lane_torch(compiled.target, doorbell, **turns))

    def _torch(self) -> None:
        if not self._wants("torch step"):
            return
        size, rounds = (300_000, 2) if self._quick else (_TORCH, 9)
        with echo_process() as echo, server_process("--device", "cpu") as server:
            self._section("torch step", lambda: torch_step(server.target, echo, size=size, rounds=rounds))

    def _own_arrays(self) -> None:
        if not self._wants("own arrays"):
            return
        size, rounds = (1_000_000, 2) if self._quick else (_OWN_ARRAYS, 9)
        with server_process("--device", "cpu") as server:
            self._section("own arrays", lambda: own_arrays.own_arrays(server.target, size=size, rounds=rounds))

    def _rows(self) -> None:
        if not self._wants("rows"):
            return
        scale = {"rows": 20_000, "width": 8, "came": 500, "rounds": 2}
        if not self._quick:
            scale = {"rows": 1_000_000, "width": 64, "came": 8192, "rounds": 9}
        with echo_process() as echo, server_process("--device", "cpu") as server:
            self._section("rows", lambda: row_steps.row_steps(server, echo, **scale))

    def _workers(self) -> None:
        sizes = (10_000, 300_000) if self._quick else (10_000, _LARGE)
        names = {size: transports.section_name("workers", size) for size in sizes}
        if not any(map(self._wants, (*names.values(), "straggler"))):
            return
        with echo_process() as echo, server_process("--device", "cpu") as server:
            rounds, target = 2 if self._quick else 9, server.target
            for size, name in names.items():
                self._section(name, functools.partial(workers, target, echo, size=size, rounds=rounds))
            self._section("straggler", lambda: straggler(target, size=sizes[-1], rounds=rounds))

    def _transports(self) -> None:
        names = {size: transports.section_name("transports", size) for size in self._sizes}
        if not any(map(self._wants, names.values())):
            return
        with contextlib.ExitStack() as stack:
            servers = [stack.enter_context(server_process("--device", "cpu")) for _ in range(2)]
            echo, sockets = stack.enter_context(echo_process()), stack.enter_context(socket_server())
            entrants = transports.contenders([server.target for server in servers], echo, sockets)
            for size, name in names.items():
                self._section(name, functools.partial(self._contest, entrants, size))

    @property
    def _sizes(self) -> tuple[int, ...]:
        return _QUICK_SIZES if self._quick else _SIZES

    def _contest(self, entrants: Sequence[Contender], size: int) -> Figures:
        return transports.transports(entrants, size=size, rounds=2 if self._quick else 9)

    def _memory(self, server: ServerProcess, variant: str) -> dict[str, float]:
        return occupancy.memory(server, variant, size=self._large, looks=self._looks)

    def _growth(self, server: ServerProcess, variant: str) -> dict[str, float]:
        return occupancy.growth(server, variant, steps=200 if self._quick else 10_000)

    def _wants(self, name: str) -> bool:
        return not self._only or name.startswith(self._only)

    def _section(self, name: str, measure: Callable[[], Figures]) -> None:
        if not self._wants(name):
            return
        self.results[name] = _guarded("skipped", measure)
        if self._path:
            report.keep(self.results, self._path)


def main() -> None:
    """Run, print, and write JSON where asked; exit with 1 if something failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a short form, to check the benchmark itself")
    parser.add_argument("--json", type=pathlib.Path, help="also write the figures here, after every section")
    parser.add_argument("--only", nargs="*", default=(), metavar="SECTION", help="sections whose names begin so")
    parser.add_argument("--data-dir", type=pathlib.Path, help="the place for data directories, on a disk to measure")
    arguments = parser.parse_args()
    run = Run(quick=arguments.quick, only=arguments.only, path=arguments.json, data_dir=arguments.data_dir)
    run.everything()
    print(report.text(run.results, GOALS))
    failed = report.failures(run.results)
    print(*(f"failed: {name}" for name in failed), sep="\n", end="\n" if failed else "", file=sys.stderr)
    sys.exit(1 if failed else 0)


def _by_variant(names: Sequence[str], measure: Callable[..., Figures]) -> Figures:
    """Measure each variant against a server of its own."""
    figures: Figures = {}
    for name in names:
        found = _guarded("left out", functools.partial(_with_server, functools.partial(measure, variant=name)))
        figures |= {f"{name} {figure}": value for figure, value in found.items()}
    return figures


def _guarded(name: str, measure: Callable[[], Figures]) -> Figures:
    """Return the figures of a measurement; after a failure, print the error and return the failure instead."""
    try:
        return measure()
    except Exception as problem:
        traceback.print_exc()
        return {name: failure(problem)}


def _with_server(measure: Callable[[ServerProcess], Any]) -> Any:
    with server_process("--device", "cpu") as server:
        return measure(server)


if __name__ == "__main__":
    main()
