"""A server on a pretended GPU against the vectors: a case a rule, the formulas of Adam, and reduced precision."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest

from conformance.checking import PASSED, check
from conformance.stored_case import stored_cases
from stepwire.v1 import optimizer_pb2
from stepwire_server.config import ServerConfig
from stepwire_server.devices.pool import DevicePool
from stepwire_server.rpc.decode_config import decode_session_config
from stepwire_server.server import Server
from tests.server.pretended_gpus import (
    PlacedGpu,
    compiled_kernels,
    kernels_of_config,
    library_of,
    machine_code,
    needs_compiler,
    pretended_cupy,
)

pytestmark = [needs_compiler, pytest.mark.slow, pytest.mark.many]

ALL = {case.name: case for case in stored_cases()}
STEPS = 10


def _chosen() -> set[str]:
    """Return the first case of each rule and formula that does not run on defaults, and those that say more."""
    firsts: dict[tuple[int, int], str] = {}
    for case in ALL.values():
        if case.family.startswith(case.rule.lower()) and not case.name.endswith("-defaults"):
            firsts.setdefault((case.config.optimizer.rule, case.config.optimizer.formula), case.name)
    more = {"accumulation-clipped", "gradient-bfloat16", "groups-adamw", "loss-scale-dynamic", "missing-adam"}
    return {*firsts.values(), *more, "parameter-average", "state-bfloat16", "state-int8"}


CASES = {name: ALL[name] for name in sorted(_chosen())}


@pytest.fixture(scope="module")
def channel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[grpc.Channel]:
    directory, config = compiled_kernels(request, tmp_path_factory), ServerConfig(bind="127.0.0.1:0")
    plans = [decode_session_config(case.config, config) for case in CASES.values()]
    library = library_of([kernel for plan in plans for kernel in kernels_of_config(plan)], directory)
    cupy = pretended_cupy(directory, library=library, order=("random", 1))
    cubins = machine_code(tmp_path_factory)
    next(cubins)
    with (
        Server(config, pool=DevicePool.of([PlacedGpu(cupy)])) as server,
        grpc.insecure_channel(server.target) as channel,
    ):
        yield channel
    cupy.check()
    next(cubins, None)


def test_every_rule_and_every_formula_of_adam_is_among_them() -> None:
    optimizers = [case.config.optimizer for case in CASES.values()]
    assert {optimizer.rule for optimizer in optimizers} == set(optimizer_pb2.Rule.values()) - {0}
    formulas = {optimizer.formula for optimizer in optimizers if optimizer.rule == optimizer_pb2.RULE_ADAM}
    assert formulas == set(optimizer_pb2.Formula.values())


@pytest.mark.parametrize("name", CASES)
def test_a_gpu_computes_what_the_framework_computes(name: str, channel: grpc.Channel) -> None:
    case = CASES[name]
    result = check(channel, case, max(STEPS, case.checkpoints[1]))
    assert result.outcome == PASSED, f"{result.fraction:.3g} of what is allowed: {result.detail} ({case.reference})"
