"""The real server on pretended GPUs: placement, memory that comes back, and shortages that harm nobody."""

from __future__ import annotations

import contextlib
import pathlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import stepwire
from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire_server.config import ServerConfig
from stepwire_server.devices.pool import DevicePool
from stepwire_server.server import Server
from tests.integration.events import PATIENCE_SECONDS
from tests.integration.probes import chunks_staged, stream_ends
from tests.integration.training import SMALL, WIDE, Model, bits, same_bits
from tests.server.pretended_gpus import (
    PlacedGpu,
    compiled_kernels,
    machine_code,
    needs_compiler,
    pretended_cupy,
)
from tests.support.raw import RawClient, Refused, Vector, step_message

pytestmark = needs_compiler

_SIZE = 16_000
_STATE_BYTES = 3 * 4 * _SIZE
_MEMORY_BYTES = 8 << 20

Opened = Callable[[str], stepwire.Client]


class Gpus(NamedTuple):
    """A server with pretended GPUs.

    Attributes:
        cupy: the stand-in, which counts their memory.
        engines: one a GPU.
        server: it.
        idle_bytes: device memory in use without sessions.
    """

    cupy: Any
    engines: list[PlacedGpu]
    server: Server
    idle_bytes: int


@pytest.fixture(scope="module")
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return compiled_kernels(request, tmp_path_factory)


@pytest.fixture(scope="module", autouse=True)
def cubins(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pathlib.Path]:
    yield from machine_code(tmp_path_factory)


@pytest.fixture
def start(
    exits: contextlib.ExitStack, directory: pathlib.Path, settings: dict[str, Any], clock: Callable[[], float]
) -> Callable[..., Gpus]:
    """Start a server: `start(count, budget_bytes, **options)`."""

    def started(count: int = 1, budget_bytes: int = 4 << 20, order: Any = ("random", 7), **options: int) -> Gpus:
        cupy = pretended_cupy(directory, devices=count, memory_bytes=_MEMORY_BYTES, order=order)
        exits.callback(cupy.check)
        sizes = {"buffer_bytes": 16 << 10, "gradient_cache_bytes": 1} | options
        engines = [PlacedGpu(cupy, index, **sizes) for index in range(count)]
        idle_bytes = cupy.used_bytes
        pool = DevicePool.of(engines, budget_bytes)
        server = Server(ServerConfig(bind="127.0.0.1:0", **settings), clock=clock, pool=pool)
        return Gpus(cupy, engines, exits.enter_context(server), idle_bytes)

    return started


def gradient(seed: int = 5) -> Vector:
    return np.random.default_rng(seed).standard_normal(_SIZE, np.float32)


def made(raw: RawClient, size: int = _SIZE) -> tuple[str, int]:
    """Create a session; returns its id and the token of its creator."""
    created = raw.create(size)
    return created.session.session_id, created.attach_token


def train(client: stepwire.Client, model: Model, steps: range, **options: Any) -> tuple[Any, ...]:
    """Train from the start; returns the state at the end, and every answer."""
    with model.create(client, **options) as session:
        answers = [bits(session.step(model.gradient(step))) for step in steps]
        return session.state(), answers


@pytest.mark.many
@pytest.mark.parametrize(("order", "gradient_cache_bytes"), [("lazy", 1), ("greedy", 1 << 20), (("random", 3), 1)])
def test_clients_that_step_at_once_get_what_each_would_get_alone(
    start: Any, connect: Opened, client: stepwire.Client, order: Any, gradient_cache_bytes: int
) -> None:
    gpus = start(order=order, gradient_cache_bytes=gradient_cache_bytes)
    models, steps, results = [WIDE, SMALL, WIDE], range(1, 5), dict[int, Any]()

    def work(number: int) -> None:
        results[number] = train(connect(gpus.server.target), models[number], steps)

    threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(len(models))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * PATIENCE_SECONDS)
    expected = {model.name: train(client, model, steps) for model in (WIDE, SMALL)}
    for number, model in enumerate(models):
        state, answers = expected[model.name]
        assert same_bits(results[number][0], state)
        assert results[number][1] == answers
    gpus.server.close()
    assert gpus.cupy.used_bytes == gpus.idle_bytes


TABLES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "ids": ({"t": stepwire.Table((12, 3), "skipped", 0.5, 7, hashed=True, max_age_steps=1)}, {}),
    "global": (
        {"t": stepwire.Table((9, 3), "global", 0.5, 7)},
        {"accumulation_steps": 2, "parameter_average_decay": 0.5, "clip_grad_norm": 0.5},
    ),
}


