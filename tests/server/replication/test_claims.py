"""Claims: one server at a time speaks for a shard."""

from __future__ import annotations

import pathlib

import pytest

from stepwire.errors import InvalidRequestError
from stepwire_server.replication.claims import KEPT, Claim, Claims

pytestmark = pytest.mark.many


def test_of_two_claims_of_a_number_one_is_made(tmp_path: pathlib.Path) -> None:
    claims = Claims(tmp_path, "a")
    assert claims.newest() == Claim()
    first = claims.begin("one", "h:1")
    assert first == Claim(1, "one", "", "h:1")
    named = first._replace(epoch=2, standby="two")
    assert claims.make(named)
    assert claims.make(named), "it may be made again"
    assert not claims.make(Claim(2, "two", "", "h:2")), "the number is another server's"
    assert not claims.make(Claim(1, "two", "", "h:2"))
    assert claims.newest() == named
    assert Claims(tmp_path, "b").newest() == Claim(), "shards are apart"


def test_a_shard_begins_when_nobody_speaks_for_it(tmp_path: pathlib.Path) -> None:
    claims = Claims(tmp_path, "a")
    claims.make(Claim(1, "one", "two", "h:1"))
    with pytest.raises(InvalidRequestError, match="at h:1 since epoch 1, and with its standby: start this server with"):
        claims.begin("three", "h:3")
    claims.release(1)
    assert claims.begin("three", "h:3").epoch == 3


def test_a_file_that_is_no_claim_is_told(tmp_path: pathlib.Path) -> None:
    claims = Claims(tmp_path, "a")
    claims.make(Claim(1, "one", "", "h:1"))
    (tmp_path / ".claims" / "a" / f"{2:016x}").write_text("[]")
    with pytest.raises(InvalidRequestError, match="is no claim: .*; remove it once no server runs"):
        claims.newest()


def test_old_claims_go_and_no_number_of_theirs_is_made_again(tmp_path: pathlib.Path) -> None:
    claims, last = Claims(tmp_path, "a"), 3 * KEPT
    made = [Claim(number, "one", "", "h:1") for number in range(1, last + 1)]
    assert all(claims.make(each) for each in made)
    names = [f"{number:016x}" for number in range(last - KEPT + 1, last + 1)]
    assert sorted(path.name for path in (tmp_path / ".claims" / "a").iterdir()) == names
    for number in (1, last - KEPT, last):
        assert not Claims(tmp_path, "a").make(Claim(number, "two", "", "h:2")), "a server that was paused since then"
    assert claims.newest() == made[-1]


def test_a_claim_that_goes_between_the_look_and_the_reading_is_looked_for_again(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    claims, read = Claims(tmp_path, "a"), pathlib.Path.read_text
    assert claims.make(Claim(1, "one", "", "h:1"))

    def slowly(path: pathlib.Path) -> str:
        monkeypatch.undo()
        for number in range(2, KEPT + 2):
            assert Claims(tmp_path, "a").make(Claim(number, "one", "", "h:1"))
        return read(path)

    monkeypatch.setattr(pathlib.Path, "read_text", slowly)
    assert claims.newest().epoch == KEPT + 1
