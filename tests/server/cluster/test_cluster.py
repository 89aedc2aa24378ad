"""Shards on Ray: their settings, the refusals, and a real cluster on this machine where Ray is installed."""

from __future__ import annotations

import contextlib
import functools
import os
import pathlib
import signal
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import stepwire
from stepwire.wire.directory import ShardDirectory
from stepwire_server.cli.cluster import cluster_app
from stepwire_server.cli.standby import standby_app
from stepwire_server.cluster import on_ray
from stepwire_server.cluster.cluster_settings import (
    ClusterSettings,
    Resources,
    ShardStatus,
    shard_names,
    standby_name,
)
from stepwire_server.cluster.directory_reader import DirectoryReader
from stepwire_server.cluster.on_ray import RayCluster
from stepwire_server.config import ServerConfig
from stepwire_server.processes.standby_settings import check_replication
from stepwire_server.replication.claims import Claims
from tests.support.numpy_server import numpy_server

SHARDS = 4
START = {f"w{index}": np.linspace(-1.0, 1.0, 5000, dtype=np.float32) for index in range(SHARDS)}
STEPS = 6


def gradients(step: int) -> dict[str, Any]:
    chance = np.random.default_rng(step)
    return {name: chance.standard_normal(5000).astype(np.float32) for name in START}


def test_a_shard_has_a_data_directory_of_its_own_and_the_directory_of_all(tmp_path: pathlib.Path) -> None:
    asked = ClusterSettings(tmp_path, 2, ServerConfig(bind="127.0.0.1:0", threads=1), Resources(cpus=0.5))
    first, second = (asked.server_of(name) for name in shard_names(2))
    assert (first.shard, second.shard) == ("shard-0000", "shard-0001")
    assert first.data_dir == str(tmp_path / "data" / "shard-0000") != second.data_dir
    assert first.directory == second.directory == str(asked.directory)
    assert (first.threads, first.bind) == (1, "127.0.0.1:0")
    assert shard_names(11) == sorted(shard_names(11))
    with pytest.raises(stepwire.InvalidRequestError, match=r"shards.*0 is not in \[1, 4096\]"):
        shard_names(0)


def test_the_two_servers_of_a_shard_have_one_name_no_disk_and_come_in_the_vacant_role(tmp_path: pathlib.Path) -> None:
    asked = ClusterSettings(tmp_path, 1, ServerConfig(bind="127.0.0.1:0"), standbys=True)
    found = asked.server_of("shard-0000")
    assert (found.shard, found.data_dir, found.directory) == ("shard-0000", "", str(asked.directory))
    assert (found.standby, found.standby_of, found.promote_after_seconds) == ("required", "directory", 10)
    check_replication(found)
    chosen = ServerConfig(standby="preferred", promote_after_seconds=3)
    found = ClusterSettings(tmp_path, 1, chosen, standbys=True).server_of("shard-0000")
    assert (found.standby, found.promote_after_seconds) == ("preferred", 3)
    assert standby_name("shard-0012") == "standby-0012"


def test_the_directory_is_read_for_clients_that_do_not_see_it(tmp_path: pathlib.Path) -> None:
    reader = DirectoryReader(str(tmp_path))
    assert reader.entries() == (str(tmp_path), {})
    directory = ShardDirectory(tmp_path)
    directory.announce("b", 1, "h:1")
    directory.announce("a", 1, "h:2")
    directory.announce("a", 2, "h:3")
    assert reader.entries() == (str(tmp_path), {"a": (2, "h:3"), "b": (1, "h:1")})


def test_a_missing_ray_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise ImportError(name)

    refused = stepwire.UnsupportedFeatureError  # which is imported now
    monkeypatch.setattr(on_ray.importlib, "import_module", absent)
    with pytest.raises(refused, match=r"pip install 'stepwire\[server,ray\]'"):
        RayCluster()


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'stepwire[server,ray]'")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own
        with RayCluster() as joined:
            yield joined


@functools.cache
def expected() -> list[bytes]:
    with numpy_server() as server, stepwire.connect(server.target) as client:
        alone: Any = client.create_session(START, optimizer=stepwire.Adam(lr=0.1), clip_grad_norm=1.0)
        return [joined(alone.step(gradients(step))) for step in range(STEPS)]


def joined(reply: dict[str, Any]) -> bytes:
    return b"".join(reply[name].tobytes() for name in START)


def settings(**more: Any) -> ServerConfig:
    """Return settings of servers that share few processors: NumPy's bits are those of compiled kernels."""
    common = {"bind": "127.0.0.1:0", "device": "cpu", "threads": 1, "log_level": "error"}
    return ServerConfig(**common | {"journal_segment_bytes": 1 << 20} | more)


