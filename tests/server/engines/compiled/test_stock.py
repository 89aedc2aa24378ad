"""Kernels compiled ahead are copied whole into a cache, and trusted only where nobody else could write them."""

from __future__ import annotations

import logging
import os
import pathlib
from collections.abc import Iterator

import pytest

from stepwire_server.engines.compiled.levels import level_of_this_processor
from stepwire_server.engines.compiled.stock import fill, stocked_level

pytest.importorskip("numba")


@pytest.fixture
def level_stock(tmp_path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A stock of one level, of files that are no kernels."""
    folder = tmp_path / "x86-64-v3"
    (folder / "__pycache__").mkdir(parents=True)
    (folder / "__pycache__" / "a.nbi").write_text("index")
    (folder / "__pycache__" / "a.1.nbc").write_text("code")
    (folder / "a.py").write_text("source")
    os.utime(folder / "a.py", (1e9, 1e9))
    yield folder


def test_files_keep_their_times_and_never_replace_others(level_stock: pathlib.Path, tmp_path: pathlib.Path) -> None:
    cache = tmp_path / "cache"
    fill(cache, level_stock)
    assert (cache / "a.py").read_text() == "source"
    assert (cache / "a.py").stat().st_mtime == 1e9
    assert (cache / "__pycache__" / "a.nbi").read_text() == "index"
    assert {path.stat().st_mode & 0o777 for path in cache.rglob("*") if path.is_file()} == {0o600}
    (cache / "__pycache__" / "a.nbi").write_text("longer")
    (cache / "a.py").unlink()
    fill(cache, level_stock)
    assert (cache / "__pycache__" / "a.nbi").read_text() == "longer"
    assert sorted(path.name for path in cache.rglob("*")) == ["__pycache__", "a.1.nbc", "a.nbi", "a.py"]


@pytest.mark.parametrize("what", [".", "a.py", "__pycache__"])
def test_what_others_can_write_is_not_read(
    level_stock: pathlib.Path, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    (level_stock / what).chmod(0o777)
    with caplog.at_level(logging.WARNING):
        fill(tmp_path / "cache", level_stock)
    assert "others than root and this user can write it" in caplog.text
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_link_is_not_followed(
    level_stock: pathlib.Path, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    (level_stock / "b.py").symlink_to(tmp_path / "elsewhere")
    with caplog.at_level(logging.WARNING):
        fill(tmp_path / "cache", level_stock)
    assert "b.py is no plain file" in caplog.text


def test_a_stock_of_another_user_is_not_read(
    level_stock: pathlib.Path, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    if os.geteuid():
        pytest.skip("only root gives files away")
    os.chown(level_stock / "a.py", 12345, -1)
    with caplog.at_level(logging.WARNING):
        fill(tmp_path / "cache", level_stock)
    assert "a.py" in caplog.text
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_level_is_this_processors_unless_somebody_has_chosen(tmp_path: pathlib.Path) -> None:
    level, stock = level_of_this_processor(), tmp_path
    if level is None:
        pytest.skip("this processor has no level")
    (stock / level.name).mkdir()
    assert stocked_level({"STEPWIRE_KERNELS": str(stock)}) == (level, stock / level.name)
    assert stocked_level({}) is None
    assert stocked_level({"STEPWIRE_KERNELS": str(stock), "NUMBA_CPU_NAME": "generic"}) is None
    assert stocked_level({"STEPWIRE_KERNELS": str(stock), "NUMBA_CPU_FEATURES": "+avx2"}) is None


def test_a_stock_without_this_level_is_told(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert stocked_level({"STEPWIRE_KERNELS": str(tmp_path)}) is None
    assert f"no kernels for this processor in {tmp_path}, which STEPWIRE_KERNELS names" in caplog.text
