"""Shards as actors of Ray: detached, named, and restarted for ever."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, Final

from stepwire.errors import InvalidRequestError, UnavailableError, UnsupportedFeatureError
from stepwire_server.cluster.cluster_settings import ClusterSettings, Resources, ShardStatus, shard_names
from stepwire_server.cluster.shard_server import ShardServer

__all__ = ["RayCluster"]

_NAMESPACE: Final = "stepwire"
_LEAST_OBJECT_STORE_BYTES: Final = 80 << 20  # Ray's own least: no gradient goes through it


class RayCluster:
    """The shards of one Ray cluster. A context manager; closes twice without complaint."""

    def __init__(self, address: str = "", *, patience_seconds: float = 120.0) -> None:
        """Join a Ray cluster, or begin one on this machine that ends with this process.

        Args:
            address: the address of the cluster, such as `10.0.0.1:6379`, or `auto`; empty begins one.
            patience_seconds: the longest wait for a shard.

        Raises:
            UnsupportedFeatureError: Ray is not installed.
            UnavailableError: there is no such cluster.
        """
        self._ray, self._patience_seconds = _loaded(), patience_seconds
        options: dict[str, Any] = {"namespace": _NAMESPACE, "logging_level": "error", "log_to_driver": False}
        if address:
            options["address"] = address
        else:
            options |= {"include_dashboard": False, "object_store_memory": _LEAST_OBJECT_STORE_BYTES}
        try:
            self._ray.init(**options)
        except (ConnectionError, RuntimeError, ValueError) as problem:
            raise UnavailableError(
                f"the Ray cluster {address or 'on this machine'!r} cannot be used: {problem}; start it with `ray start`"
            ) from None

    def up(self, cluster: ClusterSettings) -> list[ShardStatus]:
        """Start the shards that are not there yet, and wait until all serve.

        Raises:
            InvalidRequestError: the number of shards is out of range, or other shards than these are there.
        """
        names = shard_names(cluster.shards)
        if others := sorted(set(self.names()) - set(names)):
            raise InvalidRequestError.of(
                "shards", f"the cluster has {', '.join(others)} too; it cannot be scaled, so end it with `down` first"
            )
        for name in names:
            self._begin(cluster, name)
        return self.status(names)

    def names(self) -> list[str]:
        """Return the names of the shards that are there, sorted."""
        listed = self._ray.util.list_named_actors(all_namespaces=False)
        return sorted(name for name in listed if name.startswith("shard-"))

    def status(self, names: Sequence[str] | None = None) -> list[ShardStatus]:
        """Ask the shards for their states; one that does not answer in time has the reason in its state."""
        asked = self.names() if names is None else list(names)
        return [self._asked(name) for name in asked]

    def drain(self, names: Sequence[str] | None = None) -> dict[str, bool]:
        """Drain shards, and end them; tell for each whether everything was saved in time.

        Raises:
            InvalidRequestError: there is no such shard.
        """
        ray, present = self._ray, self.names()
        asked = present if names is None else list(names)
        if unknown := sorted(set(asked) - set(present)):
            raise InvalidRequestError.of("shard", f"{unknown[0]!r} is none of {', '.join(present) or 'no shards'}")
        calls = {name: ray.get_actor(name).drain.remote() for name in asked}
        found = {}
        for name, call in calls.items():
            try:
                found[name] = bool(ray.get(call, timeout=self._patience_seconds))
            except ray.exceptions.RayError:
                found[name] = False
            self._kill(name)
        return found

    def down(self) -> None:
        """End all shards at once, without a drain: what is on their disks stays."""
        for name in self.names():
            self._kill(name)

    def close(self) -> None:
        """Leave the cluster. Closing twice is harmless."""
        self._ray.shutdown()

    def __enter__(self) -> RayCluster:
        """Use the cluster for a block."""
        return self

    def __exit__(self, *error: object) -> None:
        """Leave it."""
        self.close()

    def _begin(self, cluster: ClusterSettings, name: str) -> None:
        actor = self._ray.remote(ShardServer).options(
            name=name,
            lifetime="detached",
            get_if_exists=True,
            max_restarts=-1,
            max_task_retries=0,  # a drain is not made twice
            max_concurrency=2,  # the state is told during a drain
            scheduling_strategy="SPREAD",
            **_options(cluster.resources),
        )
        actor.remote(cluster.server_of(name))

    def _asked(self, name: str) -> ShardStatus:
        ray = self._ray
        try:
            found: ShardStatus = ray.get(ray.get_actor(name).status.remote(), timeout=self._patience_seconds)
        except (ray.exceptions.RayError, ValueError) as problem:
            return ShardStatus(name, problem=str(problem).partition("\n")[0])
        return found

    def _kill(self, name: str) -> None:
        self._ray.kill(self._ray.get_actor(name), no_restart=True)


def _options(resources: Resources) -> dict[str, Any]:
    options: dict[str, Any] = {"num_cpus": resources.cpus, "num_gpus": resources.gpus}
    return options | ({"memory": resources.memory_bytes} if resources.memory_bytes else {})


def _loaded() -> Any:
    try:
        return importlib.import_module("ray")
    except ImportError:
        raise UnsupportedFeatureError(
            "Ray is not installed: pip install 'stepwire[server,ray]'",
            metadata={"field": "cluster", "feature": "ray"},
        ) from None
