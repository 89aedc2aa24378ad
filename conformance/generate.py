"""Write the vectors anew from the reference frameworks, or check the stored ones against them.

    python conformance/generate.py [--family FAMILY]...
    python conformance/generate.py --check [--framework torch|optax|keras|hand]... [--only PATTERN]

The program needs torch 2.13.0, optax 0.2.8 and Keras 3.15.1 with jax, each for its own cases. The program does not
import stepwire: the frameworks alone compute the vectors.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib
import json
import pathlib
import sys
from collections.abc import Iterable, Iterator
from typing import Final

import numpy as np

if __name__ == "__main__":
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

from conformance.case import Case, Json
from conformance.inputs import Tensors
from conformance.recording import record, stored_inputs
from conformance.tensor_file import read_tensors, write_tensors

__all__ = ["VECTORS", "cases", "differences", "main"]

VECTORS: Final = pathlib.Path(__file__).parent / "vectors"

_MODULES: Final = {
    "torch": ("torch_rule_cases", "torch_group_cases", "torch_treatment_cases"),
    "optax": ("optax_cases",),
    "keras": ("keras_cases",),
    "hand": ("hand_cases",),
}

# Another processor adds in another order: a few last places of float64 after 1000 steps, and of float32 likewise.
_CLOSENESS: Final = {"float64": 1e-11, "float32": 2e-5}


def cases(frameworks: Iterable[str] = tuple(_MODULES)) -> Iterator[Case]:
    """Yield the cases of some frameworks, which must be installed."""
    for framework in frameworks:
        for name in _MODULES[framework]:
            yield from getattr(importlib.import_module(f"conformance.{name}"), name)()


def _write(wanted: Iterable[Case]) -> None:
    """Replace the stored files of every family."""
    families: dict[str, list[Json]] = {}
    tensors: dict[str, Tensors] = {}
    for case in wanted:
        entry, expected = record(case)
        families.setdefault(case.family, []).append(entry)
        stored = tensors.setdefault(case.family, {})
        stored.update(expected)
        initial, gradients = stored_inputs(case.bank)
        stored.update({f"initial/{case.bank}/{name}": value for name, value in initial.items()})
        stored.update({f"gradients/{case.bank}/{name}": value for name, value in gradients.items()})
    for family, entries in families.items():
        (VECTORS / f"{family}.json").write_text(_text(entries))
        write_tensors(VECTORS / f"{family}.safetensors", tensors[family])


def _text(entries: list[Json]) -> str:
    """Write one line a field, so that a change of one number is a change of one line."""
    written = []
    for entry in entries:
        fields = ",\n    ".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in entry.items())
        written.append(f"  {{\n    {fields}\n  }}")
    return "[\n" + ",\n".join(written) + "\n]\n"


def differences(wanted: Iterable[Case]) -> Iterator[str]:
    """Yield the differences between the stored vectors and the installed frameworks."""
    files: dict[str, tuple[dict[str, Json], Tensors]] = {}
    for case in wanted:
        if case.family not in files:
            entries = json.loads((VECTORS / f"{case.family}.json").read_text())
            tensors = read_tensors(VECTORS / f"{case.family}.safetensors")
            files[case.family] = {entry["name"]: entry for entry in entries}, tensors
        entries_by_name, tensors = files[case.family]
        entry, expected = record(case)
        stored = entries_by_name.get(case.name)
        if stored is None or not _equal(json.loads(json.dumps(entry)), stored):
            yield f"{case.name}: its description differs"
        for key, value in expected.items():
            if key not in tensors or not _close(tensors[key], value):
                yield f"{key} differs"


def _equal(fresh: object, stored: object) -> bool:
    """Compare JSON, numbers closely."""
    if isinstance(fresh, dict) and isinstance(stored, dict):
        return fresh.keys() == stored.keys() and all(_equal(value, stored[key]) for key, value in fresh.items())
    if isinstance(fresh, list) and isinstance(stored, list):
        return len(fresh) == len(stored) and all(map(_equal, fresh, stored))
    if isinstance(fresh, float) and isinstance(stored, int | float):
        return abs(fresh - stored) <= 1e-9 * max(abs(fresh), abs(stored))
    return fresh == stored


def _close(stored: np.ndarray, fresh: np.ndarray) -> bool:
    if stored.dtype != fresh.dtype or stored.shape != fresh.shape:
        return False
    scale = max(1e-3, float(np.max(np.abs(fresh), initial=0.0)))
    return bool(np.all(np.abs(stored - fresh) <= _CLOSENESS[fresh.dtype.name] * scale))


def main(arguments: list[str] | None = None) -> int:
    """Write or check; returns the exit status."""
    parser = argparse.ArgumentParser(description="Write the conformance vectors, or check them.")
    parser.add_argument("--check", action="store_true", help="compare with the stored vectors instead of writing them")
    parser.add_argument("--family", action="append", help="write the files of these alone; may repeat")
    parser.add_argument("--framework", action="append", choices=sorted(_MODULES), help="only with --check; may repeat")
    parser.add_argument("--only", metavar="PATTERN", default="*", help="names of cases; only with --check")
    chosen = parser.parse_args(arguments)
    if chosen.check and chosen.family:
        parser.error("--family is of writing; --check has --framework and --only")
    if not chosen.check:
        if chosen.framework or chosen.only != "*":
            parser.error("files are written whole: only --check can do without some of the cases")
        _write(case for case in cases() if not chosen.family or case.family in chosen.family)
        return 0
    wanted = (case for case in cases(chosen.framework or _MODULES) if fnmatch.fnmatch(case.name, chosen.only))
    found = list(differences(wanted))
    print("\n".join(found) or "the stored vectors are what the frameworks compute")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
