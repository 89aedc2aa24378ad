"""Adam's t, segment by segment."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepwire.layout import TensorSpec
from stepwire.optimizers import LAMB, SGD, Adam, NAdam
from stepwire_server.records.step_result import GroupResult, StepResult, StepTimes
from stepwire_server.rules import Precision
from stepwire_server.steps.tensor_steps import CountedSegment, TensorSteps
from tests.server.configs import make_config

SPECS = (
    TensorSpec("a", (3,)),
    TensorSpec("b", (2,)),
    TensorSpec("c", (0,)),
    TensorSpec("d", (4,)),
    TensorSpec("e", (5,), 1),
)
NUMBERS = tuple(Adam(lr=0.1 * group).hyperparameters() for group in (1, 2, 3))
CONFIG = make_config(*SPECS, groups=NUMBERS)
ABSENT = st.frozensets(st.integers(0, 4))


def ranges(steps: TensorSteps) -> list[tuple[int, int]]:
    return [(segment.start, segment.end) for segment in steps.segments(CONFIG.active)]


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([0, 0, 0, 0, 0], [(0, 9), (256, 261)]),
        ([4, 4, 9, 4, 4], [(0, 9), (256, 261)]),
        ([4, 5, 5, 5, 5], [(0, 3), (3, 9), (256, 261)]),
        ([1, 2, 3, 4, 5], [(0, 3), (3, 5), (5, 9), (256, 261)]),
        ([4, 5, 4, 4, 4], [(0, 3), (3, 5), (5, 9), (256, 261)]),
    ],
)
def test_neighbours_of_one_group_with_the_same_t_are_one_segment(
    steps: list[int], expected: list[tuple[int, int]]
) -> None:
    """An empty tensor between them is no boundary; a group's end always is."""
    assert ranges(TensorSteps(CONFIG, steps)) == expected


@given(st.lists(st.integers(0, 50), min_size=5, max_size=5), st.integers(0, 20))
def test_every_tensor_counts_from_where_it_was(steps: list[int], updates: int) -> None:
    counted = TensorSteps(CONFIG, steps)
    for _ in range(updates):
        counted.advance(CONFIG.active, NUMBERS)
    assert counted.tensor_steps() == tuple(step + updates for step in steps)
    assert counted.group_steps()[:2] == [max(steps[:4]) + updates, steps[4] + updates]
    for segment in counted.segments(CONFIG.active):
        (tensor,) = [t for t in CONFIG.layout.tensors if t.offset == segment.start and t.count]
        t = steps[CONFIG.layout.tensors.index(tensor)] + updates + 1
        assert (segment.group, segment.t) == (tensor.spec.group, t)


@given(st.lists(st.integers(0, 9), min_size=5, max_size=5), st.lists(ABSENT, max_size=12))
def test_tensors_that_were_left_out_keep_their_t(steps: list[int], absences: list[frozenset[int]]) -> None:
    """Whatever was left out in each update; held against a count for each tensor."""
    counted, counts = TensorSteps(CONFIG, steps), list(steps)
    for absent in absences:
        active = CONFIG.without(absent)
        found = {at: segment for segment in counted.segments(active) for at in range(segment.start, segment.end)}
        for index, tensor in enumerate(CONFIG.layout.tensors):
            here = [found.get(at) for at in range(tensor.offset, tensor.end)]
            wanted = None if index in absent else (tensor.spec.group, counts[index] + 1)
            assert all((segment and (segment.group, segment.t)) == wanted for segment in here)
        counted.advance(active, NUMBERS)
        counts = [count + (index not in absent) for index, count in enumerate(counts)]
        assert counted.tensor_steps() == tuple(counts)
        assert counted.group_steps() == [max(counts[:4]), counts[4], 0]


def test_asking_for_segments_counts_nothing() -> None:
    counted = TensorSteps(CONFIG, [1, 2, 3, 4, 5])
    for absent in (frozenset({0}), frozenset[int](), frozenset({1, 4})):
        counted.segments(CONFIG.without(absent))
        assert counted.tensor_steps() == (1, 2, 3, 4, 5)


def test_a_layerwise_rule_has_a_segment_a_tensor() -> None:
    config = make_config(*SPECS, optimizer=LAMB(), groups=(LAMB().hyperparameters(),) * 3)
    assert TensorSteps(config, [4] * 5).segments(config.active) == [
        CountedSegment(0, 3, 0, 5),
        CountedSegment(3, 5, 0, 5),
        CountedSegment(5, 9, 0, 5),
        CountedSegment(256, 261, 1, 5),
    ]


