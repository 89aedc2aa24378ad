"""One server's settings, and a machine, cut into those of several processes."""

from __future__ import annotations

import pathlib
import types
from typing import Any

import pytest

from stepwire.errors import InvalidRequestError
from stepwire_server.config import ServerConfig
from stepwire_server.host import limits as host
from stepwire_server.processes.split_settings import Machine, divide, look_at_machine

FOLDER = pathlib.Path("/private")
MACHINE = Machine(8, 1000)
FOUR_GPUS = Machine(8, 1000, (100, 200, 300, 400))


def cut(field: str, machine: Machine = MACHINE, **settings: Any) -> list[Any]:
    return [getattr(config, field) for config in divide(ServerConfig(**{"device": "cpu"} | settings), machine, FOLDER)]


def test_ports_follow_one_another_or_are_free_ones() -> None:
    assert cut("bind", processes=3, bind="[::1]:50051") == ["[::1]:50051", "[::1]:50052", "[::1]:50053"]
    assert cut("bind", processes=2, bind="127.0.0.1:0") == ["127.0.0.1:0"] * 2
    assert cut("bind", processes=2, bind="nowhere") == ["nowhere"] * 2, "the processes will refuse it"


def test_ports_that_do_not_exist_are_refused() -> None:
    assert cut("bind", processes=2, bind="127.0.0.1:65534")[-1] == "127.0.0.1:65535"
    with pytest.raises(InvalidRequestError, match="bind: 3 processes need as many ports from '127.0.0.1:65534' on"):
        cut("bind", processes=3, bind="127.0.0.1:65534")


def test_ports_of_metrics_follow_one_another_too() -> None:
    assert cut("metrics", processes=2, metrics="127.0.0.1:9464") == ["127.0.0.1:9464", "127.0.0.1:9465"]
    assert cut("metrics", processes=2) == ["", ""]
    with pytest.raises(InvalidRequestError, match="metrics: 2 processes need as many ports from '127.0.0.1:65535' on"):
        cut("metrics", processes=2, metrics="127.0.0.1:65535")


def test_sockets_are_numbered() -> None:
    assert cut("bind", processes=2, bind="unix:/run/s") == ["unix:/run/s.0", "unix:/run/s.1"]
    assert cut("unix_socket", processes=2, bind="unix:/run/s") == ["auto", "auto"]
    assert cut("unix_socket", processes=2, unix_socket="/run/s") == ["/run/s.0", "/run/s.1"]
    assert cut("unix_socket", processes=2) == ["/private/0.sock", "/private/1.sock"]
    assert cut("unix_socket", processes=2, unix_socket="off") == ["off", "off"]
    deep = pathlib.Path("/" + "x" * 105)
    assert [config.unix_socket for config in divide(ServerConfig(device="cpu"), MACHINE, deep)] == ["auto"]


def test_sockets_of_shared_memory_are_numbered() -> None:
    assert cut("handoff_socket", processes=2, handoff_socket="/run/h") == ["/run/h.0", "/run/h.1"]
    assert cut("handoff_socket", processes=2) == ["/private/0.handoff", "/private/1.handoff"]
    assert cut("handoff_socket", processes=2, handoff_uids="7") == ["", ""], "user 7 must get there"
    assert cut("handoff_socket", processes=2, shared_memory=False, packets=False) == ["", ""]


def test_folders_and_stores_are_numbered() -> None:
    assert cut("data_dir", processes=2, data_dir="/data") == ["/data/0", "/data/1"]
    assert cut("checkpoint_store", processes=2, checkpoint_store="s3://bucket/prefix/") == [
        "s3://bucket/prefix/0",
        "s3://bucket/prefix/1",
    ]
    assert cut("checkpoint_store", processes=2) == ["", ""]


def test_processors_are_shared_and_each_process_has_one() -> None:
    assert cut("threads", processes=3) == [2, 2, 2]
    assert cut("threads", processes=2, threads=6) == [3, 3]
    assert cut("threads", processes=20) == [1] * 20


