"""The commands `stepwire state`."""

from __future__ import annotations

import json
import pathlib
from typing import Annotated, Any, Final

import numpy as np
import typer

import stepwire
from stepwire.layout import Layout, Placement, place
from stepwire.results import SessionConfig, Snapshot
from stepwire.wire.messages import specs_from_wire
from stepwire_server.cli.data_directories import DataDir, SessionId, data_folder, telling_of_the_disk
from stepwire_server.cli.options import Json, Target, Timeout
from stepwire_server.cli.progress import progress_bar, telling_of_reads, verified
from stepwire_server.cli.state_config import config_of, metadata_of, numbers_of, options_of
from stepwire_server.cli.state_forms import FORMS, Numbers, State, arrays_of, decoded_slots, params_of, state_of
from stepwire_server.cli.state_tables import TablesOfCheckpoint, check_forms, is_of_tables, refuse_import
from stepwire_server.cli.tensor_file import Tensor, TensorFile, read_tensor_file, write_tensor_file
from stepwire_server.durability.archive import checkpoints_of
from stepwire_server.durability.checkpoint import Checkpoint
from stepwire_server.durability.checkpoints import CheckpointStore
from stepwire_server.durability.disk import Disk
from stepwire_server.durability.manifest import Manifest

__all__ = ["state_app"]

state_app = typer.Typer(
    name="state",
    help="Export the state of a session to a file with the names of torch, optax or Keras, and import one.",
    no_args_is_help=True,
)

_FLOAT32: Final = np.dtype(np.float32)

FormName = Annotated[str, typer.Option("--form", metavar="<form>", help=f"The names in the file: {', '.join(FORMS)}.")]
File = Annotated[str, typer.Argument(metavar="FILE", help="The file, in the safetensors format.")]


@state_app.command("export")
def export_state(
    session_id: SessionId,
    file: File,
    data_dir: DataDir,
    form: FormName = "stepwire",
    checkpoint: Annotated[
        str, typer.Option(metavar="<name>", help="The checkpoint; by default the newest good one.")
    ] = "",
    as_json: Json = False,
) -> None:
    """Verify a checkpoint in a data directory, and write its state to a new file; no server is needed."""
    _check_form(form)
    with telling_of_the_disk():
        store = checkpoints_of(Disk(), data_folder(data_dir, "sessions"), session_id)
        with _opened(store, checkpoint) as found:
            manifest = verified(found)
            message = config_of(manifest.config)
            specs = specs_from_wire(message)
            layout = place(specs, max(len(message.groups), 1))
            check_forms(form, layout)
            tables = TablesOfCheckpoint(found, layout)
            state = _state_of(found, layout, tables)
            frozen = [spec.name for spec in specs if spec.frozen]
            optimizer = SessionConfig.from_wire(message).optimizer
            arrays = arrays_of(form, state, optimizer, frozen) | tables.beside()
            with progress_bar("writing", sum(array.nbytes for array in arrays.values())) as advance:
                arrays = telling_of_reads(arrays, advance)
                write_tensor_file(pathlib.Path(file), arrays, metadata_of(form, message, state.numbers))
            decoded = decoded_slots(form, manifest.arrays)
            name = found.name
    plain = {"checkpoint": name, "step": manifest.step, "form": form, "file": file, "decoded": decoded}
    told = f"; moments of 8 bits are float32 there: {', '.join(decoded)}" if decoded else ""
    print(json.dumps(plain) if as_json else f"wrote {name}, of step {manifest.step}, to {file} for {form}{told}")


@state_app.command("import")
def import_state(
    file: File,
    target: Target,
    form: FormName = "stepwire",
    session_id: Annotated[
        str, typer.Option("--session", metavar="<id>", help="A session to restore into; by default a new one is made.")
    ] = "",
    optimizer: Annotated[
        str,
        typer.Option(metavar="<json>", help='An optimizer in place of the file\'s: {"name": "AdamW", "lr": 0.001}.'),
    ] = "",
    durability: Annotated[str, typer.Option(metavar="<level>", help="The durability of a new session.")] = "memory",
    timeout: Timeout = 600.0,
    as_json: Json = False,
) -> None:
    """Bring the state in a file into a session, moments and t included."""
    _check_form(form)
    with telling_of_the_disk():
        read = read_tensor_file(pathlib.Path(file))
        if (written := read.metadata.get("form", form)) != form:
            raise stepwire.InvalidRequestError.of("form", f"{file} is of form {written[:32]!r}, and --form is {form!r}")
        with stepwire.connect(target, timeout=timeout) as client:
            if session_id:
                if optimizer:
                    raise stepwire.InvalidRequestError.of("optimizer", "a session that exists has one already")
                session = client.session(session_id)
                refuse_import(read.tensors, session.config.tables)
                _load(session, form, read)
            else:
                session = _created(client, form, read, optimizer, durability)
            done = {"session_id": session.session_id, "step": session.applied_step}
    print(json.dumps(done) if as_json else f"session {done['session_id']} is at step {done['step']}")


