"""The command `stepwire kernels`."""

from __future__ import annotations

import json
import pathlib
from typing import Annotated

import typer

from stepwire_server.cli.options import Json

__all__ = ["kernels"]


def kernels(
    directory: Annotated[pathlib.Path, typer.Argument(help="The directory for the kernels; it is made if missing.")],
    as_json: Json = False,
) -> None:
    """Compile the commonest kernels ahead, as for a container image, for every level of x86-64 processors.

    A server finds the kernels through STEPWIRE_KERNELS. For other processors nothing is compiled ahead.
    """
    from stepwire_server.engines import ahead

    levels = ahead.make(directory)
    print(json.dumps({"levels": levels}) if as_json else f"{directory}: kernels for {', '.join(levels) or 'no level'}")
