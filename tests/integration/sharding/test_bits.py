"""One model over several servers: every bit is that of one session, whatever is asked for."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import stepwire
from stepwire.steps.gradient_feed import GradientFeed
from stepwire_server.server import Server
from stepwire_server.testing import serving
from tests.integration.sharding.pair import SHAPES, TREATMENTS, Arrays, Opened, Pair, arrays, over
from tests.integration.training import bits
from tests.support.pairwise import pairwise

pytestmark = pytest.mark.many

OPTIMIZERS = {
    "adam": stepwire.Adam(lr=1e-2, weight_decay=1e-2),
    "adamw_amsgrad": stepwire.AdamW(lr=1e-2, amsgrad=True),
    "nadam": stepwire.NAdam(),
    "radam": stepwire.RAdam(),
    "adamax": stepwire.Adamax(),
    "sgd": stepwire.SGD(lr=1e-2, momentum=0.9, nesterov=True),
    "rmsprop": stepwire.RMSprop(centered=True, momentum=0.5),
    "adagrad": stepwire.Adagrad(initial_accumulator_value=0.1),
    "adadelta": stepwire.Adadelta(),
    "lion": stepwire.Lion(),
    "lamb": stepwire.LAMB(lr=1e-2),
    "lars": stepwire.LARS(lr=1e-1),
}
# A rule that works on elements and one that works on layers have every treatment; the others, which differ in their
# formula alone, have a third of the treatments each, in turn.
RULES_AND_TREATMENTS = [
    (rule, treatment)
    for turn, rule in enumerate(OPTIMIZERS)
    for place, treatment in enumerate(TREATMENTS)
    if rule in ("adam", "lamb") or (turn + place) % 3 == 0
]


@pytest.mark.slow
@pytest.mark.parametrize(("rule", "treatment"), RULES_AND_TREATMENTS)
def test_a_model_that_is_cut_has_the_bits_of_one_that_is_not(
    servers: list[Server], opened: Opened, one: stepwire.Client, rule: str, treatment: str
) -> None:
    pair = Pair(one, over(servers, opened, 3), SHAPES, optimizer=OPTIMIZERS[rule], **TREATMENTS[treatment])
    assert len(pair.cut.shards) == 3
    for step in (1, 2):
        pair.step(arrays(SHAPES, step))
    pair.compare()
    pair.close()


COUNTS = st.one_of(
    st.integers(0, 300), st.sampled_from([65_535, 65_536, 69_632, 69_631, 131_072 + 4096]), st.integers(60_000, 150_000)
)
WAYS = pairwise(
    {
        "treatment": ["norm", "group", "reject", "allow", "value"],
        "precision": ["float32", "bfloat16", "int8", "mixed"],
        "gradient_dtype": [np.float32, ml_dtypes.bfloat16, np.float16],
        "reply_dtype": ["float32", "bfloat16", "float16"],
    }
)


@pytest.mark.slow
@settings(max_examples=20)
@given(st.lists(COUNTS, min_size=1, max_size=5), st.integers(1, 5), st.sampled_from(WAYS))
def test_so_it_has_however_large_its_tensors_and_whatever_travels(
    servers: list[Server],
    opened: Opened,
    one: stepwire.Client,
    counts: list[int],
    shards: int,
    way: dict[str, Any],
) -> None:
    shapes = {f"t{index}": (count,) for index, count in enumerate(counts)}
    gradient_dtype = way["gradient_dtype"]
    options: dict[str, Any] = dict(TREATMENTS[way["treatment"]])
    if way["treatment"] == "group":
        options["groups"] = [{"params": list(shapes)[::2], "clip_grad_norm": 0.5}]
    mixed = way["precision"] == "mixed"
    options |= {
        "state_precision": "bfloat16" if mixed else way["precision"],
        "tensor_precision": dict(zip(shapes, itertools.cycle(["int8", "float32"]), strict=False)) if mixed else {},
        "gradient_dtype": gradient_dtype,
        "reply_dtype": way["reply_dtype"],
    }
    if shards == 1:
        assert len(over(servers, opened, 1).targets) == 1
        return
    pair = Pair(one, over(servers, opened, shards), shapes, **options)
    for step in (1, 2):
        pair.step(arrays(shapes, step, gradient_dtype))
    pair.compare()
    pair.close()


@pytest.mark.parametrize("channels", [2, 3])
def test_channels_to_one_server_are_the_same(
    servers: list[Server], opened: Opened, one: stepwire.Client, channels: int
) -> None:
    many = opened((servers[0].target,), channels)
    pair = Pair(one, many, SHAPES, clip_grad_norm=1.0, optimizer=stepwire.AdamW())
    assert len(pair.cut.shards) == channels
    for step in (1, 2):
        pair.step(arrays(SHAPES, step))
    pair.compare()
    pair.close()


def test_coarse_gradients_keep_what_they_lose_in_every_shard(
    servers: list[Server], opened: Opened, one: stepwire.Client
) -> None:
    """The blocks of 8-bit gradients are those of each shard's own space: the same ones where shards end with blocks."""
    shapes = {"a": (512,), "b": (2, 256), "c": (1024,)}
    options: dict[str, Any] = {"gradient_dtype": "int8", "error_feedback": True, "clip_grad_norm": 1.0}
    pair = Pair(one, over(servers, opened, 2), shapes, **options)
    assert len(pair.cut.shards) == 2
    for step in range(1, 5):
        pair.step(arrays(shapes, step))
    pair.compare()
    pair.close()


