"""Steps of rows over connections that are cut, in journals and in checkpoints: applied once, with the same bits."""

from __future__ import annotations

import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import stepwire
from stepwire import Rows
from stepwire_server.devices.pool import DevicePool
from stepwire_server.server import Server
from tests.integration.link import Cut
from tests.integration.proxy import Proxy
from tests.integration.training import same_bits
from tests.support.numpy_server import numpy_pool, numpy_server

TABLES = {"small": "torch_sparse", "large": "global"}
PARAMETERS = {
    "large": np.linspace(-1, 1, 900 * 40, dtype=np.float32).reshape(900, 40),
    "w": np.ones(3, np.float32),
    "small": np.ones((8, 2), np.float32),
}


def gradient(step: int) -> dict[str, Any]:
    """Draw rows of both tables, with repetitions; those of the large one take more than a message of 64 KiB."""
    rng = np.random.default_rng(step)
    large, small = rng.integers(0, 900, 700), rng.integers(0, 8, 5)
    return {
        "large": Rows(large, rng.standard_normal((700, 40)).astype(np.float32)),
        "w": rng.standard_normal(3).astype(np.float32),
        "small": Rows(small, rng.standard_normal((5, 2)).astype(np.float32)),
    }


def created(client: stepwire.Client, **options: Any) -> stepwire.Session:
    return client.create_session(PARAMETERS, tables=TABLES, optimizer=stepwire.Adam(lr=0.01), **options)


def plain(reply: Any) -> dict[str, Any]:
    """Return a reply as what can be compared."""
    return {
        name: (value.indices.tolist(), value.values.tolist()) if isinstance(value, Rows) else value.tolist()
        for name, value in reply.items()
    }


@pytest.fixture
def pool() -> DevicePool:
    """The bits are those of compiled kernels, which would take longer to compile."""
    return numpy_pool()


@pytest.mark.parametrize("proxy", ["tcp"], indirect=True)
@pytest.mark.parametrize("direction", ["up", "down"])
def test_a_step_of_rows_is_applied_once_however_its_connection_is_cut(
    server: Server, proxy: Proxy, connect: Callable[[str], stepwire.Client], direction: Any
) -> None:
    """Cut on its way there, and on the way of its reply, whose rows come again."""
    with created(connect(proxy.target)) as disturbed, created(connect(server.target)) as calm:
        for step in range(1, 6):
            if step > 1:
                proxy.arm(Cut(direction, "message", (step - 2) % 3, extra_bytes=9))
            assert plain(disturbed.step(gradient(step))) == plain(calm.step(gradient(step)))
        assert proxy.cuts
        assert same_bits(disturbed.state(), calm.state())


def test_a_journal_and_a_checkpoint_have_the_steps_of_rows(tmp_path: pathlib.Path) -> None:
    with numpy_server(data_dir=str(tmp_path / "data")) as server, stepwire.connect(server.target) as client:
        session, twin = created(client, durability="journal"), created(client)
        for step in range(1, 6):
            if step == 3:
                session.save_checkpoint("third")
            assert plain(session.step(gradient(step))) == plain(twin.step(gradient(step)))
        shutil.copytree(tmp_path / "data", tmp_path / "image")
        expected = twin.state()
    with numpy_server(data_dir=str(tmp_path / "image")) as server, stepwire.connect(server.target) as client:
        again = client.session(session.own_id)
        again.attach(take_over=True)
        assert again.applied_step == 5 and same_bits(again.state(), expected)
        again.rollback(checkpoint="third")
        for step in range(3, 6):
            again.step(gradient(step))
        assert again.state().slots["param"]["large"].tobytes() == expected.slots["param"]["large"].tobytes()


