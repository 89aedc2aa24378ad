"""Warm restores: a state that would step otherwise than the one that was saved is refused."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import numpy as np
import pytest
import structlog

import stepwire
from stepwire.errors import DataLossError, Reason, ResourceExhaustedError
from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire_server.durability.checkpoint import Checkpoint
from stepwire_server.durability.checkpoints import CheckpointStore
from stepwire_server.durability.disk import Disk
from stepwire_server.durability.manifest import Manifest, Shadow, read_manifest, write_manifest
from stepwire_server.rpc.durable_codec import DurableCodec
from stepwire_server.sessions.replay import Replayer
from stepwire_server.sessions.shadow import differs
from tests.support.numpy_server import numpy_pool, numpy_server
from tests.support.raw import RawClient

pytestmark = pytest.mark.many

SHAPES = {"wide": (64, 80), "b": (7,)}


def arrays(seed: int, scale: float = 1.0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: (scale * rng.normal(size=shape)).astype(np.float32) for name, shape in SHAPES.items()}


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / "data"


Saved = Callable[..., tuple[str, CheckpointStore]]


@pytest.fixture
def saved(folder: pathlib.Path) -> Saved:
    """Step a session three times, end its server, and leave one checkpoint alone."""

    def make(**options: Any) -> tuple[str, CheckpointStore]:
        with numpy_server(data_dir=str(folder)) as server, stepwire.connect(server.target) as client:
            session = client.create_session(arrays(99), durability="checkpoint", keep=True, **options)
            frozen = options.get("frozen", ())
            for number in range(3):
                session.step({name: each for name, each in arrays(number, 0.01).items() if name not in frozen})
            session.save_checkpoint("last")
            session_id = session.session_id
        return session_id, CheckpointStore(Disk(), folder / "sessions" / session_id / "checkpoints")

    return make


def manifest_of(store: CheckpointStore) -> Manifest:
    with opened(store) as checkpoint:
        return checkpoint.manifest


@contextlib.contextmanager
def opened(store: CheckpointStore) -> Iterator[Checkpoint]:
    checkpoint = store.newest().checkpoint
    assert checkpoint is not None
    with checkpoint:
        yield checkpoint


def rewrite(store: CheckpointStore, change: Callable[[str, np.ndarray], np.ndarray], **numbers: Any) -> None:
    """Write the newest checkpoint again, with other arrays and numbers, and with checksums that match them."""
    with opened(store) as checkpoint:
        manifest, name = checkpoint.manifest, checkpoint.name
        slots = {}
        for slot, facts in manifest.arrays.items():
            slots[slot] = np.empty(facts.elements, np.float32)
            checkpoint.body.read(slot, 0, slots[slot])
    for info in store.list():
        store.delete(info.name)
    writer = store.begin(name, {slot: len(values) for slot, values in slots.items()})
    for slot, values in slots.items():
        writer.write(slot, 0, change(slot, values))
    writer.commit(msgspec.structs.replace(manifest, **numbers))
    store.verify(name)


def as_it_was(slot: str, values: np.ndarray) -> np.ndarray:
    return values


def revived(folder: pathlib.Path, session_id: str) -> stepwire.Snapshot:
    with numpy_server(data_dir=str(folder)) as server, stepwire.connect(server.target) as client:
        return client.session(session_id).state()


EVERY_RULE = [
    {"optimizer": stepwire.Adam(), "state_precision": "int8"},
    {"optimizer": stepwire.AdamW(amsgrad=True), "state_precision": "bfloat16", "gradient_dtype": "int8"},
    {"optimizer": stepwire.Adam(formula="keras"), "gradient_dtype": "bfloat16", "clip_grad_value": 0.5},
    {"optimizer": stepwire.Adam(formula="optax", nesterov=True), "reply_dtype": "bfloat16", "telemetry": "none"},
    {"optimizer": stepwire.NAdam(), "state_precision": "bfloat16", "gradient_dtype": "float16"},
    {"optimizer": stepwire.RAdam(), "state_precision": "int8", "parameter_average_decay": 0.5},
    {"optimizer": stepwire.Adamax(), "state_precision": "bfloat16", "gradient_dtype": "int8"},
    {"optimizer": stepwire.SGD(momentum=0.9, nesterov=True), "state_precision": "int8", "accumulation_steps": 2},
    {"optimizer": stepwire.SGD(), "clip_grad_norm": 0.5},
    {"optimizer": stepwire.RMSprop(momentum=0.5), "state_precision": "int8"},
    {"optimizer": stepwire.RMSprop(centered=True), "gradient_dtype": "int8"},
    {"optimizer": stepwire.Adagrad(lr_decay=0.5, initial_accumulator_value=0.25), "state_precision": "bfloat16"},
    {"optimizer": stepwire.Adadelta(), "loss_scaling": stepwire.LossScaling(initial_scale=1.0)},
    {"optimizer": stepwire.Lion(), "state_precision": "int8", "tensor_precision": {"b": "bfloat16"}},
    {"optimizer": stepwire.Adam(maximize=True), "frozen": ["wide"]},
    {"groups": [{"params": ["b"], "lr": 0.5}], "schedule": stepwire.Schedule.cosine(2)},
]


@pytest.mark.parametrize("options", EVERY_RULE, ids=[str(index) for index in range(len(EVERY_RULE))])
def test_a_state_that_is_what_it_was_is_restored(folder: Any, saved: Saved, options: dict[str, Any]) -> None:
    session_id, store = saved(**options)
    manifest = manifest_of(store)
    assert manifest.shadow is not None
    with structlog.testing.capture_logs() as logs:
        state = revived(folder, session_id)
    assert state.step == 3
    (told,) = [log for log in logs if log["event"] == "restored"]
    assert (told["session_id"], told["step"], told["checkpoint"]) == (session_id, 3, manifest.name)
    assert told["norms"] == {slot: facts.norm for slot, facts in manifest.arrays.items()}
    assert told["digests"] == {slot: facts.digest for slot, facts in manifest.arrays.items()}
    assert told["shadow_norm"] == manifest.shadow.update_norm


def test_the_range_is_the_beginning_of_the_first_tensor_that_steps(saved: Saved) -> None:
    _, store = saved()
    shadow = manifest_of(store).shadow
    assert shadow is not None
    assert (shadow.start, shadow.elements) == (0, 4096)
    assert shadow.update_norm > 0.0
    _, store = saved(groups=[{"params": ["b"], "lr": 0.5}], frozen=["wide"])
    shadow = manifest_of(store).shadow
    assert shadow is not None
    assert (shadow.start, shadow.elements) == (5120, 7)


def test_the_norm_is_that_of_a_step_by_numpy(saved: Saved) -> None:
    """The pattern and the rule, written down again: so a later release that changes either cannot go unseen."""
    _, store = saved()
    with opened(store) as checkpoint:
        p, m, v = (np.empty(4096, np.float32) for _ in range(3))
        for slot, values in (("param", p), ("exp_avg", m), ("exp_avg_sq", v)):
            checkpoint.body.read(slot, 0, values)
        recorded = checkpoint.manifest.shadow
    assert recorded is not None
    words = (np.arange(1, 4097) * 2_654_435_761 + 20) % 2**32
    g = (words / 2**31 - 1) / 2**14
    m1, v1 = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
    way = 1e-3 * (m1 / (1 - 0.9**4)) / (np.sqrt(v1 / (1 - 0.999**4)) + 1e-8)
    assert recorded.update_norm == pytest.approx(float(np.linalg.norm(way)), rel=1e-3)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("cold", ["exp_avg", "exp_avg_sq", "tensor_steps"])
def test_a_state_that_would_step_otherwise_is_refused(folder: Any, saved: Saved, precision: str, cold: str) -> None:
    session_id, store = saved(state_precision=precision)
    recorded = manifest_of(store).shadow

    def zeroed(slot: str, values: np.ndarray) -> np.ndarray:
        return values * np.float32(0.0) if slot in (cold, f"{cold}_scale") else values

    rewrite(store, zeroed, **({"tensor_steps": (0, 0)} if cold == "tensor_steps" else {}))
    assert recorded is not None
    with structlog.testing.capture_logs() as logs, pytest.raises(DataLossError) as caught:
        revived(folder, session_id)
    assert caught.value.reason is Reason.CHECKPOINT_DAMAGED
    (told,) = [log["problem"] for log in logs if log["event"] == "checkpoint damaged"]
    assert "was restored cold: its state would step by " in told
    assert f"and the one that was saved by {recorded.update_norm!r}" in told
    assert not [log for log in logs if log["event"] == "restored"]


def test_a_cold_checkpoint_is_passed_over_once_it_is_deleted(folder: Any, saved: Saved) -> None:
    session_id, store = saved()
    with numpy_server(data_dir=str(folder)) as server, stepwire.connect(server.target) as client:
        session = client.session(session_id)
        before = session.state()
        session.step(arrays(7, 0.01))
        session.save_checkpoint("cold")
        session.detach()
    name = manifest_of(store).name
    with opened(store) as checkpoint:
        assert checkpoint.manifest.step == 4
        cold = msgspec.structs.replace(checkpoint.manifest, tensor_steps=(0, 0))
    (store.folder / name / "manifest.json").unlink()
    write_manifest(Disk(), store.folder / name / "manifest.json", cold)
    with pytest.raises(stepwire.DataLossError, match="'cold' of step 4 is damaged, and what is left ends at step 3"):
        revived(folder, session_id)
    with numpy_server(data_dir=str(folder)) as server, stepwire.connect(server.target) as client:
        with pytest.raises(stepwire.DataLossError):
            client.session(session_id)
        with RawClient(server.target) as raw:
            raw.call("DeleteCheckpoint", pb.DeleteCheckpointRequest(session_id=session_id, name="cold"))
    after = revived(folder, session_id)
    assert (after.step, after.tensor_steps) == (3, before.tensor_steps)
    assert np.array_equal(after.slots["exp_avg_sq"]["wide"], before.slots["exp_avg_sq"]["wide"])


@pytest.mark.parametrize("options", [{"optimizer": stepwire.LAMB()}, {"optimizer": stepwire.LARS(lr=0.1)}])
def test_layerwise_rules_have_no_shadow(folder: Any, saved: Saved, options: dict[str, Any]) -> None:
    session_id, store = saved(**options)
    assert manifest_of(store).shadow is None
    assert revived(folder, session_id).step == 3


def test_a_checkpoint_of_an_older_server_has_none_and_is_restored(folder: Any, saved: Saved) -> None:
    session_id, store = saved()
    rewrite(store, as_it_was, shadow=None)
    assert revived(folder, session_id).step == 3


def test_a_state_that_is_not_finite_is_restored(folder: Any, saved: Saved) -> None:
    session_id, store = saved()
    with numpy_server(data_dir=str(folder)) as server, stepwire.connect(server.target) as client:
        session = client.session(session_id)
        session.load({name: values * np.float32(np.nan) for name, values in arrays(1).items()})
        session.detach()
    shadow = manifest_of(store).shadow
    assert shadow is not None
    assert np.isnan(shadow.update_norm)
    assert revived(folder, session_id).step == 3


def test_a_device_without_room_keeps_no_state_from_the_disk(
    folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with numpy_server(data_dir=str(folder)) as server, stepwire.connect(server.target) as client:
        session = client.create_session(arrays(99), durability="checkpoint", keep=True)
        session.step(arrays(1))
        (device,) = server.registry.pool
        with monkeypatch.context() as patch, structlog.testing.capture_logs() as logs:
            patch.setattr(device.engine, "allocate", full)
            session.save_checkpoint("last")
        session_id = session.session_id
    assert [log["problem"] for log in logs if log["event"] == "checkpoint without a shadow step"] == ["full"]
    store = CheckpointStore(Disk(), folder / "sessions" / session_id / "checkpoints")
    assert (manifest_of(store).name, manifest_of(store).shadow) == ("last", None)
    assert revived(folder, session_id).step == 1


def full(*arguments: Any) -> Any:
    raise ResourceExhaustedError("full")


def test_nothing_rolls_back_to_a_cold_checkpoint(folder: pathlib.Path) -> None:
    with numpy_server(data_dir=str(folder)) as server, stepwire.connect(server.target) as client:
        session = client.create_session(arrays(99), durability="checkpoint")
        session.step(arrays(1))
        session.save_checkpoint("one")
        session.step(arrays(2))
        before = session.state()
        path = folder / "sessions" / session.session_id / "checkpoints" / "one" / "manifest.json"
        manifest, _ = read_manifest(Disk(), path)
        path.unlink()
        write_manifest(Disk(), path, msgspec.structs.replace(manifest, tensor_steps=(0, 0)))
        with pytest.raises(DataLossError, match="'one' was restored cold"):
            session.rollback(checkpoint="one")
        after = session.state()
        assert (after.step, after.tensor_steps) == (2, before.tensor_steps)
        assert np.array_equal(after.slots["param"]["wide"], before.slots["param"]["wide"])
        path.unlink()
        write_manifest(Disk(), path, manifest)
        session.rollback(checkpoint="one")
        assert session.state().tensor_steps == {"b": 1, "wide": 1}


def test_shadows_differ_beyond_a_millionth() -> None:
    one = Shadow(start=0, elements=8, update_norm=1.0)
    assert not differs(one, one)
    assert not differs(Shadow(start=0, elements=8, update_norm=1.0 + 5e-7), one)
    assert differs(Shadow(start=0, elements=8, update_norm=1.0 + 2e-6), one)
    assert differs(Shadow(start=0, elements=8, update_norm=float("nan")), one)
    assert differs(Shadow(start=256, elements=8, update_norm=1.0), one)
    assert differs(None, one)
    infinite = Shadow(start=0, elements=8, update_norm=float("inf"))
    assert not differs(infinite, infinite)


def test_a_replay_from_a_cold_checkpoint_is_refused(folder: pathlib.Path) -> None:
    with numpy_server(data_dir=str(folder)) as server, stepwire.connect(server.target) as client:
        session = client.create_session(arrays(99), durability="journal")
        session.step(arrays(1))
        session.save_checkpoint("one")
        session.step(arrays(2))
        store = CheckpointStore(Disk(), folder / "sessions" / session.session_id / "checkpoints")
        path = store.folder / "one" / "manifest.json"
        manifest, _ = read_manifest(Disk(), path)
        path.unlink()
        write_manifest(Disk(), path, msgspec.structs.replace(manifest, tensor_steps=(0, 0)))
        with (
            contextlib.closing(numpy_pool()) as pool,
            pytest.raises(DataLossError, match="'one' was restored cold"),
        ):
            Replayer(folder, DurableCodec(), pool).replay(session.session_id, "one")