def test_shards_may_share_memory_with_their_servers(exits: contextlib.ExitStack) -> None:
    targets = [exits.enter_context(serving(threads=1)) for _ in range(2)]
    one, many = (exits.enter_context(stepwire.connect(target)) for target in (targets[0], targets))
    pair = Pair(one, many, SHAPES, clip_grad_norm=1.0)
    for step in (1, 2, 3):
        pair.step(arrays(SHAPES, step))
    pair.compare()
    assert pair.cut.transport is not None and pair.whole.transport is not None
    assert pair.cut.transport.name == pair.whole.transport.name
    for shared in (pair.cut.shared_gradients, pair.cut.shared_parameters):
        with pytest.raises(stepwire.UnsupportedFeatureError, match="cut has no arrays in shared memory"):
            shared()
    pair.close()


def test_schedules_accumulation_frozen_tensors_averages_and_lists(
    servers: list[Server], opened: Opened, one: stepwire.Client
) -> None:
    options: dict[str, Any] = {
        "schedule": stepwire.Schedule.cosine(total_steps=5, warmup_steps=2),
        "accumulation_steps": 2,
        "clip_grad_norm": 1.0,
        "frozen": ["embedding"],
        "parameter_average_decay": 0.9,
    }
    pair = Pair(one, over(servers, opened, 4), SHAPES, **options)
    for step in range(1, 7):
        gradient = arrays(SHAPES, step)
        del gradient["embedding"]
        pair.step(gradient)
    pair.compare()
    assert bits(pair.cut.pull(average=True)) == bits(pair.whole.pull(average=True))
    pair.close()
    start = list(arrays(SHAPES, 0).values())
    with one.create_session(start) as whole, over(servers, opened, 3).create_session(start) as cut:
        gradient = list(arrays(SHAPES, 1).values())
        assert bits(cut.step(gradient)) == bits(whole.step(gradient))
        assert bits(cut.pull()) == bits(whole.pull())


def test_missing_gradients_are_missing_in_every_shard(
    servers: list[Server], opened: Opened, one: stepwire.Client
) -> None:
    many = over(servers, opened, 3)
    pair = Pair(one, many, SHAPES, missing_gradient="keep", clip_grad_norm=1.0)
    for step, left_out in enumerate(["head", "embedding", "w", "b", None], 1):
        gradient: Arrays = arrays(SHAPES, step)
        gradient.pop(left_out or "none")
        pair.step(gradient)
    pair.compare()
    pair.close()
    with pytest.raises(stepwire.InvalidRequestError, match="schedule: it counts the updates of a whole group"):
        many.create_session(
            arrays(SHAPES, 0), missing_gradient="keep", schedule=stepwire.Schedule.cosine(total_steps=5)
        )


def test_other_ways_to_step(servers: list[Server], opened: Opened, one: stepwire.Client) -> None:
    pair = Pair(one, over(servers, opened, 3), SHAPES, non_finite="allow", reply_dtype="bfloat16")
    pair.step(arrays(SHAPES, 1), lr=0.1, reply_first=["head", "b"], overlap=True)
    pair.step(arrays(SHAPES, 2), reply="changed", hyperparameters=[{"eps": 1e-3}])
    pair.step(arrays(SHAPES, 3), reply="changed")
    pair.step(arrays(SHAPES, 4), loss_scale=8.0, gradient_dtype="float16", reply_dtype="float32")
    assert pair.cut.step(arrays(SHAPES, 5), reply="none") == pair.whole.step(arrays(SHAPES, 5), reply="none") == {}
    told: list[str] = []
    out = {name: np.empty(shape, np.float32) for name, shape in SHAPES.items()}
    futures = [
        pair.cut.step_async(arrays(SHAPES, 6)),
        pair.cut.step_async(
            arrays(SHAPES, 7), on_tensor=lambda name, values: told.append(name), out=out, reply_dtype="float32"
        ),
    ]
    for step in (6, 7):
        pair.whole.step(arrays(SHAPES, step))
    assert [future.exception() for future in futures] == [None, None]
    assert futures[1].result() is out
    assert sorted(told) == sorted(SHAPES)
    pair.compare()
    assert bits(out) == bits(pair.whole.pull())
    pair.close()


def test_a_gradient_that_is_still_being_made_is_refused(
    servers: list[Server], opened: Opened, one: stepwire.Client
) -> None:
    pair = Pair(one, over(servers, opened, 2), SHAPES)
    pair.step(arrays(SHAPES, 1))
    future = pair.cut.step_async(arrays(SHAPES, 2), feed=GradientFeed(list(SHAPES)))
    with pytest.raises(stepwire.UnsupportedFeatureError, match="feed: gradients that are made while they are sent"):
        future.result(120.0)
    pair.step(arrays(SHAPES, 2))
    pair.compare()
    pair.close()