def test_checkpoints_and_forks_have_the_numbers_of_rows(tmp_path: pathlib.Path) -> None:
    """Both meanings that count rows; a rollback is refused, because a load brings no numbers of rows."""
    tables = {"small": "row_counter", "large": "skipped"}
    with numpy_server(data_dir=str(tmp_path / "data")) as server, stepwire.connect(server.target) as client:
        session = client.create_session(PARAMETERS, tables=tables, durability="checkpoint")
        twin = client.create_session(PARAMETERS, tables=tables)
        replies = {step: plain(twin.step(gradient(step))) for step in range(1, 6)}
        for step in range(1, 4):
            assert plain(session.step(gradient(step))) == replies[step]
        session.save_checkpoint("third")
        shutil.copytree(tmp_path / "data", tmp_path / "image")
        with pytest.raises(stepwire.UnsupportedFeatureError, match="fork the state instead"):
            session.rollback(checkpoint="third")
        session.step(gradient(9))
        with session.fork(checkpoint="third") as fork:
            assert {step: plain(fork.step(gradient(step))) for step in (4, 5)} == {4: replies[4], 5: replies[5]}
    with numpy_server(data_dir=str(tmp_path / "image")) as server, stepwire.connect(server.target) as client:
        again = client.session(session.own_id)
        again.attach(take_over=True)
        assert {step: plain(again.step(gradient(step))) for step in (4, 5)} == {4: replies[4], 5: replies[5]}


def test_a_journal_has_the_numbers_of_rows(tmp_path: pathlib.Path) -> None:
    tables = {"small": "skipped", "large": "row_counter"}
    with numpy_server(data_dir=str(tmp_path / "data")) as server, stepwire.connect(server.target) as client:
        session = client.create_session(PARAMETERS, tables=tables, durability="journal")
        twin = client.create_session(PARAMETERS, tables=tables)
        replies = {step: plain(twin.step(gradient(step))) for step in range(1, 6)}
        for step in range(1, 5):
            assert plain(session.step(gradient(step))) == replies[step]
            if step == 2:
                session.save_checkpoint("second")
        shutil.copytree(tmp_path / "data", tmp_path / "image")
    with numpy_server(data_dir=str(tmp_path / "image")) as server, stepwire.connect(server.target) as client:
        again = client.session(session.own_id)
        again.attach(take_over=True)
        assert again.applied_step == 4 and plain(again.step(gradient(5))) == replies[5]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_a_row_may_be_wider_than_the_messages_of_a_server(dtype: Any) -> None:
    """As wide as a row can be: such rows travel alone, in the messages of steps, replies and pulls."""
    rows, values = np.array([4, 1, 1]), np.ones((3, 65_536), np.float32)
    values[2] = np.linspace(-1, 1, 65_536)
    replies = []
    for most in (64 << 10, 4 << 20):
        with numpy_server(max_chunk_bytes=most) as server, stepwire.connect(server.target) as client:
            table = {"t": stepwire.Table((6, 65_536))}
            with client.create_session(table, gradient_dtype=dtype, optimizer=stepwire.SGD(lr=1.0)) as session:
                reply: Any = session.step({"t": Rows(rows, values)})
                pulled: Any = session.pull(rows={"t": [1, 4]})
                assert reply["t"].indices.tolist() == [1, 4]
                assert pulled["t"].values.tobytes() == reply["t"].values.tobytes()
                replies.append(reply["t"].values)
    assert np.array_equal(replies[0], replies[1])
    np.testing.assert_allclose(replies[0], np.stack([-values[1] - values[2], -values[0]]), atol=0.02)


@pytest.mark.parametrize("transport", ["tcp", "uds", "auto"])
def test_a_row_that_comes_a_million_times_has_the_exact_sum_over_every_transport(transport: Any) -> None:
    """Numbers of all sizes, which cancel but for the small ones; those in memory of the host are refused by name."""
    probe = np.tile(np.array([1e8, 1.0, -1e8, 1.0], np.float32), 250_000)[:, np.newaxis]
    with numpy_server() as server, stepwire.connect(server.target) as client:
        with client.create_session({"t": stepwire.Table((3, 1))}, optimizer=stepwire.SGD(lr=1.0)) as session:
            session.attach(transport=transport)
            reply: Any = session.step({"t": Rows(np.ones(len(probe), np.int64), probe)})
            assert (reply["t"].indices.tolist(), reply["t"].values.tolist()) == ([1], [[-500_000.0]])
            assert session.transport is not None
            assert session.transport.name == ("tcp" if transport == "tcp" else "uds")
            for memory in ("shm", "packets"):
                with pytest.raises(stepwire.UnsupportedFeatureError, match="the session has tables"):
                    session.attach(transport=memory)
