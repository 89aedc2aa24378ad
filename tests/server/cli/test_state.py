"""`stepwire state`: a session's state in files for other frameworks, and back."""

from __future__ import annotations

import json
import pathlib
import struct
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import stepwire
from stepwire_server.cli.tensor_file import Tensor, read_tensor_file, write_tensor_file
from stepwire_server.server import Server
from tests.support.numpy_server import numpy_server

SHAPES = {"a.weight": (3, 5), "b": (7,)}
STEPS = 10
Gradients = list[dict[str, np.ndarray]]

RULES = {
    "Adam": {"lr": 0.01},
    "AdamW": {"lr": 0.01, "amsgrad": True},
    "NAdam": {"lr": 0.01},
    "RAdam": {"lr": 0.01},
    "Adamax": {"lr": 0.01},
    "SGD": {"lr": 0.01, "momentum": 0.9, "dampening": 0.1},
    "RMSprop": {"lr": 0.01, "momentum": 0.5, "centered": True},
    "Adagrad": {"lr": 0.01, "initial_accumulator_value": 0.5},
    "Adadelta": {"lr": 0.5},
}
EVERY_RULE = [pytest.param(name, options, id=name) for name, options in RULES.items()]


def parameters() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def gradients(seed: int) -> Gradients:
    rng = np.random.default_rng(seed)
    return [{name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()} for _ in range(STEPS)]


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / "data"


@pytest.fixture
def server(folder: pathlib.Path) -> Iterator[Server]:
    with numpy_server(data_dir=str(folder)) as server:
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[stepwire.Client]:
    with stepwire.connect(server.target) as client:
        yield client


@pytest.fixture
def exported(command: Any, folder: pathlib.Path, tmp_path: pathlib.Path) -> Callable[..., pathlib.Path]:
    """Save a checkpoint of a session, and export it."""

    def export(session: stepwire.Session, form: str) -> pathlib.Path:
        session.save_checkpoint("whole")
        file = tmp_path / f"{form}.safetensors"
        place = ("--data-dir", str(folder), "--checkpoint", "whole", "--form", form)
        code, out, err = command("state", "export", session.session_id, str(file), *place)
        assert (code, err) == (0, "")
        assert out.startswith(f"wrote whole, of step {session.applied_step}, to {file} for {form}")
        return file

    return export


@pytest.fixture
def imported(command: Any, server: Server, client: stepwire.Client) -> Callable[..., stepwire.Session]:
    """Import a file into a new session."""

    def bring(file: pathlib.Path, form: str, *more: str) -> stepwire.Session:
        code, out, err = command("state", "import", str(file), "-t", server.target, "--form", form, "--json", *more)
        assert (code, err) == (0, "")
        return client.session(json.loads(out)["session_id"])

    return bring


def stepped(session: stepwire.Session, sent: Gradients) -> stepwire.Session:
    for gradient in sent:
        session.step(gradient)
    return session


def torch_optimizer(torch: Any, name: str, options: dict[str, Any], values: dict[str, np.ndarray]) -> Any:
    params = [torch.nn.Parameter(torch.from_numpy(values[each].copy())) for each in SHAPES]
    return params, getattr(torch.optim, name)(params, **options)


def torch_steps(torch: Any, params: Any, optimizer: Any, sent: Gradients) -> dict[str, np.ndarray]:
    for gradient in sent:
        for param, name in zip(params, SHAPES, strict=True):
            param.grad = torch.from_numpy(gradient[name].copy())
        optimizer.step()
    return {name: param.detach().numpy() for param, name in zip(params, SHAPES, strict=True)}


def assert_close(found: Any, wanted: Any) -> None:
    for name in SHAPES:
        np.testing.assert_allclose(found[name], wanted[name], rtol=2e-5, atol=2e-6)


