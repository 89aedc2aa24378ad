"""The sweep itself: its inputs, its sessions, its cases, and that its judgement tells what is wrong."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from conformance.sweep.judge import Finding, judge
from conformance.sweep.main import FRAMEWORKS, filled, main, variants
from conformance.sweep.regimes import BANKS, EXTREME, SUBNORMAL, make_inputs
from conformance.sweep.running import Runs, run
from conformance.sweep.session import LocalSession
from conformance.sweep.table import table
from conformance.sweep.variant import Variant, changing
from stepwire.optimizers import SGD, Adam
from stepwire_server.engines import CpuEngine
from stepwire_server.rules import ALL_RULES, rule_for

INSTALLED = [name for name, module in FRAMEWORKS.items() if importlib.util.find_spec(module) is not None]
needs_torch = pytest.mark.skipif("torch" not in INSTALLED, reason="torch is not installed (pip install torch==2.13.0)")


@pytest.fixture(scope="module")
def engine() -> CpuEngine:
    return CpuEngine(threads=1, use_numba=False)


# --- inputs and sessions ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bank", BANKS)
def test_inputs_are_those_of_their_seed(bank: str) -> None:
    regimes, count = BANKS[bank]
    one, same, other = (make_inputs(bank, 4, seed) for seed in (1, 1, 2))
    for name in regimes:
        assert one[0][name].shape == (count,) and one[1][name].shape == (4, count)
        for values, again in zip((one[0][name], one[1][name]), (same[0][name], same[1][name]), strict=True):
            assert values.dtype == np.float32 and np.isfinite(values).all()
            assert values.tobytes() == again.tobytes()
        assert one[0][name].tobytes() != other[0][name].tobytes()


def test_regimes_reach_both_ends_of_float32() -> None:
    _, gradients = make_inputs("all", 4, 0)
    magnitudes = np.abs(np.concatenate([values.ravel() for values in gradients.values()]))
    assert magnitudes[magnitudes > 0].min() == np.float32(1e-45) and magnitudes.max() > 2e38
    assert SUBNORMAL < EXTREME < BANKS["all"][0].keys()


def test_a_session_steps_as_it_is_told(engine: CpuEngine) -> None:
    initial = {"a": np.zeros(3, np.float32), "b": np.ones(2, np.float32)}
    treatment: Any = {"accumulation_steps": 2, "parameter_average_decay": 0.5}
    with LocalSession(engine, SGD(lr=1.0), initial, treatment, "float32") as session:
        gradient = session.packed({"a": np.full(3, 8.0, np.float32), "b": np.full(2, 4.0, np.float32)})
        for number in (1, 2):
            session.step(number, gradient, {"lr": 0.5}, loss_scale=4.0)
        assert {name: values.tolist() for name, values in session.unpacked(session.values).items()} == {
            "a": [-2.0] * 3,
            "b": [0.0] * 2,
        }
        assert session.unpacked(session.slot("param_average"))["a"].tolist() == [-1.0] * 3
        assert session.result is not None and session.result.step == 2


# --- cases ------------------------------------------------------------------------------------------------------


def test_names_are_unique_and_every_rule_of_an_installed_framework_has_a_case() -> None:
    cases = list(variants(INSTALLED))
    assert len({case.name for case in cases}) == len(cases)
    rules = {rule_for(case.optimizer, bool(case.optimizer.hyperparameters().momentum))[0].name for case in cases}
    owners = {"keras": "keras", "no_bias_correction": "none", "optax": "optax", "lion": "optax"}
    owners |= {"lamb": "optax", "lars": "optax"}
    expected = {
        rule.name
        for rule in ALL_RULES
        if next((owner for part, owner in owners.items() if part in rule.name), "torch") in (*INSTALLED, "none")
    }
    # AMSGrad without bias correction is of no framework and no article.
    assert rules == expected - {"adam_no_bias_correction_raw"}


def test_numbers_change_in_the_middle_of_a_run() -> None:
    numbers = changing("momentum changes", 30)
    assert [numbers[step]["momentum"] for step in (1, 7, 8, 14, 15, 22, 29)] == [0.0, 0.0, 0.9, 0.9, 0.0, 0.5, 0.0]


# --- judgement --------------------------------------------------------------------------------------------------


class Nothing:
    """A reference that no test asks."""


def case(**fields: Any) -> Variant:
    return Variant(
        name="a case, of tests", framework="hand", optimizer=Adam(), build=lambda initial, dtype: Nothing(), **fields
    )


def runs_of(framework: Sequence[float], stepwire: Sequence[float], moves: float = 1e-3) -> Runs:
    """Make the runs of elements that go from 1 to 1 + moves, with errors in ulps after the one step."""
    count, ulp = len(framework), 2.0**-23
    exact = np.stack([np.ones(count), np.full(count, 1.0 + moves)])
    errors = [np.stack([np.zeros(count), np.asarray(each) * ulp]) for each in (framework, stepwire)]
    return Runs(exact, exact + errors[0], exact + errors[1], {"normal": slice(0, count)})


def judged(runs: Runs, **fields: Any) -> Finding:
    (finding,) = judge(case(**fields), runs)
    return finding


def test_a_distance_is_compared_with_the_frameworks() -> None:
    fine = judged(runs_of([20.0] * 20, [39.0] * 20))
    assert (fine.fault, fine.unit) == ("", "ulps")
    assert (fine.stepwire, fine.framework, fine.share) == pytest.approx((39.0, 20.0, 39.0 / 40.0), rel=1e-6)
    assert judged(runs_of([20.0] * 20, [41.0] * 20)).fault == "too far"
    assert judged(runs_of([0.0] * 20, [7.9] * 20)).fault == ""
    assert judged(runs_of([0.0] * 20, [8.1] * 20)).fault == "too far"


def test_single_elements_may_be_unlucky_and_not_wrong() -> None:
    assert judged(runs_of([4.0] * 20, [4.0] * 19 + [799.0])).fault == ""
    assert judged(runs_of([4.0] * 20, [4.0] * 19 + [801.0])).fault == "one element too far: 8e+02 of 4 ulps"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nothing_is_lost_that_the_framework_has(value: float) -> None:
    lost = judged(runs_of([1.0] * 20, [1.0] * 19 + [value]))
    assert lost.fault == "not finite: 1 of 20 elements, where the framework's float32 is"
    assert lost.share == np.inf
    assert judged(runs_of([1.0] * 19 + [value], [1.0] * 19 + [value])).fault == ""


def test_fewer_bits_are_judged_by_the_way_and_by_single_changes() -> None:
    thousandth = 1e-3 * 2.0**23
    near, far, jump = (judged(runs_of([0.0], [part * thousandth]), precision="int8") for part in (0.4, 0.6, 1.1))
    assert (near.fault, near.unit, near.jump) == ("", "of the way", pytest.approx(1.4, rel=1e-4))
    assert far.fault == "too far"
    assert jump.fault == "a single change of 0.0021, where the largest is 0.001"


@needs_torch
def test_a_wrong_number_does_not_pass(engine: CpuEngine) -> None:
    (right,) = (each for each in variants(["torch"], short=True) if each.name == "adam torch")
    wrong = dataclasses.replace(right, optimizer=Adam(eps=1.1e-8))
    faults = {each.regime for each in judge(wrong, run(wrong, engine, 20, 0)) if each.fault}
    assert {"gradients of 1e-06", "gradients of 1e-12"} <= faults
    assert "normal" not in faults, "where eps does not show"


# --- the program ------------------------------------------------------------------------------------------------


def test_the_worst_of_each_family_is_shown() -> None:
    found = [
        ("a", Finding("a, one", "normal", 3.0, 2.0, "ulps")),
        ("a", Finding("a, two", "outliers", 9.0, 5.0, "ulps")),
        ("b", Finding("b", "normal", 1e5, 5.0, "ulps", fault="too far")),
        ("c, int8", Finding("c, int8", "normal", 0.0123, 0.5, "of the way", 1.02)),
    ]
    assert table(found).splitlines() == [
        "| rule, worst option | worst regime | stepwire, ulps | the framework's float32, ulps |",
        "| --- | --- | --- | --- |",
        "| a, two | outliers | 9.0 | 5.0 |",
        "| b | normal | **1.0e+05**: too far | 5.0 |",
        "",
        "| rule, worst option | worst regime | stepwire, part of the way | largest single change, of float64's |",
        "| --- | --- | --- | --- |",
        "| c, int8 | normal | 0.012 | 1.02 |",
    ]


def test_a_page_gets_the_table_between_its_markers(tmp_path: Any, capsys: Any) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- sweep -->\nold\n<!-- /sweep -->\nafter\n")
    arguments = ["--short", "--numpy", "--framework", "hand", "--page", str(page)]
    assert main(arguments) == 0
    written, printed = page.read_text(), capsys.readouterr()
    assert written.startswith("before\n<!-- sweep -->\n| rule") and written.endswith("|\n<!-- /sweep -->\nafter\n")
    assert printed.out.strip() in written
    assert printed.err.endswith(f"1 cases, {len(BANKS['all'][0])} regimes, 0 faults\n")
    with pytest.raises(LookupError, match="no markers"):
        filled("before", "text")
