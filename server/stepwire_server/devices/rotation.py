"""Deficit round robin: requests that wait, in the order in which they are served. No threads, no time.

Sharers that wait have rounds in common. In each round a sharer may have work of `quantum_bytes` for each unit of its
weight. They are served in turns, one request at a time. A sharer that has had its bytes is spent: it waits until all
others that wait are spent as well, and the next round begins. A request may be larger than the rest of the bytes. The
excess counts against the next rounds.

The textbook's form takes away the rest of the bytes from a sharer without requests. Here the rest stays until the end
of the round. A step asks for its next pass a moment after the pass before, and would never have more than one pass in a
round. Nobody has more than the bytes of one round, so nobody can save for later.

A rotation is a sharer itself, so rotations make a tree: tenants, and the sessions of each.
"""

from __future__ import annotations

import abc
from collections import deque

__all__ = ["Queue", "Rotation", "Sharer", "TurnRequest"]


class TurnRequest:
    """A request for some work.

    Attributes:
        cost_bytes: the size of the work.
    """

    __slots__ = ("cost_bytes",)

    def __init__(self, cost_bytes: int) -> None:
        """Ask for work of a size."""
        self.cost_bytes = cost_bytes


class Sharer(abc.ABC):
    """One of several that are served in turns.

    Attributes:
        weight: its share beside those of the others, a whole number from 1 on.
        deficit_bytes: the work that it may still have in its last round; 0 or less for none.
        round: the number of the last round that it has had its bytes of.
    """

    __slots__ = ("deficit_bytes", "parent", "round", "weight")

    def __init__(self, parent: Rotation | None, weight: int = 1) -> None:
        """Share with the other sharers of a rotation; None for the root."""
        self.parent = parent
        self.weight = weight
        self.deficit_bytes = 0
        self.round = -1

    @abc.abstractmethod
    def __bool__(self) -> bool:
        """Tell whether a request waits."""

    @abc.abstractmethod
    def pop(self) -> TurnRequest:
        """Return the request that is served next, which waits no longer."""


class Rotation(Sharer):
    """Sharers that share in turns."""

    __slots__ = ("_number", "_quantum_bytes", "_ready", "_spent")

    def __init__(self, quantum_bytes: int, parent: Rotation | None = None, weight: int = 1) -> None:
        """Give sharers a number of bytes in each round."""
        super().__init__(parent, weight)
        self._quantum_bytes = quantum_bytes
        self._number = 0
        self._ready: deque[Sharer] = deque()
        self._spent: deque[Sharer] = deque()

    def __bool__(self) -> bool:
        """Tell whether a request waits."""
        return bool(self._ready or self._spent)

    def put(self, sharer: Sharer) -> None:
        """Have a sharer wait, which begins to have requests."""
        waits = bool(self)
        self._append(sharer)
        if not waits and self.parent is not None:
            self.parent.put(self)

    def remove(self, sharer: Sharer) -> None:
        """Forget a sharer that has no requests any more, and waits."""
        (self._ready if sharer in self._ready else self._spent).remove(sharer)
        if not self and self.parent is not None:
            self.parent.remove(self)

    def pop(self) -> TurnRequest:
        """See `Sharer.pop`."""
        sharer = self._first()
        request = sharer.pop()
        sharer.deficit_bytes -= request.cost_bytes
        if sharer:
            self._append(sharer)
        return request

    def _append(self, sharer: Sharer) -> None:
        self._renew(sharer)
        (self._ready if sharer.deficit_bytes > 0 else self._spent).append(sharer)

    def _renew(self, sharer: Sharer) -> None:
        """Give a sharer its bytes of the rounds since it had some."""
        if missed := self._number - sharer.round:
            share = self._quantum_bytes * sharer.weight
            sharer.deficit_bytes = min(sharer.deficit_bytes + missed * share, share)
            sharer.round = self._number

    def _first(self) -> Sharer:
        """Remove and return the sharer that is served next."""
        while True:
            if not self._ready:
                self._begin_round()
            sharer = self._ready.popleft()
            self._renew(sharer)
            if sharer.deficit_bytes > 0:
                return sharer
            self._spent.append(sharer)

    def _begin_round(self) -> None:
        """Begin the next round, or the first one in which somebody who waits may be served."""
        self._ready, self._spent = self._spent, self._ready
        self._number += min(
            -sharer.deficit_bytes // (self._quantum_bytes * sharer.weight) + 1 for sharer in self._ready
        )


class Queue(Sharer):
    """A sharer whose requests are served in the order in which they came."""

    __slots__ = ("_requests",)

    def __init__(self, parent: Rotation, weight: int = 1) -> None:
        """Start without requests."""
        super().__init__(parent, weight)
        self._requests: deque[TurnRequest] = deque()

    def __bool__(self) -> bool:
        """Tell whether a request waits."""
        return bool(self._requests)

    def push(self, request: TurnRequest) -> None:
        """Have a request wait."""
        self._requests.append(request)
        if len(self._requests) == 1:
            assert self.parent is not None
            self.parent.put(self)

    def pop(self) -> TurnRequest:
        """See `Sharer.pop`."""
        return self._requests.popleft()

    def withdraw(self, request: TurnRequest) -> None:
        """Forget a request that waits."""
        self._requests.remove(request)
        if not self._requests:
            assert self.parent is not None
            self.parent.remove(self)