@pytest.mark.many
@pytest.mark.parametrize(("name", "options"), EVERY_RULE)
def test_torch_goes_on_from_an_export(client: Any, exported: Any, name: str, options: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch")
    reader = pytest.importorskip("safetensors.torch")
    session = client.create_session(parameters(), optimizer=getattr(stepwire, name)(**options), durability="checkpoint")
    stepped(session, gradients(1))
    tensors = reader.load_file(exported(session, "torch"))
    params, optimizer = torch_optimizer(
        torch, name, options, {each: tensors[f"param.{each}"].numpy() for each in SHAPES}
    )
    for param, each in zip(params, SHAPES, strict=True):
        start = f"state.{each}."
        optimizer.state[param] = {
            key.removeprefix(start): value for key, value in tensors.items() if key.startswith(start)
        }
    local = torch_steps(torch, params, optimizer, gradients(2))
    stepped(session, gradients(2))
    assert_close(session.pull(), local)


@pytest.mark.many
@pytest.mark.parametrize(("name", "options"), EVERY_RULE)
def test_a_session_goes_on_from_torch(
    imported: Any, tmp_path: pathlib.Path, name: str, options: dict[str, Any]
) -> None:
    torch = pytest.importorskip("torch")
    writer = pytest.importorskip("safetensors.torch")
    params, optimizer = torch_optimizer(torch, name, options, parameters())
    torch_steps(torch, params, optimizer, gradients(1))
    tensors = {f"param.{each}": param.detach() for param, each in zip(params, SHAPES, strict=True)}
    for param, each in zip(params, SHAPES, strict=True):
        tensors |= {f"state.{each}.{key}": value.clone() for key, value in optimizer.state[param].items()}
    file = tmp_path / "local.safetensors"
    writer.save_file(tensors, file, {"optimizer": json.dumps({"name": name, **options}), "step": "10"})
    session = imported(file, "torch")
    assert session.applied_step == STEPS
    stepped(session, gradients(2))
    assert_close(session.pull(), torch_steps(torch, params, optimizer, gradients(2)))


WIDE = {"wide": np.linspace(-1, 1, 8192, dtype=np.float32), "small": np.ones(5, np.float32)}


@pytest.mark.many
@pytest.mark.parametrize(
    "options",
    [
        {"state_precision": "int8"},
        {"state_precision": "bfloat16", "optimizer": stepwire.NAdam()},
        {"tensor_precision": {"wide": "int8"}, "frozen": ["small"]},
        {"accumulation_steps": 2, "parameter_average_decay": 0.9, "loss_scaling": stepwire.LossScaling()},
        {"groups": [{"params": ["wide"], "lr": 0.5, "schedule": stepwire.Schedule.cosine(100)}], "clip_grad_norm": 1.0},
        {"optimizer": stepwire.SGD(lr=0.1, momentum=0.9)},
        {"optimizer": stepwire.LARS(lr=0.1), "missing_gradient": "keep"},
    ],
    ids=lambda options: "-".join(options),
)
def test_a_state_goes_out_and_in_bit_for_bit(client: Any, exported: Any, imported: Any, options: Any) -> None:
    session = client.create_session(WIDE, durability="checkpoint", **options)
    rng = np.random.default_rng(5)
    scale = 65536.0 if "loss_scaling" in options else 1.0
    for _ in range(3):
        sent = {name: (scale * rng.normal(size=each.shape)).astype(np.float32) for name, each in WIDE.items()}
        session.step({name: sent[name] for name in sent if name not in options.get("frozen", ())})
    again = imported(exported(session, "stepwire"), "stepwire")
    before, after = session.state(), again.state()
    assert after.slots.keys() == before.slots.keys()
    for slot, arrays in before.slots.items():
        for name, values in arrays.items():
            assert np.array_equal(after.slots[slot][name], values), (slot, name)
    assert (after.step, after.tensor_steps, after.tensor_scalars) == (3, before.tensor_steps, before.tensor_scalars)
    assert after.loss_scale == before.loss_scale
    mine, other = session.config, again.config
    assert (other.optimizer, other.groups, other.membership) == (mine.optimizer, mine.groups, mine.membership)
    assert (other.treatment, other.tensor_precision) == (mine.treatment, mine.tensor_precision)


def test_tables_stay_tables(client: Any, exported: Any, imported: Any) -> None:
    table = {"table": np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3)}
    session = client.create_session(table, tables={"table": "torch_sparse"}, durability="checkpoint")
    rows = stepwire.Rows([2, 0, 2], np.ones((3, 3), np.float32))
    session.step({"table": rows})
    again = imported(exported(session, "stepwire"), "stepwire")
    assert again.config.tables == {"table": "torch_sparse"}
    replies = [each.step({"table": rows})["table"].values for each in (session, again)]
    assert np.array_equal(*replies)


