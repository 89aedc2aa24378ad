"""The contents of the status page as JSON: the server, its sessions, and the history of the one that is looked at."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from stepwire.version import __version__
from stepwire_server.monitoring.histories import Histories, History, Trouble
from stepwire_server.monitoring.refusals import Refusals
from stepwire_server.records.session_snapshot import SessionSnapshot
from stepwire_server.records.step_result import StepResult
from stepwire_server.sessions.registry import Registry
from stepwire_server.sessions.tenants import TenantSessions
from stepwire_server.sessions.watching import Rates, snapshots

__all__ = ["View"]

_MOST_GROUPS = 8


class View:
    """The contents of the page. Thread-safe."""

    def __init__(
        self, registry: Registry, draining: Callable[[], bool], histories: Histories, refusals: Refusals
    ) -> None:
        """Look at a server; see `StatusPage`."""
        self._registry = registry
        self._draining = draining
        self._histories = histories
        self._refusals = refusals
        self._started = registry.clock()

    @staticmethod
    def rates() -> Rates:
        """Return what one browser's looks are compared by."""
        return Rates()

    def shown(self, tenant: str | None, chosen: str, rates: Rates) -> dict[str, Any]:
        """Return the contents as of now.

        Args:
            tenant: the tenant whose sessions are shown; None for those of all.
            chosen: the id of the session whose history is shown; another one's is left out.
            rates: the looks so far.
        """
        now, everything = self._registry.clock(), snapshots(self._registry, None)
        self._histories.keep({session.session_id for session in everything})
        own = [session for session in everything if tenant in (None, session.tenant)]
        known = rates.look(own, now)
        detail = next((session for session in own if session.session_id == chosen), None)
        return {
            "at": time.time(),
            "server": self._server(TenantSessions(self._registry, tenant), own, known, now),
            "sessions": [self._summary(session, known.get(session.session_id)) for session in own],
            "detail": None if detail is None else self._detail(detail),
            "refusals": [refusal._asdict() for refusal in self._refusals.last()[::-1]] if tenant is None else [],
        }

    def _server(
        self, seen: TenantSessions, sessions: list[SessionSnapshot], rates: dict[str, float], now: float
    ) -> dict[str, Any]:
        statistics = seen.statistics()
        return {
            "version": __version__,
            "draining": self._draining(),
            "uptime": now - self._started,
            "sessions": statistics.sessions,
            "parked": statistics.parked,
            "streams": statistics.streams,
            "rate": sum(rates.values()),
            "lag": max((session.durable_lag for session in sessions), default=0),
            "memory": [
                {"device": device.name, "reserved": seen.reserved_bytes(device), "budget": device.budget.limit_bytes}
                for device in self._registry.pool
            ],
        }

    def _summary(self, session: SessionSnapshot, rate: float | None) -> dict[str, Any]:
        history, result = self._histories.of(session.session_id), session.result
        return {
            "id": session.session_id,
            "label": session.label,
            "state": session.state,
            "device": session.device,
            "via": session.transports,
            "step": session.applied_step,
            "lag": None if session.durable_step is None else session.durable_lag,
            "rate": rate,
            "memory": session.memory_bytes,
            "attached": session.attached_workers,
            "workers": session.workers,
            "idle": session.idle_seconds,
            **_last(result),
            "troubles": [] if history is None else [_trouble(each) for each in list(history.troubles)],
        }

    def _detail(self, session: SessionSnapshot) -> dict[str, Any]:
        history = self._histories.of(session.session_id) or History()
        members = [
            {**member._asdict(), "late": history.lateness.get(member.worker)} for member in self._members(session)
        ]
        points, now = list(history.points), time.time()
        groups = range(min(max((len(point.rates) for point in points), default=0), _MOST_GROUPS))
        return {
            "id": session.session_id,
            "seconds": history.seconds,
            "members": members,
            "points": {
                "at": [point.at for point in points],
                "step": [point.last_step for point in points],
                "rate": [
                    point.steps / history.seconds if now - point.at >= history.seconds else None for point in points
                ],
                "norm": [_number(point.norm) for point in points],
                "ratio": [_number(point.ratio) for point in points],
                "scale": [_number(point.scale) for point in points],
                "clipped": [point.clipped / point.steps if point.steps else None for point in points],
                "bad": [point.bad for point in points],
                "lr": [[_number(_at(point.rates, group)) for point in points] for group in groups],
            },
        }

    def _members(self, session: SessionSnapshot) -> list[_Member]:
        found = next((each for each in self._registry.of(None) if each.session_id == session.session_id), None)
        if found is None:
            return []
        return [_Member(member.worker.index, member.worker.attached, member.number) for member in found.ledger.members]


class _Member(NamedTuple):
    """A worker: its index, whether it has a stream, and the number of its last contribution."""

    worker: int
    attached: bool
    contribution: int


def _last(result: StepResult | None) -> dict[str, Any]:
    """Return the numbers of the last step."""
    if result is None:
        return {"norm": None, "bad": 0, "ratio": None, "lr": [], "scale": None, "clip": None}
    measured = result.update_norm is not None and result.param_norm
    return {
        "norm": _number(result.grad_norm),
        "bad": result.non_finite_count,
        "ratio": _number(result.update_norm / result.param_norm) if measured else None,  # type: ignore[operator]
        "lr": [_number(group.hyperparameters.lr) for group in result.groups[:_MOST_GROUPS]],
        "scale": _number(result.loss_scale),
        "clip": _number(result.clip_coefficient),
    }


def _trouble(trouble: Trouble) -> dict[str, Any]:
    return trouble._asdict() | {"norm": _number(trouble.norm)}


def _at(rates: tuple[float, ...], group: int) -> float | None:
    return rates[group] if group < len(rates) else None


def _number(value: float | None) -> float | None:
    """Return a number as JSON has it: None for NaN and infinity."""
    return value if value is not None and math.isfinite(value) else None
