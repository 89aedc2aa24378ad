"""What every formula must be, so that engines can make kernels of it."""

from __future__ import annotations

import ast
import inspect
import math
import textwrap

import numpy as np
import pytest

from stepwire.optimizers import (
    LAMB,
    LARS,
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    Lion,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
)
from stepwire_server.engines.compiled.rule_source import functions_of
from stepwire_server.rules import ALL_RULES, Decay, Rule, rule_for, treatment

OPTIMIZERS: list[Optimizer] = [
    Adam(),
    Adam(amsgrad=True),
    Adam(formula="keras"),
    Adam(formula="keras", amsgrad=True),
    Adam(formula="no_bias_correction"),
    Adam(formula="no_bias_correction", amsgrad=True),
    Adam(formula="optax"),
    Adam(formula="optax", amsgrad="corrected"),
    Adam(formula="optax", nesterov=True),
    AdamW(formula="decay_after"),
    NAdam(),
    RAdam(),
    Adamax(),
    SGD(),
    SGD(momentum=0.9),
    SGD(momentum=0.9, nesterov=True),
    *[RMSprop(centered=centered, momentum=momentum) for centered in (False, True) for momentum in (0.0, 0.9)],
    Adagrad(),
    Adadelta(),
    Lion(),
    LAMB(),
    LARS(),
    LARS(nesterov=True),
]
RULES = [
    pytest.param(rule_for(optimizer, bool(optimizer.hyperparameters().momentum))[0], optimizer, id=str(index))
    for index, optimizer in enumerate(OPTIMIZERS)
]
FUNCTIONS = {
    function.__name__: function
    for rule in ALL_RULES
    for top in (rule.update, rule.direction)
    if top is not None
    for function in functions_of(top)
} | {name: getattr(treatment, name) for name in treatment.__all__}


def scalars_of(rule: Rule, optimizer: Optimizer, t: int) -> tuple[float, ...]:
    scalars = rule.scalars(optimizer.hyperparameters(), t)
    return (*scalars, 0.5) if rule.trust is not None else scalars


def test_the_optimizers_above_use_every_rule() -> None:
    assert [parameters.values[0].name for parameters in RULES] == [rule.name for rule in ALL_RULES]


def test_names_are_unique() -> None:
    assert len({rule.name for rule in ALL_RULES}) == len(ALL_RULES) == 26
    names = {rule.update.__name__: rule.update for rule in ALL_RULES}
    assert all(names[rule.update.__name__] is rule.update for rule in ALL_RULES)


@pytest.mark.parametrize(("rule", "optimizer"), RULES)
def test_update_takes_what_the_rule_says(rule: Rule, optimizer: Optimizer) -> None:
    scalars = scalars_of(rule, optimizer, 1)
    assert len(inspect.signature(rule.update).parameters) == 2 + len(rule.slots) + len(scalars)
    result = rule.update(1.0, 1.0, *[0.25] * len(rule.slots), *scalars)
    assert isinstance(result, tuple) and len(result) == 1 + len(rule.slots)
    names = list(inspect.signature(rule.update).parameters)
    assert names[:2] == ["p", "g"]
    if rule.direction is not None:
        assert rule.trust is not None and names[-1] == "trust"
        assert list(inspect.signature(rule.direction).parameters) == names[:-1]


@pytest.mark.parametrize(("rule", "optimizer"), RULES)
def test_scalars_are_float64_whatever_the_numbers_are(rule: Rule, optimizer: Optimizer) -> None:
    base = optimizer.hyperparameters()
    exact = {name: 0.25 for name in base.used() if name != "maximize"}
    single = {name: np.float32(value) for name, value in exact.items()} | {"lr": np.float32(0.25)}
    for t in (1, 2, 7):
        scalars = rule.scalars(base.replace(single), t)
        assert all(type(scalar) is float for scalar in scalars)
        assert scalars == rule.scalars(base.replace(exact), t)
    zeros = {name: 0 for name in base.used() if name not in ("maximize", "trust_coefficient")}
    assert all(type(scalar) is float and not math.isnan(scalar) for scalar in rule.scalars(base.replace(zeros), 1))