@pytest.mark.parametrize("alone", [True, False])
def test_sums_of_rows_go_out_as_torchrec_has_them(
    client: Any, command: Any, server: Server, folder: pathlib.Path, exported: Any, alone: bool
) -> None:
    parameters = {"table": np.ones((4, 2), np.float32)} | ({} if alone else {"w": np.ones(3, np.float32)})
    rule = stepwire.Adagrad(lr=0.5, initial_accumulator_value=0.25)
    options = {"optimizer": rule, "tables": {"table": "row_wise"}, "durability": "checkpoint"}
    session = client.create_session(parameters, **options)
    rows = stepwire.Rows([2, 0], np.array([[3.0, 1.0], [2.0, 0.0]], np.float32))
    session.step({"table": rows} | ({} if alone else {"w": np.full(3, 2.0, np.float32)}))
    found = read_tensor_file(file := exported(session, "torch")).tensors
    assert found["state.table.sum"].read().tolist() == [[2.25], [0.25], [5.25], [0.25]]
    assert found["state.table.step"].read() == 1.0
    assert alone or found["state.w.sum"].read().tolist() == [4.25] * 3
    place = (session.session_id, str(file) + ".2", "--data-dir", str(folder), "--form", "keras")
    code, _, err = command("state", "export", *place)
    assert code and "keras has no counterpart of one sum a row" in err
    code, _, err = command("state", "import", str(file), "-t", server.target, "--form", "torch")
    assert code and "no load brings numbers of rows; fork the session" in err


@pytest.mark.parametrize("meaning", ["row_counter", "skipped", "torch_sparse"])
@pytest.mark.parametrize("capacity", [12, 3])
def test_rows_by_ids_go_out_with_their_ids(
    client: Any, command: Any, server: Server, exported: Any, folder: pathlib.Path, meaning: str, capacity: int
) -> None:
    """By rising id, without empty places, also of a full table; with the numbers and the ages of rows."""
    table = stepwire.Table((capacity, 3), meaning, 0.5, 7, hashed=True, max_age_steps=9)
    other = stepwire.Table((2, 2), "row_counter")
    session = client.create_session({"t": table, "other": other}, durability="checkpoint")
    nothing = stepwire.Rows([], np.ones((0, 2), np.float32))
    for ids in ([2**63 - 1, 5], [5, 77], [5]):
        session.step({"t": stepwire.Rows(ids, np.ones((len(ids), 3), np.float32)), "other": nothing})
    session.step(
        {"t": stepwire.Rows([], np.ones((0, 3), np.float32)), "other": stepwire.Rows([1], np.ones((1, 2), np.float32))}
    )
    pulled = session.pull()
    found = read_tensor_file(file := exported(session, "torch")).tensors
    assert found["row_ids.t"].read().tolist() == pulled["t"].indices.tolist() == [5, 77, 2**63 - 1]
    assert found["param.t"].read().tobytes() == pulled["t"].values.tobytes()
    assert found["state.t.exp_avg"].shape == (3, 3) and np.all(found["state.t.exp_avg"].read() != 0)
    assert found["row_ages.t"].read().tolist() == [3, 2, 1]
    numbers = {"row_counter": [3, 1, 1], "skipped": [3, 2, 1]}.get(meaning)
    assert ("row_numbers.t" in found) == (numbers is not None)
    assert numbers is None or found["row_numbers.t"].read().tolist() == numbers
    assert found["row_numbers.other"].read().tolist() == [0, 1]
    place = (session.session_id, str(file) + ".2", "--data-dir", str(folder), "--form", "optax")
    code, _, err = command("state", "export", *place)
    assert code and "optax has no counterpart of rows by ids, of table 't'" in err
    code, _, err = command("state", "import", str(file), "-t", server.target, "--form", "torch")
    assert code and "rows of table 't' are named by ids, and no load brings ids; fork the session" in err
    assert len(list(client.sessions())) == 1


def test_a_session_that_exists_gets_the_state(command: Any, server: Server, client: Any, exported: Any) -> None:
    session = client.create_session(parameters(), durability="checkpoint")
    stepped(session, gradients(1))
    file = exported(session, "keras")
    other = client.create_session(parameters())
    arguments = ("-t", server.target, "--form", "keras", "--session", other.session_id)
    code, out, err = command("state", "import", str(file), *arguments)
    assert (code, out, err) == (0, f"session {other.session_id} is at step 10\n", "")
    before, after = session.state(), client.session(other.session_id).state()
    for slot, arrays in before.slots.items():
        for name in SHAPES:
            assert np.array_equal(after.slots[slot][name], arrays[name])
    assert after.tensor_steps == dict.fromkeys(SHAPES, 10)
    outcome = command("state", "import", str(file), *arguments, "--optimizer", '{"name": "Adam"}')
    assert outcome == (2, "", "stepwire: optimizer: a session that exists has one already\n")


