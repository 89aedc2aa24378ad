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
