"""The devices of a server, each an engine with a budget of its own, and which of them a session lives on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from stepwire.errors import UnsupportedFeatureError
from stepwire_server.devices.budget import MemoryBudget
from stepwire_server.engines.protocol import DeviceInfo, Engine

__all__ = ["Device", "DevicePool", "default_budget"]

_BUDGET_SHARE: Final = 0.8
# Of a device's name as a client spells it; more would only fill the error.
_SHOWN_CHARACTERS: Final = 32


class Device(NamedTuple):
    """A device where sessions can live.

    Attributes:
        engine: owns its memory and kernels.
        budget: counts what sessions hold there.
    """

    engine: Engine
    budget: MemoryBudget

    @property
    def name(self) -> str:
        """The device's name, such as "cuda:0"."""
        return self.engine.device.name


class DevicePool:
    """All devices of a server, in the order in which they were asked for. Thread-safe, and never changes."""

    def __init__(self, pool: Sequence[Device]) -> None:
        """Hold at least one place; no two are of one device."""
        self._places = tuple(pool)
        self._by_name = {place.name: place for place in pool}
        assert 0 < len(self._by_name) == len(self._places)

    @classmethod
    def of(cls, engines: Sequence[Engine], budget_bytes: int = 0) -> DevicePool:
        """Give each engine a budget of its own: the same for each, or, with 0, by the memory of its device."""
        return cls([Device(engine, MemoryBudget(budget_bytes or default_budget(engine.device))) for engine in engines])

    def __iter__(self) -> Iterator[Device]:
        """Iterate over the places, in order."""
        return iter(self._places)

    def named(self, name: str) -> Device:
        """Find a place by its device.

        Raises:
            UnsupportedFeatureError: this server does not have it; the message lists what there is.
        """
        if (place := self._by_name.get(name)) is None:
            shown = name[:_SHOWN_CHARACTERS]
            raise UnsupportedFeatureError(
                f"config.device asks for {shown!r}, and this server has {', '.join(self._by_name)}; name one of these, "
                "or none for the one with the most free budget",
                metadata={"field": "config.device", "feature": f"device_{shown}"},
            )
        return place

    def choose(self, name: str) -> Device:
        """Return the place a client names, or, where it names none, the one with the most free budget.

        By bytes, not by sessions: of many small ones and a large one, a device holds very different numbers. If the
        session does not fit there, it fits nowhere. Between equals the first is taken, so a lone server fills up in
        order.

        Raises:
            UnsupportedFeatureError: as `named`.
        """
        if name:
            return self.named(name)
        return max(self._places, key=lambda place: place.budget.limit_bytes - place.budget.reserved_bytes)

    @property
    def reserved_bytes(self) -> int:
        """Bytes reserved now, on all devices."""
        return sum(place.budget.reserved_bytes for place in self._places)

    @property
    def limit_bytes(self) -> int:
        """Bytes that can be reserved, on all devices."""
        return sum(place.budget.limit_bytes for place in self._places)

    @property
    def released_bytes(self) -> int:
        """Bytes given back since the start: messages of about as many have passed through the C heap."""
        return sum(place.budget.released_bytes for place in self._places)

    def warm_up(self) -> None:
        """Have every engine compile what most sessions need."""
        for place in self._places:
            place.engine.warm_up()

    def rest(self) -> None:
        """Have every engine give back what it only keeps for the next step."""
        for place in self._places:
            place.engine.rest()

    def close(self) -> None:
        """Close every engine, whatever becomes of the others. Closing twice is harmless."""
        with contextlib.ExitStack() as stack:
            for place in self._places:
                stack.callback(place.engine.close)


def default_budget(device: DeviceInfo) -> int:
    """Return the bytes that sessions may hold on a device where nobody says: four fifths of what its engine leaves."""
    return max(0, int((device.memory_bytes - device.working_bytes) * _BUDGET_SHARE))
