"""Object stores through obstore: one in memory, a folder, and one that speaks S3."""

from __future__ import annotations

import io
import pathlib
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import stepwire
from stepwire.errors import InvalidRequestError, UnsupportedFeatureError
from stepwire_server.durability import object_store
from stepwire_server.durability.object_store import ObjectStore, ObjectStoreError
from tests.support.numpy_server import numpy_server

REMEDY = "pip install obstore"

# In a process of its own: what it imports warns, and here warnings are errors.
S3 = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
server.stop()
"""


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """The address of a server that speaks S3, with a bucket."""
    command = [sys.executable, "-W", "ignore", "-c", S3]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        if not (port := process.stdout.readline().strip()):
            pytest.skip("moto is not installed: pip install 'moto[s3,server]'")
        endpoint = f"http://127.0.0.1:{port}"
        urllib.request.urlopen(urllib.request.Request(f"{endpoint}/bucket", method="PUT")).close()
        yield endpoint
        assert process.stdin is not None
        process.stdin.close()


@pytest.fixture(params=["memory", "file", "s3"])
def objects(request: pytest.FixtureRequest, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    stores: Any = pytest.importorskip("obstore.store", reason=f"obstore is not installed: {REMEDY}")
    if request.param == "memory":
        return ObjectStore(stores.MemoryStore(), "memory://")
    if request.param == "file":
        return ObjectStore.open(f"file://{tmp_path}/some/prefix")
    keyed(monkeypatch, request.getfixturevalue("s3"))
    return ObjectStore.open(f"s3://bucket/{request.node.name}")


def keyed(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    """Have a place and a credential in the environment, as obstore reads them."""
    for name, value in {
        "AWS_ENDPOINT": endpoint,
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "KEYID",
        "AWS_SECRET_ACCESS_KEY": "SECRETSECRET",
        "AWS_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)


def test_an_object_is_created_once(objects: ObjectStore) -> None:
    assert objects.create("epochs/1", b"first")
    assert not objects.create("epochs/1", b"second")
    assert objects.create("epochs/1", b"first")  # the same call, whose reply was lost
    assert objects.read("epochs/1", 100) == b"first"


def test_objects_are_written_listed_read_and_deleted(objects: ObjectStore) -> None:
    for key in ("a/2", "a/1", "b/1", "ab"):
        objects.put(key, key.encode())
    objects.put("a/1", b"again")
    assert objects.keys("a/") == ["a/1", "a/2"]
    assert objects.keys("c/") == []
    assert objects.read("a/1", 100) == b"again"
    objects.delete(["a/1", "a/none", "a/2"])
    assert objects.keys("a/") == []
    assert objects.keys("b/") == ["b/1"]


def test_a_large_object_is_written_in_parts(
    objects: ObjectStore, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_store, "_PART_BYTES", 5 << 20)
    data = bytes(range(256)) * (50 << 10)  # 12.5 MiB
    (tmp_path / "body").write_bytes(data)
    with io.FileIO(tmp_path / "body") as file:
        objects.upload("body", file, len(data))
    parts = list(objects.parts("body"))
    assert b"".join(parts) == data
    assert data.startswith(found := objects.read("body", 10))
    assert len(found) > 10
    assert objects.url == "memory://" or len(parts) > 1 < len(data) - len(found)


def test_a_missing_object_is_told(objects: ObjectStore) -> None:
    with pytest.raises(FileNotFoundError, match="read none: there is no such object"):
        objects.read("none", 1)


def test_servers_on_two_machines_go_on_over_s3(
    s3: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("obstore", reason=f"obstore is not installed: {REMEDY}")
    keyed(monkeypatch, s3)
    gradient, place = {"w": np.ones(100, np.float32)}, {"checkpoint_store": "s3://bucket/whole"}
    with numpy_server(data_dir=str(tmp_path / "one"), **place) as server, stepwire.connect(server.target) as client:
        session = client.create_session({"w": np.zeros(100, np.float32)}, durability="checkpoint", keep=True)
        before = session.step(gradient)
        assert server.drain()
        assert server.registry.get(session.session_id).ledger.durable_step == 1
    with numpy_server(data_dir=str(tmp_path / "two"), **place) as server, stepwire.connect(server.target) as client:
        again = client.session(session.session_id)
        assert (again.pull()["w"] == before["w"]).all()
        assert (again.info().epoch, again.info().durable_step) == (2, 1)


def test_a_failure_tells_no_credential(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("obstore", reason=f"obstore is not installed: {REMEDY}")
    keyed(monkeypatch, "http://127.0.0.1:1")
    objects = ObjectStore.open("s3://bucket/prefix")
    with pytest.raises(ObjectStoreError) as told:
        objects.put("key", b"data")
    text = str(told.value)
    assert text.startswith("s3://bucket/prefix: write key: ")
    assert "KEYID" not in text
    assert "SECRET" not in text
    assert object_store._told(ValueError("GET https://a/b?sig=SECRET&x=1 failed\n\nDebug source: …")) == (
        "GET https://a/b?… failed"
    )


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("", "it is no URL of s3, gs, az, file://"),
        ("ftp://bucket/prefix", "it is no URL of"),
        ("s3://", "it is no URL of"),
        ("s3://bucket/prefix?key=SECRET", "it is no URL of"),
        ("s3://KEYID:SECRET@bucket/prefix", "holds a credential; give it in the environment"),
    ],
)
def test_a_wrong_url_is_refused_and_not_repeated(url: str, problem: str) -> None:
    with pytest.raises(InvalidRequestError, match=problem) as refused:
        ObjectStore.open(url)
    assert "SECRET" not in str(refused.value)
    assert refused.value.metadata["field"] == "checkpoint_store"


def test_without_obstore_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("obstore", "obstore.store", "obstore.exceptions"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UnsupportedFeatureError, match="pip install obstore"):
        ObjectStore.open("s3://bucket/prefix")
