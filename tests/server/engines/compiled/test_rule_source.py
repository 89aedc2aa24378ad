"""Finding the functions that a recipe is made of."""

from __future__ import annotations

from stepwire_server.engines.compiled.rule_source import functions_of, functions_of_stages
from stepwire_server.rules import ALL_RULES, Decay, Recipe
from stepwire_server.rules.adaptive import RMSPROP_RULES
from stepwire_server.rules.layerwise import LAMB
from stepwire_server.rules.momentum import sgd


def names(functions) -> list[str]:
    return [function.__name__ for function in functions]


def test_a_function_comes_after_those_it_calls() -> None:
    assert names(functions_of(sgd)) == ["sgd"]
    assert names(functions_of(LAMB.update)) == ["weighted_mean", "second_moment", "towards", "lamb"]
    assert names(functions_of(RMSPROP_RULES[True, False].update))[-1] == "rmsprop_centered"


def test_functions_of_a_pass_are_found_once_each() -> None:
    for rule in ALL_RULES:
        recipe = Recipe(rule, Decay.BEFORE, accumulates=True, limits=True, averages=True)
        found = functions_of_stages(recipe.stages)
        assert len(set(names(found))) == len(found)
        assert {stage.function for stage in recipe.stages} <= set(found)
        for place, function in enumerate(found):
            assert set(functions_of(function)[:-1]) <= set(found[:place])


def test_functions_of_others_are_left_alone() -> None:
    """NumPy's are the subset that every engine knows by name."""
    assert not {"sqrt", "maximum"} & set(names(functions_of(LAMB.update)))
