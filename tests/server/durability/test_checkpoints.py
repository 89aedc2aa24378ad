"""The store of checkpoints: names, lists, the newest, verification, pruning and links."""

from __future__ import annotations

import os
import pathlib
import random
import shutil

import numpy as np
import pytest
import structlog.testing

from stepwire.errors import DataLossError, InvalidRequestError, Reason
from stepwire_server.durability.checkpoints import CheckpointStore, automatic_name
from stepwire_server.durability.disk import Disk
from stepwire_server.durability.manifest import encode_manifest
from tests.server.durability.checkpoint_cases import (
    Values,
    bits,
    make_manifest,
    make_values,
    open_files,
    read_checkpoint,
    write_checkpoint,
)

SLOTS = {"param": 3000, "exp_avg": 3000, "exp_avg_sq": 3000}


@pytest.fixture
def store(tmp_path: pathlib.Path) -> CheckpointStore:
    return CheckpointStore(Disk(), tmp_path / "checkpoints")


def newest(store: CheckpointStore, *without: str) -> tuple[str, Values] | None:
    """Name the newest checkpoint, and read it whole."""
    checkpoint, _ = store.newest(without)
    if checkpoint is None:
        return None
    with checkpoint:
        values = {slot: np.empty(elements, np.float32) for slot, elements in checkpoint.body.slots.items()}
        for slot, out in values.items():
            checkpoint.body.read(slot, 0, out)
        return checkpoint.name, values


def test_a_checkpoint_comes_back(store: CheckpointStore) -> None:
    before = open_files()
    values = make_values(SLOTS)
    written = write_checkpoint(store, "best", values, make_manifest(step=7, load=2))
    manifest, found = read_checkpoint(store, "best")
    assert encode_manifest(manifest) == encode_manifest(written) == encode_manifest(store.verify("best"))
    assert (manifest.name, manifest.step, manifest.load, list(manifest.arrays)) == ("best", 7, 2, sorted(SLOTS))
    assert bits(found) == bits(values)
    assert sorted(path.name for path in (store.folder / "best").iterdir()) == ["manifest.json", "state.safetensors"]
    assert [path.name for path in store.folder.iterdir()] == ["best"]
    assert open_files() == before


def test_files_are_the_users_own(store: CheckpointStore) -> None:
    write_checkpoint(store, "best", make_values(SLOTS), make_manifest())
    modes = {path.name: path.stat().st_mode & 0o777 for path in (store.folder / "best").iterdir()}
    assert modes == {"manifest.json": 0o600, "state.safetensors": 0o600}
    assert {path.stat().st_mode & 0o777 for path in (store.folder, store.folder / "best")} == {0o700}


def test_a_list_has_a_line_for_each(store: CheckpointStore) -> None:
    assert (store.list(), store.newest()) == ((), (None, ()))
    for name, step, load in (("b", 9, 1), ("a", 3, 1), (automatic_name(9, 2), 9, 2)):
        write_checkpoint(store, name, make_values(SLOTS, step), make_manifest(step, load))
    sizes = {path.name: sum(file.stat().st_size for file in path.iterdir()) for path in store.folder.iterdir()}
    assert [(info.name, info.step, info.load, info.created, info.damage) for info in store.list()] == [
        ("a", 3, 1, "2026-11-30T07:00:03Z", None),
        ("auto-0000000009-000002", 9, 2, "2026-11-30T07:00:09Z", None),
        ("b", 9, 1, "2026-11-30T07:00:09Z", None),
    ]
    assert {info.name: info.nbytes for info in store.list()} == sizes
    found = newest(store)
    assert found is not None
    assert found[0] == "auto-0000000009-000002"
    assert bits(found[1]) == bits(make_values(SLOTS, 9))
    found = newest(store, found[0], "unknown")
    assert found is not None
    assert found[0] == "b"
    assert newest(store, *(info.name for info in store.list())) is None


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        ".hidden",
        "a/b",
        "/a",
        "../a",
        "a\\b",
        "a b",
        "a\n",
        "a\0b",
        "größe",
        "ａ",
        "x" * 65,
        "a:b",
        "auto*",
    ],
)
def test_names_that_are_none_are_refused(store: CheckpointStore, name: str) -> None:
    other = CheckpointStore(Disk(), store.folder)
    write_checkpoint(store, "a", make_values(SLOTS), make_manifest())
    calls = (
        lambda: store.begin(name, SLOTS),
        lambda: store.open(name),
        lambda: store.verify(name),
        lambda: store.delete(name),
        lambda: store.link(name, other, "b"),
        lambda: store.link("a", other, name),
    )
    for call in calls:
        with pytest.raises(InvalidRequestError, match="is no name of a checkpoint") as refused:
            call()
        assert refused.value.metadata == {"field": "name"}
        assert repr(name[:80]) in str(refused.value)
    assert [path.name for path in store.folder.iterdir()] == ["a"]


