"""The generated CUDA C: the printer's subset, choices among zeros and NaNs, and what nvcc makes of every kernel."""

from __future__ import annotations

import concurrent.futures
import os
import pathlib
import re
import shutil
import subprocess
from typing import Any

import numpy as np
import pytest
from numpy import absolute, maximum, minimum, sign, sqrt

from stepwire_server.engines.cuda.source import (
    COMPILE_OPTIONS,
    Kernel,
    block_kernels,
    gradient_kernels,
    measure_kernel,
    module_source,
    update_kernel,
)
from stepwire_server.engines.cuda.source.memory import MEMORY
from stepwire_server.engines.cuda.source.prelude import SQUARES
from stepwire_server.engines.cuda.source.printer import print_call, print_function
from stepwire_server.engines.cuda.source.updates import is_crowded, resident_in_blocks
from stepwire_server.engines.stochastic_rounding import round_stochastically
from stepwire_server.rules import Precision, Stage
from stepwire_server.rules.momentum import sgd
from stepwire_server.rules.treatment import scaled
from tests.support import cuda_cases as cases
from tests.support import cuda_shim as shim
from tests.support.pairwise import spread

pytestmark = pytest.mark.many

NVCC = shutil.which("nvcc")
CASES = [*cases.CASES, *cases.IN_BLOCKS]
UPDATES = [update_kernel(*case) for case in CASES]
LAYERWISE = [*cases.LAYERWISE, *cases.LAYERWISE_IN_BLOCKS]
MEASURES = [measure_kernel(recipe, gradient) for recipe, gradient, _ in LAYERWISE]
KERNELS = UPDATES + MEASURES + gradient_kernels() + block_kernels()
ARCHITECTURES = ("75", "90", "100")
TRIED = ARCHITECTURES if os.environ.get("CI") == "true" else ("90",)
"""The architectures that nvcc compiles for, a third of the cases each; it takes seconds for one."""


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
    source = module_source([kernel]).replace(MEMORY, "").replace(SQUARES, "").replace("double *__restrict__ sums", "")
    assert not re.search(r"double|pow|#include|\d\.\d+(?!f)\b", source)
    assert source.count("__global__") == 1


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_updates_call_the_formula_in_one_place(case) -> None:
    """A function of one element; the loops over vectors or whole blocks, and over the rest, call that."""
    kernel = update_kernel(*case)
    calls = len(re.findall(rf"\b{kernel.functions[-1].__name__}\(", kernel.text))
    assert calls == 1
    assert len(re.findall(rf"\b{kernel.name}_element\(", kernel.text)) == 1 + 2


def test_functions_shared_by_kernels_are_printed_once() -> None:
    source = module_source(KERNELS)
    assert source.count("float first_moment(") == source.count("decode_code(unsigned char") == 1
    assert source.count("__global__") == len(KERNELS) == len({kernel.name for kernel in KERNELS})


def test_modules_without_8_bits_have_none_of_its_code() -> None:
    assert "decode_code" not in module_source(gradient_kernels())
    assert "decode_code" in module_source(block_kernels())
    assert "struct Blocks" in module_source(gradient_kernels())
    assert "struct Blocks" not in module_source([*block_kernels(), update_kernel(*cases.CASES[0])])


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


def cases_of(architecture: str) -> list[cases.Case]:
    """Return the cases that are compiled for an architecture: a third, and those with most to hold at once."""
    chosen = spread(cases.rows_of(CASES), ARCHITECTURES)
    return [
        case
        for case, number in zip(CASES, chosen, strict=True)
        if number == architecture or all(getattr(case.recipe, flag) for flag in cases.FLAGS)
    ]


def test_every_architecture_meets_every_value_of_a_case() -> None:
    parameters = {**cases.PARAMETERS, "gradient": cases.GRADIENTS}
    for number in ARCHITECTURES:
        found = {item for row in cases.rows_of(cases_of(number)) for item in row.items()}
        assert found >= {(name, value) for name, values in parameters.items() for value in values}
    assert {case for number in ARCHITECTURES for case in cases_of(number)} == set(CASES)


