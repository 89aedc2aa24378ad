"""Progress bars of commands that read or send large states: on a terminal alone, and on the standard error."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn, TransferSpeedColumn

from stepwire_server.cli.tensor_file import Tensor
from stepwire_server.durability.checkpoint import Checkpoint
from stepwire_server.durability.manifest import Manifest

__all__ = ["Advance", "progress_bar", "telling_of_reads", "verified"]

Advance: TypeAlias = Callable[[int], object]
"""Gets the bytes that are done, of all that the bar began with."""


@contextlib.contextmanager
def progress_bar(title: str, total_bytes: int = 0) -> Iterator[Advance]:
    """Show how much of some work is done, for a block. Nothing stays of the bar, and in a pipe there is none.

    Args:
        title: the work in a word or two.
        total_bytes: the bytes of all of it; 0 for a server's work, whose time alone is shown.

    Yields:
        A function of the bytes that are done, in all.
    """
    if sys.stderr is None or not sys.stderr.isatty():
        yield lambda done: None
        return
    sizes = (DownloadColumn(binary_units=True), TransferSpeedColumn()) if total_bytes else ()
    columns = (TextColumn("{task.description}"), BarColumn(), *sizes, TimeElapsedColumn())
    with Progress(*columns, console=Console(file=sys.stderr, markup=False), transient=True) as bars:
        task = bars.add_task(title, total=total_bytes or None)
        yield lambda done: bars.update(task, completed=done)


def verified(checkpoint: Checkpoint) -> Manifest:
    """Read all of a checkpoint, and return its manifest.

    Raises:
        DataLossError: it is damaged.
        OSError: the disk failed.
    """
    manifest = checkpoint.manifest
    total_bytes = sum(facts.elements for facts in manifest.arrays.values()) * np.dtype(np.float32).itemsize
    with progress_bar("verifying", total_bytes) as advance:
        checkpoint.body.verify(advance)
    return manifest


def telling_of_reads(tensors: Mapping[str, Tensor], advance: Advance) -> dict[str, Tensor]:
    """Return the same arrays, each of which tells that it was read."""
    done = 0

    def told(tensor: Tensor) -> Tensor:
        def read() -> Any:
            nonlocal done
            values = tensor.read()
            done += tensor.nbytes
            advance(done)
            return values

        return tensor._replace(read=read)

    return {name: told(tensor) for name, tensor in tensors.items()}
