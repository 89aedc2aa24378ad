"""The shards of a Ray cluster, as its directory actor tells them; Ray is loaded when it is asked, and not before."""

from __future__ import annotations

import importlib
import pathlib
from collections.abc import Mapping
from typing import Any, Final

from stepwire.errors import Reason, UnavailableError, UnsupportedFeatureError
from stepwire.wire.directory import RAY_ACTOR, RAY_NAMESPACE, ShardDirectory

__all__ = ["RAY_SCHEME", "RayDirectory"]

RAY_SCHEME: Final = "ray://"
"""The beginning of a client's target that names a Ray cluster, as Ray itself has it."""

_THIS: Final = ("", "auto")


class RayDirectory:
    """The directory of a cluster, as an `EndpointSource`.

    The actor reads the create-only files of the cluster's directory. Where Ray does not answer, a client that sees the
    folder reads them itself. So no gradient and no move depends on Ray.
    """

    def __init__(self, target: str) -> None:
        """Know the target alone: `ray://auto` for the cluster of this machine, `ray://host:10001` for another one."""
        self._target = target
        self._folder: pathlib.Path | None = None

    def endpoints(self, seconds: float) -> Mapping[str, str]:
        """See `EndpointSource`.

        Raises:
            UnsupportedFeatureError: Ray is not installed.
            UnavailableError: the cluster, or its directory, does not answer; or no shard is there.
        """
        try:
            folder, entries = self._told(seconds)
        except UnavailableError:
            if self._folder is None or not self._folder.is_dir():
                raise
            directory = ShardDirectory(self._folder)
            return {shard: directory.newest(shard)[1] for shard in directory.shards()}
        self._folder = pathlib.Path(folder)
        if not entries:
            raise UnavailableError(
                f"the cluster {self._target!r} has no shard yet; start some with `stepwire cluster up`",
                reason=Reason.UNREACHABLE,
            )
        return {shard: endpoint for shard, (_, endpoint) in entries.items()}

    def _told(self, seconds: float) -> tuple[str, Mapping[str, tuple[int, str]]]:
        """Ask the actor; a program that has joined a Ray cluster asks that one.

        Raises:
            UnsupportedFeatureError, UnavailableError: as `endpoints`.
        """
        ray = _loaded()
        try:
            if not ray.is_initialized():
                address = self._target.removeprefix(RAY_SCHEME)
                ray.init(
                    "auto" if address in _THIS else self._target,
                    namespace=RAY_NAMESPACE,
                    logging_level="error",
                    log_to_driver=False,
                )
            actor = ray.get_actor(RAY_ACTOR, namespace=RAY_NAMESPACE)
            told: tuple[str, Mapping[str, tuple[int, str]]] = ray.get(actor.entries.remote(), timeout=seconds)
        except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as problem:
            raise UnavailableError(
                f"the cluster {self._target!r} does not tell its shards: {str(problem).partition(chr(10))[0]}; start "
                "it with `stepwire cluster up`",
                reason=Reason.UNREACHABLE,
            ) from None
        return told


def _loaded() -> Any:
    try:
        return importlib.import_module("ray")
    except ImportError:
        raise UnsupportedFeatureError(
            "a target ray://… needs Ray: pip install ray; or connect to the cluster's directory, directory:PATH",
            metadata={"field": "target", "feature": "ray"},
        ) from None