def nvcc(*arguments: str) -> str:
    """Run nvcc with the options of the engine; return what it and the assembler say."""
    done = subprocess.run([str(NVCC), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def compiled(number: str, kernels: list[Kernel], source: pathlib.Path) -> str:
    """Compile a module for one architecture."""
    source.write_text(module_source(kernels))
    options = [*COMPILE_OPTIONS, f"-arch=sm_{number}", "-Werror=all-warnings", "-Xptxas=-v", "-cubin"]
    return nvcc(*options, "-o", str(source.with_suffix(".cubin")), str(source))


FIGURES = re.compile(
    r"entry function '(\w+)' for.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    r".*?Used (\d+) registers",
    re.DOTALL,
)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed; it compiles the kernels for real devices")
@pytest.mark.parametrize("number", TRIED)
def test_every_kernel_compiles_for_a_real_device_and_spills_nothing(tmp_path, record_property, number) -> None:
    """For one of Turing, Hopper and Blackwell, and each of these compiles every rule and option.

    With 64 registers a multiprocessor holds four blocks of 256 threads; with 80, as where much is held at once, three;
    with more, two.
    """
    if f"compute_{number}\n" not in nvcc("--list-gpu-arch"):
        pytest.skip(f"this nvcc does not know sm_{number}")
    chosen = cases_of(number)
    kernels = [update_kernel(*case) for case in chosen] + gradient_kernels() + block_kernels()
    kernels += [measure_kernel(case.recipe, case.gradient) for case in chosen if case in LAYERWISE]
    modules = {tmp_path / f"kernels_{k}.cu": kernels[k::2] for k in range(2)}
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        outputs = list(pool.map(lambda item: compiled(number, item[1], item[0]), modules.items()))
    figures = {name: numbers for name, *numbers in FIGURES.findall("\n".join(outputs))}
    assert figures.keys() == {kernel.name for kernel in kernels}
    assert {tuple(numbers[:3]) for numbers in figures.values()} == {("0", "0", "0")}
    registers = {name: int(numbers[3]) for name, numbers in figures.items()}
    eight_bit = {update_kernel(*case).name for case in chosen if case.recipe.precision is Precision.INT8}
    measuring = {
        update_kernel(*case).name for case in chosen if case.recipe.measures or is_crowded(case.recipe)
    } - eight_bit
    kinds = [("float", 64, registers.keys() - eight_bit - measuring), ("measuring", 80, measuring)]
    for resident, bound in ((4, 64), (3, 80), (2, 128)):
        held = [case for case in chosen if resident_in_blocks(case.recipe, case.gradient) == resident]
        kinds.append((f"int8 ({resident})", bound, {update_kernel(*case).name for case in held} & eight_bit))
    for kind, bound, names in kinds:
        most = max((registers[name] for name in names), default=0)
        record_property(f"most_registers_{kind}_sm_{number}", most)
        print(f"sm_{number}: {len(names)} {kind} kernels of at most {most} registers")
        assert most <= bound


@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed; it compiles the kernels for real devices")
def test_adam_moves_whole_vectors_and_has_all_loads_under_way_before_the_first_is_used(tmp_path) -> None:
    source = tmp_path / "adam.cu"
    source.write_text(module_source(UPDATES[:1]))
    nvcc(*COMPILE_OPTIONS, "-arch=sm_90", "-ptx", "-o", str(source.with_suffix(".ptx")), str(source))
    operations = re.findall(
        r"\b((?:ld|st)\.global[.\w]*|(?:mul|add|sub)\.rn\.f32)", source.with_suffix(".ptx").read_text()
    )
    loads, stores = ["ld.global.cs.v4.f32"] * 4, ["st.global.cs.v4.f32"] * 4
    assert operations[:4] == loads, "parameters, both moments and the gradient"
    assert [name for name in operations if ".v4." in name] == loads + stores
    assert operations.count("ld.global.cs.f32") == operations.count("st.global.cs.f32") == 4, "what no vector holds"


def test_modules_need_no_header() -> None:
    assert "#include" not in module_source(KERNELS)