def _check_form(form: str) -> None:
    if form not in FORMS:
        raise stepwire.InvalidRequestError.of("form", f"{form!r} is none of {', '.join(FORMS)}")


def _opened(store: CheckpointStore, name: str) -> Checkpoint:
    if name:
        return store.open(name)
    if (newest := store.newest().checkpoint) is None:
        raise stepwire.InvalidRequestError.of("checkpoint", f"{store.folder} has no checkpoint that is not damaged")
    return newest


def _state_of(checkpoint: Checkpoint, layout: Layout, tables: TablesOfCheckpoint) -> State:
    """Return the state in a checkpoint; its arrays are read when they are needed.

    Raises:
        InvalidRequestError: the arrays are not those of the config.
    """
    manifest, tensors = checkpoint.manifest, layout.tensors
    plain = [slot for slot in manifest.arrays if not is_of_tables(slot)]
    for slot in plain:
        elements = manifest.arrays[slot].elements
        if elements != layout.size or len(manifest.tensor_steps) != len(tensors):
            raise stepwire.InvalidRequestError.of(
                "checkpoint", f"{slot!r} has {elements} elements, and the config {layout.size}"
            )
    slots = {
        slot: {
            each.spec.name: tables.slot(slot, index, each) or _tensor(checkpoint, slot, each)
            for index, each in enumerate(tensors)
        }
        for slot in plain
    }
    if sums := tables.sums():
        slots["sum"] = {**slots.get("sum", {}), **sums}
    return State(slots, _numbers_of(manifest, layout))


def _tensor(checkpoint: Checkpoint, slot: str, placed: Placement) -> Tensor:
    def read() -> Any:
        values = np.empty(placed.count, np.float32)
        if placed.count:
            checkpoint.body.read(slot, placed.offset, values)
        return values.reshape(placed.spec.shape)

    return Tensor(tuple(placed.spec.shape), _FLOAT32, read)


def _numbers_of(manifest: Manifest, layout: Layout) -> Numbers:
    names = [tensor.spec.name for tensor in layout.tensors]
    scale = manifest.loss_scale
    return Numbers(
        manifest.step,
        dict(zip(names, manifest.tensor_steps, strict=True)),
        dict(zip(names, manifest.tensor_scalars, strict=True)) if manifest.tensor_scalars else {},
        None if scale is None else (scale.scale, scale.clean_steps),
    )


def _created(client: Any, form: str, read: TensorFile, optimizer: str, durability: str) -> stepwire.Session:
    """Create a session with the state of a file; nothing stays of one that fails."""
    options = options_of(read.metadata, optimizer)
    refuse_import(read.tensors, options.get("tables", {}))
    params = params_of(form, read.tensors, options["optimizer"])
    arrays = {name: _float32(tensor) for name, tensor in params.items()}
    session: stepwire.Session = client.create_session(arrays, durability=durability, **options)
    _load(session, form, read)
    session.keep()
    return session


def _load(session: stepwire.Session, form: str, read: TensorFile) -> None:
    """Load the state of a file into a session."""
    given, total_bytes = numbers_of(read.metadata), sum(tensor.nbytes for tensor in read.tensors.values())
    with progress_bar("reading", total_bytes) as advance:
        tensors = telling_of_reads(read.tensors, advance)
        state = state_of(form, tensors, given, session.config.optimizer, session.slots)
        slots = {slot: {name: _float32(each) for name, each in arrays.items()} for slot, arrays in state.slots.items()}
    numbers = state.numbers
    steps, scalars = dict(numbers.tensor_steps), dict(numbers.tensor_scalars)
    snapshot = Snapshot(numbers.step or 0, slots, steps, numbers.loss_scale, scalars)
    with progress_bar(
        "sending", sum(array.nbytes for arrays in slots.values() for array in arrays.values())
    ) as advance:
        session.load_state(snapshot, progress=lambda sent, total: advance(sent))


def _float32(tensor: Tensor) -> Any:
    return tensor.read().astype(np.float32)
