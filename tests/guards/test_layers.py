"""Guards of the floors: imports go down only, and the client shares nothing with the server but its shared half."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

import pytest

from tests.guards.source import CLIENT, SERVER, imports_of, modules

# From the roof down. A room imports from rooms below its own line alone: no circle, no arrow upward.
SERVER_LAYERS = [
    "__main__",
    "cli",
    "demo",
    "testing",
    "cluster",
    "server",
    "rpc",
    "doctor",
    "monitoring",
    "replication",
    "sharing",
    "sessions",
    "aggregation",
    "steps",
    "durability",
    "observability",
    "access",
    "records",
    "processes",
    "devices",
    "engines",
    "rules",
    "host",
    "config",
]
ENGINE_LAYERS = ["choice", "ahead", "cpu", "cuda", "compiled", "probe", "protocol"]
CLIENT_LAYERS = [
    "torch",
    "optax",
    "aio",
    "plots",
    "connecting",
    "sharding",
    "client",
    "session",
    "session_state",
    "links",
    "steps",
    "transports",
    "connection",
    "results",
    "statistics",
    "loggers",
    "step_result",
    "arrays",
    "lifetimes",
    "tracing",
    "wire",
    "optimizers",
    "layout",
    "errors",
    "host",
    "version",
    "v1",
]
SHARED_HALF = {"tracing", "wire", "optimizers", "layout", "errors", "host", "version", "v1"}
# The driver of CUDA is a client's, for memory that it maps; an engine asks it for the same memory.
DRIVER = "stepwire.transports.cuda.driver"
# These are clients themselves: they use the public names, and what the command prints of them.
CLIENTS_ON_THE_SERVER = {"doctor", "demo", "cli"}

ROOMS = [("stepwire_server", SERVER, SERVER_LAYERS), ("stepwire", CLIENT, CLIENT_LAYERS)]


def room_of(path: pathlib.Path, root: pathlib.Path) -> str:
    """Name the folder or module at the top of a package that a file belongs to; empty for the package itself."""
    first = path.relative_to(root).parts[0]
    return "" if first == "__init__.py" else first.removesuffix(".py")


def arrows(package: str, root: pathlib.Path) -> Iterator[tuple[str, str, str]]:
    """Yield (importing room, imported room, file → module) for each import within a package."""
    rooms = {room_of(path, root) for path in modules(root)} | {"v1"}
    for path in modules(root):
        for name in imports_of(path):
            parts = name.split(".")
            if parts[0] == package and len(parts) > 1 and parts[1] in rooms:
                yield room_of(path, root), parts[1], f"{path.relative_to(root)} → {name}"


@pytest.mark.parametrize(("package", "root", "layers"), ROOMS, ids=["server", "client"])
def test_every_room_has_its_floor(package: str, root: pathlib.Path, layers: list[str]) -> None:
    assert {room_of(path, root) for path in modules(root)} - {""} == set(layers)


@pytest.mark.parametrize(("package", "root", "layers"), ROOMS, ids=["server", "client"])
def test_imports_go_down(package: str, root: pathlib.Path, layers: list[str]) -> None:
    height = {room: rank for rank, room in enumerate(reversed(layers))}
    found = [
        arrow
        for importing, imported, arrow in arrows(package, root)
        if importing and importing != imported and height[imported] >= height[importing]
    ]
    assert found == []


def test_engines_go_down_too() -> None:
    """Kernels on disk know no engine, and an engine knows no other."""
    root = SERVER / "engines"
    found = []
    for path in modules(root):
        room = room_of(path, root)
        for name in imports_of(path):
            parts = name.split(".")
            if parts[:2] != ["stepwire_server", "engines"] or len(parts) < 3:
                continue
            known = room in ENGINE_LAYERS and parts[2] in ENGINE_LAYERS and parts[2] != room
            if known and ENGINE_LAYERS.index(parts[2]) <= ENGINE_LAYERS.index(room):
                found.append(f"{path.relative_to(root)} → {name}")
            if {room, parts[2]} == {"cpu", "cuda"}:
                found.append(f"{path.relative_to(root)} → {name}")
    assert found == []


def test_the_server_uses_of_the_client_what_both_share() -> None:
    found = [
        f"{path.relative_to(SERVER)} → {name}"
        for path in modules(SERVER)
        for name in imports_of(path)
        if name.startswith("stepwire.")
        and name.split(".")[1] not in SHARED_HALF
        and not name.startswith(DRIVER)
        and room_of(path, SERVER) not in CLIENTS_ON_THE_SERVER
    ]
    assert found == []


def test_the_shared_half_stands_alone() -> None:
    found = [
        arrow
        for importing, imported, arrow in arrows("stepwire", CLIENT)
        if importing in SHARED_HALF and imported not in SHARED_HALF
    ]
    assert found == []


def test_nothing_in_the_client_imports_the_server() -> None:
    found = [
        (str(path.relative_to(CLIENT)), name)
        for path in modules(CLIENT)
        for name in imports_of(path)
        if name.partition(".")[0] == "stepwire_server"
    ]
    assert found == []


def test_grpc_is_imported_where_calls_are_made_or_served() -> None:
    importing = {
        (package, room_of(path, root))
        for package, root, _ in ROOMS
        for path in modules(root)
        for name in imports_of(path)
        if name.partition(".")[0] in ("grpc", "grpc_health")
    }
    assert importing <= {
        ("stepwire_server", "rpc"),
        ("stepwire_server", "server"),
        ("stepwire_server", "cli"),
        ("stepwire", "connection"),
        ("stepwire", "wire"),
    }
