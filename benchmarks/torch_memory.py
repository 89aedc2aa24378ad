"""The memory of a training process: with torch's own Adam, and with the drop-in over each transport.

    python benchmarks/torch_memory.py [--quick] [--size PARAMETERS] [--json FILE]

Each row is a process of its own, which trains a model of a transformer's shapes for some steps. Private memory is the
process's alone. A part of it is free: the C library keeps the memory of messages that were sent or read, for the next
ones. Shared memory belongs to the server, which would hold the gradient and the parameters in any case. All figures are
megabytes of 10⁶ bytes; Adam's two moments take 8 bytes a parameter.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import pathlib
import subprocess
import sys
import types
from collections.abc import Mapping
from typing import Any, NamedTuple

from child import python

__all__ = ["MODES", "Figures", "main", "measure"]

MODES: Mapping[str, Mapping[str, Any] | None] = types.MappingProxyType(
    {
        "torch.optim.Adam": None,
        "tcp": {"transport": "tcp"},
        "tcp, send_in_backward": {"transport": "tcp", "send_in_backward": True},
        "uds": {"transport": "uds"},
        "shm": {"transport": "shm"},
        "shm, shared_views": {"transport": "shm", "shared_views": True},
    }
)
"""The options of each row; None for torch's own optimizer."""

_FULL, _QUICK, _STEPS = 25_000_000, 1_000_000, 5
_MEGABYTE = 1e6


class Figures(NamedTuple):
    """The memory of one process after a step, in megabytes.

    Attributes:
        libraries: the private memory after the imports, which every row has.
        private: the private memory.
        free: the part of it that the C library keeps for reuse.
        shared: the process's portion of the memory that it shares with the server.
    """

    libraries: float
    private: float
    free: float
    shared: float


def measure(target: str, mode: str, shapes: list[list[int]]) -> Figures:
    """Train in a process of its own and return its memory."""
    request = json.dumps({"target": target, "mode": mode, "shapes": shapes})
    done = subprocess.run(python(__file__, "--train"), input=request, stdout=subprocess.PIPE, text=True, check=True)
    return Figures(**json.loads(done.stdout))


def _train(target: str, mode: str, shapes: list[list[int]]) -> Figures:
    import torch
    import torch._dynamo  # torch imports it with the first optimizer

    import stepwire.torch

    torch.set_num_threads(1)
    libraries = _memory()["Anonymous"]
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    options = MODES[mode]
    optimizer: Any = (
        torch.optim.Adam(parameters, foreach=False)
        if options is None
        else stepwire.torch.Adam(parameters, server=target, **options)
    )
    for _ in range(_STEPS):
        optimizer.zero_grad()
        for parameter in parameters:
            (parameter * 2.0).sum().backward()
        optimizer.step()
    gc.collect()
    memory = _memory()
    _trim()
    free = memory["Anonymous"] - _memory()["Anonymous"]
    if options is not None:
        optimizer.close()
    return Figures(libraries, memory["Anonymous"], free, memory.get("Pss_Shmem", 0.0))


def _memory() -> dict[str, float]:
    """Return the kernel's account of this process, in megabytes."""
    lines = [line.split() for line in pathlib.Path("/proc/self/smaps_rollup").read_text("utf-8").splitlines()]
    return {words[0].rstrip(":"): int(words[1]) * 1024 / _MEGABYTE for words in lines if words[-1] == "kB"}


def _trim() -> None:
    """Give free memory back, where the C library can."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _table(size: int, rows: Mapping[str, Figures]) -> str:
    local = rows["torch.optim.Adam"]
    lines = [
        f"{size:,} float32 parameters; parameters and gradients {8 * size / _MEGABYTE:.0f} MB, moments the same again",
        f"{'':<24}{'private':>9}{'free':>7}{'in use':>8}{'saved':>7}{'shared':>8}",
    ]
    for mode, row in rows.items():
        private, used = row.private - row.libraries, row.private - row.free - row.libraries
        saved = "" if row is local else f"{local.private - local.free - local.libraries - used:.0f}"
        lines.append(f"{mode:<24}{private:>9.0f}{row.free:>7.0f}{used:>8.0f}{saved:>7}{row.shared:>8.0f}")
    return "\n".join(lines)


def main() -> None:
    """Print the table, and write JSON where asked; as a child, train and print the figures of this process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model, to check the benchmark itself")
    parser.add_argument("--size", type=int, help="parameters of the model")
    parser.add_argument("--json", type=pathlib.Path, help="also write the figures here")
    parser.add_argument("--train", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.train:
        print(json.dumps(_train(**json.load(sys.stdin))._asdict()))
        return
    from stepwire_server.processes.spawn import server_process
    from torch_step import shapes

    size = arguments.size or (_QUICK if arguments.quick else _FULL)
    made = [list(shape) for shape in shapes(size)]
    with server_process("--device", "cpu") as server:
        rows = {mode: measure(server.target, mode, made) for mode in MODES}
    print(_table(size, rows))
    if arguments.json:
        arguments.json.write_text(json.dumps({mode: row._asdict() for mode, row in rows.items()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
