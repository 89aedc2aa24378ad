"""The kernels as NVRTC compiles them: needs CuPy and NVRTC, and no device."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

from stepwire_server.engines.cuda.source import (
    COMPILE_OPTIONS,
    Kernel,
    block_kernels,
    gradient_kernels,
    measure_kernel,
    module_source,
    update_kernel,
)
from tests.support import cuda_cases as cases

cupy = pytest.importorskip("cupy", reason="CuPy is not installed (pip install '.[cuda13]')", exc_type=ImportError)


ARCHITECTURES = ("75", "90", "100")
KERNELS = [
    *[update_kernel(*case) for case in [*cases.CASES, *cases.IN_BLOCKS]],
    *[measure_kernel(recipe, gradient) for recipe, gradient, _ in [*cases.LAYERWISE, *cases.LAYERWISE_IN_BLOCKS]],
]


@pytest.fixture
def target(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Say what CuPy would ask a device for: the architecture, and whether machine code is wanted or PTX."""
    compiler = cupy.cuda.compiler
    try:
        compiler._get_nvrtc_version()
    except Exception as problem:
        pytest.skip(f"NVRTC is not installed (pip install '.[cuda13]'): {problem}")

    def choose(option: str, form: str) -> None:
        monkeypatch.setattr(compiler, "_get_arch_for_options_for_nvrtc", lambda arch: (f"-arch={option}", form))

    return choose


def compiled(kernels: list[Kernel]) -> bytes:
    """Compile as `Compiler` does."""
    code, _ = cupy.cuda.compiler.compile_using_nvrtc(
        module_source(kernels), COMPILE_OPTIONS, filename="stepwire.cu", cache_in_memory=True
    )
    return code if isinstance(code, bytes) else code.encode()


@pytest.mark.parametrize("number", ARCHITECTURES)
def test_nvrtc_takes_every_kernel(target: Any, number: str) -> None:
    """Each architecture has a few: nvcc's compiler is the same, and its test has them all."""
    target(f"sm_{number}", "cubin")
    share = KERNELS[4 * ARCHITECTURES.index(number) :: 12]
    for kernels in (share, gradient_kernels(), block_kernels()):
        code = compiled(kernels)
        assert code.startswith(b"\x7fELF")
        assert all(f".text.{kernel.name}\0".encode() in code for kernel in kernels)


def test_nothing_is_fused_flushed_or_approximated(target: Any) -> None:
    """But for squares in float64, which are exact: a product of two float32 has 48 bits."""
    target("compute_90", "ptx")
    text = compiled([*KERNELS[::12], *gradient_kernels(), *block_kernels()]).decode()
    arithmetic = "add|sub|mul|div|fma|mad|sqrt|rsqrt|rcp|ex2|lg2|sin|cos|tanh"
    operations = set(re.findall(rf"^\s*((?:{arithmetic})\S*\.f(?:32|64))\s", text, re.M))
    rounded = {f"{name}.rn.f32" for name in ("add", "sub", "mul", "div", "rcp", "sqrt")}
    assert (
        {"div.rn.f32", "sqrt.rn.f32"}
        <= operations
        <= rounded | {*("add.f64", "mul.f64", "add.rn.f64", "mul.rn.f64", "fma.rn.f64")}
    )
    assert ".ftz" not in text and ".approx" not in text
