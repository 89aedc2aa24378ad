"""Write the figures of finished runs into docs/performance.md and docs/durability.md, and draw the plot.

    python benchmarks/page.py [RESULTS.json …]

Tables stand between markers, `<!-- bench:NAME -->` and `<!-- /bench:NAME -->`. The rest of a page does not change,
nor does a table without its sections in the files. Without arguments, the program reads the results of `main.py`,
`peers.py` and `wire_encodings.py` in `benchmarks/results`.
"""

from __future__ import annotations

import json
import pathlib
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import plot
from tables import DURABILITY_TABLES, TABLES, Results

__all__ = ["PAGES", "filled", "written"]

Tables = Mapping[str, Callable[[Results], str]]
_ROOT = pathlib.Path(__file__).parents[1]
_RESULTS = _ROOT / "benchmarks" / "results"
_FILES = tuple(
    _RESULTS / f"{name}.json"
    for name in (
        "cpu-2-core",
        "durability-2-core",
        "services-2-core",
        "workers-2-core",
        "peers-2-core",
        "encodings",
    )
)
PAGES = {
    _ROOT / "docs" / "performance.md": TABLES,
    _ROOT / "docs" / "durability.md": DURABILITY_TABLES,
}
_PLOT = _ROOT / "docs" / "images" / "steps.png"


def filled(page: str, name: str, text: str) -> str:
    """Return a page with another text between the markers of a name.

    Raises:
        LookupError: the page has no such markers.
    """
    marked = re.compile(rf"(<!-- bench:{name} -->\n).*?(<!-- /bench:{name} -->)", re.DOTALL)
    if not marked.search(page):
        raise LookupError(f"the page has no markers for {name!r}: add <!-- bench:{name} --> and <!-- /bench:{name} -->")
    return marked.sub(lambda found: f"{found[1]}{text}\n{found[2]}", page)


def written(page: str, results: Results, tables: Tables = TABLES) -> str:
    """Return a page with every table of which there are figures."""
    for name, table in tables.items():
        if text := table(results):
            page = filled(page, name, text)
    return page


def command(paths: Sequence[pathlib.Path]) -> None:
    """Read the files, write the pages and draw the plot."""
    results: dict[str, Any] = {}
    for path in reversed(paths):  # the first file's machine is the page's
        results |= json.loads(path.read_text(encoding="utf-8"))
    for page, tables in PAGES.items():
        page.write_text(written(page.read_text(encoding="utf-8"), results, tables), encoding="utf-8")
    plot.draw(results, _PLOT)


if __name__ == "__main__":
    command([pathlib.Path(name) for name in sys.argv[1:]] or [path for path in _FILES if path.exists()])
