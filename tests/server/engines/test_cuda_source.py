from __future__ import annotations

import itertools
import re
import shutil
import subprocess
from typing import Any

import pytest
from numpy import sqrt

from stepwire_server.engines.cuda_printer import print_function
from stepwire_server.engines.cuda_source import COMPILE_OPTIONS, sum_module, update_module
from stepwire_server.rules import ALL_RULES

NAMES = ["float32", "bfloat16", "float16"]
ALL_KERNELS = list(itertools.product({rule.update: rule for rule in ALL_RULES}.values(), NAMES, [None, *NAMES]))
NVCC = shutil.which("nvcc")


def square(x: Any) -> Any:
    """Return x²."""
    return x * x


def rule_like(p: Any, g: Any, m: Any, rate: Any) -> tuple[Any, Any]:
    m = m + rate * (square(g) - m)
    step = -m / (sqrt(m) + rate)
    return p - step, m


def test_rule_is_printed_as_it_reads() -> None:
    assert print_function(square) == (
        "__device__ __forceinline__ float square(float x) {\n    return (x * x);\n}\n"  #
    )
    assert print_function(rule_like, ("p", "m")) == (
        "__device__ __forceinline__ void rule_like(float p, float g, float m, float rate, "
        "float &p_next, float &m_next) {\n"
        "    m = (m + (rate * (square(g) - m)));\n"
        "    float step = ((-m) / (sqrtf(m) + rate));\n"
        "    p_next = (p - step); m_next = m;\n"
        "}\n"
    )


def with_literal(p: Any) -> Any:
    return p * 2.0


def with_power(p: Any) -> Any:
    return p**p


def with_choice(p: Any) -> Any:
    if p:
        return p
    return p


def with_stranger(p: Any) -> Any:
    return abs(p)


def with_keyword(p: Any) -> Any:
    return square(x=p)


def with_global(p: Any) -> Any:
    return p + NAMES


@pytest.mark.parametrize(
    ("function", "shown"),
    [
        (with_literal, "'2.0'"),
        (with_power, r"'p \*\* p'"),
        (with_choice, "if p"),
        (with_stranger, r"'abs\(p\)'"),
        (with_keyword, r"'square\(x=p\)'"),
        (with_global, "'NAMES'"),
        (rule_like, r"'\(p - step, m\)'"),
    ],
)
def test_what_is_outside_the_subset_is_refused(function, shown) -> None:
    with pytest.raises(SyntaxError, match=f"{function.__name__}: .*{shown}"):
        print_function(function)


@pytest.mark.parametrize(
    ("rule", "gradient", "reply"), ALL_KERNELS, ids=lambda value: getattr(value, "name", str(value))
)
def test_updates_use_neither_double_nor_pow_nor_headers(rule, gradient, reply) -> None:
    source = update_module([(rule, gradient, reply)])
    assert not re.search(r"double|pow|#include|\d\.\d+(?!f)\b", source)
    assert source.count("__global__") == 1


def test_functions_shared_by_rules_are_printed_once() -> None:
    source = update_module(ALL_KERNELS)
    assert source.count("float first_moment(") == 1
    assert source.count("__global__") == len(ALL_KERNELS) == 48


def architectures() -> list[str]:
    """List what this nvcc knows of Turing, Hopper and Blackwell."""
    known = subprocess.run([str(NVCC), "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    return [number for number in ("75", "90", "100") if f"compute_{number}\n" in known]


@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed; it compiles the kernels for real devices")
@pytest.mark.parametrize("module", ["updates", "sums"])
def test_every_kernel_compiles_for_real_devices(module, tmp_path) -> None:
    source = tmp_path / "kernels.cu"
    source.write_text(update_module(ALL_KERNELS) if module == "updates" else sum_module())
    targets = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in architectures()]
    assert targets
    command = [str(NVCC), *COMPILE_OPTIONS, *targets, "--threads=2", "-Werror=all-warnings", "-fatbin"]
    done = subprocess.run(
        [*command, "-o", str(tmp_path / "kernels.fatbin"), str(source)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