def test_segments_end_where_eight_bits_begin() -> None:
    specs = [TensorSpec(name, (count,)) for name, count in (("a", 3), ("b", 4), ("c", 4352), ("d", 5), ("e", 6))]
    config = make_config(*specs, precision=Precision.INT8)
    ranges = [(segment.start, segment.end) for segment in TensorSteps(config, [0] * 5).segments(config.active)]
    assert ranges == [(0, 7), (256, 4608), (4608, 4619)]


def test_a_replayed_result_differs_in_saying_so() -> None:
    result = StepResult(4, 1, True, 1.5, 2, (GroupResult(1.5, NUMBERS[0], 3),), StepTimes(0.1, 0.2, 0.3))
    assert not result.replayed
    assert result.replay() == result._replace(replayed=True)
    assert result.replay().replay() == result.replay()


# --- the scalars of tensors -----------------------------------------------------------------------------------

MOVING, STILL = (SGD(momentum=momentum).hyperparameters() for momentum in (0.5, 0.0))
BUFFERED = make_config(*SPECS, optimizer=SGD(), groups=(MOVING, STILL, MOVING))
PRODUCTS = make_config(*SPECS, optimizer=NAdam(), groups=(NAdam().hyperparameters(),) * 3)


@given(st.lists(st.tuples(ABSENT, st.lists(st.booleans(), min_size=3, max_size=3)), max_size=12))
def test_a_buffer_begins_with_the_first_update_that_has_momentum(
    updates: list[tuple[frozenset[int], list[bool]]],
) -> None:
    """Whichever tensors are left out, and whichever groups have momentum; held against a flag for each tensor."""
    counted, begun = TensorSteps(BUFFERED, [0] * 5), [0.0] * 5
    for absent, moving in updates:
        selection = BUFFERED.without(absent)
        found = {at: segment for segment in counted.segments(selection) for at in range(segment.start, segment.end)}
        groups = [MOVING if moves else STILL for moves in moving]
        for index, tensor in enumerate(BUFFERED.layout.tensors):
            if index not in absent:
                assert all(found[at].scalar == begun[index] for at in range(tensor.offset, tensor.end))
                begun[index] = max(begun[index], float(moving[tensor.spec.group]))
        counted.advance(selection, groups)
        assert counted.tensor_scalars() == tuple(begun)


@given(st.lists(st.tuples(ABSENT, st.floats(0.0, 0.99)), max_size=12))
def test_a_product_is_of_the_numbers_of_its_own_updates(updates: list[tuple[frozenset[int], float]]) -> None:
    counted, products, counts = TensorSteps(PRODUCTS, [0] * 5), [1.0] * 5, [0] * 5
    for absent, beta1 in updates:
        hyper = NAdam(betas=(beta1, 0.9), momentum_decay=0.5).hyperparameters()
        counted.advance(PRODUCTS.without(absent), [hyper] * 3)
        for index in set(range(5)) - absent:
            counts[index] += 1
            products[index] *= beta1 * (1.0 - 0.5 * 0.96 ** (counts[index] * 0.5))
        assert counted.tensor_scalars() == pytest.approx(products, rel=1e-12)


def test_scalars_are_loaded_or_derived_from_t() -> None:
    assert TensorSteps(BUFFERED, [0, 1, 2, 0, 9]).tensor_scalars() == (0.0, 1.0, 1.0, 0.0, 0.0), "the last has none"
    assert TensorSteps(BUFFERED, [3] * 5, [0, 1, 0, 1, 1]).tensor_scalars() == (0, 1, 0, 1, 1)
    assert TensorSteps(CONFIG, [3] * 5).tensor_scalars() == ()
    assert TensorSteps(PRODUCTS, [0] * 5).tensor_scalars() == (1.0,) * 5


def test_tensors_with_other_scalars_are_other_segments() -> None:
    steps = TensorSteps(BUFFERED, [3] * 5, [0, 0, 1, 1, 0])
    assert steps.segments(BUFFERED.active) == [
        CountedSegment(0, 5, 0, 4, 0.0),
        CountedSegment(5, 9, 0, 4, 1.0),
        CountedSegment(256, 261, 1, 4, 0.0),
    ]
