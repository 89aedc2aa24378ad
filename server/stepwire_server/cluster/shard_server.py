"""The server of one shard, in the process of a Ray actor.

Ray makes the object anew when its process has ended, with the same settings. So a restart is a recovery from the data
directory under the next epoch, and the announcement of a new address. Nothing of a session passes through Ray.
"""

from __future__ import annotations

import os

from stepwire_server.cluster.cluster_settings import ShardStatus
from stepwire_server.config import ServerConfig
from stepwire_server.observability.logs import configure_logging
from stepwire_server.processes.announcement import endpoint_of
from stepwire_server.server import Server

__all__ = ["ShardServer"]


class ShardServer:
    """One shard, from its recovery to its drain."""

    def __init__(self, config: ServerConfig, name: str = "") -> None:
        """Recover, announce, and serve; or follow the other server of the shard.

        Args:
            config: the settings.
            name: the name of the actor; empty for that of the shard.

        Raises:
            StepwireError: as `Server`.
        """
        configure_logging(config.log_level, True)
        self._config, self._name = config, name or config.shard
        self._server = Server(config)
        self._server.on_lost(lambda: os._exit(os.EX_TEMPFAIL))  # and Ray makes the actor anew
        self._server.start()
        self._draining = False

    def status(self) -> ShardStatus:
        """Tell the state of the shard."""
        server, replication = self._server, self._server.replication.status()
        return ShardStatus(
            name=self._name,
            endpoint=endpoint_of(self._config, server.target, server.port),
            epoch=replication.epoch or server.registry.epoch,
            pid=os.getpid(),
            sessions=server.registry.statistics().sessions,
            draining=self._draining,
            role=replication.role,
            in_sync=replication.in_sync,
        )

    def drain(self) -> bool:
        """Refuse new steps, end those under way, save every session, and end; see `Server.drain`."""
        self._draining = True
        complete = self._server.drain()
        self._server.close()
        return complete
