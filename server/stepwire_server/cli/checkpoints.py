"""The commands `stepwire checkpoint`."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

import stepwire
from stepwire.results import CheckpointInfo
from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire_server.cli.data_directories import DataDir, SessionId, data_folder, telling_of_the_disk
from stepwire_server.cli.options import Json, Target, Timeout
from stepwire_server.cli.progress import progress_bar, verified
from stepwire_server.durability.archive import checkpoints_of
from stepwire_server.durability.checkpoint import BODY, MANIFEST
from stepwire_server.durability.disk import Disk
from stepwire_server.durability.reading import find_damage
from stepwire_server.durability.repair import cut

__all__ = ["checkpoint_app"]

checkpoint_app = typer.Typer(
    name="checkpoint",
    help="List, save, verify, delete and export the checkpoints of a session; repair a data directory.",
    no_args_is_help=True,
)

_COPIED_BYTES: Final = 8 << 20

Name = Annotated[str, typer.Argument(metavar="NAME", help="The name of the checkpoint.")]


@checkpoint_app.command("list")
def list_checkpoints(session_id: SessionId, target: Target, timeout: Timeout = 10.0, as_json: Json = False) -> None:
    """List the checkpoints of a session. A parked session stays parked."""
    request = pb.ListCheckpointsRequest(session_id=session_id)
    response = _asked(target, timeout, "ListCheckpoints", request, pb.ListCheckpointsResponse)
    found = [CheckpointInfo.from_wire(each) for each in response.checkpoints]
    if as_json:
        print(json.dumps([_plain(info) for info in found]))
        return
    table = Table("checkpoint", "step", "load", "created", "bytes", "damage", "in the store")
    for info in found:
        created = "" if info.create_time is None else f"{info.create_time:%Y-%m-%d %H:%M:%S} UTC"
        numbers = ("", "", "", "") if info.damage else (str(info.step), str(info.load), created, _size(info))
        stored = "yes" if info.stored else info.store_problem or "no"
        table.add_row(info.name, *numbers, Text(info.damage), Text(stored))  # never markup
    Console().print(table)


@checkpoint_app.command("save")
def save_checkpoint(
    session_id: SessionId, name: Name, target: Target, timeout: Timeout = 600.0, as_json: Json = False
) -> None:
    """Save a checkpoint of the present state of a session, while its steps go on."""
    request = pb.SaveCheckpointRequest(session_id=session_id, name=name)
    with progress_bar("saving"):
        response = _asked(target, timeout, "SaveCheckpoint", request, pb.SaveCheckpointResponse)
    _tell("saved", CheckpointInfo.from_wire(response.checkpoint), as_json)


@checkpoint_app.command("verify")
def verify_checkpoint(
    session_id: SessionId,
    name: Name,
    target: Target,
    data_dir: Annotated[
        str, typer.Option("--data-dir", metavar="<path>", help="Read the checkpoint here, without a server.")
    ] = "",
    timeout: Timeout = 600.0,
    as_json: Json = False,
) -> None:
    """Read all of a checkpoint, and compare its checksums; without --data-dir the server does so.

    With --data-dir, norm and digest of each array are told too, and the norm of the shadow step.
    """
    if data_dir:
        _verify_here(data_dir, session_id, name, as_json)
        return
    request = pb.VerifyCheckpointRequest(session_id=session_id, name=name)
    with progress_bar("verifying"):
        response = _asked(target, timeout, "VerifyCheckpoint", request, pb.VerifyCheckpointResponse)
    _tell("verified", CheckpointInfo.from_wire(response.checkpoint), as_json)


def _verify_here(data_dir: str, session_id: str, name: str, as_json: bool) -> None:
    with telling_of_the_disk():
        with checkpoints_of(Disk(), data_folder(data_dir, "sessions"), session_id).open(name) as checkpoint:
            manifest = verified(checkpoint)
    shadow = None if manifest.shadow is None else manifest.shadow.update_norm
    if as_json:
        arrays = {slot: {"norm": facts.norm, "digest": facts.digest} for slot, facts in manifest.arrays.items()}
        plain = {"name": name, "step": manifest.step, "load": manifest.load, "arrays": arrays, "shadow_norm": shadow}
        print(json.dumps(plain))
        return
    print(f"verified {name}, of step {manifest.step} and load {manifest.load}")
    for slot, facts in manifest.arrays.items():
        print(f"{slot:>20}  norm {facts.norm:.9g}  digest {facts.digest}")
    print(f"{'shadow step':>20}  {'none' if shadow is None else f'norm {shadow:.9g}'}")


@checkpoint_app.command("delete")
def delete_checkpoint(
    session_id: SessionId, name: Name, target: Target, timeout: Timeout = 10.0, as_json: Json = False
) -> None:
    """Delete a checkpoint. The newest state of the session stays, under a name of the server's own."""
    request = pb.DeleteCheckpointRequest(session_id=session_id, name=name)
    _asked(target, timeout, "DeleteCheckpoint", request, pb.DeleteCheckpointResponse)
    print(json.dumps({"name": name}) if as_json else f"deleted {name}")


