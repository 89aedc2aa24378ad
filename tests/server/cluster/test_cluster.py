"""Shards on Ray: their settings, the refusals, and a real cluster on this machine where Ray is installed."""

from __future__ import annotations

import os
import pathlib
import signal
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import stepwire
from stepwire.wire.directory import ShardDirectory
from stepwire_server.cli.cluster import cluster_app
from stepwire_server.cluster import on_ray
from stepwire_server.cluster.cluster_settings import ClusterSettings, Resources, shard_names
from stepwire_server.cluster.on_ray import RayCluster
from stepwire_server.config import ServerConfig
from tests.support.numpy_server import numpy_server

START = {name: np.linspace(-1.0, 1.0, 5000, dtype=np.float32) for name in ("w0", "w1")}
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


def test_scaling_and_a_missing_ray_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = CliRunner().invoke(cluster_app, ["scale", "3"]).exception
    assert isinstance(refused, stepwire.UnsupportedFeatureError)
    assert "cannot be scaled to 3 shards" in str(refused)

    def absent(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(on_ray.importlib, "import_module", absent)
    with pytest.raises(stepwire.UnsupportedFeatureError, match=r"pip install 'stepwire\[server,ray\]'"):
        RayCluster()


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # Ray's own
def test_a_killed_shard_comes_back_and_training_ends_with_the_bits_of_an_undisturbed_run(
    tmp_path: pathlib.Path,
) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'stepwire[server,ray]'")
    with numpy_server() as server, stepwire.connect(server.target) as client:
        alone: Any = client.create_session(START, optimizer=stepwire.Adam(lr=0.1), clip_grad_norm=1.0)
        expected = [alone.step(gradients(step))["w1"].tobytes() for step in range(STEPS)]
    settings = ServerConfig(
        bind="127.0.0.1:0", device="cpu", threads=1, log_level="error", journal_segment_bytes=1 << 20
    )
    with RayCluster() as cluster:
        asked = ClusterSettings(tmp_path, 2, settings, Resources(cpus=0.5))
        found = cluster.up(asked)
        assert [(each.name, each.epoch, each.problem) for each in found] == [
            ("shard-0000", 1, ""),
            ("shard-0001", 1, ""),
        ]
        with stepwire.connect(f"directory:{asked.directory}", timeout=120.0) as client:
            session: Any = client.create_session(
                START, optimizer=stepwire.Adam(lr=0.1), clip_grad_norm=1.0, durability="journal", request_id="job"
            )
            replies = []
            for step in range(STEPS):
                if step == STEPS // 2:
                    os.kill(found[1].pid, signal.SIGKILL)
                replies.append(session.step(gradients(step))["w1"].tobytes())
            assert replies == expected
            assert [shard.info().epoch for shard in session.shards] == [1, 2]
        assert ShardDirectory(asked.directory).newest("shard-0001")[0] == 2
        assert [each.epoch for each in cluster.up(asked)] == [1, 2]
        assert cluster.drain() == {"shard-0000": True, "shard-0001": True}
        assert cluster.names() == []
