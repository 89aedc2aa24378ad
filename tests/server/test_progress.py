"""Adam's t, range by range."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepwire.layout import TensorSpec, place
from stepwire.optimizers import Adam, AdamW
from stepwire_server import rules
from stepwire_server.progress import GroupRecord, Progress, StepRecord

LAYOUT = place(
    [
        TensorSpec("a", (3,)),
        TensorSpec("b", (2,)),
        TensorSpec("c", (0,)),
        TensorSpec("d", (4,)),
        TensorSpec("e", (5,), 1),
    ],
    3,
)
NUMBERS = tuple(Adam(lr=0.1 * group).hyperparameters() for group in (1, 2, 3))


def spans(progress: Progress) -> list[tuple[int, int]]:
    return [(run.start, run.end) for run in progress.next_step(Adam(), NUMBERS)]


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
def test_neighbours_of_one_group_with_the_same_t_are_one_run(steps: list[int], expected: list[tuple[int, int]]) -> None:
    """An empty tensor between them is no boundary; a group's end always is."""
    assert spans(Progress(LAYOUT, steps)) == expected


@given(st.lists(st.integers(0, 50), min_size=5, max_size=5), st.integers(0, 20))
def test_every_tensor_counts_from_where_it_was(steps: list[int], updates: int) -> None:
    progress = Progress(LAYOUT, steps)
    for _ in range(updates):
        progress.advance()
    assert progress.tensor_steps() == tuple(step + updates for step in steps)
    assert progress.group_steps()[:2] == [max(steps[:4]) + updates, steps[4] + updates]
    for run in progress.next_step(Adam(), NUMBERS):
        (tensor,) = [t for t in LAYOUT.tensors if t.offset == run.start and t.count]
        group, t = tensor.spec.group, steps[LAYOUT.tensors.index(tensor)] + updates + 1
        assert run.scalars == run.rule.scalars(NUMBERS[group], t)


@pytest.mark.parametrize(
    ("optimizer", "decay"), [(Adam(), 0.0), (Adam(weight_decay=0.1), 0.1), (AdamW(), 0.1), (Adam(amsgrad=True), 0.0)]
)
def test_a_run_has_the_rule_of_its_numbers(optimizer: Adam, decay: float) -> None:
    numbers = tuple(numbers.replace({"weight_decay": decay}) for numbers in NUMBERS)
    for run, group in zip(Progress(LAYOUT, [0] * 5).next_step(optimizer, numbers), (0, 1), strict=True):
        assert run.rule is rules.rule_for(optimizer, numbers[group])


def test_a_replayed_record_differs_in_saying_so() -> None:
    record = StepRecord(4, 1, True, 1.5, 2, (GroupRecord(1.5, NUMBERS[0], 3),), 0.1, 0.2, 0.3)
    assert not record.replayed
    assert record.replay() == record._replace(replayed=True)
    assert record.replay().replay() == record.replay()
