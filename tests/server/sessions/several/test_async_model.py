"""Workers without rounds, whatever each of them does and when: the product beside a model, bit for bit."""

from __future__ import annotations

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepwire.optimizers.aggregation import Aggregation
from stepwire_server.engines.cpu.engine import CpuEngine
from tests.server.sessions.several.async_model import SIZE, AsyncRun
from tests.server.sessions.several.model import Operation
from tests.server.sessions.several.rig import Rig, config_of

EXAMPLES = int(os.environ.get("STEPWIRE_WORKERS_EXAMPLES", "60" if "CI" in os.environ else "20"))
KINDS = ("join", "step", "step", "step", "step", "come_back", "leave", "repeat", "skip_ahead")
OPERATIONS = st.one_of(
    st.builds(Operation, st.sampled_from(KINDS), st.integers(0, 2)),
    st.builds(Operation, st.just("pass"), st.just(0), st.sampled_from([1.0, 30.0, 60.0])),
)
AGGREGATIONS = {
    "plain": Aggregation(workers=3, mode="async"),
    "corrected": Aggregation(workers=3, mode="async", staleness_correction=True),
    "no older than 1": Aggregation(workers=3, mode="async", max_staleness_steps=1),
    "no older than 0": Aggregation(workers=2, mode="async", max_staleness_steps=0),
    "2 ahead": Aggregation(workers=3, mode="async", max_clock_lead=2),
    "abreast": Aggregation(workers=3, mode="async", max_clock_lead=0),
    "both": Aggregation(workers=3, mode="async", max_clock_lead=1, max_staleness_steps=2),
    "one": Aggregation(workers=1, mode="async", max_clock_lead=0),
}


@pytest.mark.parametrize("name", AGGREGATIONS)
@given(operations=st.lists(OPERATIONS, max_size=40))
@settings(max_examples=EXAMPLES, derandomize="STEPWIRE_WORKERS_EXAMPLES" not in os.environ)
def test_steps_are_those_of_the_model(engine: CpuEngine, name: str, operations: list[Operation]) -> None:
    run = AsyncRun(Rig(engine, config_of(AGGREGATIONS[name], SIZE)), AGGREGATIONS[name])
    try:
        for index in range(AGGREGATIONS[name].workers):
            run.do(Operation("join", index))
        for operation in operations:
            run.do(operation)
    finally:
        run.close()
