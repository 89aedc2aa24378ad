"""The servers and options of sessions, from the arguments of constructors."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
from typing import Any

import pytest

import stepwire
from stepwire.errors import InvalidRequestError
from stepwire.wire.directory import ShardDirectory

pytest.importorskip("jax")
pytest.importorskip("optax")

from stepwire.optax.connection import Connection


def test_options_are_the_connections_or_the_sessions() -> None:
    connection, options = Connection.read({"server": "a:1", "channels": 2, "label": "x", "clip_grad_norm": 1.0})
    assert connection == Connection(("a:1",), (("channels", 2),))
    assert options == {"label": "x", "clip_grad_norm": 1.0}
    assert Connection.read({})[0] == Connection(("localhost:50051",))
    assert hash(connection) == hash(Connection.read({"channels": 2, "server": ["a:1"]})[0])


@pytest.mark.parametrize(
    ("options", "shards"),
    [({}, 1), ({"server": ["a:1", "b:1"]}, 2), ({"server": ["a:1", "b:1"], "channels": 3}, 6)],
)
def test_there_is_room_for_the_ids_of_all_shards(options: dict[str, Any], shards: int) -> None:
    connection, _ = Connection.read(options)
    assert connection.id_bytes >= len(",".join(["0" * 32] * shards))
    with connection.open() as client:
        assert Connection.read({"server": client})[0].id_bytes == connection.id_bytes
        assert not Connection.read({"server": client})[0].owned


def test_a_directory_has_the_ids_of_all_its_shards(tmp_path: pathlib.Path) -> None:
    for shard in ("a", "b", "c"):
        ShardDirectory(tmp_path).announce(shard, 1, "127.0.0.1:1")
    connection, _ = Connection.read({"server": ["a:1", f"directory:{tmp_path}"], "channels": 2})
    assert connection.id_bytes >= len(",".join(["0" * 32] * 8))
    with connection.open() as client:
        assert Connection.read({"server": client})[0].id_bytes == connection.id_bytes


def test_a_client_is_connected_already() -> None:
    with (
        stepwire.connect("a:1") as client,
        pytest.raises(InvalidRequestError, match="timeout: the client given as `server` is connected already"),
    ):
        Connection.read({"server": client, "timeout": 3.0})


@pytest.mark.parametrize("missing", ["jax", "optax"])
def test_without_jax_or_optax_the_import_says_what_to_install(missing: str) -> None:
    code = (
        "import json, sys\n"
        f"sys.modules[{missing!r}] = None\n"
        "import stepwire\n"
        "try:\n"
        "    import stepwire.optax\n"
        "except ModuleNotFoundError as error:\n"
        "    print(json.dumps([str(error), error.name]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [
        f"stepwire.optax needs jax and optax, and {missing!r} is not installed: pip install jax optax",
        missing,
    ]
