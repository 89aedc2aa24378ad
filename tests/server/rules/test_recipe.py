"""A pass as a list of functions: what is in it, in which order, and under which names."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import re

import numpy as np
import pytest

from stepwire_server.engines.compiled.rule_source import functions_of_stages
from stepwire_server.rules import ACCUMULATED, ALL_RULES, AVERAGE, Decay, Precision, Recipe, Rule
from stepwire_server.rules.adam import ADAM_RULES
from stepwire_server.rules.momentum import SGD, SGD_MOMENTUM

FLAGS = ("accumulates", "limits", "averages", "measures")
RECIPES = [
    Recipe(rule, decay, *flags, precision)
    for rule, decay, flags, precision in itertools.product(
        ALL_RULES, Decay, list(itertools.product([False, True], repeat=4)), Precision
    )
]
RECIPES += [
    Recipe(rule, decay, forgotten=forgotten)
    for rule, decay in itertools.product(ALL_RULES, Decay)
    for forgotten in {(slot,) for slot, _ in rule.means} | {tuple(slot for slot, _ in rule.means)} - {()}
]
LAYERWISE = [recipe for recipe in RECIPES if recipe.rule.direction is not None]

KERNELS_OWN = set(
    "gradient out start begin first size low high block partials sums lanes i k values total before treated term lane "
    "lanes_0 lanes_1 block_low block_high sum_update sum_param sum_gradient range min helper kernel measuring_kernel "
    "absolute empty float32 float64 maximum minimum sign sqrt uint16 uint32 zeros".split()
)
"""Names that generated kernels use themselves."""


def variables(recipe: Recipe) -> set[str]:
    stages = [*recipe.stages, *(recipe.direction_stages if recipe.rule.direction is not None else [])]
    return {name for stage in stages for name in (*stage.results, *stage.arguments)}


def test_equal_recipes_are_one_key_and_others_are_others() -> None:
    copies = [dataclasses.replace(recipe) for recipe in RECIPES]
    assert [hash(copy) for copy in copies] == [hash(recipe) for recipe in RECIPES]
    assert len({recipe: None for recipe in RECIPES + copies}) == len(RECIPES)


def test_variables_do_not_collide_with_those_of_kernels() -> None:
    for recipe in RECIPES:
        names = variables(recipe)
        assert not names & KERNELS_OWN
        assert not any(
            re.fullmatch(r".*_(all|now)|seed_.*|lanes_.*|sum_.*|decode_.*|encode_.*", name) for name in names
        )
        functions = {function.__name__ for function in functions_of_stages(recipe.stages)}
        assert not names & functions


def test_variables_of_a_pass_are_all_there_are() -> None:
    for recipe in RECIPES:
        slots, scalars = list(recipe.slots.values()), recipe.scalars
        assert len({"p", "g", *slots, *scalars}) == 2 + len(slots) + len(scalars), "no name stands for two things"
        assert variables(recipe) - {"u"} == {"p", "g", *slots, *scalars, *recipe.temporaries}


def test_every_stage_calls_its_function_rightly() -> None:
    for recipe in RECIPES:
        for stage in recipe.stages:
            assert len(inspect.signature(stage.function).parameters) == len(stage.arguments)
        update = next(stage for stage in recipe.stages if stage.function is recipe.rule.update)
        names = tuple(inspect.signature(recipe.rule.update).parameters)
        others = {"p": "way"} if recipe.decay is Decay.WITHIN else {}
        assert update.results == (others.get("p", "p"), *names[2 : 2 + len(recipe.rule.slots)])
        others |= {recipe.slots[slot]: "g" for slot in recipe.forgotten}
        assert update.arguments == tuple(others.get(name, name) for name in names)


def test_slots_are_the_rules_then_the_sum_then_the_average() -> None:
    for recipe in RECIPES:
        extra = [ACCUMULATED] * recipe.accumulates + [AVERAGE] * recipe.averages
        assert list(recipe.slots) == [*recipe.rule.slots, *extra]
        assert recipe.slots.get(ACCUMULATED, "accumulated") == "accumulated"
        assert recipe.slots.get(AVERAGE, "average") == "average"


def test_scalars_are_the_treatments_then_the_rules() -> None:
    for recipe in RECIPES:
        names = ["factor", "clip"] + ["limit"] * recipe.limits
        names += ["decay_scalar"] * (recipe.decay is not Decay.NONE) + ["average_rate"] * recipe.averages
        assert recipe.scalars == (*names, *recipe.rule_scalars)
        assert ("trust" == recipe.scalars[-1]) == (recipe.rule.trust is not None)


def test_sums_are_of_the_update_the_parameters_and_a_limited_gradient() -> None:
    for recipe in RECIPES:
        expected = ("update", "param", "gradient") if recipe.limits else ("update", "param")
        assert recipe.sums == (expected if recipe.measures else ())


def test_stages_come_in_the_order_of_a_step() -> None:
    recipe = Recipe(SGD_MOMENTUM, Decay.GRADIENT, accumulates=True, limits=True, averages=True)
    names = ["scaled", "added", "scaled", "limited", "decayed", "sgd_momentum", "averaged"]
    assert [stage.function.__name__ for stage in recipe.stages] == names
    assert recipe.treatment == recipe.stages[:4]
    before, after = Recipe(SGD, Decay.BEFORE), Recipe(SGD, Decay.AFTER, averages=True)
    assert [stage.function.__name__ for stage in before.stages] == ["scaled", "scaled", "scaled", "sgd"]
    assert [stage.function.__name__ for stage in after.stages] == ["scaled", "scaled", "sgd", "scaled", "averaged"]
    assert before.stages[2].results == after.stages[3].results == ("p",)
    apart, within = Recipe(SGD, Decay.APART), Recipe(SGD, Decay.WITHIN, averages=True)
    assert [stage.function.__name__ for stage in apart.stages] == ["scaled", "scaled", "lessened", "sgd"]
    names = ["scaled", "scaled", "drawn", "sgd", "moved", "averaged"]
    assert [stage.function.__name__ for stage in within.stages] == names


def test_decay_within_the_update_is_added_to_it_first() -> None:
    """P = 2^24 is even, so either part alone, 1, would be lost; together they are 2."""
    recipe = Recipe(SGD, Decay.WITHIN)
    scalars = dict(zip(recipe.scalars, map(np.float32, (1.0, 1.0, 2.0**-24, 1.0)), strict=True))
    values = {"p": np.float32(2.0**24), "g": np.float32(1.0)}
    assert recipe.evaluate(recipe.stages, values | scalars)["p"] == 2.0**24 - 2.0
    values = {"p": np.float32(-(2.0**24)), "g": np.float32(-1.0)}
    assert recipe.evaluate(recipe.stages, values | scalars)["p"] == 2.0 - 2.0**24


@pytest.mark.parametrize(
    "rule", [rule for rule in ALL_RULES if rule.direction is None and rule.name != "nadam"], ids=lambda rule: rule.name
)
def test_a_rule_only_ever_subtracts_from_its_parameter(rule: Rule) -> None:
    """That is why it can step what is no parameter: see `Recipe.stages`.

    Layerwise rules have a decay of their own. NAdam subtracts twice, as torch's does, and never decays within.
    """
    count = len(inspect.signature(rule.update).parameters)
    others = np.random.default_rng(4).uniform(0.25, 1.0, count - 1).astype(np.float32)
    apart = rule.update(np.float32(0.0), *others)
    for p in np.float32([1.0, -3.0, 1e-3, 2.0**24]):
        together = rule.update(p, *others)
        assert together[0] == p + apart[0]
        assert together[1:] == apart[1:]


def test_a_forgotten_mean_is_the_gradient_in_every_bit() -> None:
    recipe = Recipe(ADAM_RULES[0], forgotten=("exp_avg",))
    g, m = np.float32([1e-9, -3.0, 0.0, 3e38]), np.float32([1.0, 1e8, 7.0, -3e38])
    scalars = dict.fromkeys(recipe.scalars, np.float32(1.0)) | {"beta2": np.float32(0.5)}
    values = {"p": np.zeros(4, np.float32), "g": g, "m": m, "v": np.ones(4, np.float32)}
    with np.errstate(all="ignore"):
        assert recipe.evaluate(recipe.stages, values | scalars)["m"].tolist() == g.tolist()
        usual = Recipe(ADAM_RULES[0])
        assert usual.evaluate(usual.stages, values | scalars)["m"].tolist() != g.tolist()


def test_a_step_by_hand() -> None:
    """The gradient: −8·¼ = −2; + 5 = 3; ·2 = 6; limited to 4; decay ½·2 = 1 makes 5. Then p = 2 − 0.2·5."""
    recipe = Recipe(SGD, Decay.GRADIENT, accumulates=True, limits=True, averages=True)
    scalars = dict(zip(recipe.scalars, (-0.25, 2.0, 4.0, 0.5, 0.5, 0.2), strict=True))
    values = recipe.evaluate(recipe.stages, {"p": 2.0, "g": 8.0, "accumulated": 5.0, "average": 3.0} | scalars)
    assert (values["g"], values["p"], values["average"]) == (5.0, 1.0, 2.0)


def test_evaluation_changes_nothing_it_is_given() -> None:
    recipe = Recipe(SGD_MOMENTUM, Decay.BEFORE, averages=True)
    arrays = {name: np.ones(3, np.float32) for name in ("p", "g", *recipe.slots.values())}
    given = {**arrays, **{name: np.float32(0.5) for name in recipe.scalars}}
    after = recipe.evaluate(recipe.stages, given)
    assert all((array == 1.0).all() for array in arrays.values())
    assert given.keys() == after.keys() and after is not given


# --- layerwise rules ------------------------------------------------------------------------------------------


def test_the_direction_is_of_the_gradient_that_the_update_gets() -> None:
    for recipe in LAYERWISE:
        *treatment, direction = recipe.direction_stages
        assert tuple(treatment) == recipe.treatment
        assert direction.function is recipe.rule.direction and direction.results == ("u",)
        assert direction.arguments == tuple(inspect.signature(recipe.rule.direction).parameters)
        assert not recipe.rule.means
        assert "trust" not in direction.arguments


def test_other_rules_have_no_direction() -> None:
    with pytest.raises(AssertionError):
        _ = Recipe(SGD).direction_stages


# --- keys and names -------------------------------------------------------------------------------------------


def test_names_are_unique_for_unequal_keys() -> None:
    """The name is a kernel's, and its file's: two keys under one name would run one another's machine code."""
    names: dict[str, tuple[object, ...]] = {}
    for recipe in RECIPES:
        assert names.setdefault(recipe.name, recipe.key) == recipe.key
        assert recipe.name.isidentifier()
    assert len(names) == len({recipe.key for recipe in RECIPES})


def test_keys_tell_everything_that_changes_the_arithmetic() -> None:
    base = Recipe(SGD_MOMENTUM)
    others = [dataclasses.replace(base, **{flag: True}) for flag in FLAGS]
    others += [dataclasses.replace(base, precision=Precision.BFLOAT16), dataclasses.replace(base, rule=SGD)]
    others += [dataclasses.replace(base, decay=decay) for decay in Decay if decay is not Decay.NONE]
    others += [dataclasses.replace(base, forgotten=("momentum_buffer",))]
    assert len({recipe.key for recipe in (base, *others)}) == 1 + len(others)
    assert dataclasses.replace(base).key == base.key


def test_rules_with_one_function_share_keys() -> None:
    by_function: dict[object, set[object]] = {}
    for rule in ALL_RULES:
        by_function.setdefault(rule.update, set()).add(Recipe(rule).key)
    assert all(len(keys) == 1 for keys in by_function.values())
    assert len(by_function) < len(ALL_RULES)
