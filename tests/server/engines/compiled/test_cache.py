from __future__ import annotations

import logging
import os
import pathlib

import pytest

from stepwire.errors import InvalidRequestError
from stepwire_server.engines.compiled.cache import kernel_directory, require_named_directory, store


def test_directory_is_the_chosen_one_then_xdg_then_home(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(pathlib.Path, "home", lambda: tmp_path / "home")
    chosen = {"STEPWIRE_CACHE_DIR": str(tmp_path / "mine"), "XDG_CACHE_HOME": str(tmp_path / "xdg")}
    assert kernel_directory(chosen) == tmp_path / "mine"
    assert kernel_directory({"XDG_CACHE_HOME": str(tmp_path / "xdg")}) == tmp_path / "xdg" / "stepwire"
    assert kernel_directory({}) == tmp_path / "home" / ".cache" / "stepwire"


def test_directory_is_the_owners_alone(tmp_path) -> None:
    directory = kernel_directory({"STEPWIRE_CACHE_DIR": str(tmp_path / "deep" / "cache")})
    assert directory.stat().st_mode & 0o777 == 0o700


def check_replaced(chosen: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        directory = kernel_directory({"STEPWIRE_CACHE_DIR": str(chosen)})
    assert directory != chosen
    assert directory.stat().st_mode & 0o777 == 0o700
    assert "set STEPWIRE_CACHE_DIR" in caplog.text
    store(directory, "kernel", "text")
    assert kernel_directory({"STEPWIRE_CACHE_DIR": str(chosen)}) == directory, "one temporary directory is enough"


def test_a_directory_that_others_can_write_is_refused(tmp_path, caplog) -> None:
    tmp_path.chmod(0o770)
    check_replaced(tmp_path, caplog)


def test_a_directory_in_one_that_others_can_write_is_refused(tmp_path, caplog) -> None:
    """They could put a directory of their own in its place, and the server would load their code."""
    middle = tmp_path / "shared" / "middle"
    middle.mkdir(parents=True)
    (tmp_path / "shared").chmod(0o777)
    check_replaced(middle / "cache", caplog)
    with pytest.raises(InvalidRequestError, match=r"shared, above .*cache, belongs to, or can be written by, another"):
        require_named_directory({"STEPWIRE_CACHE_DIR": str(middle / "cache")})
    (tmp_path / "shared").chmod(0o1777)  # as /tmp: others replace nothing there
    assert kernel_directory({"STEPWIRE_CACHE_DIR": str(middle / "cache")}) == middle / "cache"


def test_a_link_that_leads_through_a_directory_of_others_is_refused(tmp_path, caplog) -> None:
    (tmp_path / "shared" / "mine").mkdir(parents=True)
    (tmp_path / "link").symlink_to("shared/mine")
    assert kernel_directory({"STEPWIRE_CACHE_DIR": str(tmp_path / "link" / "cache")}) == tmp_path / "link" / "cache"
    (tmp_path / "shared").chmod(0o777)
    check_replaced(tmp_path / "link" / "cache", caplog)
    (tmp_path / "round").symlink_to("round")
    check_replaced(tmp_path / "round" / "cache", caplog)


def test_a_directory_of_another_user_is_refused(tmp_path, caplog, monkeypatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
    check_replaced(tmp_path, caplog)


def test_a_file_in_the_way_is_survived(tmp_path, caplog) -> None:
    (tmp_path / "file").touch()
    check_replaced(tmp_path / "file", caplog)


def test_a_read_only_directory_is_survived(tmp_path, caplog) -> None:
    tmp_path.chmod(0o500)
    try:
        (tmp_path / "probe").touch()
    except PermissionError:
        check_replaced(tmp_path, caplog)
    else:
        pytest.skip("this user may write everywhere")


def test_a_user_without_a_home_is_survived(caplog, monkeypatch) -> None:
    def no_home() -> pathlib.Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(pathlib.Path, "home", no_home)
    assert kernel_directory({}).is_dir()
    assert "home" in caplog.text


def test_a_directory_that_was_named_must_do(tmp_path) -> None:
    require_named_directory({"STEPWIRE_CACHE_DIR": str(tmp_path / "new")})
    assert (tmp_path / "new").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(
        InvalidRequestError, match=r"STEPWIRE_CACHE_DIR: '.*file' cannot be used by user \d+: .*; name a"
    ):
        require_named_directory({"STEPWIRE_CACHE_DIR": str(tmp_path / "file")})
    (tmp_path / "new").chmod(0o777)
    with pytest.raises(InvalidRequestError, match="belongs to, or can be written by, another user"):
        require_named_directory({"STEPWIRE_CACHE_DIR": str(tmp_path / "new")})
    require_named_directory({"XDG_CACHE_HOME": str(tmp_path / "file")})


def test_stored_text_is_never_rewritten_and_names_differ_with_it(tmp_path) -> None:
    path = store(tmp_path, "kernel", "a = '√'\n")
    assert path.read_text(encoding="utf-8") == "a = '√'\n"
    inode, time = path.stat().st_ino, path.stat().st_mtime
    assert store(tmp_path, "kernel", "a = '√'\n") == path
    assert (path.stat().st_ino, path.stat().st_mtime) == (inode, time)
    assert store(tmp_path, "kernel", "b = 1\n") != path
    assert sorted(tmp_path.iterdir()) == sorted([path, store(tmp_path, "kernel", "b = 1\n")]), "no leftovers"


def test_damaged_text_is_replaced_under_the_same_time(tmp_path) -> None:
    path = store(tmp_path, "kernel", "a = 1\n")
    time = path.stat().st_mtime
    path.write_text("import os\n")
    assert store(tmp_path, "kernel", "a = 1\n") == path
    assert path.read_text() == "a = 1\n"
    assert path.stat().st_mtime == time == int(time)
