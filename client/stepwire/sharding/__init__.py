"""One model over several servers, or over several connections to one: partitioned, stepped together, put together."""

from __future__ import annotations

from stepwire.sharding.link import ShardedLink
from stepwire.sharding.server import ShardedServer

__all__ = ["ShardedLink", "ShardedServer"]
