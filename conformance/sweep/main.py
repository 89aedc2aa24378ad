"""Every rule, formula, option and precision in regimes that no stored vector has, against the frameworks.

    python conformance/sweep/main.py [--short] [--framework NAME]... [--only PATTERN] [--seeds N] [--numpy]
        [--page FILE]

The frameworks that are installed are compared with: torch, optax, Keras. The program prints the tables of worst cases,
and exits with 1 where a case is worse than `judge` allows. The long form compares Numba's kernels with NumPy's bit for
bit as well.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib
import importlib.util
import pathlib
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np

if __name__ == "__main__":
    root = pathlib.Path(__file__).resolve().parents[2]
    sys.path[:1] = [str(root), str(root / "client"), str(root / "server")]

from conformance.sweep.judge import Finding, judge
from conformance.sweep.running import run
from conformance.sweep.table import table
from conformance.sweep.variant import Variant
from stepwire_server.engines import CpuEngine

__all__ = ["FRAMEWORKS", "filled", "main", "variants"]

FRAMEWORKS: Final = {"hand": "numpy", "torch": "torch", "optax": "optax", "keras": "keras"}
"""The modules that the cases of a framework need."""

_MARKERS: Final = re.compile(r"(<!-- sweep -->\n).*?(<!-- /sweep -->)", re.DOTALL)


def variants(frameworks: Sequence[str], *, short: bool = False) -> Iterator[Variant]:
    """Yield the cases of some frameworks, which must be installed."""
    for framework in frameworks:
        module = importlib.import_module(f"conformance.sweep.{framework}_variants")
        yield from (each for each in getattr(module, f"{framework}_variants")() if each.short or not short)


def installed() -> list[str]:
    """Return the frameworks that are installed, and say which are not."""
    found = [name for name, module in FRAMEWORKS.items() if importlib.util.find_spec(module) is not None]
    for name in FRAMEWORKS.keys() - set(found):
        print(f"{name} is not installed: its cases are left out", file=sys.stderr)
    return found


def filled(page: str, text: str) -> str:
    """Return a page with another text between its markers.

    Raises:
        LookupError: the page has no markers.
    """
    if not _MARKERS.search(page):
        raise LookupError("the page has no markers: add <!-- sweep --> and <!-- /sweep -->")
    return _MARKERS.sub(lambda found: f"{found[1]}{text}\n{found[2]}", page)


def main(arguments: list[str] | None = None) -> int:
    """Run the cases and print the tables; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--short", action="store_true", help="the cases and steps of the tests")
    parser.add_argument("--framework", action="append", choices=FRAMEWORKS, help="may repeat; default: all there are")
    parser.add_argument("--only", metavar="PATTERN", default="*", help="names of cases")
    parser.add_argument("--seeds", type=int, default=1, help="the number of inputs for each case")
    parser.add_argument("--numpy", action="store_true", help="step with NumPy's kernels instead of Numba's")
    parser.add_argument("--page", type=pathlib.Path, help="write the tables between the markers of this page")
    chosen = parser.parse_args(arguments)
    wanted = [
        each
        for each in variants(chosen.framework or installed(), short=chosen.short)
        if fnmatch.fnmatch(each.name, chosen.only)
    ]
    engine = CpuEngine(threads=1, use_numba=not chosen.numpy)
    findings = list(_findings(wanted, engine, chosen))
    text = table(findings)
    print(text)
    if chosen.page is not None:
        chosen.page.write_text(filled(chosen.page.read_text(encoding="utf-8"), text), encoding="utf-8")
    faults = [each for _, each in findings if each.fault]
    print(f"{len(wanted)} cases, {len(findings)} regimes, {len(faults)} faults", file=sys.stderr)
    return 1 if faults else 0


def _findings(
    wanted: Sequence[Variant], engine: CpuEngine, chosen: argparse.Namespace
) -> Iterator[tuple[str, Finding]]:
    numpy_engine = CpuEngine(threads=1, use_numba=False)
    for number, variant in enumerate(wanted, 1):
        print(f"{number}/{len(wanted)} {variant.name}", file=sys.stderr)
        for seed in range(chosen.seeds):
            runs = run(variant, engine, variant.steps if chosen.short else variant.long_steps, seed)
            yield from ((variant.family, each) for each in judge(variant, runs))
        if variant.short and not (chosen.short or chosen.numpy):
            yield variant.family, _same_bits(variant, engine, numpy_engine)


def _same_bits(variant: Variant, engine: CpuEngine, other: CpuEngine) -> Finding:
    """Compare the kernels of two engines."""
    one, two = (run(variant, each, variant.steps, 0).stepwire for each in (engine, other))
    fault = "" if np.array_equal(one, two, equal_nan=True) else "other bits than NumPy's kernels"
    return Finding(variant.name, "Numba and NumPy", 0.0, 0.0, "ulps", fault=fault)


if __name__ == "__main__":
    raise SystemExit(main())
