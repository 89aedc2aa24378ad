"""One worker of several that steps rows of a table, in a process of its own.

`python row_child.py KIND ROWS WIDTH CAME RANK WORKERS TARGET` prepares a worker and prints "ready". For each line with
a number it takes part in so many rounds, and prints "done". Each round has CAME distinct rows of the worker's own.

- `rows`: a table of ROWS rows.
- `ids`: a table of 2 · CAME · WORKERS rows by ids, half full.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np

__all__ = ["named_rows", "table_of"]


def named_rows(kind: str, rows: int, came: int, rank: int) -> Any:
    """Return the names of the rows of one worker, `(came,) int64`."""
    rng = np.random.default_rng(rank)
    return rng.integers(0, 2**63, came) if kind == "ids" else rng.permutation(rows)[:came]


def table_of(kind: str, rows: int, width: int) -> Any:
    """Return a table of a number of rows."""
    import stepwire

    return stepwire.Table((rows, width), "torch_sparse", hashed=kind == "ids")


def main() -> None:
    """Take part in rounds until standard input ends."""
    kind, rows, width, came, rank, workers, target = sys.argv[1:]
    sizes = int(rows), int(width), int(came)
    round_of = _prepared(kind, sizes, int(rank), int(workers), target)
    print("ready", flush=True)
    for line in sys.stdin:
        for _ in range(int(line)):
            round_of()
        print("done", flush=True)


def _prepared(kind: str, sizes: tuple[int, int, int], rank: int, workers: int, target: str) -> Callable[[], Any]:
    import stepwire

    rows, width, came = sizes
    client = stepwire.connect(target, transport="tcp", timeout=120.0)
    session = client.create_session(
        {"table": table_of(kind, 2 * came * workers if kind == "ids" else rows, width)},
        aggregation=stepwire.Aggregation(workers=workers),
        worker=rank,
        request_id=f"bench-{kind}-{'-'.join(map(str, sizes))}",
    )
    session.attach()
    values = np.random.default_rng(rank).standard_normal((came, width)).astype(np.float32)
    gradient = {"table": stepwire.Rows(named_rows(kind, rows, came, rank), values)}
    return lambda: session.step(gradient)


if __name__ == "__main__":
    main()
