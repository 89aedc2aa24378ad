"""The options and errors of commands that read a data directory without a server."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator
from typing import Annotated

import typer

import stepwire

__all__ = ["DataDir", "SessionId", "data_folder", "telling_of_the_disk"]

SessionId = Annotated[str, typer.Argument(metavar="SESSION", help="The id of the session.")]
DataDir = Annotated[
    str, typer.Option("--data-dir", metavar="<path>", envvar="STEPWIRE_DATA_DIR", help="The data directory.")
]


def data_folder(data_dir: str, name: str) -> pathlib.Path:
    """Return a folder of a data directory.

    Raises:
        InvalidRequestError: there is none.
    """
    folder = pathlib.Path(data_dir) / name
    if not folder.is_dir():
        raise stepwire.InvalidRequestError.of(
            "data_dir", f"{data_dir} is no data directory of a server: it has no folder {name!r}"
        )
    return folder


@contextlib.contextmanager
def telling_of_the_disk() -> Iterator[None]:
    """Tell the failure of a disk in a block as what a caller may see."""
    try:
        yield
    except OSError as error:
        raise stepwire.DataLossError(f"the disk failed: {error}", reason=stepwire.Reason.DURABILITY_FAILED) from error
