"""One model over several servers: every bit is that of one session, whatever is asked for and whatever breaks."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import stepwire
from stepwire.connection.retry import Deadline
from stepwire.results import Snapshot, StepResult
from stepwire.sharding.coordinator import Coordinator
from stepwire.steps.gradient_feed import GradientFeed
from stepwire_server.config import ServerConfig
from stepwire_server.server import Server
from stepwire_server.testing import serving
from tests.integration.events import Clock
from tests.integration.link import Cut
from tests.integration.proxy import Proxy
from tests.integration.training import bits, same_bits
from tests.support.pairwise import pairwise

Arrays = dict[str, np.ndarray[Any, Any]]
Opened = Callable[..., stepwire.Client]

_SEED = 20_261_201
SHAPES = {"embedding": (310, 701), "w": (129, 130), "b": (131,), "scale": (), "none": (0, 3), "head": (3, 67_111)}


@pytest.fixture(scope="module")
def servers() -> Iterator[list[Server]]:
    """Five servers whose messages hold 64 KiB."""
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(
                Server(
                    ServerConfig(
                        bind="127.0.0.1:0", device="cpu", threads=1, max_chunk_bytes=64 << 10, sweep_seconds=3600.0
                    )
                )
            )
            for _ in range(5)
        ]


@pytest.fixture(scope="module")
def opened() -> Iterator[Opened]:
    """Open clients over TCP that retry within milliseconds; each set of targets once."""
    with contextlib.ExitStack() as stack:

        @functools.cache
        def open_once(targets: tuple[str, ...], channels: int = 1) -> stepwire.Client:
            retry = stepwire.Retry(initial_seconds=0.001, max_seconds=0.01)
            return stack.enter_context(
                stepwire.connect(list(targets), transport="tcp", channels=channels, timeout=30.0, retry=retry)
            )

        yield open_once


@pytest.fixture(scope="module")
def one(servers: list[Server], opened: Opened) -> stepwire.Client:
    """A client of one server."""
    return opened((servers[0].target,))


def over(servers: list[Server], opened: Opened, count: int) -> stepwire.Client:
    """A client of some of the servers."""
    return opened(tuple(server.target for server in servers[:count]))


def arrays(shapes: dict[str, tuple[int, ...]], step: int, dtype: Any = np.float32) -> Arrays:
    """Return a gradient, the same whenever it is asked for; step 0 is the start."""
    generator = np.random.default_rng((_SEED, step))
    return {name: generator.standard_normal(shape, np.float32).astype(dtype) for name, shape in shapes.items()}


def with_nan(gradient: Arrays, name: str, element: int, value: float = np.nan) -> Arrays:
    """Return the gradient with one element that is not finite."""
    spoiled = gradient[name].copy()
    spoiled.reshape(-1)[element] = value
    return gradient | {name: spoiled}


def decided(result: StepResult | None) -> str:
    """Write out what of a result is the same bit for bit wherever the gradient is decided on as a whole: NaN is NaN."""
    assert result is not None
    groups = [
        dataclasses.replace(group, update_norm=None, param_norm=None, clipped_grad_norm=0.0) for group in result.groups
    ]
    kept = dataclasses.replace(
        result,
        epoch=0,
        groups=tuple(groups),
        receive_seconds=0.0,
        queue_seconds=0.0,
        apply_seconds=0.0,
        previous_send_seconds=None,
        clipped_grad_norm=0.0,
        update_norm=None,
        param_norm=None,
    )
    return repr(kept)


def measured(result: StepResult | None) -> list[float]:
    """Return what of a result is measured and decides nothing."""
    assert result is not None
    values = [
        (each.clipped_grad_norm, each.update_norm or 0.0, each.param_norm or 0.0) for each in (result, *result.groups)
    ]
    return [value for each in values for value in each]


class Pair:
    """One training twice: in one session, and cut over several."""

    def __init__(self, one: stepwire.Client, many: stepwire.Client, shapes: dict[str, tuple[int, ...]], **options: Any):
        self.shapes = shapes
        self.whole = one.create_session(arrays(shapes, 0), **options)
        self.cut = many.create_session(arrays(shapes, 0), **options)
        self.exact = options.get("non_finite") != "allow" or bool(options.get("clip_grad_norm"))

    def step(self, gradient: Arrays, **options: Any) -> None:
        """Apply a step in both; answers and results are the same."""
        expected = self.whole.step(gradient, **options)
        assert bits(self.cut.step(gradient, **options)) == bits(expected)
        self.compare_results()

    def compare_results(self) -> None:
        whole, cut = self.whole.last_result, self.cut.last_result
        if self.exact:
            assert decided(cut) == decided(whole)
        np.testing.assert_allclose(measured(cut), measured(whole), rtol=1e-5, atol=1e-30)

    def compare(self) -> None:
        """Compare everything the servers hold."""
        whole, cut = self.whole.state(), self.cut.state()
        assert same_bits(cut, whole)
        assert cut.loss_scale == whole.loss_scale

    def close(self) -> None:
        self.whole.close()
        self.cut.close()


# --- every bit ------------------------------------------------------------------------------------------------

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
TREATMENTS: dict[str, dict[str, Any]] = {
    "reject": {},
    "allow": {"non_finite": "allow"},
    "norm": {"clip_grad_norm": 1.0},
    "optax": {"clip_grad_norm": 3.0, "clip_formula": "optax"},
    "group": {"groups": [{"params": ["w", "head"], "clip_grad_norm": 0.5, "lr": 1e-3}]},
    "both": {
        "groups": [{"params": ["w", "b"], "clip_grad_norm": 2.0}, {"params": ["head"], "maximize": True}],
        "clip_grad_norm": 1.5,
        "clip_formula": "keras",
    },
    "value": {"clip_grad_value": 0.3, "clip_grad_norm": 100.0},
}


# One rule that works on elements and both that work on layers have every treatment; the others, which differ in their
# formula alone, have a third of the treatments each, in turn.
RULES_AND_TREATMENTS = [
    (rule, treatment)
    for turn, rule in enumerate(OPTIMIZERS)
    for place, treatment in enumerate(TREATMENTS)
    if rule in ("adam", "lamb", "lars") or (turn + place) % 3 == 0
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
    assert sorted(told) == sorted(set(SHAPES) - {"none"})
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
        future.result(30.0)
    pair.step(arrays(SHAPES, 2))
    pair.compare()
    pair.close()


# --- NaN and Inf ----------------------------------------------------------------------------------------------


def test_nan_in_one_shard_is_refused_by_all(servers: list[Server], opened: Opened, one: stepwire.Client) -> None:
    pair = Pair(one, over(servers, opened, 3), SHAPES, clip_grad_norm=1.0)
    pair.step(arrays(SHAPES, 1))
    before = pair.cut.state()
    element = 3 * 67_111 - 5
    spoiled = with_nan(arrays(SHAPES, 2), "head", element)
    with pytest.raises(stepwire.NonFiniteGradientError, match="gradient of tensor 'head' holds NaN") as refused:
        pair.cut.step(spoiled)
    assert (refused.value.metadata["tensor"], refused.value.metadata["element"]) == ("head", str(element))
    assert pair.cut.applied_step == 1
    assert same_bits(pair.cut.state(), before)
    pair.step(arrays(SHAPES, 2))
    pair.compare()
    pair.close()


@pytest.mark.slow
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(
    "options",
    [
        {"non_finite": "skip"},
        {"non_finite": "skip", "accumulation_steps": 2, "clip_grad_norm": 1.0},
        {"loss_scaling": stepwire.LossScaling(initial_scale=1024.0, growth_interval=2), "clip_grad_norm": 1.0},
        {"non_finite": "allow", "clip_grad_norm": 1.0},
        {"non_finite": "allow"},
    ],
    ids=["skip", "accumulated", "loss_scaling", "clipped", "allow"],
)
def test_nan_in_one_shard_is_skipped_or_applied_by_all(
    servers: list[Server], opened: Opened, one: stepwire.Client, options: dict[str, Any], value: float
) -> None:
    pair = Pair(one, over(servers, opened, 3), SHAPES, **options)
    for step in range(1, 7):
        gradient = arrays(SHAPES, step)
        pair.step(with_nan(gradient, "embedding", 3, value) if step in (2, 3) else gradient)
        assert pair.cut.loss_scale == pair.whole.loss_scale
    pair.compare()
    pair.close()


# --- state ----------------------------------------------------------------------------------------------------


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
    with pytest.raises(stepwire.SessionNotFoundError):
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


# --- what breaks ----------------------------------------------------------------------------------------------


@pytest.fixture
def proxied(servers: list[Server], opened: Opened) -> Iterator[tuple[stepwire.Client, Proxy]]:
    """Three servers, the second behind a network that fails."""
    with Proxy(servers[1].target) as proxy:
        yield opened((servers[0].target, proxy.target, servers[2].target)), proxy


@pytest.fixture
def unhurried(exits: contextlib.ExitStack) -> Callable[[list[Server]], stepwire.Client]:
    """Open clients for whom time passes only while they pause."""

    def opened(servers: list[Server]) -> stepwire.Client:
        clock = Clock()
        retry = stepwire.Retry(clock=clock, sleep=clock.advance)
        return exits.enter_context(stepwire.connect([each.target for each in servers], transport="tcp", retry=retry))

    return opened


def counts(session: stepwire.Session) -> list[int]:
    """Return the steps that each server has applied, as it says itself."""
    return [shard.info().applied_step for shard in session.shards]


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"clip_grad_norm": 1.0}, {"non_finite": "allow"}], ids=["two_phases", "one_phase"])
@pytest.mark.parametrize("direction", ["up", "down"])
def test_a_shard_cut_off_at_any_message_is_stepped_once(
    proxied: tuple[stepwire.Client, Proxy], one: stepwire.Client, options: dict[str, Any], direction: Any
) -> None:
    """Before it has staged, between the two halves of the commit, within the answer: the others are left alone."""
    many, proxy = proxied
    pair = Pair(one, many, SHAPES, **options)
    step = 0
    for after in range(100):
        step += 1
        pair.step(arrays(SHAPES, step))  # so that the connection is open and quiet
        cuts = proxy.cuts
        proxy.arm(Cut(direction, "message", after))
        step += 1
        gradient = arrays(SHAPES, step)
        assert bits(pair.cut.step(gradient)) == bits(pair.whole.step(gradient))
        proxy.disarm()
        assert counts(pair.cut) == [step] * 3
        if proxy.cuts == cuts:
            break
    assert after >= 3
    pair.compare()
    pair.close()


class Lost(Exception):
    """Stands for whatever ends one shard's part of a step."""


