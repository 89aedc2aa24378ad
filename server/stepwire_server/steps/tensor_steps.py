"""Adam's t for every tensor of a session, and for the segments that one update moves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from stepwire.optimizers import Hyperparameters
from stepwire_server.records.session_config import SessionConfig
from stepwire_server.records.tensor_selection import TensorSelection

__all__ = ["CountedSegment", "TensorSteps"]


class CountedSegment(NamedTuple):
    """Neighbouring tensors of one group with the same t and scalar: flat elements `[start, end)`.

    Almost always there is one segment a group, so a step is one kernel call a group and chunk, however many tensors.
    Layerwise rules have a segment a tensor, and a table is one. A segment ends where moments are held in another
    precision.

    Attributes:
        start: first flat element.
        end: one past the last.
        group: the group of the tensors.
        t: counts the next update.
        scalar: the rule's scalar of the tensors before that update; 0 where the rule keeps none.
    """

    start: int
    end: int
    group: int
    t: int
    scalar: float = 0.0


class _Course(NamedTuple):
    """The course of tensors of one group that were updated alike: their t as of `TensorSteps._base`, and scalar."""

    group: int
    base: int
    scalar: float


class TensorSteps:
    """Adam's t, tensor by tensor, and the rule's scalar. Almost always all tensors of a group move together.

    So an update counts one up, and moves one scalar a course.
    """

    def __init__(
        self, config: SessionConfig, tensor_steps: Sequence[int], tensor_scalars: Sequence[float] = ()
    ) -> None:
        """Start from the updates that each tensor, in layout order, has had.

        Args:
            config: the session's config.
            tensor_steps: the updates of each tensor.
            tensor_scalars: the scalar of each tensor; empty to derive them from the session's numbers.
        """
        self._config = config
        self._base = list(tensor_steps)
        self._scalars = list(tensor_scalars) or self._derived()  # as of _base, and empty where the rule keeps none
        self._updates = 0  # of all selected tensors, since _base
        self._selection = config.active
        self._courses: list[_Course] = []
        self._find_segments()

    def tensor_steps(self) -> tuple[int, ...]:
        """Return the updates each tensor has had, in layout order."""
        moved = self._updates
        return tuple(t if index in self._selection.absent else t + moved for index, t in enumerate(self._base))

    def tensor_scalars(self) -> tuple[float, ...]:
        """Return the scalar of each tensor, in layout order; empty where the rule keeps none."""
        moving = {index: self._courses[course].scalar for index, course in self._course_of.items()}
        return tuple(moving.get(index, scalar) for index, scalar in enumerate(self._scalars))

    def group_steps(self) -> list[int]:
        """Return the most updates that a tensor of each group has had."""
        return [int(max(still, moving + self._updates)) for still, moving in self._group_base]

    def segments(self, selection: TensorSelection) -> list[CountedSegment]:
        """Return the segments that the next update moves, in flat order; their t counts that update."""
        if selection is not self._selection:
            self._follow(selection)
        updates, courses = self._updates + 1, self._courses
        return [
            CountedSegment(start, end, courses[at].group, courses[at].base + updates, courses[at].scalar)
            for start, end, at in self._segments
        ]

    def advance(self, selection: TensorSelection, groups: Sequence[Hyperparameters]) -> None:
        """Count one update of the tensors that it moved, by these numbers."""
        if selection is not self._selection:
            self._follow(selection)
        self._updates += 1
        if self._scalars:
            self._courses = [self._moved(course, groups[course.group]) for course in self._courses]

    def _moved(self, course: _Course, hyper: Hyperparameters) -> _Course:
        kept = self._config.recipe(hyper).rule.tensor_scalar
        if kept is None:  # without momentum
            return course
        return course._replace(scalar=kept.following(hyper, course.base + self._updates, course.scalar))

    def _derived(self) -> list[float]:
        kept, groups = self._config.rule.tensor_scalar, self._config.groups
        if kept is None:
            return []
        tensors = zip(self._config.layout.tensors, self._base, strict=True)
        return [kept.derived(groups[tensor.spec.group], t) for tensor, t in tensors]

    def _follow(self, selection: TensorSelection) -> None:
        """Count from here on for other tensors than before."""
        if selection.absent != self._selection.absent:
            self._base, self._scalars = list(self.tensor_steps()), list(self.tensor_scalars())
            self._updates, self._selection = 0, selection
            self._find_segments()

    def _find_segments(self) -> None:
        layout, config = self._config.layout, self._config
        alone = config.rule.direction is not None
        bounds = {region.start for region in config.regions}
        for table in layout.tables.values():
            bounds |= {table.offset, table.end}
        courses = dict[_Course, int]()
        segments = list[tuple[int, int, int]]()  # start, end, course
        self._course_of = dict[int, int]()  # of the tensors that move
        self._group_base = _largest_steps(self._selection, self._base)
        for index in self._selection.indices:
            tensor, scalar = layout.tensors[index], self._scalars[index] if self._scalars else 0.0
            course = courses.setdefault(_Course(tensor.spec.group, self._base[index], scalar), len(courses))
            self._course_of[index] = course
            if tensor.count == 0:
                continue
            joins = bool(segments) and segments[-1][1:] == (tensor.offset, course)
            if joins and not alone and tensor.offset not in bounds:
                segments[-1] = (segments[-1][0], tensor.end, course)
            else:
                segments.append((tensor.offset, tensor.end, course))
        self._courses, self._segments = list(courses), segments


def _largest_steps(selection: TensorSelection, steps: Sequence[int]) -> list[tuple[int, float]]:
    """Return for each group the largest t of tensors that stay, and of those that move (−∞ for none)."""
    groups: list[tuple[int, float]] = [(0, -math.inf)] * len(selection.layout.groups)
    for index, t in enumerate(steps):
        group = selection.layout.tensors[index].spec.group
        still, moving = groups[group]
        groups[group] = (max(still, t), moving) if index in selection.absent else (still, max(moving, t))
    return groups
