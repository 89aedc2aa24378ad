"""Attach tokens across servers: a client goes on with those that it has, and a stranger's stay a stranger's."""

from __future__ import annotations

import base64
import json
import pathlib
from collections.abc import Iterator

import pytest

from stepwire.v1 import optimizer_pb2, session_pb2, tensor_pb2
from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire_server.durability.archive import ArchivedSession
from tests.support.numpy_server import numpy_server
from tests.support.raw import RawClient, Refused


def create(raw: RawClient) -> pb.CreateSessionResponse:
    config = session_pb2.SessionConfig(
        tensors=[tensor_pb2.TensorSpec(name="w", shape=[4])],
        optimizer=optimizer_pb2.Optimizer(
            rule=optimizer_pb2.RULE_SGD, hyperparameters=optimizer_pb2.Hyperparameters(lr=1.0)
        ),
        initialization=session_pb2.INITIALIZATION_ZEROS,
        durability=session_pb2.DURABILITY_JOURNAL,
    )
    created: pb.CreateSessionResponse = raw.call(
        "CreateSession", pb.CreateSessionRequest(request_id="again", config=config)
    )
    return created


@pytest.fixture
def data(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / "data"


def served(data: pathlib.Path) -> Iterator[RawClient]:
    """Serve a data directory in two lives, one after the other."""
    for _ in range(2):
        with numpy_server(data_dir=str(data)) as server, RawClient(server.target) as raw:
            yield raw


def attach(raw: RawClient, session_id: str, token: int) -> int:
    return int(raw.attach(session_id, token).receive().opened.attach_token)


def test_a_client_attaches_to_the_next_server_with_any_token_it_had(data: pathlib.Path) -> None:
    lives = served(data)
    first = next(lives)
    made = create(first)
    session_id = made.session.session_id
    taken = attach(first, session_id, 0)
    renewed = attach(first, session_id, taken)
    second = next(lives)
    again = create(second)
    assert (again.replayed, again.attach_token) == (True, made.attach_token)
    with pytest.raises(Refused) as refused:  # another client has acquired the worker since
        attach(second, session_id, made.attach_token)
    assert refused.value.row == ("FAILED_PRECONDITION", "FENCED")
    newer = [attach(second, session_id, token) for token in (taken, renewed)]
    assert len({0, made.attach_token, taken, renewed, *newer}) == 6
    assert list(lives) == []


def test_a_session_that_an_earlier_release_kept_is_acquired_anew(data: pathlib.Path) -> None:
    """Its file has no key, so no token of that release is known."""
    lives = served(data)
    made = create(next(lives))
    session_id = made.session.session_id
    (file,) = (each for each in (data / "sessions" / session_id).iterdir() if each.is_file())
    fields = json.loads(file.read_text())
    fields.pop("attach_key")
    kept = ArchivedSession(
        session_id=session_id,
        request_id=fields["request_id"],
        config=base64.b64decode(fields["config"]),
        create_time=fields["create_time"],
    )
    fields["crc32c"] = kept.checksum()
    file.write_text(json.dumps(fields))
    second = next(lives)
    with pytest.raises(Refused) as refused:
        attach(second, session_id, made.attach_token)
    assert refused.value.row == ("FAILED_PRECONDITION", "FENCED")
    assert attach(second, session_id, 0) not in (0, made.attach_token)
    assert list(lives) == []
