"""Shards as actors of Ray: detached, named, and restarted for ever."""

from __future__ import annotations

import contextlib
import importlib
import pathlib
from collections.abc import Sequence
from typing import Any, Final

from stepwire.errors import InvalidRequestError, UnavailableError, UnsupportedFeatureError
from stepwire.wire.directory import RAY_ACTOR, RAY_NAMESPACE
from stepwire_server.cluster.cluster_settings import (
    ClusterSettings,
    Resources,
    ShardStatus,
    shard_names,
    standby_name,
)
from stepwire_server.cluster.directory_reader import DirectoryReader
from stepwire_server.cluster.shard_server import ShardServer
from stepwire_server.replication.claims import Claims

__all__ = ["RayCluster"]

_SERVERS: Final = ("shard-", "standby-")
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
        options: dict[str, Any] = {"namespace": RAY_NAMESPACE, "logging_level": "error", "log_to_driver": False}
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

    def grow(self, cluster: ClusterSettings) -> list[str]:
        """Start the shards that are not there yet, wait until they serve, and return the names of those beyond them.

        Raises:
            InvalidRequestError: the number of shards is out of range.
            UnsupportedFeatureError: the cluster has standbys.
            UnavailableError: a shard does not serve.
        """
        names = shard_names(cluster.shards)
        if set(self.servers()) - set(self.names()):
            raise UnsupportedFeatureError(
                "a cluster with standbys cannot be scaled: replicated sessions do not move; end it with `down` first",
                metadata={"field": "shards", "feature": "durability_replicated"},
            )
        self._detached(DirectoryReader, RAY_ACTOR, num_cpus=0).remote(str(cluster.directory))
        for name in names:
            self._begin(cluster, name)
        for each in self.status(names):
            if each.problem:
                raise UnavailableError(f"{each.name} does not serve: {each.problem}; nothing has moved")
        return sorted(set(self.names()) - set(names))

    def up(self, cluster: ClusterSettings) -> list[ShardStatus]:
        """Start the shards that are not there yet, and wait until all serve.

        Raises:
            InvalidRequestError: the number of shards is out of range, or other shards than these are there.
        """
        shards = shard_names(cluster.shards)
        names = [*shards, *(map(standby_name, shards) if cluster.standbys else ())]
        if others := sorted(set(self.servers()) - set(names)):
            raise InvalidRequestError.of(
                "shards", f"the cluster has {', '.join(others)} too; move their sessions with `stepwire cluster scale`"
            )
        self._detached(DirectoryReader, RAY_ACTOR, num_cpus=0).remote(str(cluster.directory))
        for shard in shards:
            self._begin(cluster, shard)
        return self.status(names)

    def names(self) -> list[str]:
        """Return the names of the shards that are there, sorted; each is that of the shard's first server."""
        return [name for name in self.servers() if name.startswith(_SERVERS[0])]

    def servers(self) -> list[str]:
        """Return the names of all servers that are there: those of the shards, and then their standbys."""
        listed = self._ray.util.list_named_actors(all_namespaces=False)
        return sorted(name for name in listed if name.startswith(_SERVERS))

    def status(self, names: Sequence[str] | None = None) -> list[ShardStatus]:
        """Ask the shards for their states; one that does not answer in time has the reason in its state."""
        asked = self.servers() if names is None else list(names)
        return [self._asked(name) for name in asked]

    def drain(self, names: Sequence[str] | None = None) -> dict[str, bool]:
        """Drain servers, and end them; tell for each whether everything was saved in time.

        Standbys end first. So a primary that drains alone has its standby promoted, and one that drains with it keeps
        nobody waiting.

        Raises:
            InvalidRequestError: there is no such server.
        """
        present = self.servers()
        asked = present if names is None else list(names)
        if unknown := sorted(set(asked) - set(present)):
            raise InvalidRequestError.of("shard", f"{unknown[0]!r} is none of {', '.join(present) or 'no shards'}")
        roles = {each.name: each.role for each in self.status(asked)}
        found = self._drained([name for name in asked if roles[name] == "standby"])
        found |= self._drained([name for name in asked if name not in found])
        self._tidy()
        return {name: found[name] for name in asked}

    def down(self) -> None:
        """End all servers at once, without a drain: what is on their disks stays, and replicated sessions end."""
        folder, shards = self._directory()
        for name in self.servers():
            self._kill(name)
        for shard in shards:
            claims = Claims(pathlib.Path(folder), shard)
            if (newest := claims.newest()).server:
                claims.release(newest.epoch)
        self._tidy()

    def close(self) -> None:
        """Leave the cluster. Closing twice is harmless."""
        self._ray.shutdown()

    def __enter__(self) -> RayCluster:
        """Use the cluster for a block."""
        return self

    def __exit__(self, *error: object) -> None:
        """Leave it."""
        self.close()

    def _begin(self, cluster: ClusterSettings, shard: str) -> None:
        """Start the servers of a shard that are not there; the two of one shard on different machines, if there are."""
        names = [shard, standby_name(shard)] if cluster.standbys else [shard]
        options = _options(cluster.resources)
        placed: list[Any] = ["SPREAD"] * len(names)
        if cluster.standbys:
            group = self._group(shard, cluster.resources)
            placed = [
                self._ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(group, bundle)
                for bundle in range(len(names))
            ]
        for name, strategy in zip(names, placed, strict=True):
            actor = self._detached(ShardServer, name, max_concurrency=2, scheduling_strategy=strategy, **options)
            actor.remote(cluster.server_of(shard), name)

    def _detached(self, kind: type, name: str, **options: Any) -> Any:
        """Return the maker of an actor that outlives this process, unless one of its name is there.

        It is restarted for ever, and no call of it is made twice, such as a drain. Two calls at a time tell the state
        during a drain.
        """
        return self._ray.remote(kind).options(
            name=name, lifetime="detached", get_if_exists=True, max_restarts=-1, max_task_retries=0, **options
        )

    def _group(self, shard: str, resources: Resources) -> Any:
        """Return the places of the two servers of a shard, apart from one another where there are several machines."""
        util = importlib.import_module("ray.util")
        importlib.import_module("ray.util.scheduling_strategies")
        try:
            return util.get_placement_group(shard)
        except ValueError:  # there is none
            bundle = {"CPU": resources.cpus, "GPU": resources.gpus, "memory": resources.memory_bytes}
            needed = {kind: value for kind, value in bundle.items() if value}
            return util.placement_group([needed, needed], strategy="SPREAD", name=shard, lifetime="detached")

    def _directory(self) -> tuple[str, list[str]]:
        """Return the folder of the directory, and the shards there; nothing where no cluster is up."""
        try:
            actor = self._ray.get_actor(RAY_ACTOR)
            folder, entries = self._ray.get(actor.entries.remote(), timeout=self._patience_seconds)
        except (self._ray.exceptions.RayError, ValueError):
            return "", []
        return str(folder), list(entries)

    def _drained(self, names: Sequence[str]) -> dict[str, bool]:
        ray = self._ray
        calls = {name: ray.get_actor(name).drain.remote() for name in names}
        found = {}
        for name, call in calls.items():
            try:
                found[name] = bool(ray.get(call, timeout=self._patience_seconds))
            except ray.exceptions.RayError:
                found[name] = False
            self._kill(name)
        return found

    def _tidy(self) -> None:
        """Remove the places and the directory of servers that are gone."""
        util, names = importlib.import_module("ray.util"), self.servers()
        for group in util.placement_group_table().values():
            shard = group["name"]
            if group["state"] != "REMOVED" and not {shard, standby_name(shard)} & set(names):
                util.remove_placement_group(util.get_placement_group(shard))
        if not names:
            with contextlib.suppress(ValueError):
                self._kill(RAY_ACTOR)

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
