"""The monitoring of one server: what counts its steps, and the addresses that tell of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import structlog

from stepwire_server.access.certificates import CertificateFiles
from stepwire_server.access.control import AccessControl
from stepwire_server.access.identity import METRICS_PATH
from stepwire_server.config import ServerConfig
from stepwire_server.monitoring.endpoint import Endpoint, checked_address
from stepwire_server.monitoring.metrics import Metrics
from stepwire_server.observability.commits import log_committed
from stepwire_server.observability.tallies import Tallies
from stepwire_server.records.committed import CommitSink
from stepwire_server.sessions.registry import Registry

__all__ = ["Monitoring"]

_log = structlog.get_logger()


class Monitoring:
    """The monitoring of a server, as far as its settings ask for some. Closes twice without complaint.

    Attributes:
        tallies: the counts of steps and calls; None where nobody asks for them.
        sinks: are told of each commit.
        metrics: the address of the metrics; None without one.
    """

    def __init__(self, config: ServerConfig) -> None:
        """Count, and listen nowhere so far.

        Raises:
            InvalidRequestError: an address is none, or would tell strangers.
        """
        self._config = config
        self._address = checked_address(config, "metrics") if config.metrics else None
        self.tallies = None if self._address is None else Tallies()
        self.sinks: list[CommitSink] = [log_committed] if config.log_level == "debug" else []
        if self.tallies is not None:
            self.sinks.append(self.tallies.committed)
        self.metrics: Endpoint | None = None

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
        if self._address is None or self.tallies is None:
            return
        shown = None if self._address.loopback else certificates
        metrics = Metrics(registry, self.tallies, access, draining)
        self.metrics = Endpoint(self._address, "metrics", metrics.get, shown)

    def start(self) -> None:
        """Answer from now on."""
        if self.metrics is not None:
            self.metrics.start()
            _log.info("metrics", url=f"{self.metrics.url}{METRICS_PATH}")

    def close(self) -> None:
        """Answer no longer."""
        with contextlib.ExitStack() as stack:
            for endpoint in [self.metrics] if self.metrics is not None else []:
                stack.callback(endpoint.close)
