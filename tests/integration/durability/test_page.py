"""The examples of docs/durability.md run as they stand."""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys

import pytest

PAGE = (pathlib.Path(__file__).parents[3] / "docs" / "durability.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.mark.slow
def test_the_first_example_comes_back_where_the_page_says() -> None:
    said = re.search(r"The example prints `([^`]+)`", PAGE)
    assert said is not None
    done = subprocess.run([sys.executable, "-c", EXAMPLES[0]], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert said[1] in done.stdout.splitlines()


@pytest.mark.parametrize("example", EXAMPLES[1:])
def test_the_other_examples_run(example: str) -> None:
    exec(example, {})
