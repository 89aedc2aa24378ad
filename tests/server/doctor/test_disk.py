"""The doctor's check of a data directory."""

from __future__ import annotations

import errno
import os
import pathlib
import re

import pytest

from stepwire_server.doctor import disk
from stepwire_server.doctor.disk import examine_data_directory, file_system_of


def test_without_a_data_directory_there_is_no_finding() -> None:
    assert examine_data_directory("") == []


@pytest.mark.parametrize("below", ["", "later/data"])
def test_a_folder_on_a_disk_is_well(below: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "file_system_of", lambda folder: "ext4")
    (finding,) = examine_data_directory(str(tmp_path / below))
    assert (finding.check, finding.ok, finding.remedy) == ("data directory", True, "")
    assert re.fullmatch(rf"{tmp_path} on ext4, a sync in \d+ us, (direct|buffered) writes", finding.detail)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("kind", "remedy"), [("tmpfs", "name a --data-dir on a disk"), ("nfs4", "name a --data-dir on a local file system")]
)
def test_memory_and_networks_are_told(
    kind: str, remedy: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "file_system_of", lambda folder: kind)
    (finding,) = examine_data_directory(str(tmp_path))
    assert (finding.ok, finding.optional, finding.remedy.startswith(remedy)) == (False, True, True)


def test_a_folder_that_cannot_be_written_is_wrong(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(descriptor: int) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "fdatasync", failing)
    (finding,) = examine_data_directory(str(tmp_path))
    assert (finding.ok, finding.optional) == (False, False)
    assert os.strerror(errno.EROFS) in finding.detail


def test_the_type_of_a_file_system_is_that_of_the_nearest_mount() -> None:
    assert file_system_of(pathlib.Path("/proc/self")) == "proc"