@pytest.mark.parametrize("others", [0, 1])
def test_a_shard_that_failed_after_the_decision_is_finished_by_the_next_call(
    servers: list[Server], opened: Opened, one: stepwire.Client, monkeypatch: pytest.MonkeyPatch, others: int
) -> None:
    """The others have stepped, and do not step again; where none has, the next call decides anew."""
    pair = Pair(one, over(servers, opened, 2), SHAPES, clip_grad_norm=1.0)
    pair.step(arrays(SHAPES, 1))
    decide = Coordinator.decide

    def decide_and_be_lost(self: Coordinator, shard: int, staged: Any, deadline: Deadline) -> Any:
        commit = decide(self, shard, staged, deadline)
        if shard >= others:
            raise Lost
        return commit

    with monkeypatch.context() as patched:
        patched.setattr(Coordinator, "decide", decide_and_be_lost)
        with pytest.raises(Lost):
            pair.cut.step(arrays(SHAPES, 2 if others else 7))
    assert pair.cut.applied_step == 1
    assert [server_step(servers[rank], pair.cut, rank) for rank in range(2)] == [1 + others, 1]
    gradient = arrays(SHAPES, 2)
    assert bits(pair.cut.step(gradient)) == bits(pair.whole.step(gradient))
    assert pair.cut.applied_step == 2
    pair.compare_results()
    pair.step(arrays(SHAPES, 3))
    pair.compare()
    pair.close()


