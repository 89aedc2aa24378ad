"""Partitioned sessions as one: found again, moved, created once, listed together."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import stepwire
from stepwire_server.config import ServerConfig
from stepwire_server.server import Server
from tests.integration.sharding.pair import SHAPES, TREATMENTS, Opened, Pair, arrays, over
from tests.integration.training import bits, same_bits

pytestmark = pytest.mark.many


def test_a_session_is_found_again_by_its_ids_alone(servers: list[Server], opened: Opened, one: stepwire.Client) -> None:
    many = over(servers, opened, 3)
    options = TREATMENTS["both"] | {"state_precision": "int8", "label": "mine"}
    pair = Pair(one, many, SHAPES, **options)
    pair.step(arrays(SHAPES, 1))
    first = pair.cut
    again = many.session(first.session_id)
    assert len(again.shards) == 3
    assert (again.shapes, again.applied_step) == (pair.whole.shapes, 1)
    assert list(again.shapes) == list(pair.whole.shapes)
    assert (again.info().label, again.info().session_id) == ("mine", first.session_id)
    pair.cut = again
    for step in (2, 3):
        pair.step(arrays(SHAPES, step))
    pair.compare()
    with pytest.raises(stepwire.FencedError, match=r"shard \d on"):
        first.step(arrays(SHAPES, 4))
    ids = first.session_id.split(",")
    with pytest.raises(stepwire.InvalidRequestError, match="in the order in which"):
        many.session(list(reversed(ids)))
    with pytest.raises(stepwire.InvalidRequestError, match="not the shards of one model"):
        many.session(ids[:2])
    pair.close()


def test_state_moves_between_one_session_and_several(
    servers: list[Server], opened: Opened, one: stepwire.Client
) -> None:
    options: dict[str, Any] = {"state_precision": "int8", "clip_grad_norm": 1.0}
    pair = Pair(one, over(servers, opened, 4), SHAPES, **options)
    pair.step(arrays(SHAPES, 1))
    other = Pair(one, over(servers, opened, 2), SHAPES, **options)
    other.whole.load_state(pair.cut.state())
    other.cut.load_state(pair.whole.state())
    assert other.cut.applied_step == 1
    other.step(arrays(SHAPES, 2))
    other.compare()
    other.cut.load(arrays(SHAPES, 9))
    other.whole.load(arrays(SHAPES, 9))
    assert bits(other.cut.pull()) == bits(arrays(SHAPES, 9))
    other.step(arrays(SHAPES, 3))
    other.compare()
    pair.close()
    other.close()


@pytest.mark.parametrize(
    ("optimizer", "change"),
    [
        (stepwire.SGD(lr=1e-2, momentum=0.9, dampening=0.5), {"momentum": 0.0, "dampening": 0.0}),
        (stepwire.NAdam(), {"betas": (0.5, 0.9)}),
    ],
)
def test_numbers_that_change_leave_the_bits_of_one_session(
    servers: list[Server], opened: Opened, one: stepwire.Client, optimizer: Any, change: dict[str, Any]
) -> None:
    pair = Pair(one, over(servers, opened, 3), SHAPES, optimizer=optimizer, missing_gradient="keep")
    for step, numbers in enumerate((change, {}, change, {}), start=1):
        gradient = arrays(SHAPES, step)
        if step == 2:
            del gradient["b"]
        pair.step(gradient, **({"hyperparameters": numbers} if numbers else {}))
        pair.compare()
    other = Pair(one, over(servers, opened, 2), SHAPES, optimizer=optimizer, missing_gradient="keep")
    other.whole.load_state(pair.cut.state())
    other.cut.load_state(pair.whole.state())
    for each in (pair, other):
        each.step(arrays(SHAPES, 5))
        each.compare()
    assert same_bits(other.cut.state(), pair.whole.state())
    pair.close()
    other.close()


@pytest.mark.parametrize("named", list(SHAPES))
def test_one_shard_alone_may_have_8_bits(
    servers: list[Server], opened: Opened, one: stepwire.Client, named: str
) -> None:
    """The others have no maxima of blocks, which are zeros in the state of the whole."""
    many = over(servers, opened, 3)
    options: dict[str, Any] = {"tensor_precision": {named: "int8"}, "clip_grad_norm": 1.0}
    pair = Pair(one, many, SHAPES, **options)
    pair.step(arrays(SHAPES, 1))
    pair.compare()
    other = Pair(one, many, SHAPES, **options)
    other.whole.load_state(pair.cut.state())
    other.cut.load_state(pair.whole.state())
    other.cut = many.session(other.cut.session_id)
    other.step(arrays(SHAPES, 2))
    other.compare()
    assert other.cut.config.tensor_precision == {name: "int8" if name == named else "float32" for name in SHAPES}
    pair.close()
    other.close()


def test_a_creation_is_repeated_by_its_id(servers: list[Server], opened: Opened) -> None:
    many = over(servers, opened, 3)
    first = many.create_session(arrays(SHAPES, 0), request_id="again")
    first.step(arrays(SHAPES, 1))
    again = many.create_session(arrays(SHAPES, 0), request_id="again")
    assert again.session_id == first.session_id
    assert same_bits(again.state(), first.state())
    again.close()


def test_a_small_model_lies_on_the_first_servers(servers: list[Server], opened: Opened) -> None:
    before = [server.registry.statistics().sessions for server in servers]
    with over(servers, opened, 5).create_session({"w": np.ones(3, np.float32), "b": np.ones(3, np.float32)}) as session:
        now = [server.registry.statistics().sessions for server in servers]
        assert [late - early for early, late in zip(before, now, strict=True)] == [1, 1, 0, 0, 0]
        assert bits(session.step({"w": np.zeros(3, np.float32), "b": np.zeros(3, np.float32)})) == bits(session.pull())
    session.close()
    assert [server.registry.statistics().sessions for server in servers] == before


def test_the_servers_are_told_of_together(servers: list[Server], opened: Opened) -> None:
    many = over(servers, opened, 2)
    info = many.info()
    assert list(info.devices) == [f"{server.target} cpu" for server in servers[:2]]
    assert "two_phase_clipping" in info.features
    with many.create_session(arrays(SHAPES, 0), label="told") as session:
        assert len(session.shards) == 2
        assert {each.session_id for each in many.sessions() if each.label == "told"} == set(
            session.session_id.split(",")
        )
        assert session.info().memory_bytes == sum(shard.info().memory_bytes for shard in session.shards)
        session.attach()
        assert session.transport is not None and session.transport.name == "tcp"
        assert session.info().attached
        session.detach()


def test_a_creation_that_one_server_refuses_leaves_nothing(servers: list[Server], opened: Opened) -> None:
    before = [server.registry.statistics().sessions for server in servers]
    with Server(ServerConfig(bind="127.0.0.1:0", device="cpu", memory_budget=1 << 16)) as small:
        with pytest.raises(stepwire.ResourceExhaustedError):
            opened((servers[0].target, small.target)).create_session(arrays(SHAPES, 0))
    assert [server.registry.statistics().sessions for server in servers] == before