@pytest.mark.parametrize(
    ("form", "names"),
    [
        ("optax", {"params/b", "params/a.weight", "mu/b", "mu/a.weight", "nu/b", "nu/a.weight", "count"}),
        (
            "keras",
            {"b", "a.weight", "b/momentum", "a.weight/momentum", "b/velocity", "a.weight/velocity", "iterations"},
        ),
    ],
)
def test_the_names_are_the_frameworks_own(client: Any, exported: Any, imported: Any, form: str, names: Any) -> None:
    session = client.create_session(parameters(), durability="checkpoint")
    stepped(session, gradients(1))
    file = exported(session, form)
    found = read_tensor_file(file)
    assert set(found.tensors) == names
    state = session.state()
    first = "mu/b" if form == "optax" else "b/momentum"
    assert np.array_equal(found.tensors[first].read(), state.slots["exp_avg"]["b"])
    assert int(found.tensors["count" if form == "optax" else "iterations"].read()) == 10
    again = imported(file, form)
    stepped(session, gradients(2))
    stepped(again, gradients(2))
    assert np.array_equal(again.pull()["b"], session.pull()["b"])


def test_optax_goes_on_from_an_export(client: Any, exported: Any) -> None:
    optax = pytest.importorskip("optax")
    rule = stepwire.Adam(lr=0.01, formula="optax")
    session = client.create_session(parameters(), optimizer=rule, durability="checkpoint")
    stepped(session, gradients(1))
    tensors = read_tensor_file(exported(session, "optax")).tensors
    values = {name: tensors[f"params/{name}"].read() for name in SHAPES}
    transformation = optax.adam(0.01)
    adam, *rest = transformation.init(values)
    moments = {slot: {name: tensors[f"{slot}/{name}"].read() for name in SHAPES} for slot in ("mu", "nu")}
    state: Any = (adam._replace(count=tensors["count"].read(), **moments), *rest)
    for gradient in gradients(2):
        updates, state = transformation.update(gradient, state, values)
        values = optax.apply_updates(values, updates)
    stepped(session, gradients(2))
    assert_close(session.pull(), {name: np.asarray(each) for name, each in values.items()})


def test_moments_of_8_bits_are_decoded_and_that_is_said(
    command: Any, client: Any, folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    session = client.create_session(WIDE, state_precision="int8", durability="checkpoint")
    session.step({name: values + 1 for name, values in WIDE.items()})
    session.save_checkpoint("whole")
    file = tmp_path / "out.safetensors"
    place = ("--data-dir", str(folder), "--form", "keras")
    code, out, err = command("state", "export", session.session_id, str(file), *place)
    assert (code, err) == (0, "")
    assert out.endswith("for keras; moments of 8 bits are float32 there: exp_avg, exp_avg_sq\n")
    found = read_tensor_file(file).tensors["wide/momentum"].read()
    assert np.array_equal(found, session.state().slots["exp_avg"]["wide"])


@pytest.mark.parametrize(
    ("rule", "options", "form", "said"),
    [
        (stepwire.NAdam(), {}, "keras", "keras has no counterpart of 'nadam'"),
        (stepwire.SGD(momentum=0.9), {}, "keras", "keras has no counterpart of 'momentum_buffer'"),
        (stepwire.AdamW(amsgrad=True), {}, "optax", "optax has no counterpart of 'max_exp_avg_sq', whose amsgrad is"),
        (stepwire.Adam(), {"parameter_average_decay": 0.9}, "torch", "torch has no counterpart of 'param_average'"),
        (stepwire.Adam(), {"accumulation_steps": 2}, "torch", "torch has no counterpart of 'grad_accumulation'"),
        (stepwire.Adam(), {"missing_gradient": "keep"}, "optax", "optax has no counterpart of 'count', with "),
    ],
)
def test_what_has_no_counterpart_is_refused_by_name(
    command: Any, client: Any, tmp_path: pathlib.Path, rule: Any, options: Any, form: str, said: str
) -> None:
    folder = tmp_path / "data"
    session = client.create_session(parameters(), optimizer=rule, durability="checkpoint", **options)
    session.step({"b": gradients(1)[0]["b"]} if "missing_gradient" in options else gradients(1)[0])
    session.save_checkpoint("whole")
    file = tmp_path / "out.safetensors"
    code, out, err = command(
        "state", "export", session.session_id, str(file), "--data-dir", str(folder), "--form", form
    )
    assert (code, out, file.exists()) == (2, "", False)
    assert err.startswith(f"stepwire: form: {said}")


def head(tree: object) -> bytes:
    text = json.dumps(tree).encode()
    return struct.pack("<Q", len(text)) + text


def one(**changes: object) -> dict[str, object]:
    return {"param.w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}


@pytest.mark.many
@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "its head has 0 bytes, in a file of 0"),
        (struct.pack("<Q", 2**63) + b"{}", f"its head has {2**63} bytes, in a file of 10"),
        (struct.pack("<Q", 9) + b"{}", "its head has 9 bytes, in a file of 10"),
        (struct.pack("<Q", 4) + b"[[[[", "its head is damaged"),
        (struct.pack("<Q", 200_000) + b"[" * 200_000, "its head is damaged"),
        (head(one(shape=[2**40, 2**40])), f"'param.w' of shape [{2**40}, {2**40}] has the bytes 0 to 8"),
        (head(one(shape=[-2])) + bytes(8), "its head is damaged"),
        (head(one(data_offsets=[8, 16])) + bytes(16), "'param.w' of shape [2] has the bytes 8 to 16, and 0 to 8"),
        (head(one(data_offsets=[8, 0])) + bytes(8), "'param.w' of shape [2] has the bytes 8 to 0, and 0 to 8"),
        (head(one(dtype="U8")) + bytes(8), "'param.w' has the dtype 'U8'"),
        (head(one()) + bytes(7), "its arrays end at byte"),
        (head(one()) + bytes(9), "its arrays end at byte"),
        (head({"__metadata__": {"step": 3}}), "its head is damaged"),
    ],
)
def test_files_that_are_none_are_refused(command: Any, tmp_path: pathlib.Path, data: bytes, said: str) -> None:
    file = tmp_path / "bad.safetensors"
    file.write_bytes(data)
    code, out, err = command("state", "import", str(file), "-t", "localhost:1", "--form", "torch")
    assert (code, out) == (2, "")
    assert f"{file} is no file of a state: {said}" in err


