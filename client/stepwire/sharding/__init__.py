"""One model over several servers, or over several connections to one: cut, stepped together, put together again."""

from __future__ import annotations

from stepwire.sharding.client import ShardedClient
from stepwire.sharding.session import ShardedSession

__all__ = ["ShardedClient", "ShardedSession"]