def training(client: stepwire.Client, durability: str) -> Any:
    return client.create_session(
        START, optimizer=stepwire.Adam(lr=0.1), clip_grad_norm=1.0, durability=durability, request_id="job"
    )


def disturbed(session: Any, disturb: Callable[[], object]) -> list[bytes]:
    """Return the replies of all steps; something happens in the middle."""
    replies = []
    for step in range(STEPS):
        if step == STEPS // 2:
            disturb()
        replies.append(joined(session.step(gradients(step))))
    return replies


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # Ray's own
def test_a_killed_shard_comes_back_and_training_ends_with_the_bits_of_an_undisturbed_run(
    cluster: RayCluster, tmp_path: pathlib.Path
) -> None:
    asked = ClusterSettings(tmp_path, SHARDS, settings(), Resources(cpus=0.1))
    found = cluster.up(asked)
    assert [(each.name, each.epoch, each.role, each.problem) for each in found] == [
        (name, 1, "none", "") for name in shard_names(SHARDS)
    ]
    with stepwire.connect(f"ray://auto?shards={SHARDS}", timeout=120.0) as client:
        assert client.targets == tuple(f"ray://auto/{name}" for name in shard_names(SHARDS))
        session = training(client, "journal")
        assert disturbed(session, lambda: os.kill(found[1].pid, signal.SIGKILL)) == expected()
        assert [shard.info().epoch for shard in session.shards] == [1, 2, 1, 1]
    assert ShardDirectory(asked.directory).newest("shard-0001")[0] == 2
    assert [each.epoch for each in cluster.up(asked)] == [1, 2, 1, 1]
    assert cluster.drain() == dict.fromkeys(shard_names(SHARDS), True)
    assert cluster.servers() == []
    with pytest.raises(stepwire.UnavailableError, match="does not tell its shards"):
        stepwire.connect("ray://auto", retry=stepwire.Retry(uniform=lambda low, high: 3600.0))  # beyond the deadline


def await_promotion(standby: ShardStatus) -> None:
    """Promote a standby; one that is being promoted has been when this returns."""
    promoted = CliRunner().invoke(standby_app, ["promote", "-t", standby.endpoint])
    assert promoted.exit_code == 0, promoted.output


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # Ray's own
def test_a_standby_replaces_a_killed_primary_and_one_that_is_paused(
    cluster: RayCluster, tmp_path: pathlib.Path
) -> None:
    """The killed one is replaced by itself, and the paused one by an operator; it answers nothing when it goes on.

    Both come back as standbys: without them nothing is acknowledged.
    """
    asked = ClusterSettings(tmp_path, SHARDS, settings(promote_after_seconds=1), Resources(cpus=0.1), standbys=True)
    shards, directory = shard_names(SHARDS), ShardDirectory(asked.directory)
    found = {each.name: each for each in cluster.up(asked)}
    assert [*found] == [*shards, *map(standby_name, shards)] == cluster.servers()
    assert cluster.names() == shards
    primaries = [
        next(found[each] for each in (shard, standby_name(shard)) if found[each].role == "primary") for shard in shards
    ]
    killed, paused = primaries[1], primaries[2]
    other, _, successor, _ = (
        next(found[each] for each in (shard, standby_name(shard)) if found[each].role == "standby") for shard in shards
    )
    with stepwire.connect(f"directory:{asked.directory}?shards={SHARDS}", timeout=120.0) as client:
        session = training(client, "replicated")
        paused_id = session.session_id.split(",")[2]

        def disturb() -> None:
            os.kill(killed.pid, signal.SIGKILL)
            os.kill(paused.pid, signal.SIGSTOP)
            try:
                await_promotion(successor)
            finally:
                os.kill(paused.pid, signal.SIGCONT)
            with stepwire.connect(paused.endpoint, timeout=5.0) as old:
                with pytest.raises((stepwire.FencedError, stepwire.UnavailableError)) as refused:
                    old.session(paused_id)
            assert refused.value.reason in (stepwire.Reason.NOT_PRIMARY, stepwire.Reason.UNREACHABLE)

        assert disturbed(session, disturb) == expected()
        assert session.info().durable_step == STEPS, "all shards have a standby again"
    now = [directory.newest(shard)[1] for shard in shards]
    assert [one.endpoint == other for one, other in zip(primaries, now, strict=True)] == [True, False, False, True]
    assert {killed.pid, paused.pid} & {each.pid for each in cluster.status()} == set()
    assert cluster.drain([primaries[0].name]) == {primaries[0].name: True}
    await_promotion(other)  # which the drain has begun
    assert directory.newest(shards[0])[1] == other.endpoint
    cluster.down()
    assert cluster.servers() == []
    assert [Claims(asked.directory, shard).newest().server for shard in shards] == [""] * SHARDS


