"""Guards of what is loaded: a light client, a domain without gRPC, no pickle, optional parts optional."""

from __future__ import annotations

import re

import pytest

import stepwire
import stepwire_server
from tests.guards.source import (
    ADAPTERS,
    ROOT,
    imports_of,
    loaded_by,
    modules_of,
    own_framework,
    run,
)

HEAVY = {"cupy", "numba", "torch", "ray", "jax", "stepwire_server", "opentelemetry"}


def test_the_client_is_light() -> None:
    """Promise 4. Every module of the package, not only what `import stepwire` happens to load."""
    loaded = loaded_by("stepwire", "stepwire.client", *modules_of(stepwire))
    assert HEAVY & set(loaded["stepwire.client"]) == set()
    assert HEAVY & set().union(*map(set, loaded.values())) == set()


@pytest.mark.parametrize(("adapter", "framework"), ADAPTERS.items())
def test_an_adapter_says_what_to_install(adapter: str, framework: str) -> None:
    said = run(
        f"import json, sys\nsys.modules[{framework!r}] = None\n"
        f"try:\n    import {adapter}\nexcept ImportError as error:\n    print(json.dumps(str(error)))"
    )
    assert f"{adapter} needs" in said
    assert re.search(rf"pip install [a-z ]*{framework}", said)


@pytest.mark.parametrize(("adapter", "framework"), ADAPTERS.items())
def test_an_adapter_loads_its_own_framework_and_nothing_of_the_server(adapter: str, framework: str) -> None:
    pytest.importorskip(framework)
    assert HEAVY & set(loaded_by(adapter)[adapter]) == {framework}


def test_importing_the_package_alone_loads_next_to_nothing() -> None:
    assert {"grpc", "numpy", "google"} & set(loaded_by("stepwire")["stepwire"]) == set()


def test_the_client_needs_nothing_of_the_servers() -> None:
    """Its distribution installs grpcio, protobuf, numpy and ml-dtypes, and none of these."""
    extras = (
        "google_crc32c",
        "msgspec",
        "structlog",
        "typer",
        "rich",
        "grpc_health",
        "sklearn",
        "matplotlib",
        *sorted(HEAVY),
    )
    assert set(loaded_by(*modules_of(stepwire), missing=(*extras, *sorted(HEAVY)))) == set(modules_of(stepwire))


# Rooms that load gRPC; `__main__` is `cli`'s door.
GRPC_ROOMS = {"rpc", "server", "testing", "cluster", "cli", "demo", "__main__"}


def test_the_domain_knows_no_grpc() -> None:
    """Every module of every room but those that serve calls or make them."""
    names = [name for name in modules_of(stepwire_server) if "numba" not in name and "." in name]
    domain = [name for name in names if name.split(".")[1] not in GRPC_ROOMS | {"doctor"}]
    assert len(domain) > 80
    assert "grpc" not in loaded_by(*domain)[domain[-1]]


def test_the_parent_of_several_processes_knows_no_grpc() -> None:
    """It must not: gRPC does not survive a fork, and a parent that only watches has no use for its threads."""
    loaded = loaded_by(
        "stepwire_server.cli.main", "stepwire_server.processes.supervisor", "stepwire_server.processes.split_settings"
    )
    assert {name: packages for name, packages in loaded.items() if "grpc" in packages} == {}


def test_a_server_that_starts_loads_no_framework() -> None:
    loaded = loaded_by("stepwire_server.server", "stepwire_server.cli.main")
    for name, packages in loaded.items():
        assert {"torch", "jax", "ray", "cupy", "pytest", "sklearn", "matplotlib"} & set(packages) == set(), name


def test_nobody_imports_pickle() -> None:
    """Promise 5: nothing that comes over the wire or from a file of a client's is ever unpickled."""
    unsafe = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "torch", "copyreg"}
    found = [
        (str(path.relative_to(ROOT)), name)
        for folder in ("client", "server")
        for path in (ROOT / folder).rglob("*.py")
        for name in imports_of(path)
        if name.partition(".")[0] in unsafe and name.partition(".")[0] != own_framework(path)
    ]
    assert found == []


def test_everything_imports_and_steps_without_numba_and_cupy_and_traces_nothing() -> None:
    """Without traces no thread of client or server calls anything of theirs."""
    names = [name for name in modules_of(stepwire_server) if "numba" not in name]
    loaded = loaded_by(*names, missing=("numba", "cupy", "llvmlite"))
    assert list(loaded) == names
    answer = run(
        "import json, sys, threading\n"
        "sys.modules.update(dict.fromkeys(('numba', 'cupy', 'llvmlite')))\n"
        "import numpy as np, stepwire, structlog, stepwire_server.testing\n"
        "called = set()\n"
        "threading.setprofile(lambda frame, event, _: called.add(frame.f_code.co_filename))\n"
        "structlog.configure(logger_factory=structlog.ReturnLoggerFactory())\n"
        "with stepwire_server.testing.serving(device='auto') as target, stepwire.connect(target) as client:\n"
        "    with client.create_session({'w': np.ones(2, np.float32)}, optimizer=stepwire.Adam(lr=0.5)) as session:\n"
        "        called.clear()\n"
        "        stepped = session.step({'w': np.float32([1, -1])})['w'].tolist()\n"
        "print(json.dumps([stepped, sorted(called), 'opentelemetry' in sys.modules]))\n"
    )
    stepped, called, loaded = answer
    assert stepped == pytest.approx([0.5, 1.5], rel=1e-6)
    assert any(name.endswith("links/observed.py") for name in called)
    assert any(name.endswith("rpc/attach.py") for name in called)
    assert not [name for name in called if "trac" in name.rpartition("stepwire")[2]] and not loaded