@checkpoint_app.command("export")
def export_checkpoint(
    session_id: SessionId,
    name: Name,
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="The folder to make.")],
    data_dir: DataDir,
    as_json: Json = False,
) -> None:
    """Verify a checkpoint in a data directory, and copy its files; no server is needed."""
    target = pathlib.Path(folder)
    if target.exists():
        raise stepwire.InvalidRequestError.of("folder", f"{folder} exists; name a folder that does not")
    with telling_of_the_disk():
        store = checkpoints_of(Disk(), data_folder(data_dir, "sessions"), session_id)
        with store.open(name) as checkpoint:
            manifest = verified(checkpoint)
        target.mkdir(parents=True)
        for file in (BODY, MANIFEST):
            _copy(store.folder / name / file, target / file)
    plain = {"name": name, "step": manifest.step, "load": manifest.load, "folder": folder}
    print(
        json.dumps(plain)
        if as_json
        else f"copied {name}, of step {manifest.step} and load {manifest.load}, to {folder}"
    )


@checkpoint_app.command("repair")
def repair(
    data_dir: DataDir,
    yes: Annotated[bool, typer.Option("--yes", help="Cut: what lies behind the damage is lost to sessions.")] = False,
    as_json: Json = False,
) -> None:
    """End a damaged log at its first damage. No server may use the directory meanwhile.

    What lies behind is set aside under other names, and no server reads it. Sessions then lack the steps in it.
    """
    log = data_folder(data_dir, "log")
    with telling_of_the_disk():
        damage = find_damage(Disk(), log)
        if damage is None:
            print(json.dumps({"damaged": False}) if as_json else f"the log in {log} has no damage")
            return
        place = f"{damage.segment.path} at byte {damage.offset}, behind record {damage.after.number}"
        if not yes:
            raise stepwire.InvalidRequestError.of(
                "yes", f"the log is damaged: {place}. Copy the directory, and repeat with --yes to end the log there"
            )
        done = cut(Disk(), log)
    assert done is not None
    aside = [str(path) for path in done.set_aside]
    if as_json:
        print(json.dumps({"damaged": True, "path": str(done.path), "offset": done.offset, "set_aside": aside}))
        return
    print(f"the log ends now in {place}", *(f"set aside {path}" for path in aside), sep="\n")


def _asked(target: str, timeout: float, method: str, request: Any, response: Any) -> Any:
    """Call a method about a session, which need not be in memory for it."""
    from stepwire.connecting import calls_to  # loads gRPC, which the parent of several servers must not

    calls = calls_to(target, timeout=timeout)
    try:
        return calls.unary(method, request, response)
    finally:
        calls.close()


def _copy(source: pathlib.Path, target: pathlib.Path) -> None:
    with source.open("rb") as read, target.open("xb") as written:
        with progress_bar("copying", os.fstat(read.fileno()).st_size) as advance:
            while data := read.read(_COPIED_BYTES):
                written.write(data)
                advance(written.tell())


def _tell(done: str, info: CheckpointInfo, as_json: bool) -> None:
    text = f"{done} {info.name}, of step {info.step} and load {info.load}, {_size(info)}"
    print(json.dumps(_plain(info)) if as_json else text)


def _size(info: CheckpointInfo) -> str:
    return f"{info.nbytes / 2**20:.1f} MiB"


def _plain(info: CheckpointInfo) -> dict[str, Any]:
    created = None if info.create_time is None else info.create_time.isoformat()
    return dataclasses.asdict(info) | {"create_time": created}
