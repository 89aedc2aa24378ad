"""The doctor's check of an object store: what it does, what it cannot do, and nothing left of the check."""

from __future__ import annotations

import pathlib
import re
from typing import Any

import pytest

from stepwire_server.doctor.store import examine_checkpoint_store
from stepwire_server.durability import object_store
from stepwire_server.durability.object_store import ObjectStore
from tests.server.durability.test_object_store import REMEDY, keyed, s3

__all__ = ["s3"]


@pytest.fixture(autouse=True)
def _obstore() -> None:
    pytest.importorskip("obstore", reason=f"obstore is not installed: {REMEDY}")


@pytest.fixture
def url(tmp_path: pathlib.Path) -> str:
    return f"file://{tmp_path}/later/store"


def test_without_a_store_there_is_no_finding() -> None:
    assert examine_checkpoint_store("") == []


def test_a_folder_is_well_and_is_left_as_it_was(url: str, tmp_path: pathlib.Path) -> None:
    (finding,) = examine_checkpoint_store(url)
    assert (finding.check, finding.ok, finding.remedy) == ("object store", True, "")
    assert re.fullmatch(rf"{url} creates each key once, a small object in \S+ ms", finding.detail)
    assert list(tmp_path.iterdir()) == []


def test_a_store_that_speaks_s3_is_well_and_holds_nothing(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    keyed(monkeypatch, s3)
    (finding,) = examine_checkpoint_store("s3://bucket/examined")
    assert finding.ok, finding.detail
    assert ObjectStore.open("s3://bucket/examined").keys("doctor/") == []


@pytest.mark.parametrize(
    ("place", "detail"),
    [
        ("s3://bucket/prefix", "s3://bucket/prefix: create doctor/"),  # nobody listens there
        ("ftp://bucket", "checkpoint_store: it is no URL of s3, gs, az, file://bucket/prefix"),
        ("s3://KEYID:SECRETSECRET@bucket", "checkpoint_store: the URL holds a credential"),
    ],
)
def test_a_store_that_cannot_be_used_is_told_with_its_remedy(
    place: str, detail: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_store, "_RETRIES", {"max_retries": 0})
    keyed(monkeypatch, "http://127.0.0.1:1")
    (finding,) = examine_checkpoint_store(place)
    assert (finding.ok, finding.optional, finding.detail.startswith(detail)) == (False, False, True)
    assert finding.remedy.startswith("name a store of" if place.startswith("ftp") else "check the bucket, AWS_REGION")
    assert "SECRETSECRET" not in finding.detail + finding.remedy


def test_a_bucket_that_is_not_there_is_told(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    keyed(monkeypatch, s3)
    (finding,) = examine_checkpoint_store("s3://nobodys/prefix")
    assert (finding.ok, finding.remedy.startswith("check the bucket")) == (False, True)


def test_without_obstore_the_remedy_is_to_install_it(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr("importlib.import_module", missing)
    (finding,) = examine_checkpoint_store(url)
    assert (finding.ok, finding.remedy) == (False, "pip install obstore")


def test_a_store_that_writes_over_a_key_cannot_be_owned(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def written_over(store: ObjectStore, key: str, data: bytes) -> bool:
        store.put(key, data)
        return True

    monkeypatch.setattr(ObjectStore, "create", written_over)
    (finding,) = examine_checkpoint_store(url)
    assert (finding.ok, finding.optional) == (False, False)
    assert "creates a key that exists: two servers would both own the store" in finding.detail


@pytest.mark.parametrize("listed", [True, False], ids=["long after", "not at once"])
def test_lists_that_are_late_are_told(url: str, listed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    found, keys = list[list[str]](), ObjectStore.keys

    def late(store: ObjectStore, prefix: str) -> list[str]:
        found.append(keys(store, prefix))
        return found[0] if listed else []

    monkeypatch.setattr(ObjectStore, "keys", late)
    (finding,) = examine_checkpoint_store(url)
    assert (finding.ok, finding.optional) == (False, False)
    assert "lists keys as they were before" in finding.detail


@pytest.mark.parametrize(("now", "told"), [(6_400.0, "3600 s ahead of"), (17_200.0, "7200 s behind")])
def test_a_clock_of_another_hour_is_told(url: str, now: float, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ObjectStore, "modified", lambda store, key: 10_000.0)
    (finding,) = examine_checkpoint_store(url, clock=lambda: now)
    assert (finding.ok, finding.optional, finding.remedy) == (False, True, "set the clocks: timedatectl set-ntp true")
    assert finding.detail == f"the clock of {url} is {told} this machine's"
