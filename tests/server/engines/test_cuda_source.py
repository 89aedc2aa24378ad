"""The generated CUDA C: the printer's subset, choices among zeros and NaNs, and what nvcc makes of every kernel."""

from __future__ import annotations

import concurrent.futures
import importlib.util
import pathlib
import re
import shutil
import subprocess
import types
from typing import Any

import numpy as np
import pytest
from numpy import absolute, maximum, minimum, sign, sqrt

from stepwire_server.engines.cuda_codecs import PRELUDE
from stepwire_server.engines.cuda_printer import print_call, print_function
from stepwire_server.engines.cuda_source import (
    COMPILE_OPTIONS,
    Kernel,
    gradient_kernels,
    measure_kernel,
    module_source,
    update_kernel,
)
from stepwire_server.engines.rounding import round_stochastically
from stepwire_server.rules import Stage
from stepwire_server.rules.momentum import sgd
from stepwire_server.rules.treatment import scaled


def load(name: str) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(name, pathlib.Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


cases, shim = load("cuda_cases"), load("cuda_shim")

NVCC = shutil.which("nvcc")
UPDATES = [update_kernel(*case) for case in cases.CASES]
MEASURES = [measure_kernel(recipe, gradient) for recipe, gradient, _ in cases.LAYERWISE]


def square(x: Any) -> Any:
    """Return x²."""
    return x * x


def rule_like(p: Any, g: Any, m: Any, rate: Any) -> tuple[Any, Any]:
    m = m + rate * (scaled(g, g) - m)
    step = -m / (sqrt(m) + rate)
    return p - step, m


def choosing(x: Any, y: Any) -> Any:
    return maximum(minimum(absolute(x), y), sign(y))


def test_functions_are_printed_as_they_read() -> None:
    assert print_function(square) == (
        "__device__ __forceinline__ float square(float x) {\n    return (x * x);\n}\n"  #
    )
    assert print_function(rule_like) == (
        "__device__ __forceinline__ void rule_like(float p, float g, float m, float rate, "
        "float &result_0, float &result_1) {\n"
        "    m = (m + (rate * (scaled(g, g) - m)));\n"
        "    float step = ((-m) / (sqrtf(m) + rate));\n"
        "    result_0 = (p - step); result_1 = m;\n"
        "}\n"
    )
    assert print_function(sgd) == (
        "__device__ __forceinline__ void sgd(float p, float g, float lr, float &result_0) {\n"
        "    result_0 = (p - (lr * g));\n"
        "}\n"
    )
    assert "return maximum(minimum(fabsf(x), y), sign(y));" in print_function(choosing)


def test_stages_are_printed_as_calls() -> None:
    assert print_call(Stage(scaled, ("g",), ("g", "factor"))) == "g = scaled(g, factor);"
    assert print_call(Stage(sgd, ("p",), ("p", "g", "lr"))) == "sgd(p, g, lr, p);"
    assert print_call(Stage(rule_like, ("p", "m"), ("p", "g", "m", "rate"))) == "rule_like(p, g, m, rate, p, m);"


def with_literal(p: Any) -> Any:
    return p * 2.0


def with_power(p: Any) -> Any:
    return p**p


def with_choice(p: Any) -> Any:
    if p:
        return p
    return p


def with_early_return(p: Any) -> Any:
    return -p
    return p


def with_stranger(p: Any) -> Any:
    return abs(p)


def with_keyword(p: Any) -> Any:
    return scaled(x=p, factor=p)


def with_global(p: Any) -> Any:
    return p + NVCC


def with_two_targets(p: Any) -> Any:
    p, q = rule_like(p, p, p, p)
    return p + q


def without_return(p: Any) -> Any:
    p = -p


@pytest.mark.parametrize(
    ("function", "shown"),
    [
        (with_literal, "'2.0'"),
        (with_power, r"'p \*\* p'"),
        (with_choice, "if p"),
        (with_early_return, "'return -p'"),
        (with_stranger, r"'abs\(p\)'"),
        (with_keyword, r"'scaled\(x=p, factor=p\)'"),
        (with_global, "'NVCC'"),
        (with_two_targets, "rule_like"),
        (without_return, "'p = -p'"),
    ],
)
def test_what_is_outside_the_subset_is_refused(function, shown) -> None:
    with pytest.raises(SyntaxError, match=rf"{function.__name__}: .*{shown}"):
        print_function(function)


@pytest.mark.parametrize("kernel", UPDATES, ids=lambda kernel: kernel.name)
def test_updates_use_neither_double_nor_pow_nor_headers(kernel) -> None:
    source = module_source([kernel])
    assert not re.search(r"double|pow|#include|\d\.\d+(?!f)\b", source)
    assert source.count("__global__") == 1


def test_functions_shared_by_kernels_are_printed_once() -> None:
    source = module_source(UPDATES + MEASURES)
    assert source.count("float first_moment(") == 1
    assert source.count("__global__") == len(UPDATES + MEASURES) == len({kernel.name for kernel in UPDATES + MEASURES})


CHOICES = """
extern "C" __global__ void choices(const float *a, const float *b, float *results, unsigned short *rounded,
                                   unsigned int seed, long long size) {
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= size) return;
    results[i] = maximum(a[i], b[i]);
    results[size + i] = minimum(a[i], b[i]);
    results[2 * size + i] = sign(a[i]);
    rounded[i] = encode_bfloat16_stochastic(a[i], seed);
}
"""


@pytest.mark.skipif(shim.COMPILER is None, reason="g++ is not installed; it compiles for the processor")
def test_choices_and_stochastic_rounding_are_those_of_numpy(tmp_path) -> None:
    """All pairs of odd and of random values but those of two zeros, where NumPy's own loops differ."""
    random = np.random.default_rng(0).integers(0, 1 << 32, 300, np.uint32).view(np.float32)
    values = np.concatenate([np.array([*cases.ODD, -1e-45], np.float32), random])
    a, b = (side.ravel().copy() for side in np.meshgrid(values, values))
    results, rounded = np.empty(3 * len(a), np.float32), np.empty(len(a), np.uint16)
    library = shim.Library(module_source([Kernel("choices", CHOICES)]), tmp_path)
    blocks = -(-len(a) // 256)
    library.launch("choices", blocks, 256, (a, b, results, rounded, np.uint32(cases.SEED), np.int64(len(a))))
    got, zeros = results.reshape(3, -1), (a == 0.0) & (b == 0.0)
    cases.assert_same_bits(got[0][~zeros], np.maximum(a, b)[~zeros])
    cases.assert_same_bits(got[1][~zeros], np.minimum(a, b)[~zeros])
    cases.assert_same_bits(got[0][zeros], a[zeros])
    cases.assert_same_bits(got[1][zeros], a[zeros])
    cases.assert_same_bits(got[2], np.sign(a))
    dtype = cases.WIRE["bfloat16"]
    cases.assert_same_bits(rounded.view(dtype), round_stochastically(a, cases.SEED).view(dtype))


def architectures() -> list[str]:
    """List what this nvcc knows of Turing, Hopper and Blackwell."""
    known = subprocess.run([str(NVCC), "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    return [number for number in ("75", "90", "100") if f"compute_{number}\n" in known]


def compiled(number: str, kernels: list[Kernel], directory: pathlib.Path) -> str:
    """Compile a module for one architecture, and return what the assembler says of its kernels."""
    source = directory / f"kernels_{number}.cu"
    source.write_text(module_source(kernels))
    command = [str(NVCC), *COMPILE_OPTIONS, f"-arch=sm_{number}", "-Werror=all-warnings", "-Xptxas=-v", "-cubin"]
    command += ["-o", str(source.with_suffix(".cubin")), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed; it compiles the kernels for real devices")
def test_every_kernel_compiles_for_a_real_device_and_spills_nothing(tmp_path, record_property) -> None:
    """Each architecture gets its share of the updates, with at least one of each rule, and everything else.

    nvcc 13.0 uses at most 64 registers for Turing, 46 for Hopper and 56 for Blackwell; with 80, a multiprocessor
    still holds three blocks of 256 threads.
    """
    rest, targets = MEASURES + gradient_kernels(), architectures()
    shares = {number: UPDATES[k :: len(targets)] + rest for k, number in enumerate(targets)}
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        outputs = list(pool.map(lambda item: compiled(*item, tmp_path), shares.items()))
    for (number, kernels), output in zip(shares.items(), outputs, strict=True):
        spilled = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", output)
        registers = [int(count) for count in re.findall(r"Used (\d+) registers", output)]
        assert len(spilled) == len(registers) == len(kernels)
        assert set(spilled) == {("0", "0", "0")}
        record_property(f"most_registers_sm_{number}", max(registers))
        print(f"sm_{number}: {len(kernels)} kernels of at most {max(registers)} registers")
        assert max(registers) <= 80


def test_the_prelude_needs_nothing() -> None:
    assert "#" not in PRELUDE
