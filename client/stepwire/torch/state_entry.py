"""The state of one parameter, as a dict that has the present slots of a server when it is asked for them."""

from __future__ import annotations

import collections
import copy
import functools
from collections.abc import Callable
from typing import Any, Protocol

from stepwire.torch.state_tensor import StateTensor

__all__ = ["EntryKeeper", "StateEntry"]


class EntryKeeper(Protocol):
    """The owner of entries."""

    def read(self, entry: StateEntry) -> None:
        """Lend an entry, which has none, the present slots of the server."""


class StateEntry(dict[str, Any]):
    """The slots of one parameter, beside keys of other code.

    Slots are read from the server when the dict is first used after a step, and leave it with the next step. An entry
    without a keeper is an ordinary dict.

    Attributes:
        keeper: the owner; None for an entry that is no part of a state, or no part of it any more.
        parameter: the parameter.
        is_read: True while the dict has slots.
        lent: the slots as they were read.
    """

    keeper: EntryKeeper | None
    parameter: Any
    is_read: bool
    lent: dict[str, StateTensor]

    def __init__(self, *values: Any, **more: Any) -> None:
        """Make an ordinary dict."""
        super().__init__(*values, **more)
        self.keeper, self.parameter, self.is_read, self.lent = None, None, False, {}

    def read(self) -> None:
        """Have the present slots in the dict. After a failure it has none, and the next use reads them."""
        if self.keeper is not None and not self.is_read:
            self.keeper.read(self)

    def lend(self, slots: dict[str, StateTensor]) -> None:
        """Put slots into the dict, before the keys of other code."""
        others = {key: value for key, value in self.present().items() if key not in slots}
        dict.clear(self)
        dict.update(self, slots | others)
        self.lent, self.is_read = slots, True

    def replaced(self) -> list[str]:
        """Return the names of lent slots that other code has replaced or removed."""
        return [key for key, tensor in self.lent.items() if dict.get(self, key) is not tensor]

    def forget(self, keys: frozenset[str]) -> None:
        """Leave the slots of these names out until the next use."""
        self.lent, self.is_read = {}, False  # first, so that after an interrupt they are read again
        for key in keys:
            dict.pop(self, key, None)

    def present(self) -> dict[str, Any]:
        """Return the present content, which may lack slots."""
        return dict(dict.items(self))

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        """Return an ordinary dict of copies."""
        return {key: copy.deepcopy(value, memo) for key, value in self.items()}

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle an ordinary dict, of the kind that `torch.load` reads by default."""
        return collections.OrderedDict, (), None, None, iter(list(self.items()))


def _reading(name: str) -> Callable[..., Any]:
    """Return a method of dict that reads the slots first."""
    method = getattr(dict, name)

    @functools.wraps(method)
    def reading(self: StateEntry, *arguments: Any, **options: Any) -> Any:
        self.read()
        return method(self, *arguments, **options)

    return reading


for _name in (
    *("__contains__", "__delitem__", "__eq__", "__getitem__", "__ior__", "__iter__", "__len__", "__ne__", "__or__"),
    *("__repr__", "__reversed__", "__ror__", "__setitem__", "clear", "copy", "get", "items", "keys", "pop", "popitem"),
    *("setdefault", "update", "values"),
):
    setattr(StateEntry, _name, _reading(_name))
