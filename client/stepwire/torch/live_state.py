"""`Optimizer.state` of an optimizer whose state is on a server: a mapping that reads there, and notes the writes."""

from __future__ import annotations

import collections
import copy
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, Final, Protocol

import torch

from stepwire.errors import InvalidRequestError, StepwireError
from stepwire.lifetimes.weak_calls import weak_call
from stepwire.torch.state_entry import StateEntry
from stepwire.torch.state_tensor import StateTensor, plain

__all__ = ["LiveState", "StateView"]

_UNHELD: Final = 2
"""The references to an entry that no other code holds, as `sys.getrefcount` counts them."""


class StateView(Protocol):
    """The state of a session as of one moment, as torch has it."""

    def keys(self, parameter: Any) -> Sequence[str]:
        """Return the names of a parameter's slots; none for a parameter without state."""

    def value(self, parameter: Any, key: str) -> Any:
        """Return one slot of one parameter."""


class LiveState(MutableMapping[Any, Any]):
    """The state of all parameters, by parameter, as `Optimizer.state` is.

    A read fetches the state of the session, once between two steps. A write is noted, and `edits` has it for the
    optimizer, which sends it before the next step, save or move. Keys of other code stay here, since wrappers of
    optimizers keep values in the state: keys that are no parameters of the session, and keys of an entry that the rule
    does not know.
    """

    def __init__(self) -> None:
        """Be the ordinary dict that a constructor of torch fills; `serve` makes it the state of a session."""
        self._view: Callable[[], StateView] | None = None
        self._slots: frozenset[str] = frozenset()
        self._parameters: dict[Any, None] = {}
        self._others: dict[Any, Any] = {}  # everything that belongs to no parameter of the session
        self._entries: dict[Any, StateEntry] = {}  # those that were asked for
        self._created: set[Any] = set()  # entries that exist here without state on the server, as in a defaultdict
        self._dropped: set[Any] = set()  # parameters whose state on the server is not wanted any more
        self._given: dict[Any, Any] = {}  # dicts that other code has put into the place of entries
        self._read: list[StateEntry] = []  # entries with slots of this moment
        self._used: dict[int, StateTensor] = {}  # tensors with values of this moment
        self._alive: weakref.WeakValueDictionary[tuple[int, str], StateTensor] = weakref.WeakValueDictionary()
        self._moment = 0

    # --- the session's side ------------------------------------------------------------------------------

    def serve(self, view: Callable[[], StateView], slots: frozenset[str]) -> None:
        """Show the state of a session from now on.

        Args:
            view: returns the present state of the session.
            slots: the names of the slots of an entry, as torch has them.
        """
        self._view, self._slots = weak_call(view, "optimizer"), slots

    def settled(self, parameters: Sequence[Any]) -> None:
        """Note that the session has everything that was written, and steps these parameters."""
        self._parameters = dict.fromkeys(parameters)
        self._given |= {key: self._others.pop(key) for key in parameters if key in self._others}
        self.expire()

    def expire(self) -> None:
        """Note that the session has everything that was written, and that its state is about to change."""
        for entry in self._read:
            replaced = entry.replaced()
            entry.forget(self._slots)
            self._part_with(entry.parameter, replaced)
        for parameter, given in self._given.items():
            self._created.add(parameter)
            ours = isinstance(given, StateEntry) and given.keeper is None
            entry = given if ours else StateEntry(given if isinstance(given, Mapping) else {})
            entry.forget(self._slots)
            self._bind(parameter, entry)
        self._read, self._used, self._given = [], {}, {}
        self._dropped.clear()
        self._moment += 1

    def edits(self) -> dict[Any, dict[str, Any]]:
        """Return the wanted slots of each parameter of the session whose state was written, as plain values.

        Raises:
            InvalidRequestError: the state of a parameter is no dict.
        """
        if not (self._dropped or self._given or self._read or self._used):
            return {}
        wanted: dict[Any, dict[str, Any]] = {parameter: {} for parameter in self._dropped}
        for parameter, given in self._given.items():
            if not isinstance(given, Mapping):
                raise InvalidRequestError.of(
                    "optimizer.state", f"the state of a parameter is {given!r:.60}, and no dict"
                )
            wanted[parameter] = self._slots_of(given)
        for entry in self._read:
            if entry.parameter in self._dropped or self._differs(entry):
                wanted[entry.parameter] = self._slots_of(entry.present())
        for tensor in list(self._used.values()):
            if tensor.parameter not in wanted and self._is_changed(tensor):
                wanted[tensor.parameter] = self._slots_now(tensor.parameter)
        return wanted

    def claimed(self, parameter: Any) -> dict[str, Any]:
        """Return the slots that other code has put here for a parameter that joins the session; perhaps none."""
        found = self._others.get(parameter)
        return self._slots_of(found) if isinstance(found, Mapping) else {}

    def leave(self, parameter: Any) -> None:
        """Keep the state of a parameter that leaves the session, as torch keeps it."""
        if parameter in self._given:
            self._others[parameter] = self._given.pop(parameter)
        elif parameter in self:
            held = self._entries.get(parameter)
            content = self._slots_now(parameter) if held is None or not held.is_read else self._slots_of(held.present())
            content = {
                key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in content.items()
            }
            content |= {} if held is None else self._kept_of(held)
            detached = self._detach(parameter)
            self._others[parameter] = content if detached is None else detached
        self._created.discard(parameter)

    def release(self) -> None:
        """Give the values of this moment to entries and tensors that other code holds; another state is to come.

        Raises:
            StepwireError: as a read; nothing is part of the state any more.
        """
        failed: StepwireError | None = None
        for parameter in list(self._parameters):
            try:
                self._detach(parameter)
            except StepwireError as error:
                failed = error
        if failed is not None:
            raise failed

    def replaced(self, extras: Mapping[Any, Any]) -> None:
        """Note that the session has another state as a whole; nothing of the present one stays.

        Args:
            extras: the values that stay here: by parameter the keys that no rule knows, and all other keys.
        """
        self._entries, self._others, self._given, self._read, self._used = {}, {}, {}, [], {}
        self._created.clear()
        for key, values in extras.items():
            if key in self._parameters:
                self._created.add(key)
                self._bind(key, StateEntry(values))
            else:
                self._others[key] = values
        self.expire()

    def exported(self, parameters: Sequence[Any]) -> dict[Any, Any]:
        """Return the state of these parameters as plain dicts of plain tensors, and all that is not of a parameter."""
        view, made = self._present(), {}
        for parameter in parameters:
            if parameter in self:
                held = self._entries.get(parameter)
                made[parameter] = {slot: view.value(parameter, slot) for slot in view.keys(parameter)}
                made[parameter] |= {} if held is None else self._kept_of(held)
        return made | {key: value for key, value in self._others.items() if not isinstance(key, torch.Tensor)}

    def _present(self) -> StateView:
        assert self._view is not None  # parameters exist since `settled`
        return self._view()

    # --- tensors and entries ------------------------------------------------------------------------------

    def use(self, tensor: StateTensor) -> None:
        """Give a tensor its present values; see `Keeper`."""
        if tensor.moment == self._moment:
            return
        view = self._present()
        if tensor.key not in view.keys(tensor.parameter):
            tensor.keeper = None  # a load has left the slot out
            return
        value, memory = view.value(tensor.parameter, tensor.key), plain(tensor)
        if memory.shape != value.shape:
            tensor.keeper = None
            return
        memory.copy_(value)
        self._used[id(tensor)] = tensor  # before it has the moment: an interrupt in between has it used once more
        tensor.moment = self._moment

    def read(self, entry: StateEntry) -> None:
        """Put the present slots into an entry; see `EntryKeeper`."""
        slots = {} if entry.parameter in self._dropped else self._slots_to_lend(entry)
        self._read.append(entry)
        entry.lend(slots)

    def _slots_to_lend(self, entry: StateEntry) -> dict[str, StateTensor]:
        view, slots = self._present(), {}
        for key in view.keys(entry.parameter):
            tensor = self._alive.get((id(entry.parameter), key))
            if tensor is None or tensor.keeper is None:
                tensor = StateTensor.made(self, entry.parameter, key, view.value(entry.parameter, key))
                self._alive[id(entry.parameter), key] = tensor
            slots[key] = tensor
        return slots

    def _bind(self, parameter: Any, entry: StateEntry, *, is_read: bool = False) -> StateEntry:
        entry.keeper, entry.parameter, entry.is_read = self, parameter, is_read
        if is_read:
            self._read.append(entry)
        self._entries[parameter] = entry
        return entry

    def _detach(self, parameter: Any) -> StateEntry | None:
        """Forget the entry of a parameter. Return it if other code holds it, as an ordinary dict with its values."""
        entry = self._entries.pop(parameter, None)
        is_held = entry is not None and sys.getrefcount(entry) > _UNHELD + any(each is entry for each in self._read)
        try:
            if entry is not None and is_held:
                entry.read()
        finally:
            self._read = [each for each in self._read if each is not entry]
            if not is_held:
                entry = None  # so that its tensors are gone, if nobody holds them either
            elif entry is not None:
                entry.keeper = None
            self._part_with(parameter, self._slots)
        return entry

    def _part_with(self, parameter: Any, keys: Iterable[str]) -> None:
        """Give tensors that other code holds their values of this moment; they are no part of the state any more."""
        found = [self._alive.pop((id(parameter), key), None) for key in keys]
        tensors = [tensor for tensor in found if tensor is not None and tensor.keeper is not None]
        try:
            for tensor in tensors:
                self.use(tensor)
        finally:
            for tensor in tensors:
                tensor.keeper = None
                self._used.pop(id(tensor), None)

    def _slots_of(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the slots among some values, as plain values of this moment."""
        return {key: _plain(value) for key, value in values.items() if key in self._slots}

    def _kept_of(self, entry: StateEntry) -> dict[str, Any]:
        """Return the values of an entry that are no slots."""
        return {key: value for key, value in entry.present().items() if key not in self._slots}

    def _slots_now(self, parameter: Any) -> dict[str, Any]:
        """Return the slots of a parameter whose entry was not changed; its tensors may be."""
        used = {tensor.key: tensor for tensor in self._used.values() if tensor.parameter is parameter}
        view = self._present()
        return {key: plain(used[key]) if key in used else view.value(parameter, key) for key in view.keys(parameter)}

    def _differs(self, entry: StateEntry) -> bool:
        """Tell whether other code has changed the slots of an entry since they were read."""
        if entry.replaced() or any(key in self._slots and key not in entry.lent for key in entry.present()):
            return True
        return any(self._is_changed(tensor) for tensor in entry.lent.values() if id(tensor) in self._used)

    def _is_changed(self, tensor: StateTensor) -> bool:
        now, then = plain(tensor), self._present().value(tensor.parameter, tensor.key)
        return (now.shape, now.dtype) != (then.shape, then.dtype) or not torch.equal(_bits(now), _bits(then))

    # --- the mapping ---------------------------------------------------------------------------------------

    def __contains__(self, key: object) -> bool:
        """Tell whether there is state of a parameter."""
        if key in self._given or key in self._others or key in self._created:
            return True
        return key in self._parameters and key not in self._dropped and bool(self._present().keys(key))

    def __getitem__(self, key: Any) -> Any:
        """Return the state of a parameter; an empty dict is made for a parameter without state, as in torch."""
        if key in self._given:
            return self._given[key]
        if key not in self._parameters:
            return self._others.setdefault(key, {})
        if (entry := self._entries.get(key)) is None:
            if key not in self:
                self._created.add(key)
            entry = self._bind(key, StateEntry(), is_read=key in self._dropped)
        return entry

    def __setitem__(self, key: Any, value: Any) -> None:
        """Replace the state of a parameter."""
        if key not in self._parameters:
            self._others[key] = value
            return
        if value is self._entries.get(key):
            return
        self._detach(key)
        self._created.add(key)
        self._dropped.add(key)
        if isinstance(value, StateEntry) and value.keeper is None:
            self._given.pop(key, None)
            self._bind(key, value, is_read=True)
        else:
            self._given[key] = dict(value) if isinstance(value, StateEntry) else value

    def __delitem__(self, key: Any) -> None:
        """Drop the state of a parameter: its next step begins anew."""
        if key not in self:
            raise KeyError(key)
        if key not in self._parameters:
            del self._others[key]
            return
        self._given.pop(key, None)
        self._detach(key)
        self._created.discard(key)
        self._dropped.add(key)

    def clear(self) -> None:
        """Drop all state; nothing is fetched for it."""
        for parameter in list(self._entries):
            self._detach(parameter)
        self._others.clear()
        self._given.clear()
        self._created.clear()
        self._dropped = set(self._parameters)

    def __iter__(self) -> Iterator[Any]:
        """Iterate over the parameters with state, in the order of their groups, and over all other keys."""
        yield from [key for key in self._parameters if key in self]
        yield from list(self._others)

    def __len__(self) -> int:
        """Count the parameters with state, and all other keys."""
        return sum(1 for _ in self)

    def get(self, key: Any, default: Any = None) -> Any:
        """Return the state of a parameter, or the default; nothing is made."""
        return self[key] if key in self else default

    def pop(self, key: Any, *default: Any) -> Any:
        """Remove the state of a parameter and return it as an ordinary dict."""
        if key not in self:
            if default:
                return default[0]
            raise KeyError(key)
        value = self[key]
        del self[key]
        return value

    def setdefault(self, key: Any, default: Any = None) -> Any:
        """Return the state of a parameter; put the default into its place if there is none."""
        if key not in self:
            self[key] = default
        return self[key]

    def copy(self) -> dict[Any, Any]:
        """Return an ordinary dict of the entries."""
        return dict(self.items())

    def __repr__(self) -> str:
        """Show the state as an ordinary dict."""
        return repr(self.copy())

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[Any, Any]:
        """Return ordinary dicts of copies."""
        return collections.defaultdict(dict, copy.deepcopy(self.copy(), memo))

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle ordinary dicts."""
        return collections.OrderedDict, (), None, None, iter(list(self.items()))


def _plain(value: Any) -> Any:
    """Return a value of other code as torch's own code would have it."""
    if not isinstance(value, StateTensor):
        return value
    tensor = value if value.viewed is None else value.viewed
    if tensor.keeper is not None:
        tensor.keeper.use(tensor)
    return plain(value)


def _bits(tensor: Any) -> Any:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
