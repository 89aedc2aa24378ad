"""The devices of a server, each an engine with a budget of its own, and the choice of one for a session."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final, NamedTuple

from stepwire.errors import DataLossError, UnsupportedFeatureError
from stepwire_server.devices.budget import BudgetStatistics, MemoryBudget
from stepwire_server.devices.fair_share import FairShare, ShareStatistics
from stepwire_server.devices.kernels import KernelAccount, KernelLimits
from stepwire_server.engines.protocol import DeviceInfo, Engine, EngineStatistics

__all__ = ["Device", "DevicePool", "DeviceStatistics", "default_budget"]

_BUDGET_SHARE: Final = 0.8
# The characters of a device's name that an error shows; more would only fill the error.
_SHOWN_CHARACTERS: Final = 32
_KERNELS: Final = KernelLimits()


class DeviceStatistics(NamedTuple):
    """The state of one device at one moment.

    Attributes:
        name: the device's name, such as "cuda:0".
        budget: the bytes that sessions have reserved there.
        engine: the memory and the threads of its engine.
        share: the turns of its engine.
    """

    name: str
    budget: BudgetStatistics
    engine: EngineStatistics
    share: ShareStatistics


class Device:
    """A device where sessions can live.

    Attributes:
        engine: the owner of its memory and kernels.
        budget: the account of the bytes that sessions hold there.
        share: the turns of the engine.
        kernels: the account of its compiled kernels.
    """

    __slots__ = ("budget", "engine", "kernels", "share")

    def __init__(
        self,
        engine: Engine,
        budget: MemoryBudget,
        share: FairShare | None = None,
        kernels: KernelLimits = _KERNELS,
    ) -> None:
        """Share an engine; None for tenants of equal weights."""
        self.engine = engine
        self.budget = budget
        self.share = share or FairShare()
        self.kernels = KernelAccount(budget, kernels)
        engine.bound_kernels(self.kernels)

    @property
    def name(self) -> str:
        """The device's name, such as "cuda:0"."""
        return self.engine.device.name

    def statistics(self) -> DeviceStatistics:
        """Return the state of the device now."""
        return DeviceStatistics(self.name, self.budget.statistics(), self.engine.statistics(), self.share.statistics())


class DevicePool:
    """All devices of a server, in the order in which they were asked for. Thread-safe, and never changes."""

    def __init__(self, devices: Sequence[Device]) -> None:
        """Hold at least one device; each name occurs once."""
        self._devices = tuple(devices)
        self._by_name = {device.name: device for device in devices}
        assert 0 < len(self._by_name) == len(self._devices)

    @classmethod
    def of(
        cls,
        engines: Sequence[Engine],
        budget_bytes: int = 0,
        weights: Mapping[str, int] | None = None,
        kernels: KernelLimits = _KERNELS,
    ) -> DevicePool:
        """Give each engine a budget and turns of its own.

        Args:
            engines: the engines.
            budget_bytes: the budget of each; 0 for one by the memory of its device.
            weights: the weights of tenants; see `FairShare`.
            kernels: the most compiled kernels of each.
        """
        return cls(
            [
                Device(engine, MemoryBudget(budget_bytes or default_budget(engine.device)), FairShare(weights), kernels)
                for engine in engines
            ]
        )

    def __iter__(self) -> Iterator[Device]:
        """Iterate over the devices, in order."""
        return iter(self._devices)

    def named(self, name: str) -> Device:
        """Find a device by its name.

        Args:
            name: the name, as a client spells it.

        Returns:
            The device.

        Raises:
            UnsupportedFeatureError: this server does not have the device; the message lists those that it has.
        """
        if (device := self._by_name.get(name)) is None:
            shown = name[:_SHOWN_CHARACTERS]
            raise UnsupportedFeatureError(
                f"config.device asks for {shown!r}, and this server has {', '.join(self._by_name)}; name one of these, "
                "or none for the one with the most free budget",
                metadata={"field": "config.device", "feature": f"device_{shown}"},
            )
        return device

    def choose(self, name: str) -> Device:
        """Return the device that a client names, or else the one with the most free budget.

        Bytes decide, not sessions: of many small ones and a large one, a device holds very different numbers. A session
        that does not fit there fits nowhere. Between equals the first is chosen, so a lone server fills up in order.

        Args:
            name: the device's name; empty for any.

        Returns:
            The device.

        Raises:
            UnsupportedFeatureError: as `named`.
        """
        if name:
            return self.named(name)
        return max(self._devices, key=lambda device: device.budget.limit_bytes - device.budget.reserved_bytes)

    def choose_like(self, name: str) -> Device:
        """Return the device that another server had by this name, or any where this one has none of the name."""
        return self.choose(name if name in [device.name for device in self._devices] else "")

    def statistics(self) -> tuple[DeviceStatistics, ...]:
        """Return the state of each device now, in order."""
        return tuple(device.statistics() for device in self._devices)

    @property
    def reserved_bytes(self) -> int:
        """The bytes reserved now, on all devices."""
        return sum(device.budget.reserved_bytes for device in self._devices)

    @property
    def limit_bytes(self) -> int:
        """The bytes that can be reserved, on all devices."""
        return sum(device.budget.limit_bytes for device in self._devices)

    @property
    def released_bytes(self) -> int:
        """The bytes released since the start: messages of about as many have passed through the C heap."""
        return sum(device.budget.released_bytes for device in self._devices)

    def on_lost(self, tell: Callable[[DataLossError], None]) -> None:
        """Call `tell` when a device fails for good; see `Engine.on_lost`."""
        for device in self._devices:
            device.engine.on_lost(tell)

    def warm_up(self) -> None:
        """Have every engine compile the kernels that most sessions need."""
        for device in self._devices:
            device.engine.warm_up()

    def rest(self) -> None:
        """Have every engine give back the memory that it only keeps for the next step."""
        for device in self._devices:
            device.engine.rest()

    def close(self) -> None:
        """Close every engine, even where closing another fails. Closing twice is harmless."""
        with contextlib.ExitStack() as stack:
            for device in self._devices:
                stack.callback(device.engine.close)


def default_budget(device: DeviceInfo) -> int:
    """Return the bytes that sessions may hold on a device by default: four fifths of the memory its engine leaves."""
    return max(0, int((device.memory_bytes - device.working_bytes) * _BUDGET_SHARE))