@pytest.mark.parametrize("what", TABLES)
def test_tables_have_the_bits_of_the_processor(start: Any, connect: Opened, client: stepwire.Client, what: str) -> None:
    """Rows by ids through evictions, and accumulated gradients with an average; rows come often, of all sizes."""
    gpus, (tables, options), told = start(order=("random", 3)), TABLES[what], []
    for each in (connect(gpus.server.target), client):
        rng = np.random.default_rng(4)
        with each.create_session(tables, optimizer=stepwire.Adam(lr=0.1), **options) as session:
            replies = []
            for step in range(6):
                rows = rng.integers(0, 9, 8) + (step // 2 if what == "ids" else 0)
                values = (rng.standard_normal((8, 3)) * 2.0 ** rng.integers(-30, 30, (8, 3))).astype(np.float32)
                reply: Any = session.step({"t": stepwire.Rows(rows, values)})
                replies.append((reply["t"].indices.tolist(), reply["t"].values.tolist()))
            whole: Any = session.pull()
            told.append(
                (replies, whole["t"].values.tolist() if what == "ids" else whole["t"].tolist(), session.info().tables)
            )
            if what == "global":
                told[-1] += (session.pull(average=True)["t"].tolist(),)  # type: ignore[call-overload]
    assert told[0] == told[1]
    gpus.server.close()
    assert gpus.cupy.used_bytes == gpus.idle_bytes


def test_sessions_live_where_there_is_most_budget_or_where_they_are_told(start: Any, connect: Opened) -> None:
    gpus = start(2)
    client = connect(gpus.server.target)
    sessions = [SMALL.create(client, device=device) for device in ("", "", "cuda:1", "cuda:1", "")]
    listed = {info.session_id: info for info in client.sessions()}
    devices = [listed[session.session_id].device for session in sessions]
    assert devices == ["cuda:0", "cuda:1", "cuda:1", "cuda:1", "cuda:0"]
    state_bytes = {info.memory_bytes for info in listed.values()}
    assert state_bytes == {3 * 768}, "163 elements a slot"
    known = {"description": "Pretended GPU", "memory_bytes": _MEMORY_BYTES, "budget_bytes": 4 << 20}
    assert client.info().devices == {
        "cuda:0": known | {"reserved_bytes": 2 * 3 * 768},
        "cuda:1": known | {"reserved_bytes": 3 * 3 * 768},
    }
    answers = [bits(session.step(SMALL.gradient(1))) for session in sessions]
    assert answers == answers[:1] * 5
    for session in sessions:
        session.close()
    with pytest.raises(stepwire.UnsupportedFeatureError, match="this server has cuda:0, cuda:1"):
        SMALL.create(client, device="cpu")
    gpus.server.close()  # a step gives its gradient's memory back after its reply has left
    assert gpus.cupy.used_bytes == gpus.idle_bytes


def test_a_client_moves_a_session_from_device_to_device(start: Any, connect: Opened, client: stepwire.Client) -> None:
    gpus = start(2)
    there = connect(gpus.server.target)
    straight = WIDE.create(client)
    moving = WIDE.create(there, device="cuda:0")
    for step, (other, options) in enumerate([(there, {"device": "cuda:1"}), (client, {}), (there, {})], start=1):
        assert bits(moving.step(WIDE.gradient(step))) == bits(straight.step(WIDE.gradient(step)))
        state = moving.state()
        moving.close()
        moving = WIDE.create(other, **options)
        moving.load_state(state)
    assert bits(moving.step(WIDE.gradient(4))) == bits(straight.step(WIDE.gradient(4)))
    assert same_bits(moving.state(), straight.state())
    moving.close()
    assert gpus.cupy.used_bytes == gpus.idle_bytes


def test_a_device_without_room_for_a_session_refuses_it_and_harms_nobody(start: Any) -> None:
    """The budget would have allowed it: somebody else holds the device's memory."""
    gpus = start(budget_bytes=1 << 30)
    with RawClient(gpus.server.target) as raw:
        live = made(raw)
        before = gpus.cupy.used_bytes, raw.info().devices[0].reserved_bytes
        assert before == (gpus.idle_bytes + _STATE_BYTES, _STATE_BYTES)
        hog = gpus.engines[0]._resources.device.allocate(_MEMORY_BYTES - before[0] - _STATE_BYTES + 1)
        with pytest.raises(Refused) as refused:
            raw.create(_SIZE)
        assert refused.value.row == ("RESOURCE_EXHAUSTED", "MEMORY_EXHAUSTED")
        assert refused.value.metadata["needed_bytes"] == str(_STATE_BYTES)
        assert (gpus.cupy.used_bytes - hog.nbytes, raw.info().devices[0].reserved_bytes) == before
        assert raw.step(*live, 1, gradient()).result.step == 1
        del hog
        assert raw.create(_SIZE).session.device == "cuda:0"


def test_a_device_without_room_for_a_gradient_refuses_the_step_and_takes_it_later(start: Any, raw: RawClient) -> None:
    """`raw` is a client of a server on the CPU."""
    gpus, states = start(budget_bytes=1 << 30), []
    with RawClient(gpus.server.target) as there:
        created, beside = made(there), made(there, 12)
        hog = gpus.engines[0]._resources.device.allocate(_MEMORY_BYTES - gpus.cupy.used_bytes - 4 * _SIZE + 1)
        reserved, used = there.info().devices[0].reserved_bytes, gpus.cupy.used_bytes
        with pytest.raises(Refused) as refused:
            there.step(*created, 1, gradient())
        assert refused.value.row == ("RESOURCE_EXHAUSTED", "MEMORY_EXHAUSTED")
        assert (there.info().devices[0].reserved_bytes, gpus.cupy.used_bytes) == (reserved, used)
        assert there.step(*beside, 1, gradient()[:12]).result.step == 1
        del hog
        for who, session in ((there, created), (raw, made(raw))):
            states.append(who.step(*session, 1, gradient()).payload)
        assert states[0] == states[1]


@pytest.mark.parametrize("how", ["cancel", "finish"])
def test_a_stream_that_breaks_inside_a_step_leaves_no_gradient_behind(start: Any, how: str) -> None:
    gpus = start()
    with RawClient(gpus.server.target) as raw:
        created = raw.create(_SIZE)
        session, token = created.session.session_id, created.attach_token
        arrived = chunks_staged(gpus.server.registry.get(session))
        ended = stream_ends(gpus.server.registry)
        stream = raw.attach(session, token)
        stream.receive()
        before = gpus.cupy.used_bytes
        assert before == gpus.idle_bytes + _STATE_BYTES
        stream.send(step_message(1, gradient(), slice(0, 8_000), commit=False))
        arrived.wait()
        assert gpus.cupy.used_bytes == before + 4 * _SIZE
        getattr(stream, how)()
        ended.wait()
        assert gpus.cupy.used_bytes == before
        assert raw.step(session, stream.token, 1, gradient()).result.step == 1
        assert gpus.cupy.used_bytes == before


def test_a_device_that_fails_inside_a_commit_is_told_and_damages_one_session(start: Any) -> None:
    gpus = start()
    with RawClient(gpus.server.target) as raw:
        broken, beside = made(raw), made(raw)
        gpus.cupy.fail_next("kernel", RuntimeError("an illegal memory access"), after=1)
        with pytest.raises(Refused) as refused:
            raw.step(*broken, 1, gradient())
        assert refused.value.code == "INTERNAL"
        assert "illegal" not in str(refused.value), "that is for the log"
        with pytest.raises(Refused) as refused:
            raw.step(*broken, 1, gradient())
        assert refused.value.row == ("DATA_LOSS", "SESSION_DAMAGED")
        assert [raw.step(*beside, step, gradient(step)).result.step for step in (1, 2)] == [1, 2]
    gpus.server.close()  # when it returns, no handler's error keeps a gradient any more
    assert gpus.cupy.used_bytes == gpus.idle_bytes


def test_a_device_that_fails_for_good_is_told_and_the_server_is_not_healthy(start: Any) -> None:
    gpus, told = start(), []
    gpus.server.on_lost(lambda: told.append(gpus.server.lost))
    with RawClient(gpus.server.target) as raw, grpc.insecure_channel(gpus.server.target) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        sessions = [made(raw) for _ in range(2)]
        for session in sessions:
            raw.step(*session, 1, gradient())
        gpus.cupy.poison(gpus.cupy.cuda.runtime.CUDARuntimeError(700))
        for session in [*sessions, *sessions]:
            with pytest.raises(Refused) as refused:
                raw.step(*session, 2, gradient())
            assert refused.value.row == ("DATA_LOSS", "DEVICE_LOST")
        with pytest.raises(Refused) as refused:
            raw.create(_SIZE)
        assert refused.value.row == ("DATA_LOSS", "DEVICE_LOST")
        status = health.Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE_SECONDS).status
        assert status == health_pb2.HealthCheckResponse.NOT_SERVING
        for session_id, _ in sessions:
            raw.call("DeleteSession", pb.DeleteSessionRequest(session_id=session_id))
    assert told == [True]
    assert [device.budget.reserved_bytes for device in gpus.server._pool] == [0]


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_a_session_moves_between_processors_and_gpus(
    start: Any, server: Server, client: stepwire.Client, connect: Opened, precision: Any
) -> None:
    """The state is read from either engine, and comes into the other one, bit for bit."""
    gpus = start()
    shapes = {"a": (70, 64), "b": (5,), "c": (4096,)}

    def drawn(step: int) -> dict[str, Any]:
        chance = np.random.default_rng(step)
        return {name: chance.standard_normal(shape, np.float32) for name, shape in shapes.items()}

    options: dict[str, Any] = {"optimizer": stepwire.Adam(lr=1e-2), "clip_grad_norm": 1.0}
    options |= {"state_precision": precision, "accumulation_steps": 2}
    places = [server.target, gpus.server.target]
    with stepwire.connect(places, transport="tcp", timeout=120.0) as several:
        with client.create_session(drawn(0), **options) as whole, several.create_session(drawn(0), **options) as cut:
            for step in range(1, 8):
                if step in (2, 4, 6):
                    onto = {2: places[1:], 4: places[::-1], 6: places[:1]}[step]
                    stepwire.move_session(cut.session_id, places, onto)
                assert bits(cut.step(drawn(step))) == bits(whole.step(drawn(step)))
            assert same_bits(cut.state(), whole.state())
    gpus.server.close()
    assert gpus.cupy.used_bytes == gpus.idle_bytes
