"""The text of generated modules: it says everything that its machine code depends on."""

from __future__ import annotations

import ast
import itertools

import pytest

from stepwire_server.engines.cpu.numba_module import HELPER_OPTIONS, KERNEL_OPTIONS, MEASURING_OPTIONS
from stepwire_server.engines.cpu.numba_source import (
    accumulate_source,
    measure_source,
    seeds_of,
    sum_source,
    update_source,
)
from stepwire_server.rules import ALL_RULES, Decay, Precision, Recipe
from stepwire_server.rules.adam import amsgrad
from stepwire_server.rules.layerwise import LAMB
from stepwire_server.rules.momentum import SGD

FLAGS = list(itertools.product([False, True], repeat=4))
PRECISIONS = (Precision.FLOAT32, Precision.BFLOAT16)
RULES = list({rule.update: rule for rule in ALL_RULES}.values())
WIRE = ("float32", "bfloat16", "float16")


def unbound(text: str) -> set[str]:
    """Return names that a module reads and nobody gives it."""
    tree = ast.parse(text)
    given = {"helper", "kernel", "measuring_kernel", "range", "min"}
    given |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    given |= {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    loose = set()
    for function in [node for node in tree.body if isinstance(node, ast.FunctionDef)]:
        own = {argument.arg for argument in function.args.args}
        names = [node for node in ast.walk(function) if isinstance(node, ast.Name)]
        own |= {node.id for node in names if isinstance(node.ctx, ast.Store)}
        body = [node for statement in function.body for node in ast.walk(statement) if isinstance(node, ast.Name)]
        loose |= {node.id for node in body} - own - given
    return loose


def test_every_update_is_a_module_of_its_own() -> None:
    """Every rule, place of decay and precision, with options in turn; codecs stand in one line each."""
    texts = set()
    cases = list(itertools.product(RULES, Decay, PRECISIONS))
    for (rule, decay, precision), flags in zip(cases, itertools.cycle(FLAGS), strict=False):
        recipe = Recipe(rule, decay, *flags, precision)
        text = update_source(recipe, "the_kernel", "float32", "bfloat16")
        assert unbound(text) == set(), recipe
        texts.add(text)
    assert len(texts) == len(cases)
    assert len({update_source(Recipe(SGD, Decay.NONE, *flags), "k", "float32", None) for flags in FLAGS}) == len(FLAGS)


@pytest.mark.parametrize(("gradient", "reply"), list(itertools.product(WIRE, (None, *WIRE))))
def test_codecs_are_those_of_the_dtypes(gradient, reply) -> None:
    text = update_source(Recipe(SGD), "the_kernel", gradient, reply)
    assert unbound(text) == set()
    assert f"decode_{gradient}(gradient_now[i])" in text
    assert (f"out_now[i] = encode_{reply}(p)" in text) is (reply is not None)
    assert ("out_now" in text) is (reply is not None)


@pytest.mark.parametrize("gradient", WIRE)
def test_other_kernels_are_whole_too(gradient) -> None:
    held = Recipe(LAMB, accumulates=True, limits=True, precision=Precision.BFLOAT16)
    for text in (
        sum_source("the_kernel", gradient, False),
        sum_source("the_kernel", gradient, True),
        accumulate_source("the_kernel", gradient),
        *[measure_source(Recipe(rule), "the_kernel", gradient) for rule in RULES if rule.direction],
        measure_source(held, "the_kernel", gradient),
    ):
        assert unbound(text) == set()
        assert f"decode_{gradient}(" in text


def test_the_text_states_the_options_it_is_compiled_with() -> None:
    """Its hash names the file; machine code of other options must not be found under it."""
    plain = update_source(Recipe(SGD), "the_kernel", "float32", "float32")
    measuring = update_source(Recipe(SGD, measures=True), "the_kernel", "float32", "float32")
    for text, options, decorator in (
        (plain, KERNEL_OPTIONS, "kernel"),
        (measuring, MEASURING_OPTIONS, "measuring_kernel"),
    ):
        documentation = ast.get_docstring(ast.parse(text))
        assert documentation is not None
        assert f"helpers {HELPER_OPTIONS}" in documentation and f"kernel {options}" in documentation
        assert f"@{decorator}\ndef the_kernel(" in text
    for text in (
        sum_source("s", "float32", False),
        accumulate_source("a", "float32"),
        measure_source(Recipe(LAMB), "m", "float32"),
    ):
        assert f"kernel {KERNEL_OPTIONS}" in text and "measuring_kernel" not in text


def test_options_allow_what_the_engine_promises() -> None:
    """The same bits everywhere: no fast-math but for sums of telemetry; and the GIL is free."""
    assert HELPER_OPTIONS["fastmath"] is False
    assert "fastmath" not in KERNEL_OPTIONS and MEASURING_OPTIONS["fastmath"] == {"reassoc"}
    assert all(options["error_model"] == "numpy" for options in (HELPER_OPTIONS, KERNEL_OPTIONS, MEASURING_OPTIONS))
    assert KERNEL_OPTIONS["nogil"] is MEASURING_OPTIONS["nogil"] is True


def test_a_rules_formula_stands_in_the_text_as_it_stands_in_the_source() -> None:
    rule = next(rule for rule in ALL_RULES if rule.update is amsgrad)
    text = update_source(Recipe(rule, Decay.BEFORE), "the_kernel", "float32", "float32")
    assert "return p - step_size * (m / (sqrt(x) + eps)), m, v, x" in text
    body = text[text.index("def the_kernel") :]
    calls = [line.strip() for line in body.splitlines() if "= scaled(" in line or "= amsgrad(" in line]
    assert calls == [
        "g = scaled(g, factor)",
        "g = scaled(g, clip)",
        "p = scaled(p, decay_scalar)",
        "p, m, v, x = amsgrad(p, g, m, v, x, rate1, beta2, rate2, step_size, eps)",
    ]


def test_seeds_are_of_the_rules_slots_held_as_bfloat16() -> None:
    recipe = Recipe(LAMB, accumulates=True, averages=True, precision=Precision.BFLOAT16)
    assert seeds_of(recipe) == ["seed_m", "seed_v"]
    assert seeds_of(Recipe(LAMB, accumulates=True)) == []
    text = update_source(recipe, "the_kernel", "float32", None)
    assert "m_now[i] = encode_bfloat16_stochastic(m, seed_m)" in text
    assert "accumulated_now[i] = float32(0.0)" in text and "average_now[i] = average" in text