@pytest.mark.parametrize(("rule", "optimizer"), RULES)
def test_scalars_follow_the_step_and_nothing_else(rule: Rule, optimizer: Optimizer) -> None:
    hyper = optimizer.hyperparameters()
    first = [rule.scalars(hyper, t) for t in (1, 2, 3, 1000)]
    assert [rule.scalars(hyper, t) for t in (1, 2, 3, 1000)] == first
    assert not any(map(math.isnan, (*rule.scalars(hyper, 10**12), *rule.scalars(hyper, 2**53))))


@pytest.mark.parametrize(("rule", "optimizer"), RULES)
def test_update_leaves_its_arguments_alone(rule: Rule, optimizer: Optimizer) -> None:
    arrays = [np.full(3, 0.5) for _ in range(2 + len(rule.slots))]
    scalars = scalars_of(rule, optimizer, 1)
    rule.update(*arrays, *scalars)
    if rule.direction is not None:
        rule.direction(*arrays, *scalars[:-1])
    assert all((array == 0.5).all() for array in arrays)


@pytest.mark.parametrize(("rule", "optimizer"), RULES)
def test_update_stays_in_float32_and_arrays_mean_elements(rule: Rule, optimizer: Optimizer) -> None:
    random = np.random.default_rng(2)
    arrays = [random.uniform(0.5, 1.5, 9).astype(np.float32) for _ in range(2 + len(rule.slots))]
    scalars = [np.float32(scalar) for scalar in scalars_of(rule, optimizer, 3)]
    result = rule.update(*arrays, *scalars)
    assert {value.dtype.name for value in result} == {"float32"}
    for place in range(9):
        alone = rule.update(*[array[place] for array in arrays], *scalars)
        assert [type(value) for value in alone] == [np.float32] * len(result)
        assert list(alone) == [value[place] for value in result]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_in_the_subset_that_engines_understand(name: str) -> None:
    tree = ast.parse(textwrap.dedent(inspect.getsource(FUNCTIONS[name])))
    literals = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    assert literals == [ast.get_docstring(tree.body[0], clean=False)], "no literals but the documentation"  # type: ignore[arg-type]
    calls = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert calls <= {"sqrt", "maximum", "minimum", "absolute", "sign"} | set(FUNCTIONS)
    allowed = (ast.Assign, ast.Return, ast.Expr, ast.FunctionDef)
    statements = [node for node in ast.walk(tree) if isinstance(node, ast.stmt)]
    assert all(isinstance(node, allowed) for node in statements)
    operators = {type(node.op) for node in ast.walk(tree) if isinstance(node, (ast.BinOp, ast.UnaryOp))}
    assert operators <= {ast.Add, ast.Sub, ast.Mult, ast.Div, ast.USub}


# --- decay ----------------------------------------------------------------------------------------------------


def test_decays_number_is_the_coefficient_or_what_is_left() -> None:
    hyper = AdamW(lr=0.25, weight_decay=0.5).hyperparameters()
    assert Decay.GRADIENT.scalar(hyper) == 0.5
    assert Decay.BEFORE.scalar(hyper) == Decay.AFTER.scalar(hyper) == 0.875
    assert Decay.APART.scalar(hyper) == Decay.WITHIN.scalar(hyper) == 0.125


def test_no_decay_leaves_exactly_everything() -> None:
    hyper = AdamW(lr=0.3, weight_decay=0.0).hyperparameters()
    assert (Decay.GRADIENT.scalar(hyper), Decay.BEFORE.scalar(hyper)) == (0.0, 1.0)


def test_decay_is_float64_whatever_the_numbers_are() -> None:
    hyper = AdamW().hyperparameters().replace({"lr": np.float32(1e-3), "weight_decay": np.float32(1e-2)})
    for decay in (Decay.GRADIENT, Decay.BEFORE):
        assert type(decay.scalar(hyper)) is float
    assert Decay.BEFORE.scalar(hyper) == 1.0 - float(np.float32(1e-3)) * float(np.float32(1e-2))
