"""`make bench`: stepwire beside its floors, in one run on one described machine.

    python benchmarks/main.py [--quick] [--json FILE]

Quick mode runs every section in a short form; its figures are for checking the benchmark, not for quoting.
"""

from __future__ import annotations

import argparse
import json
import pathlib
from typing import Any, NamedTuple

import footprint
import kernels
import machine
import sections
from echo import echo_process
from stepwire_server.process import server_process

_LARGE = 32_000_000
_QUICK_LARGE = 1_000_000


class Goal(NamedTuple):
    """A figure that must not exceed a bound."""

    section: str
    figure: str
    bound: float


_GOALS = (
    Goal("small_step", "ratio_p50", 1.5),
    Goal("small_step", "ratio_p99", 1.5),
    Goal("large_step", "ratio", 1.25),
    Goal("memory", "rest_bytes", 12.5),
    Goal("memory", "peak_bytes", 17.0),
)


def run(*, quick: bool) -> dict[str, dict[str, Any]]:
    """Run every section, each against a server of its own where memory is measured."""
    large = _QUICK_LARGE if quick else _LARGE
    results: dict[str, dict[str, Any]] = {
        "footprint": footprint.footprint(rounds=1 if quick else 5),
        "kernels": kernels.kernels(sizes=(1_000_000,) if quick else (1_000_000, 32_000_000, 128_000_000)),
        "many_small": kernels.many_small(rounds=20 if quick else 200),
    }
    with echo_process() as echo, server_process("--device", "cpu") as server:
        results["small_step"] = sections.small_step(server, echo, rounds=4 if quick else 40)
        results["large_step"] = sections.large_step(server, echo, size=large, rounds=3 if quick else 9)
        results["concurrency"] = sections.concurrency(server, echo, steps=200 if quick else 6000)
    with server_process("--device", "cpu") as server:
        results["memory"] = sections.memory(server, size=large)
    with server_process("--device", "cpu") as server:
        results["growth"] = sections.growth(server, steps=300 if quick else 10_000)
    return results


def report(results: dict[str, dict[str, Any]]) -> str:
    """Lay the figures out, and the goals with what was reached."""
    lines = [f"{name:>10}  {value}" for name, value in machine.describe().items()]
    for section, figures in results.items():
        lines += ["", section]
        lines += [f"  {name:<28} {_number(value)}" for name, value in figures.items()]
    lines += ["", "goals"]
    for goal in _GOALS:
        value = results[goal.section][goal.figure]
        verdict = "met" if value <= goal.bound else "missed"
        lines.append(f"  {goal.section + '.' + goal.figure:<28} {value:.3f} <= {goal.bound}  {verdict}")
    return "\n".join(lines)


def main() -> None:
    """Run, print, and write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a short form, to check the benchmark itself")
    parser.add_argument("--json", type=pathlib.Path, help="also write the figures here")
    arguments = parser.parse_args()
    results = run(quick=arguments.quick)
    print(report(results))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps({"machine": machine.describe(), **results}, indent=2) + "\n")


def _number(value: Any) -> str:
    return f"{value:,.3f}" if isinstance(value, float) else f"{value:,}"


if __name__ == "__main__":
    main()
