"""Rounds of several workers, whatever each of them does and when: the product beside a model, bit for bit."""

from __future__ import annotations

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepwire.optimizers.aggregation import Aggregation
from stepwire.optimizers.gradient_treatment import GradientTreatment
from stepwire_server.engines.cpu.engine import CpuEngine
from tests.server.sessions.several.model import SIZE, Model, Operation, Run
from tests.server.sessions.several.rig import Rig, config_of

EXAMPLES = int(os.environ.get("STEPWIRE_WORKERS_EXAMPLES", "60" if "CI" in os.environ else "20"))
KINDS = ("join", "step", "step", "step", "step", "come_back", "leave", "break_off", "poison", "repeat", "load")
KINDS += ("skip_ahead",)
SECONDS = st.sampled_from([0.0, 0.001, 0.01, 1.0, 5.0, 60.0])
OPERATIONS = st.one_of(
    st.builds(Operation, st.sampled_from(KINDS), st.integers(0, 3)),
    st.builds(Operation, st.sampled_from(["step"]), st.integers(0, 3)),
    st.builds(Operation, st.just("pass"), st.just(0), SECONDS),
)
AGGREGATIONS = {
    "all": Aggregation(workers=3),
    "two phases": Aggregation(workers=3),
    "one": Aggregation(workers=1),
    "k of n": Aggregation(workers=4, required_workers=2),
    "one of n": Aggregation(workers=3, required_workers=1, most_grace=1.0),
    "no grace": Aggregation(workers=3, required_workers=2, least_grace=0.0, most_grace=0.0),
    "sum": Aggregation(workers=2, reduction="sum"),
    "weighted": Aggregation(workers=3, reduction="weighted_mean", required_workers=2),
    "median": Aggregation(workers=4, reduction="median", required_workers=3),
    "trimmed": Aggregation(workers=4, reduction="trimmed_mean", trimmed=1, required_workers=3),
}


@pytest.mark.parametrize("name", AGGREGATIONS)
@given(operations=st.lists(OPERATIONS, max_size=40))
@settings(max_examples=EXAMPLES, derandomize="STEPWIRE_WORKERS_EXAMPLES" not in os.environ)
def test_rounds_are_those_of_the_model(engine: CpuEngine, name: str, operations: list[Operation]) -> None:
    aggregation = AGGREGATIONS[name]
    treatment = GradientTreatment(non_finite="reject", two_phase=name == "two phases")
    run = Run(Rig(engine, config_of(aggregation, SIZE, treatment=treatment)), Model(aggregation))
    try:
        for index in range(aggregation.workers):
            run.do(Operation("join", index))
        for operation in operations:
            run.do(operation)
        run.finish()
    finally:
        run.close()