def good() -> dict[str, np.ndarray]:
    ones = np.ones(2, np.float32)
    return {"param.w": ones, "state.w.exp_avg": ones, "state.w.exp_avg_sq": ones, "state.w.step": np.float32(3)}  # type: ignore[dict-item]


ADAM = {"optimizer": '{"name": "Adam"}'}


@pytest.mark.many
@pytest.mark.parametrize(
    ("changes", "metadata", "said"),
    [
        ({"state.w.step": np.float32(np.nan)}, ADAM, "'state.w.step' is nan, which is no number of updates"),
        ({"state.w.step": np.float32(-1)}, ADAM, "'state.w.step' is -1.0, which is no number of updates"),
        ({"state.w.step": np.float32(2.5)}, ADAM, "'state.w.step' is 2.5, which is no number of updates"),
        ({"state.w.step": np.float32(np.inf)}, ADAM, "'state.w.step' is inf, which is no number of updates"),
        ({"state.w.step": np.ones(2, np.float32)}, ADAM, "'state.w.step' has the shape [2]; it is one number"),
        (
            {"state.w.exp_avg": np.ones(3, np.float32)},
            ADAM,
            "'state.w.exp_avg' has the shape [3], and its",
        ),
        ({"state.w.exp_avg": None}, ADAM, "lacks 'exp_avg' of 'w', which has 3 updates"),
        ({"state.w.sum": np.ones(2, np.float32)}, ADAM, "'state.w.sum' is nothing that this session has in form torch"),
        ({"state.x.step": np.float32(3)}, ADAM, "'state.x.step' is nothing that this session has in form torch"),
        ({"param.w": None}, ADAM, "has no parameters: no name is like 'param.NAME'"),
        ({}, {}, "metadata.optimizer: is missing; give --optimizer"),
        ({}, {"optimizer": '{"name": "Sgdm"}'}, "metadata.optimizer.name: 'Sgdm' is none of Adam"),
        ({}, {"optimizer": '{"name": "Adam", "lr": -1}'}, "optimizer.lr: lr is -1"),
        ({}, {"optimizer": '{"name": "Adam", "rate": 1}'}, "metadata.optimizer: "),
        ({}, {"optimizer": "[]"}, "metadata.optimizer: '[]' is none"),
        ({}, ADAM | {"step": "-1"}, "metadata.step: '-1' is none"),
        ({}, ADAM | {"loss_scale": "[0, 1]"}, "metadata.loss_scale: 0.0 is no scale"),
        ({}, ADAM | {"tensor_steps": '{"w": NaN}'}, "metadata.tensor_steps: '{\"w\": NaN}' is none"),
        ({}, ADAM | {"tensor_scalars": '{"w": 2}'}, "metadata.tensor_scalars: 'w' has 2.0, which is not in [0, 1]"),
        ({}, ADAM | {"options": '{"keep": true}'}, "metadata.options: 'keep' is none of"),
        ({}, ADAM | {"groups": '[{"params": ["v"]}]'}, "groups[0].params: 'v' is not a parameter"),
        ({}, ADAM | {"form": "keras"}, "is of form 'keras', and --form is 'torch'"),
    ],
)
def test_states_that_are_wrong_are_refused_and_leave_no_session(
    command: Any, server: Server, client: Any, tmp_path: pathlib.Path, changes: Any, metadata: Any, said: str
) -> None:
    file = tmp_path / "bad.safetensors"
    arrays = {name: np.asarray(each) for name, each in (good() | changes).items() if each is not None}
    write_tensor_file(file, {name: Tensor.of(each) for name, each in arrays.items()}, metadata)
    code, out, err = command("state", "import", str(file), "-t", server.target, "--form", "torch")
    assert (code, out) == (2, "")
    assert said in err
    assert list(client.sessions()) == []


