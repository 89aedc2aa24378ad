"""The findings of a step about torch's groups, which hold as long as nothing in them has changed."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, Final

from stepwire.torch.rules import Group

__all__ = ["KnownGroups"]

_PLAIN: Final = frozenset({bool, float, int, str, type(None)})


class KnownGroups:
    """The groups of the step before, and what was found out about them.

    Values that cannot change are the same as long as they are the same objects. A group with another kind of value,
    such as a tensor for its learning rate, is not known.

    Attributes:
        overrides: what was found out; see `Placement.overrides`.
    """

    def __init__(self) -> None:
        """Know no groups yet."""
        self.overrides: list[dict[str, Any]] | None = None
        self._known: list[tuple[list[str], list[Any]]] = []

    def are(self, groups: Sequence[Group]) -> bool:
        """Tell whether groups are those that are known."""
        if not self._known or len(groups) != len(self._known):
            return False
        for group, (names, values) in zip(groups, self._known, strict=True):
            if list(group) != names or not all(map(operator.is_, group.values(), values)):
                return False
        return True

    def note(self, groups: Sequence[Group], overrides: list[dict[str, Any]] | None) -> None:
        """Know groups, where nothing in them can change unseen; whoever steps them sees to their parameters."""
        self.overrides, self._known = overrides, []
        if all(_is_fixed(value) for group in groups for name, value in group.items() if name != "params"):
            self._known = [(list(group), list(group.values())) for group in groups]


def _is_fixed(value: object) -> bool:
    return type(value) in _PLAIN or type(value) is tuple and all(type(each) in _PLAIN for each in value)
