"""The directory of a Ray cluster, with a Ray of the test's own: asked when it is needed, and replaced by its files."""

from __future__ import annotations

import pathlib
import sys
import types
from typing import Any

import pytest

from stepwire.connection.ray_directory import RayDirectory
from stepwire.errors import UnavailableError, UnsupportedFeatureError
from stepwire.wire.directory import ShardDirectory


class Ray(types.ModuleType):
    """The functions of Ray that a client calls."""

    def __init__(self, told: Any, *, joined: bool = False) -> None:
        super().__init__("ray")
        self.told, self.joined, self.calls = told, joined, list[Any]()
        self.exceptions = types.SimpleNamespace(RayError=type("RayError", (Exception,), {}))

    def is_initialized(self) -> bool:
        return self.joined

    def init(self, address: str, **options: Any) -> None:
        self.calls.append((address, options["namespace"]))
        self.joined = True

    def get_actor(self, name: str, namespace: str) -> Any:
        self.calls.append((name, namespace))
        remote = types.SimpleNamespace(remote=lambda: "entries")
        return types.SimpleNamespace(entries=remote)

    def get(self, reference: str, timeout: float) -> Any:
        self.calls.append((reference, timeout))
        if isinstance(self.told, Exception):
            raise self.told
        return self.told


def ray_of(monkeypatch: pytest.MonkeyPatch, ray: Ray) -> Ray:
    monkeypatch.setitem(sys.modules, "ray", ray)
    return ray


@pytest.mark.parametrize(
    ("target", "address"), [("ray://", "auto"), ("ray://auto", "auto"), ("ray://head:10001", "ray://head:10001")]
)
def test_the_directory_actor_is_asked(monkeypatch: pytest.MonkeyPatch, target: str, address: str) -> None:
    ray = ray_of(monkeypatch, Ray(("/nowhere", {"a": (3, "h:1"), "b": (1, "h:2")})))
    known = RayDirectory(target)
    assert ray.calls == []
    assert known.endpoints(5.0) == {"a": "h:1", "b": "h:2"}
    assert ray.calls == [(address, "stepwire"), ("directory", "stepwire"), ("entries", 5.0)]
    assert known.endpoints(4.0) == {"a": "h:1", "b": "h:2"}, "and joins once"
    assert ray.calls[3:] == [("directory", "stepwire"), ("entries", 4.0)]


def test_files_are_read_where_ray_does_not_answer(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    ray = ray_of(monkeypatch, Ray((str(tmp_path), {"a": (1, "h:1")}), joined=True))
    known = RayDirectory("ray://auto")
    assert known.endpoints(5.0) == {"a": "h:1"}
    ShardDirectory(tmp_path).announce("a", 2, "h:7")
    ray.told = ray.exceptions.RayError("the actor has died\nand more")
    assert known.endpoints(5.0) == {"a": "h:7"}
    with pytest.raises(UnavailableError, match=r"'ray://' does not tell its shards: the actor has died; start it with"):
        RayDirectory("ray://").endpoints(5.0)


def test_a_cluster_without_shards_and_a_missing_ray_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    ray_of(monkeypatch, Ray(("/nowhere", {})))
    with pytest.raises(UnavailableError, match="has no shard yet; start some with `stepwire cluster up`"):
        RayDirectory("ray://auto").endpoints(5.0)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UnsupportedFeatureError, match="needs Ray: pip install ray; or connect to .* directory:PATH"):
        RayDirectory("ray://auto").endpoints(5.0)