@pytest.mark.parametrize("name", ["a", "_", "-", "A.b_c-9", "x" * 64, "new-", "a..b"])
def test_other_names_are_names(store: CheckpointStore, name: str) -> None:
    write_checkpoint(store, name, make_values(SLOTS), make_manifest())
    assert [info.name for info in store.list()] == [name]
    store.delete(name)
    assert list(store.folder.iterdir()) == []


def test_nothing_is_overwritten(store: CheckpointStore) -> None:
    late = store.begin("best", SLOTS)
    for slot, array in make_values(SLOTS, 1).items():
        late.write(slot, 0, array)
    values = make_values(SLOTS)
    write_checkpoint(store, "best", values, make_manifest())
    with pytest.raises(InvalidRequestError, match="a checkpoint 'best' exists; choose another name"):
        store.begin("best", SLOTS)
    with pytest.raises(InvalidRequestError, match="a checkpoint 'best' exists; choose another name"):
        late.commit(make_manifest(8))
    assert bits(read_checkpoint(store, "best")[1]) == bits(values)
    assert [path.name for path in store.folder.iterdir()] == ["best"]


def test_an_unknown_name_is_answered_with_those_there_are(store: CheckpointStore) -> None:
    with pytest.raises(InvalidRequestError, match="no checkpoint 'c'; there are none"):
        store.open("c")
    for name in ("b", "a"):
        write_checkpoint(store, name, make_values(SLOTS), make_manifest())
    for call in (store.open, store.verify, store.delete):
        with pytest.raises(InvalidRequestError, match="no checkpoint 'c'; there are a, b"):
            call("c")


def test_an_aborted_one_leaves_nothing(store: CheckpointStore) -> None:
    before = open_files()
    writer = store.begin("best", SLOTS)
    writer.write("param", 0, make_values(SLOTS)["param"])
    assert store.list() == ()
    writer.abort()
    writer.abort()
    assert (list(store.folder.iterdir()), open_files()) == ([], before)


def test_a_missing_block_and_a_wrong_config_leave_nothing(store: CheckpointStore) -> None:
    writer = store.begin("best", SLOTS)
    writer.write("param", 0, make_values(SLOTS)["param"])
    with pytest.raises(ValueError, match="block 0 of slot 'exp_avg' was not written"):
        writer.commit(make_manifest())
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_checkpoint(store, "best", make_values(SLOTS), make_manifest(config={"lr": float("nan")}))
    assert list(store.folder.iterdir()) == []


