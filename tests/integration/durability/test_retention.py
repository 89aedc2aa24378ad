"""The log behind checkpoints: what nobody needs goes, and what a step that is still arriving has written stays."""

from __future__ import annotations

import pathlib
import shutil
from typing import Any

import numpy as np

import stepwire
from stepwire.v1 import step_pb2
from stepwire_server.rpc.decode_step import decode_step_request
from stepwire_server.rpc.reply_messages import WholeReplyWriter
from stepwire_server.server import Server
from tests.support.numpy_server import numpy_server

SIZE = 60_000


def gradient(number: int) -> dict[str, Any]:
    return {"w": np.random.default_rng((5, number)).standard_normal(SIZE).astype(np.float32)}


def created(client: stepwire.Client, **options: Any) -> stepwire.Session:
    durability = stepwire.Durability(level="journal", every_steps=2)
    return client.create_session({"w": np.ones(SIZE, np.float32)}, durability=durability, keep=True, **options)


def segments(folder: pathlib.Path) -> list[str]:
    return sorted(path.name for path in (folder / "log").iterdir())


def look(server: Server) -> None:
    assert server.registry.directory is not None
    server.registry.directory.checkpointer.look()


def test_the_log_does_not_grow_with_steps_that_checkpoints_have(tmp_path: pathlib.Path) -> None:
    with numpy_server(data_dir=str(tmp_path), journal_segment_bytes=1 << 20) as server:
        with stepwire.connect(server.target, transport="tcp") as client:
            session = created(client)
            for number in range(1, 41):  # 10 MB
                session.step(gradient(number))
                look(server)
                assert len(segments(tmp_path)) <= 3
            assert segments(tmp_path)[0] > "0000000000000001-00000007"


def test_a_step_that_is_still_arriving_keeps_its_records(tmp_path: pathlib.Path) -> None:
    data, image, half = tmp_path / "data", tmp_path / "image", SIZE // 2 // 256 * 256
    with numpy_server(data_dir=str(data), journal_segment_bytes=1 << 20) as server:
        with stepwire.connect(server.target, transport="tcp") as client:
            slow, fast = created(client, non_finite="allow"), created(client)
            slow.step(gradient(1))
            session = server.registry.get(slow.session_id)
            assert server.registry.directory is not None
            server.registry.directory.checkpointer.checkpoint(session)
            opening = step_pb2.StepBegin(step=2)
            request, payload = decode_step_request(opening, session.config, 4 << 20), gradient(2)["w"].view(np.uint8)
            holder = session.holder_of(session.ledger.worker.holder.token)
            with session.begin(request, holder, 0.0) as step:
                step.add(0, half, payload[: 4 * half])
                for number in range(1, 41):
                    fast.step(gradient(number))
                    look(server)
                step.add(half, SIZE - half, payload[4 * half :])
                session.commit(step, WholeReplyWriter(request, SIZE))
            expected = slow.state().slots["param"]["w"].tobytes()
        shutil.copytree(data, image)
    with numpy_server(data_dir=str(image)) as server, stepwire.connect(server.target) as client:
        again = client.session(slow.session_id)
        assert (again.applied_step, again.pull()["w"].tobytes()) == (2, expected)
        assert client.session(fast.session_id).applied_step == 40
