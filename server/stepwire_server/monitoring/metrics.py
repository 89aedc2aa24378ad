"""The metrics of a server, gathered when they are asked for; between two scrapes nothing of a library runs.

Names, units and types follow Prometheus' conventions, and those of calls are gRPC's own. No label names a session: the
number of series stays that of transports, states, reasons and devices.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from http import HTTPStatus
from typing import Any, Final

from stepwire.errors import AuthenticationError, PermissionDeniedError, StepwireError, UnsupportedFeatureError
from stepwire.version import PROTOCOL_MAX, __version__
from stepwire_server.access.control import AccessControl
from stepwire_server.access.identity import METRICS_PATH
from stepwire_server.monitoring.endpoint import Request, Response
from stepwire_server.monitoring.gpus import Gpus
from stepwire_server.observability.histograms import Histogram
from stepwire_server.observability.tallies import STAGES, Tallies, Tally
from stepwire_server.records.session_snapshot import SessionSnapshot
from stepwire_server.replication.status import ReplicationStatus
from stepwire_server.sessions.registry import Registry
from stepwire_server.sessions.watching import snapshots

__all__ = ["Metrics"]

_CALL: Final = ("grpc_type", "grpc_service", "grpc_method")


class Metrics:
    """The metrics of one server, in the forms of prometheus-client. Thread-safe.

    A collector of prometheus-client, and what answers a scrape over HTTP.
    """

    def __init__(
        self,
        registry: Registry,
        tallies: Tallies,
        access: AccessControl,
        draining: Callable[[], bool],
        replication: Callable[[], ReplicationStatus] = ReplicationStatus,
        gpus: Gpus | None = None,
    ) -> None:
        """Gather the metrics of a server.

        Args:
            registry: the sessions.
            tallies: the counts of steps and calls.
            access: admits a scrape.
            draining: tells whether new steps are refused.
            replication: tells how replication stands.
            gpus: the GPUs of the machine; None looks for them where the server uses one.

        Raises:
            UnsupportedFeatureError: prometheus-client is not installed.
        """
        core, exposition, registries, process = _client_library()
        self._core, self._exposition = core, exposition
        self._registry, self._tallies, self._access, self._draining = registry, tallies, access, draining
        self._replication = replication
        uses_gpu = any(device.name.startswith("cuda") for device in registry.pool)
        self._gpus = gpus or (Gpus() if uses_gpu else None)
        self._collectors = registries.CollectorRegistry(auto_describe=False)
        self._collectors.register(self)
        process.ProcessCollector(registry=self._collectors)

    def get(self, request: Request) -> Response:
        """Respond to a scrape; see `Get`."""
        if request.path not in (METRICS_PATH, "/"):
            return Response(HTTPStatus.NOT_FOUND, f"not found; metrics are at {METRICS_PATH}\n".encode())
        try:
            self._access.admit(METRICS_PATH, request.headers.get("authorization"), request.certificate)
        except AuthenticationError as error:
            return _refusal(HTTPStatus.UNAUTHORIZED, error, {"WWW-Authenticate": "Bearer"})
        except PermissionDeniedError as error:
            return _refusal(HTTPStatus.FORBIDDEN, error, {})
        encode, content_type = self._exposition.choose_encoder(request.headers.get("accept") or "")
        return Response(HTTPStatus.OK, encode(self._collectors), content_type)

    def collect(self) -> Iterator[Any]:
        """Yield the metrics as of now."""
        sessions = snapshots(self._registry, None)  # which count what compiled lanes have stepped
        total = self._tallies.total()
        yield self._core.InfoMetricFamily(
            "stepwire_build", "The version of the server.", {"version": __version__, "protocol": str(PROTOCOL_MAX)}
        )
        yield self._gauge("stepwire_draining", "1 while new steps are refused.", (), [((), int(self._draining()))])
        yield from self._calls(total)
        yield from self._steps(total)
        yield from self._sessions(sessions)
        yield from self._memory(sessions)
        yield from self._durability(sessions)
        yield from self._replicated()
        yield from self._gpu_loads()

    def _calls(self, total: Tally) -> Iterator[Any]:
        yield self._counter("grpc_server_started", "Calls that have begun.", _CALL, total.started.items())
        yield self._counter(
            "grpc_server_handled", "Calls that have ended, by status.", (*_CALL, "grpc_code"), total.handled.items()
        )
        yield self._histogram(
            "grpc_server_handling_seconds", "The time of calls; a stream lasts.", _CALL, total.handling.items()
        )
        reasons = [((reason,), count) for reason, count in total.refusals.items()]
        yield self._counter("stepwire_refusals", "Errors that clients were told, by reason.", ("reason",), reasons)

    def _steps(self, total: Tally) -> Iterator[Any]:
        yield self._counter(
            "stepwire_steps", "Steps by transport and outcome.", ("transport", "outcome"), total.steps.items()
        )
        times = [((transport,), histogram) for transport, histogram in total.step_seconds.items()]
        yield self._histogram(
            "stepwire_step_seconds", "From a step's first message until its reply has left.", ("transport",), times
        )
        stages = [((stage,), times) for stage, times in zip(STAGES, total.stages, strict=True)]
        yield self._histogram("stepwire_step_stage_seconds", "The time of each stage of a step.", ("stage",), stages)
        yield self._histogram(
            "stepwire_round_wait_seconds", "The wait of contributions for their round.", (), [((), total.round_waits)]
        )
        for direction, what in (("received", "gradients"), ("sent", "replies")):
            moved = [((way, dtype.name), n) for (to, way, dtype), n in total.moved.items() if to == direction]
            yield self._counter(f"stepwire_{direction}_bytes", f"The bytes of {what}.", ("transport", "dtype"), moved)

    def _sessions(self, sessions: list[SessionSnapshot]) -> Iterator[Any]:
        states = Counter(
            {"attached": 0, "idle": 0, "empty": 0, "damaged": 0, "parked": self._registry.statistics().parked}
        )
        states.update(session.state for session in sessions)
        yield self._gauge("stepwire_sessions", "Sessions by state.", ("state",), _labelled(states))
        attached = sum(session.attached_workers for session in sessions)
        absent = sum(session.workers for session in sessions) - attached
        workers = {"attached": attached, "absent": absent}
        yield self._gauge(
            "stepwire_workers", "Places of workers, with and without a stream.", ("state",), _labelled(workers)
        )
        yield self._gauge("stepwire_streams", "Attached streams.", (), [((), len(self._registry.streams))])

    def _memory(self, sessions: list[SessionSnapshot]) -> Iterator[Any]:
        state = Counter[str]()
        for session in sessions:
            state[session.device] += session.memory_bytes
        reserved, budgets = [], []
        for device in self._registry.pool:
            budget = device.budget.statistics()
            held = min(state[device.name], budget.reserved_bytes)
            reserved += [((device.name, "state"), held), ((device.name, "steps"), budget.reserved_bytes - held)]
            budgets.append(((device.name,), budget.limit_bytes))
        yield self._gauge(
            "stepwire_memory_reserved_bytes",
            "Memory reserved for the state of sessions, and for steps and loads on their way.",
            ("device", "kind"),
            reserved,
        )
        yield self._gauge("stepwire_memory_budget_bytes", "Memory that may be reserved.", ("device",), budgets)

    def _durability(self, sessions: list[SessionSnapshot]) -> Iterator[Any]:
        lag = max((session.durable_lag for session in sessions), default=0)
        yield self._gauge(
            "stepwire_durable_lag_steps", "Steps that a loss of the server would lose, at most.", (), [((), lag)]
        )
        if (directory := self._registry.directory) is None:
            return
        log = directory.log_statistics()
        yield self._gauge("stepwire_log_pending_bytes", "Bytes that wait to be written.", (), [((), log.pending_bytes)])
        yield self._counter("stepwire_log_written_bytes", "Bytes written to the log.", (), [((), log.written_bytes)])
        yield self._histogram(
            "stepwire_log_sync_seconds", "The time of a sync of the log.", (), [((), directory.sync_seconds)]
        )
        saves = directory.checkpointer.save_seconds
        yield self._histogram("stepwire_checkpoint_seconds", "The time of a checkpoint.", (), [((), saves)])

    def _replicated(self) -> Iterator[Any]:
        status = self._replication()
        if status.role == "none":
            return
        roles = {role: int(status.role == role) for role in ("primary", "standby", "deposed")}
        yield self._gauge("stepwire_replication_role", "1 for the role of the server.", ("role",), _labelled(roles))
        for name, text, value in (
            ("in_sync", "1 while the standby has all that was acknowledged.", int(status.in_sync)),
            ("pending_steps", "Steps that the standby has not acknowledged, or not made again.", status.pending_steps),
            ("pending_bytes", "Bytes of the records of these.", status.pending_bytes),
        ):
            yield self._gauge(f"stepwire_replication_{name}", text, (), [((), value)])
        for name, text, count in (
            ("acknowledged_steps", "Steps that the standby has acknowledged.", status.acknowledged_steps),
            ("divergences", "Digests of the standby that were others.", status.divergences),
            ("promotions", "Promotions of this server.", status.promotions),
        ):
            yield self._counter(f"stepwire_replication_{name}", text, (), [((), count)])

    def _gpu_loads(self) -> Iterator[Any]:
        if self._gpus is None or not (loads := self._gpus.loads()):
            return
        memory = [((each.uuid, "used"), each.used_bytes) for each in loads]
        memory += [((each.uuid, "free"), each.free_bytes) for each in loads]
        yield self._gauge("stepwire_gpu_memory_bytes", "The memory of GPUs.", ("gpu", "state"), memory)
        use = [((each.uuid,), each.use) for each in loads]
        yield self._gauge("stepwire_gpu_use_ratio", "The time in which kernels ran, as a portion.", ("gpu",), use)

    def _counter(self, name: str, text: str, labels: tuple[str, ...], values: Iterable[tuple[Any, int]]) -> Any:
        family = self._core.CounterMetricFamily(name, text, labels=labels)
        for key, value in values:
            family.add_metric(key, value)
        return family

    def _gauge(self, name: str, text: str, labels: tuple[str, ...], values: Iterable[tuple[Any, float]]) -> Any:
        family = self._core.GaugeMetricFamily(name, text, labels=labels)
        for key, value in values:
            family.add_metric(key, value)
        return family

    def _histogram(self, name: str, text: str, labels: tuple[str, ...], values: Iterable[tuple[Any, Histogram]]) -> Any:
        family = self._core.HistogramMetricFamily(name, text, labels=labels)
        for key, histogram in values:
            family.add_metric(key, _buckets(histogram), histogram.total)
        return family


def _buckets(histogram: Histogram) -> list[tuple[str, float]]:
    """Return the counts up to each bound, as Prometheus has them."""
    sums, reached = [], 0
    for bound, count in zip((*histogram.bounds, float("inf")), list(histogram.counts), strict=True):
        reached += count
        sums.append(("+Inf" if bound == float("inf") else repr(bound), float(reached)))
    return sums


def _labelled(counts: Mapping[str, int]) -> list[tuple[tuple[str], int]]:
    return [((name,), count) for name, count in counts.items()]


def _refusal(status: HTTPStatus, error: StepwireError, headers: Mapping[str, str]) -> Response:
    return Response(status, f"{error}\n".encode(), headers=headers)


def _client_library() -> tuple[Any, Any, Any, Any]:
    """Load prometheus-client: its metrics, their texts, its registries and the metrics of a process.

    Raises:
        UnsupportedFeatureError: it is not installed.
    """
    names = ("metrics_core", "exposition", "registry", "process_collector")
    try:
        core, exposition, registry, process = (importlib.import_module(f"prometheus_client.{name}") for name in names)
    except ImportError:
        raise UnsupportedFeatureError(
            "--metrics needs prometheus-client; install it: pip install 'stepwire[metrics]'",
            metadata={"field": "metrics", "feature": "metrics"},
        ) from None
    return core, exposition, registry, process
