"""Helpers that modules of kernels share: equal ones are one, and no two others are."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest

numba = pytest.importorskip("numba")

from stepwire_server.engines.cpu.numba_helpers import shared_helper  # noqa: E402
from stepwire_server.engines.cpu.numba_kernels import NumbaKernels  # noqa: E402
from stepwire_server.rules import ALL_RULES, Precision, Recipe  # noqa: E402

FLOAT32 = np.dtype(np.float32)
TEXT = """
@helper
def inner(x):
    return x * {constant}

@helper
def outer(x, i):
    return {callee}(x) + TABLE[i]
"""


def made(constant: str = "2.0", callee: str = "inner", table: tuple[float, ...] = (1.0, 2.0)) -> Any:
    """Execute the text of a module, and return its outer helper."""
    module = {"helper": shared_helper, "TABLE": np.array(table), "sqrt": np.sqrt}
    exec(TEXT.format(constant=constant, callee=callee), module)
    return module["outer"]


def test_equal_helpers_of_two_modules_are_one() -> None:
    assert made() is made()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"constant": "0.0"}, {"constant": "-0.0"}),
        ({"constant": "1"}, {"constant": "1.0"}),
        ({"callee": "inner"}, {"callee": "sqrt"}),
        ({"table": (1.0, 2.0)}, {"table": (1.0, 3.0)}),
        ({"table": (0.0, 0.0)}, {"table": (0.0, -0.0)}),
    ],
)
def test_a_difference_anywhere_makes_another_helper(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Of what a helper calls, too: the text of both outer helpers is the same."""
    assert made(**one) is not made(**other)


_PROCESS = """
import pathlib, sys
import numba
import numpy as np
from stepwire_server.engines.cpu.numba_kernels import NumbaKernels
from stepwire_server.rules import ALL_RULES, Precision, Recipe

compiled, compile_extra = [], numba.core.compiler.compile_extra

def counting(typing, target, function, *rest, **options):
    compiled.append(function.__name__)
    return compile_extra(typing, target, function, *rest, **options)

numba.core.compiler.compile_extra = counting
kernels, float32 = NumbaKernels(pathlib.Path(sys.argv[1])), np.dtype(np.float32)
for reply in sys.argv[2:]:
    kernels.update(Recipe(ALL_RULES[0], precision=Precision.BFLOAT16), float32, float32 if reply == "float32" else None)
print(len(compiled))
"""


@pytest.mark.long
@pytest.mark.slow
def test_another_process_loads_a_kernel_whose_helpers_were_another_kernels(tmp_path: Any) -> None:
    """The first process made the helpers for a kernel that the second process does not load."""

    def compiled_in_a_process(*replies: str) -> int:
        command = [sys.executable, "-c", _PROCESS, str(tmp_path), *replies]
        return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)

    assert compiled_in_a_process("float32", "nothing") > 2
    assert compiled_in_a_process("nothing") == 0
    assert compiled_in_a_process("nothing", "float32") == 0


def test_what_a_kernel_calls_is_compiled_once(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second kernel of the same rule differs in its loop alone."""
    kernels = NumbaKernels(tmp_path)
    kernels.update(Recipe(ALL_RULES[0], precision=Precision.BFLOAT16), FLOAT32, FLOAT32)
    compiled = []
    compile_extra = numba.core.compiler.compile_extra

    def counting(typing: Any, target: Any, function: Any, *rest: Any, **options: Any) -> Any:
        compiled.append(function.__name__)
        return compile_extra(typing, target, function, *rest, **options)

    monkeypatch.setattr(numba.core.compiler, "compile_extra", counting)
    kernels.update(Recipe(ALL_RULES[0], precision=Precision.BFLOAT16), FLOAT32, None)
    assert compiled == [f"{Recipe(ALL_RULES[0], precision=Precision.BFLOAT16).name}_float32_to_nothing"]
