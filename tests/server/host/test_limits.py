from __future__ import annotations

import os

import pytest

from stepwire.errors import InvalidRequestError
from stepwire_server.host import limits as host


def test_processors_are_limited_by_the_quota_of_the_container(tmp_path) -> None:
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert host.processor_count(tmp_path) == min(2, len(os.sched_getaffinity(0)))
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert host.processor_count(tmp_path) == 1


def test_processors_without_quota_are_those_of_the_process(tmp_path) -> None:
    assert host.processor_count(tmp_path) == len(os.sched_getaffinity(0))
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert host.processor_count(tmp_path) == len(os.sched_getaffinity(0))


def test_memory_is_limited_by_the_container(tmp_path) -> None:
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert host.memory_bytes(tmp_path) == machine
    (tmp_path / "memory.max").write_text("max\n")
    assert host.memory_bytes(tmp_path) == machine
    (tmp_path / "memory.max").write_text("1048576\n")
    assert host.memory_bytes(tmp_path) == 1_048_576


def test_limits_hold_from_every_group_down_from_the_root(tmp_path) -> None:
    """A service of systemd, say: its group is below the root, and a group in between may be smaller than its own."""
    membership = tmp_path / "membership"
    membership.write_text("0::/machine.slice/stepwire.service\n")
    own = tmp_path / "machine.slice" / "stepwire.service"
    own.mkdir(parents=True)
    (own / "memory.max").write_text("2097152\n")
    (own / "cpu.max").write_text("max 100000\n")
    assert host.memory_bytes(tmp_path, membership) == 2_097_152
    (own.parent / "memory.max").write_text("1048576\n")
    (own.parent / "cpu.max").write_text("100000 100000\n")
    assert host.memory_bytes(tmp_path, membership) == 1_048_576
    assert host.processor_count(tmp_path, membership) == 1


def test_groups_of_version_1_have_limits_too(tmp_path) -> None:
    """Each controller has a tree; without a limit, memory has a number beyond any machine's, and a quota is -1."""
    membership = tmp_path / "membership"
    membership.write_text("12:pids:/docker/abc\n5:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n")
    memory, cpu = (tmp_path / name / "docker" / "abc" for name in ("memory", "cpu"))
    for folder in (memory, cpu):
        folder.mkdir(parents=True)
    machine, processors = host.memory_bytes(tmp_path / "none"), host.processor_count(tmp_path / "none")
    (memory / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    (cpu / "cpu.cfs_quota_us").write_text("-1\n")
    (cpu / "cpu.cfs_period_us").write_text("100000\n")
    assert host.memory_bytes(tmp_path, membership) == machine
    assert host.processor_count(tmp_path, membership) == processors
    (memory / "memory.limit_in_bytes").write_text("3145728\n")
    (cpu / "cpu.cfs_quota_us").write_text("20000\n")
    assert host.memory_bytes(tmp_path, membership) == 3_145_728
    assert host.processor_count(tmp_path, membership) == 1


def test_a_limit_of_files_that_a_server_needs_itself_is_refused() -> None:
    host.require_descriptors()
    host.require_descriptors(24)
    host.require_descriptors(-1)  # unlimited
    with pytest.raises(InvalidRequestError, match="may open 16 files, and a server needs 24 and more .* `ulimit -n`"):
        host.require_descriptors(16)


def test_processor_name(tmp_path) -> None:
    file = tmp_path / "cpuinfo"
    assert host.processor_name(file) == "CPU"
    file.write_text("processor : 0\nmodel name : Abacus 3000\nmodel name : other\n")
    assert host.processor_name(file) == "Abacus 3000"
