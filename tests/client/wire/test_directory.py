"""The directory of shards: the newest entry counts, and the oldest go."""

from __future__ import annotations

import pathlib

import pytest

from stepwire.errors import InvalidRequestError
from stepwire.wire.directory import KEPT, ShardDirectory


def test_old_entries_go_and_say_nothing_if_they_come_again(tmp_path: pathlib.Path) -> None:
    directory, last = ShardDirectory(tmp_path), 3 * KEPT
    for epoch in range(1, last + 1):
        directory.announce("a", epoch, f"h:{epoch}")
        directory.announce("a", epoch, f"h:{epoch}")
    names = [f"{epoch:016x}" for epoch in range(last - KEPT + 1, last + 1)]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == names
    directory.announce("a", 1, "h:99")  # by a server that was paused since then
    assert directory.newest("a") == (last, f"h:{last}")
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == names
    with pytest.raises(InvalidRequestError, match="was announced by another server"):
        directory.announce("a", last, "h:99")