def test_memory_is_shared() -> None:
    assert cut("memory_budget", processes=4) == [200] * 4, "four fifths of a quarter"
    assert cut("memory_budget", processes=4, memory_budget=43) == [10] * 4
    assert cut("memory_limit", processes=4) == [250] * 4
    assert cut("unix_socket", processes=2, tls_cert="c", tls_key="k", tls_client_ca="ca") == ["off"] * 2
    assert cut("memory_limit", processes=4, memory_limit=43) == [10] * 4
    with pytest.raises(InvalidRequestError, match="memory_budget: 3 bytes for 4 processes; give more"):
        cut("memory_budget", processes=4, memory_budget=3)


@pytest.mark.parametrize(
    ("device", "processes", "devices", "budgets"),
    [
        ("cuda", 4, ["cuda:0", "cuda:1", "cuda:2", "cuda:3"], [0, 0, 0, 0]),
        ("auto", 2, ["cuda:0,cuda:2", "cuda:1,cuda:3"], [0, 0]),
        ("cuda", 6, ["cuda:0", "cuda:1", "cuda:2", "cuda:3", "cuda:0", "cuda:1"], [40, 80, 0, 0, 40, 80]),
        ("cuda:3,cuda:1", 2, ["cuda:3", "cuda:1"], [0, 0]),
        ("cuda:3,cuda:1", 3, ["cuda:3", "cuda:1", "cuda:3"], [160, 0, 160]),
        ("cuda:2", 3, ["cuda:2"] * 3, [80] * 3),
        ("cpu", 2, ["cpu"] * 2, [400] * 2),
    ],
)
def test_gpus_are_dealt_out(device: str, processes: int, devices: list[str], budgets: list[int]) -> None:
    assert cut("device", FOUR_GPUS, device=device, processes=processes) == devices
    assert cut("memory_budget", FOUR_GPUS, device=device, processes=processes) == budgets


def test_a_named_budget_is_that_of_each_device() -> None:
    settings: dict[str, Any] = {"device": "cuda", "processes": 6, "memory_budget": 50}
    assert cut("memory_budget", FOUR_GPUS, **settings) == [25, 25, 50, 50, 25, 25]


@pytest.mark.parametrize(
    ("device", "gpus", "budget"),
    [("cuda", (600,), 240), ("auto", (600,), 240), ("auto", (6000,), 400), ("auto", (), 400)],
)
def test_a_lone_gpu_is_shared_and_auto_may_come_to_the_cpu(device: str, gpus: tuple[int, ...], budget: int) -> None:
    machine = Machine(8, 1000, gpus)
    assert cut("device", machine, device=device, processes=2) == [device] * 2
    assert cut("memory_budget", machine, device=device, processes=2) == [budget] * 2


def test_gpus_that_the_machine_does_not_show_are_left_to_the_processes_to_miss() -> None:
    assert cut("device", processes=2, device="cuda") == ["cuda"] * 2
    assert cut("device", processes=2, device="cuda:0,cuda:1") == ["cuda:0", "cuda:1"]


def test_everything_else_stays() -> None:
    config = ServerConfig(device="cpu", processes=2, max_sessions=7, port_file="/p", log_json=True)
    (first, _) = divide(config, MACHINE, FOLDER)
    assert (first.processes, first.max_sessions, first.port_file, first.log_json) == (1, 7, "", True)


def test_the_machine_is_measured_and_gpus_only_where_they_may_be_used() -> None:
    sizes = [5, 6]
    runtime = types.SimpleNamespace(
        getDeviceCount=lambda: len(sizes), getDeviceProperties=lambda number: {"totalGlobalMem": sizes[number]}
    )
    cupy = types.SimpleNamespace(cuda=types.SimpleNamespace(runtime=runtime))
    assert look_at_machine("auto", cupy) == Machine(host.processor_count(), host.memory_bytes(), (5, 6))
    assert look_at_machine("cpu", cupy).gpu_memory_bytes == ()
    assert look_at_machine("cuda", types.SimpleNamespace()).gpu_memory_bytes == ()


def test_each_process_is_a_shard_of_the_directory() -> None:
    settings = {"processes": 2, "directory": "/shared", "shard": "a", "data_dir": "/data", "advertise": "node7:50051"}
    assert cut("shard", **settings) == ["a-0", "a-1"]
    assert cut("advertise", **settings) == ["node7:50051", "node7:50052"]
    assert cut("shard", processes=2) == ["", ""]
    with pytest.raises(InvalidRequestError, match="standby: 2 processes would need as many standbys"):
        cut("shard", processes=2, standby="required")