def test_a_client_that_ends_after_the_decision_leaves_what_only_a_load_mends(
    servers: list[Server], opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = over(servers, opened, 2)
    session = many.create_session(arrays(SHAPES, 0), clip_grad_norm=1.0)
    assert len(session.shards) == 2
    state = session.state()
    decide = Coordinator.decide

    def decide_and_end(self: Coordinator, shard: int, staged: Any, deadline: Deadline) -> Any:
        commit = decide(self, shard, staged, deadline)
        if shard == 0:
            raise Lost
        return commit

    with monkeypatch.context() as patched:
        patched.setattr(Coordinator, "decide", decide_and_end)
        with pytest.raises(Lost):
            session.step(arrays(SHAPES, 1))
    session.detach()
    later = many.session(session.session_id)
    with pytest.raises(stepwire.StepMismatchError) as uneven:
        later.step(arrays(SHAPES, 1))
    assert uneven.value.metadata == {"steps": "0,1", "expected_step": "1", "actual_step": "1"}
    later.load_state(dataclasses.replace(state, step=1))
    assert later.applied_step == 1
    later.step(arrays(SHAPES, 1))
    later.close()


def server_step(server: Server, session: stepwire.Session, rank: int) -> int:
    """Ask the server itself, in this process, where a shard is."""
    return server.registry.get(session.session_id.split(",")[rank]).ledger.applied_step


def test_a_shard_that_is_gone_before_it_has_staged_stops_all(servers: list[Server], opened: Opened) -> None:
    many = over(servers, opened, 3)
    session = many.create_session(arrays(SHAPES, 0), clip_grad_norm=1.0)
    assert len(session.shards) == 3
    session.step(arrays(SHAPES, 1))
    session.shards[1].close()
    for _ in range(2):
        with pytest.raises(stepwire.SessionNotFoundError, match=rf"shard 1 on {servers[1].target}") as gone:
            session.step(arrays(SHAPES, 2))
        assert gone.value.metadata["last_known_step"] == "1"
        assert [server_step(servers[rank], session, rank) for rank in (0, 2)] == [1, 1]
    session.close()


def test_a_client_that_ends_between_two_shards_is_told_of_to_the_next(
    servers: list[Server],
    opened: Opened,
    one: stepwire.Client,
    unhurried: Callable[[list[Server]], stepwire.Client],
) -> None:
    many = over(servers, opened, 2)
    pair = Pair(one, many, SHAPES, non_finite="allow")
    pair.step(arrays(SHAPES, 1))
    good: Snapshot = pair.cut.state()
    pair.cut.detach()
    lone = opened((servers[1].target,)).session(pair.cut.session_id.split(",")[1])
    lone.step({name: np.zeros(shape, np.float32) for name, shape in lone.shapes.items()})
    later = many.session(pair.cut.session_id)
    assert len(later.shards) == 2
    told = "shard 0 on .* is at step 1, shard 1 on .* is at step 2.*load_state, its step not below 2"
    for call in (lambda: later.applied_step, lambda: later.step(arrays(SHAPES, 2))):
        with pytest.raises(stepwire.StepMismatchError, match=told):
            call()
    with pytest.raises(stepwire.StepMismatchError, match=r"different steps, at last \[1, 2\]"):
        unhurried(servers[:2]).session(pair.cut.session_id).pull(timeout=30.0)
    later.load_state(dataclasses.replace(good, step=2))
    pair.whole.load_state(dataclasses.replace(good, step=2))
    pair.cut = later
    pair.step(arrays(SHAPES, 3))
    pair.compare()
    pair.close()