def test_an_optimizer_of_the_command_line_replaces_the_files(imported: Any, tmp_path: pathlib.Path) -> None:
    file = tmp_path / "good.safetensors"
    write_tensor_file(file, {name: Tensor.of(np.asarray(each)) for name, each in good().items()}, ADAM)
    session = imported(file, "torch", "--optimizer", '{"name": "AdamW", "lr": 0.5, "betas": [0.5, 0.75]}')
    assert session.config.optimizer == stepwire.AdamW(lr=0.5, betas=(0.5, 0.75))
    state = session.state()
    assert (state.step, state.tensor_steps) == (3, {"w": 3})
    assert np.array_equal(state.slots["exp_avg"]["w"], np.ones(2, np.float32))


def test_a_damaged_checkpoint_is_not_exported(
    command: Any, client: Any, folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    session = client.create_session(parameters(), durability="checkpoint")
    session.save_checkpoint("whole")
    body = folder / "sessions" / session.session_id / "checkpoints" / "whole" / "state.safetensors"
    data = bytearray(body.read_bytes())
    data[-1] ^= 1
    body.write_bytes(data)
    file = tmp_path / "out.safetensors"
    place = ("--data-dir", str(folder), "--checkpoint", "whole")
    code, out, err = command("state", "export", session.session_id, str(file), *place)
    assert (code, out, file.exists()) == (2, "", False)
    assert "checkpoint file whole/state.safetensors" in err
    code, out, err = command("state", "export", session.session_id, str(file), *place, "--form", "tf")
    assert (code, err) == (2, "stepwire: form: 'tf' is none of stepwire, torch, optax, keras\n")


def test_a_file_that_exists_is_not_overwritten(command: Any, client: Any, folder: Any, tmp_path: pathlib.Path) -> None:
    session = client.create_session(parameters(), durability="checkpoint")
    session.save_checkpoint("whole")
    file = tmp_path / "mine"
    file.write_bytes(b"mine")
    code, _, err = command("state", "export", session.session_id, str(file), "--data-dir", str(folder))
    assert (code, err) == (2, f"stepwire: file: {file} exists; name a file that does not\n")
    assert file.read_bytes() == b"mine"


def test_a_terminal_is_shown_how_much_is_done(
    command: Any, server: Server, client: Any, folder: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other tests have a pipe, and nothing of it there."""
    session = client.create_session(parameters(), durability="checkpoint")
    file, place = str(tmp_path / "out.safetensors"), ("--data-dir", str(folder))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    told = {
        ("checkpoint", "save", session.session_id, "whole", "-t", server.target): ["saving"],
        ("checkpoint", "export", session.session_id, "whole", str(tmp_path / "copy"), *place): ["verifying", "copying"],
        ("state", "export", session.session_id, file, *place): ["verifying", "writing"],
        ("state", "import", file, "-t", server.target): ["reading", "sending"],
    }
    for arguments, titles in told.items():
        code, out, err = command(*arguments)
        assert code == 0 and not any(title in out for title in titles), err
        assert all(f"{title} " in err for title in titles)
        assert arguments[1] == "save" or "/" in err  # the bytes that are done, of all
    body = folder / "sessions" / session.session_id / "checkpoints" / "whole" / "state.safetensors"
    assert (tmp_path / "copy" / "state.safetensors").read_bytes() == body.read_bytes()