def test_every_flip_and_cut_is_found_or_harmless(store: CheckpointStore) -> None:
    """Never wrong values: 450 random kinds of damage, of the manifest and of the body."""
    values = make_values(SLOTS)
    written = write_checkpoint(store, "best", values, make_manifest())
    pristine = {path: path.read_bytes() for path in (store.folder / "best").iterdir()}
    body = store.folder / "best" / "state.safetensors"
    rng = random.Random(3)
    before = open_files()
    found = {"state.safetensors": 0, "manifest.json": 0}
    for number in range(450):
        path = rng.choice([body, *pristine])
        data = bytearray(pristine[path])
        if number % 5 == 0:
            del data[rng.randrange(len(data)) :]
        elif number % 5 == 1:
            low = rng.randrange(len(data))
            data[low : low + 512] = bytes(len(data[low : low + 512]))
        elif number % 5 == 2:
            data += b"\0" * rng.choice([1, 4, 4096])
        else:
            for _ in range(rng.choice([1, 1, 3])):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        try:
            store.verify("best")
            manifest, read = read_checkpoint(store, "best")
        except DataLossError as error:
            found[path.name] += 1
            assert error.reason is Reason.CHECKPOINT_DAMAGED
            assert error.metadata["file"] == f"best/{path.name}"
            if path == body and number % 5 > 2 and (first := differing(pristine[path], data)) >= 4096:
                assert error.metadata["field"] == list(SLOTS)[(first - 4096) // 12_000]
        else:
            assert (encode_manifest(manifest), bits(read)) == (encode_manifest(written), bits(values))
        path.write_bytes(pristine[path])
    assert open_files() == before
    assert min(found.values()) > 100


def differing(one: bytes, other: bytes | bytearray) -> int:
    """Return the first byte that differs."""
    return next(index for index, (a, b) in enumerate(zip(one, other, strict=True)) if a != b)


def test_a_body_of_another_checkpoint_is_found(store: CheckpointStore) -> None:
    for seed, slots in enumerate((SLOTS, SLOTS, {**SLOTS, "exp_avg": 2999}, {"param": 9000})):
        write_checkpoint(store, f"c{seed}", make_values(slots, seed), make_manifest())
    for other, problem in (("c1", "block 0 has"), ("c2", "2999 elements, and 3000"), ("c3", "None elements, and 3000")):
        shutil.copy(store.folder / other / "state.safetensors", store.folder / "c0" / "state.safetensors")
        with pytest.raises(DataLossError, match=problem):
            store.verify("c0")


def test_damaged_ones_are_listed_logged_and_passed_over(store: CheckpointStore) -> None:
    for step in range(1, 7):
        write_checkpoint(store, f"c{step}", make_values(SLOTS, step), make_manifest(step))
    (store.folder / "c2" / "manifest.json").unlink()
    (store.folder / "c3" / "state.safetensors").unlink()
    (store.folder / "c5" / "manifest.json").write_text("{}")
    with (store.folder / "c6" / "state.safetensors").open("ab") as file:
        file.write(b"\0")
    (store.folder / "file").write_text("no folder")
    damage = {info.name: info.damage for info in store.list()}
    assert [name for name, reason in damage.items() if reason is None] == ["c1", "c4"]
    assert "c2/manifest.json: file: this is no file: No such file" in str(damage["c2"])
    assert "c3/state.safetensors: file: this is no file: No such file" in str(damage["c3"])
    assert "c5/manifest.json: format: 'None' is not 1" in str(damage["c5"])
    assert "the arrays end at byte 40096, and the file at 40097" in str(damage["c6"])
    assert "checkpoints/file: folder: this is a symbolic link or a file" in str(damage["file"])
    with structlog.testing.capture_logs() as logs:
        checkpoint, passed_over = store.newest()
    assert checkpoint is not None
    with checkpoint:
        assert checkpoint.name == "c4"
    assert [info.name for info in passed_over] == ["c2", "c3", "c5", "c6", "file"]
    assert [(log["event"], log["checkpoint"], log["damage"]) for log in logs] == [
        ("checkpoint damaged", info.name, info.damage) for info in passed_over
    ]


def test_links_are_refused(store: CheckpointStore, tmp_path: pathlib.Path) -> None:
    for name in ("good", "manifest", "body"):
        write_checkpoint(store, name, make_values(SLOTS), make_manifest(5))
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(store.folder / "good", elsewhere)
    (store.folder / "folder").symlink_to(elsewhere)
    for name, file in (("manifest", "manifest.json"), ("body", "state.safetensors")):
        (store.folder / name / file).unlink()
        (store.folder / name / file).symlink_to(elsewhere / file)
    for name in ("folder", "manifest", "body"):
        for call in (store.open, store.verify, lambda name: store.link(name, store, "other")):
            with pytest.raises(DataLossError) as refused:
                call(name)
            assert refused.value.reason is Reason.CHECKPOINT_DAMAGED
    with pytest.raises(DataLossError, match="symbolic link or a file, which is not deleted"):
        store.delete("folder")
    assert [info.name for info in store.list() if info.damage is None] == ["good"]
    for name in ("manifest", "body"):
        store.delete(name)
    assert sorted(path.name for path in elsewhere.iterdir()) == ["manifest.json", "state.safetensors"]
    assert sorted(path.name for path in store.folder.iterdir()) == ["folder", "good"]


def test_a_store_that_is_a_link_is_refused(store: CheckpointStore, tmp_path: pathlib.Path) -> None:
    write_checkpoint(store, "good", make_values(SLOTS), make_manifest())
    (tmp_path / "link").symlink_to(store.folder)
    linked = CheckpointStore(Disk(), tmp_path / "link")
    for call in (linked.list, linked.newest, lambda: linked.prune(0), lambda: linked.begin("a", SLOTS)):
        with pytest.raises(DataLossError, match="link: folder: this is a symbolic link"):
            call()
    assert [info.name for info in store.list()] == ["good"]


@pytest.mark.parametrize("file", ["manifest.json", "state.safetensors"])
def test_what_is_no_file_is_damage_and_nobody_waits_for_it(store: CheckpointStore, file: str) -> None:
    write_checkpoint(store, "best", make_values(SLOTS), make_manifest())
    path = store.folder / "best" / file
    path.unlink()
    for make in (os.mkfifo, os.mkdir):
        make(path)
        with pytest.raises(DataLossError, match=file):
            store.open("best")
        path.rmdir() if path.is_dir() else path.unlink()


def test_prune_keeps_the_newest_automatic_ones_and_all_others(store: CheckpointStore) -> None:
    for step, load in ((4, 1), (2, 1), (10, 1), (4, 2), (1, 1)):
        write_checkpoint(store, automatic_name(step, load), make_values(SLOTS), make_manifest(step, load))
    write_checkpoint(store, "best", make_values(SLOTS), make_manifest(1))
    write_checkpoint(store, "automatic", make_values(SLOTS), make_manifest(1))
    (store.folder / automatic_name(10, 1) / "manifest.json").write_text("damaged")
    (store.folder / automatic_name(2, 1) / "manifest.json").unlink()
    removed = store.prune(2)
    assert removed == ("auto-0000000002-000001", "auto-0000000001-000001")
    assert [info.name for info in store.list()] == [
        "auto-0000000004-000001",
        "auto-0000000004-000002",
        "auto-0000000010-000001",
        "automatic",
        "best",
    ]
    assert store.prune(2) == ()
    assert store.prune(0) == ("auto-0000000004-000001", "auto-0000000004-000002")
    with pytest.raises(ValueError, match="-1 checkpoints cannot stay"):
        store.prune(-1)


def test_prune_removes_what_was_broken_off_and_nothing_under_way(store: CheckpointStore) -> None:
    values = make_values(SLOTS)
    lost = CheckpointStore(Disk(), store.folder).begin("lost", SLOTS)
    writer = store.begin("best", SLOTS)
    (store.folder / ".new-file").write_text("")
    (store.folder / ".new-link").symlink_to(store.folder.parent)
    left = sorted(path.name for path in store.folder.iterdir() if ".new-best" not in path.name)
    assert store.prune(3) == tuple(left)
    for slot, array in values.items():
        writer.write(slot, 0, array)
    writer.commit(make_manifest())
    lost.abort()
    assert [path.name for path in store.folder.iterdir()] == ["best"]
    assert bits(read_checkpoint(store, "best")[1]) == bits(values)


def test_a_link_shares_the_arrays_and_outlives_its_source(store: CheckpointStore, tmp_path: pathlib.Path) -> None:
    values = make_values(SLOTS)
    values = {slot: np.nan_to_num(array) for slot, array in values.items()}
    source = write_checkpoint(store, "best", values, make_manifest(9))
    fork = CheckpointStore(Disk(), tmp_path / "fork")
    same = store.link("best", fork, "start")
    own = store.link("best", fork, "own", make_manifest(0, session_id="fork", arrays={}))
    assert (same.name, same.session_id, same.step, same.arrays) == ("start", source.session_id, 9, source.arrays)
    assert (own.name, own.session_id, own.step, own.arrays) == ("own", "fork", 0, source.arrays)
    files = [folder / "state.safetensors" for folder in (store.folder / "best", fork.folder / "start")]
    assert files[0].samefile(files[1])
    with pytest.raises(InvalidRequestError, match="a checkpoint 'start' exists"):
        store.link("best", fork, "start")
    store.delete("best")
    for name, manifest in (("start", same), ("own", own)):
        assert encode_manifest(fork.verify(name)) == encode_manifest(manifest)
        assert bits(read_checkpoint(fork, name)[1]) == bits(values)
    assert sorted(path.name for path in fork.folder.iterdir()) == ["own", "start"]
