"""The monitoring of one server: what counts its steps, and the addresses that tell of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import structlog

from stepwire.errors import StepwireError
from stepwire_server.access.certificates import CertificateFiles
from stepwire_server.access.control import AccessControl
from stepwire_server.access.identity import METRICS_PATH
from stepwire_server.config import ServerConfig
from stepwire_server.monitoring.endpoint import Address, Endpoint, Get, checked_address
from stepwire_server.monitoring.histories import Histories
from stepwire_server.monitoring.metrics import Metrics
from stepwire_server.monitoring.refusals import Refusals
from stepwire_server.monitoring.status import StatusPage
from stepwire_server.observability.commits import log_committed
from stepwire_server.observability.step_traces import ReplyTraces
from stepwire_server.observability.tallies import Tallies
from stepwire_server.records.committed import CommitSink
from stepwire_server.records.replied import RepliedSink
from stepwire_server.replication.status import ReplicationStatus
from stepwire_server.sessions.registry import Registry

__all__ = ["Monitoring"]

_log = structlog.get_logger()


class Monitoring:
    """The monitoring of a server, as far as its settings ask for some. Closes twice without complaint.

    Attributes:
        tallies: the counts of steps and calls; None where nobody asks for them.
        sinks: are told of each commit.
        reply_sinks: are told of each reply.
        replication: tells how replication stands.
        metrics: the address of the metrics; None without one.
        status: the address of the status page; None without one.
    """

    def __init__(self, config: ServerConfig) -> None:
        """Count, and listen nowhere so far.

        Raises:
            InvalidRequestError: an address is none, or would tell strangers; the exporter of traces cannot be had.
            UnsupportedFeatureError: a package is missing.
        """
        self._config = config
        self._metrics_address = checked_address(config, "metrics") if config.metrics else None
        self._status_address = checked_address(config, "status") if config.status else None
        self.tallies = None if self._metrics_address is None else Tallies()
        self._histories = None if self._status_address is None else Histories()
        self._refusals = Refusals()
        self.sinks: list[CommitSink] = [log_committed] if config.log_level == "debug" else []
        if self.tallies is not None:
            self.sinks.append(self.tallies.committed)
        if self._histories is not None:
            self.sinks.append(self._histories.committed)
        self._traces = ReplyTraces.of_environment(config.trace_one_in)
        counting: list[RepliedSink] = [] if self.tallies is None else [self.tallies.replied]
        self.reply_sinks = counting if self._traces is None else [*counting, self._traces.replied]
        self.replication: Callable[[], ReplicationStatus] = ReplicationStatus
        self._page: StatusPage | None = None
        self.metrics: Endpoint | None = None
        self.status: Endpoint | None = None

    @property
    def traces(self) -> bool:
        """Spans of some steps are exported, as of the moment of their replies."""
        return self._traces is not None

    def refused(self, error: StepwireError) -> None:
        """Note an error that a client was told."""
        if self.tallies is not None:
            self.tallies.refused(str(error.reason))
        if self._histories is not None:
            self._refusals.add(error)

    def listen(
        self,
        registry: Registry,
        access: AccessControl,
        draining: Callable[[], bool],
        certificates: CertificateFiles | None,
    ) -> None:
        """Listen; nobody gets a response before `start`.

        Args:
            registry: the sessions.
            access: admits whoever asks.
            draining: tells whether new steps are refused.
            certificates: those of the server; an address beyond loopback shows them.

        Raises:
            InvalidRequestError: an address cannot be listened on.
            UnsupportedFeatureError: a package is missing.
        """

        def endpoint(address: Address, field: str, get: Get) -> Endpoint:
            return Endpoint(address, field, get, None if address.loopback else certificates)

        if self._metrics_address is not None and self.tallies is not None:
            metrics = Metrics(registry, self.tallies, access, draining, self.replication)
            self.metrics = endpoint(self._metrics_address, "metrics", metrics.get)
        if self._status_address is not None and self._histories is not None:
            self._page = StatusPage(registry, access, draining, self._histories, self._refusals)
            self._page.allow(self._status_address.host, *self._config.status_hosts.split(","))
            self.status = endpoint(self._status_address, "status", self._page.get)

    def start(self) -> None:
        """Respond from now on."""
        if self.metrics is not None:
            self.metrics.start()
            _log.info("metrics", url=f"{self.metrics.url}{METRICS_PATH}")
        if self.status is not None:
            self.status.start()
            _log.info("status page", url=self.status.url)

    def close(self) -> None:
        """Respond no longer."""
        if self._page is not None:
            self._page.close()
        with contextlib.ExitStack() as stack:
            if self._traces is not None:
                stack.callback(self._traces.close)
            for endpoint in (self.metrics, self.status):
                if endpoint is not None:
                    stack.callback(endpoint.close)