class Servers:
    """Servers in this process, in the place of a Ray cluster."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack = stack
        self.running: dict[str, Any] = {}

    def names(self) -> list[str]:
        return sorted(self.running)

    def grow(self, cluster: ClusterSettings) -> list[str]:
        names = shard_names(cluster.shards)
        for name in set(names) - set(self.running):
            place = {
                "data_dir": str(cluster.folder / "data" / name),
                "directory": str(cluster.directory),
                "shard": name,
            }
            self.running[name] = self._stack.enter_context(numpy_server(drain_seconds=5.0, **place))
        return sorted(set(self.running) - set(names))

    def drain(self, names: list[str]) -> dict[str, bool]:
        return {name: self.running.pop(name).drain() for name in names}


def scaled(monkeypatch: pytest.MonkeyPatch, cluster: Any, *arguments: str) -> Any:
    monkeypatch.setattr("stepwire_server.cli.cluster._joined", lambda address: contextlib.nullcontext(cluster))
    return CliRunner().invoke(cluster_app, ["scale", *arguments])


def test_scaling_starts_and_ends_shards_and_moves_what_is_named(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with contextlib.ExitStack() as stack:
        servers, folder = Servers(stack), str(tmp_path)
        assert scaled(monkeypatch, servers, folder, "--shards", "2").exit_code == 0
        with stepwire.connect(f"directory:{tmp_path / 'directory'}") as client:
            weights = {"w": np.ones((4, 65_536), np.float32)}
            session = client.create_session(weights, durability="journal", keep=True)
            other = client.create_session(weights, durability="journal", keep=True)
            found = scaled(monkeypatch, servers, folder, "--shards", "4", "--session", session.session_id)
            assert (found.exit_code, servers.names()) == (0, shard_names(4))
            session.step({"w": np.full((4, 65_536), 0.5, np.float32)})
            assert (session.session_id, len(session.shards), len(other.shards)) == (found.output.strip(), 4, 2)

            left = scaled(monkeypatch, servers, folder, "--shards", "1", "--session", session.session_id)
            assert isinstance(left.exception, stepwire.InvalidRequestError)
            assert "1 more sessions are on shard-0001, which is to end" in str(left.exception)
            assert servers.names() == shard_names(4)
            session.step({"w": np.full((4, 65_536), 0.5, np.float32)})
            assert len(session.shards) == 1

            done = scaled(monkeypatch, servers, folder, "--shards", "1", "--session", other.session_id)
            assert done.exit_code == 0
            assert "shard-0003: ended" in done.output
            other.step({"w": np.full((4, 65_536), 0.5, np.float32)})
            assert (servers.names(), len(other.shards)) == (["shard-0000"], 1)
        directory = ShardDirectory(tmp_path / "directory")
        assert directory.shards() == ["shard-0000"]
        assert scaled(monkeypatch, servers, folder, "--shards", "2").exit_code == 0
        assert directory.shards() == ["shard-0000", "shard-0001"]  # with a later epoch


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # Ray's own
def test_a_cluster_on_ray_is_scaled_while_training_goes_on(
    cluster: RayCluster, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"DEVICE": "cpu", "THREADS": "1", "LOG_LEVEL": "error"}.items():
        monkeypatch.setenv(f"STEPWIRE_{name}", value)
    shapes = {"w": (4, 65_536)}

    def gradient(step: int) -> dict[str, Any]:
        return {"w": np.random.default_rng(step).standard_normal(shapes["w"], np.float32)}

    with numpy_server() as server, stepwire.connect(server.target) as client:
        alone: Any = client.create_session(gradient(0), clip_grad_norm=1.0)
        expected = [alone.step(gradient(step))["w"].tobytes() for step in range(1, 7)]
    few = ["--cpus", "0.1"]
    assert scaled(monkeypatch, cluster, str(tmp_path), "--shards", "1", *few).exit_code == 0
    assert scaled(monkeypatch, cluster, str(tmp_path), "--shards", "2", *few).exit_code == 0
    with stepwire.connect(f"directory:{tmp_path / 'directory'}", timeout=120.0) as client:
        session: Any = client.create_session(gradient(0), clip_grad_norm=1.0, durability="journal", keep=True)
        replies = []
        for step, shards in zip(range(1, 7), (2, 2, 4, 4, 1, 1), strict=True):
            if len(session.shards) != shards:
                named = ["--shards", str(shards), "--session", session.session_id]
                done = scaled(monkeypatch, cluster, str(tmp_path), *named, *few)
                assert done.exit_code == 0, done.exception
            replies.append(session.step(gradient(step))["w"].tobytes())
        assert replies == expected
        assert (len(session.shards), cluster.names()) == (1, ["shard-0000"])
    cluster.down()
