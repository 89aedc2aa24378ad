"""Guards of the house: who may import whom, what is public, and that tables and generated code are whole."""

from __future__ import annotations

import ast
import concurrent.futures
import functools
import importlib
import json
import pathlib
import pkgutil
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

import stepwire
import stepwire_server
from stepwire import errors
from stepwire.status import error_from_call
from stepwire_server.interceptor import ErrorInterceptor

ROOT = pathlib.Path(__file__).parents[1]
CLIENT, SERVER = ROOT / "client" / "stepwire", ROOT / "server" / "stepwire_server"
GENERATOR = "1.76.0"

PUBLIC = [
    "LAMB",
    "LARS",
    "SGD",
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "AuthenticationError",
    "Client",
    "DataLossError",
    "DeadlineExceededError",
    "FencedError",
    "GroupResult",
    "Hyperparameters",
    "InvalidRequestError",
    "Lion",
    "LossScaling",
    "NAdam",
    "NonFiniteGradientError",
    "Optimizer",
    "PermissionDeniedError",
    "RAdam",
    "RMSprop",
    "Reason",
    "ResourceExhaustedError",
    "Retry",
    "Schedule",
    "ServerError",
    "ServerInfo",
    "Session",
    "SessionInfo",
    "SessionNotFoundError",
    "SessionNotReadyError",
    "SessionState",
    "ShardedClient",
    "ShardedSession",
    "StateChangedError",
    "StepMismatchError",
    "StepResult",
    "StepwireError",
    "TransportChoice",
    "UnavailableError",
    "UnsupportedFeatureError",
    "__version__",
    "connect",
]


# --- imports --------------------------------------------------------------------------------------------------


def run(code: str) -> Any:
    """Run code in a Python of its own and return what it prints as JSON."""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def loaded_by(*modules: str, missing: tuple[str, ...] = ()) -> dict[str, list[str]]:
    """Import modules one after another, without some packages; returns the top-level packages loaded after each."""
    return dict(
        run(
            "import importlib, json, sys\n"
            f"sys.modules.update(dict.fromkeys({missing!r}))\n"
            "seen = {}\n"
            f"for name in {modules!r}:\n"
            "    importlib.import_module(name)\n"
            "    seen[name] = sorted({module.partition('.')[0] for module, at in sys.modules.items() if at})\n"
            "print(json.dumps(seen))"
        )
    )


# Doors to the frameworks people train with: who imports one of them has asked for the framework.
ADAPTERS = {"stepwire.optax": "jax", "stepwire.torch": "torch"}


def modules_of(package: Any) -> list[str]:
    """Name the modules of a package, adapters left out: walking into one would import its framework."""
    folders = [(package.__path__, f"{package.__name__}.")]
    names = [package.__name__]
    for path, prefix in folders:
        for found in pkgutil.iter_modules(path, prefix):
            if found.name in ADAPTERS or found.name.endswith("__main__"):
                continue
            names.append(found.name)
            if found.ispkg:
                folders.append(([f"{folder}/{found.name.rpartition('.')[2]}" for folder in path], f"{found.name}."))
    return names


def imports_of(path: pathlib.Path) -> Iterator[str]:
    """Yield every module that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide where a name comes from"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


HEAVY = {"cupy", "numba", "torch", "ray", "jax", "stepwire_server"}


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
    assert "pip install 'stepwire[" in said


@pytest.mark.parametrize(("adapter", "framework"), ADAPTERS.items())
def test_an_adapter_loads_its_own_framework_and_nothing_of_the_server(adapter: str, framework: str) -> None:
    pytest.importorskip(framework)
    assert HEAVY & set(loaded_by(adapter)[adapter]) == {framework}


def test_importing_the_package_alone_loads_next_to_nothing() -> None:
    assert {"grpc", "numpy", "google"} & set(loaded_by("stepwire")["stepwire"]) == set()


def test_the_client_needs_nothing_of_the_servers() -> None:
    """Its distribution installs grpcio, protobuf, numpy and ml-dtypes, and none of these."""
    extras = ("msgspec", "structlog", "typer", "rich", "grpc_health", "sklearn", "matplotlib", *sorted(HEAVY))
    assert set(loaded_by(*modules_of(stepwire), missing=extras)) == set(modules_of(stepwire))


def test_nothing_in_the_client_imports_the_server() -> None:
    found = [
        (str(path.relative_to(ROOT)), name)
        for path in CLIENT.rglob("*.py")
        for name in imports_of(path)
        if name.partition(".")[0] == "stepwire_server"
    ]
    assert found == []


DOMAIN = (
    "memory",
    "gate",
    "slot",
    "active",
    "exact_norm",
    "loss_scale",
    "schedules",
    "plan",
    "progress",
    "ledger",
    "rules",
    "engines",
    "engines.numpy_kernels",
    "engines.numba_kernels",
    "engines.cuda",
    "staging",
    "stepping",
    "commit",
    "session",
    "sharing.memory",
    "sharing.handoff",
    "sharing.listener",
    "sharing.buffers",
    "sharing.offering",
    "sharing.step",
    "places",
    "registry",
)


def test_the_domain_knows_no_grpc() -> None:
    loaded = loaded_by(*(f"stepwire_server.{name}" for name in DOMAIN))
    assert {name: packages for name, packages in loaded.items() if "grpc" in packages} == {}


def test_the_parent_of_several_processes_knows_no_grpc() -> None:
    """It must not: gRPC does not survive a fork, and a parent that only watches has no use for its threads."""
    loaded = loaded_by("stepwire_server.cli", "stepwire_server.supervisor", "stepwire_server.division")
    assert {name: packages for name, packages in loaded.items() if "grpc" in packages} == {}


def test_a_server_that_starts_loads_no_framework() -> None:
    loaded = loaded_by("stepwire_server.app", "stepwire_server.cli")
    for name, packages in loaded.items():
        assert {"torch", "jax", "ray", "cupy", "pytest", "sklearn", "matplotlib"} & set(packages) == set(), name


# Rooms, and the rooms they must not know (docs/design.md).
STRANGERS = {
    "rules": ("engines", "plan", "session", "registry", "staging", "commit", "service", "stream", "config"),
    "engines": ("session", "registry", "ledger", "staging", "plan", "commit", "service", "stream", "config"),
    "active.py": ("engines", "rules", "plan", "progress", "staging", "session"),
    "schedules.py": ("engines", "rules", "plan", "session"),
    "exact_norm.py": ("engines", "rules", "plan", "staging", "session"),
    "loss_scale.py": ("engines", "rules", "plan", "staging", "session"),
    "plan.py": ("progress", "staging", "stepping", "commit", "session", "registry", "config"),
    "progress.py": ("staging", "stepping", "commit", "session", "ledger", "registry"),
    "staging.py": ("progress", "stepping", "commit", "session", "ledger", "registry"),
    "stepping.py": ("commit", "session", "ledger", "registry", "service", "stream", "transfer"),
    "commit.py": ("session", "ledger", "registry", "slot", "service", "stream", "transfer", "decoding", "encoding"),
    "session.py": ("service", "stream", "transfer", "registry", "decoding", "encoding", "config", "app"),
    "sharing": ("service", "stream", "transfer", "registry", "decoding", "encoding", "config", "app", "listening"),
    "places.py": ("session", "plan", "registry", "service", "stream", "transfer", "config", "app"),
    "registry.py": ("service", "stream", "transfer", "decoding", "encoding", "config", "app"),
    "ledger.py": ("session", "engines", "staging", "registry", "service"),
    "service.py": ("rules",),
    "stream.py": ("rules", "service"),
    "transfer.py": ("rules", "service"),
}


@pytest.mark.parametrize("room", STRANGERS)
def test_rooms_keep_to_themselves(room: str) -> None:
    paths = [SERVER / room] if room.endswith(".py") else sorted((SERVER / room).rglob("*.py"))
    assert paths
    strangers = tuple(f"stepwire_server.{name}" for name in STRANGERS[room])
    found = [
        (path.name, name)
        for path in paths
        for name in imports_of(path)
        if name in strangers or name.startswith(tuple(f"{stranger}." for stranger in strangers))
    ]
    assert found == []


def _own_framework(path: pathlib.Path) -> str:
    """Name the framework whose adapter a file belongs to; empty for the others."""
    module = ".".join(path.relative_to(ROOT / path.relative_to(ROOT).parts[0]).with_suffix("").parts)
    return next((framework for name, framework in ADAPTERS.items() if f"{module}.".startswith(f"{name}.")), "")


def test_nobody_imports_pickle() -> None:
    """Promise 5: nothing that comes over the wire or from a file of a client's is ever unpickled."""
    unsafe = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "torch", "copyreg"}
    found = [
        (str(path.relative_to(ROOT)), name)
        for folder in ("client", "server")
        for path in (ROOT / folder).rglob("*.py")
        for name in imports_of(path)
        if name.partition(".")[0] in unsafe and name.partition(".")[0] != _own_framework(path)
    ]
    assert found == []


def test_everything_imports_and_steps_without_numba_and_cupy() -> None:
    names = [name for name in modules_of(stepwire_server) if "numba" not in name]
    loaded = loaded_by(*names, missing=("numba", "cupy", "llvmlite"))
    assert list(loaded) == names
    answer = run(
        "import json, sys\n"
        "sys.modules.update(dict.fromkeys(('numba', 'cupy', 'llvmlite')))\n"
        "import numpy as np, stepwire, structlog, stepwire_server.testing\n"
        "structlog.configure(logger_factory=structlog.ReturnLoggerFactory())\n"
        "with stepwire_server.testing.serving(device='auto') as target, stepwire.connect(target) as client:\n"
        "    with client.create_session({'w': np.ones(2, np.float32)}, optimizer=stepwire.Adam(lr=0.5)) as session:\n"
        "        print(json.dumps(session.step({'w': np.float32([1, -1])})['w'].tolist()))\n"
    )
    assert answer == pytest.approx([0.5, 1.5], rel=1e-6)


# --- what is public -------------------------------------------------------------------------------------------


def order(name: str) -> tuple[bool, bool, str]:
    """Sort as ruff's RUF022 does: constants, classes, everything else."""
    return not name.isupper(), not name[0].isupper(), name


MODULES = [name for package in (stepwire, stepwire_server) for name in modules_of(package) if "_pb2" not in name]


@pytest.mark.parametrize("name", MODULES)
def test_every_module_says_what_it_offers(name: str) -> None:
    if name == "stepwire.v1":
        return  # a folder of generated code
    if "numba" in name:
        pytest.importorskip("numba")
    module = importlib.import_module(name)
    assert isinstance(module.__all__, list)
    assert module.__all__ == sorted(set(module.__all__), key=order)
    for public in module.__all__:
        assert getattr(module, public) is not None
        assert not public.startswith("_") or public == "__version__"


def test_the_public_names_are_these() -> None:
    assert stepwire.__all__ == PUBLIC
    assert dir(stepwire) == sorted(PUBLIC)
    namespace: dict[str, Any] = {}
    exec("from stepwire import *", namespace)
    assert set(PUBLIC) <= set(namespace)


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_is_documented_where_it_lives(name: str) -> None:
    value = getattr(stepwire, name)
    assert getattr(value, "__doc__", None)
    if name != "__version__":
        assert value.__module__.partition(".")[0] == "stepwire"


def test_a_name_that_is_none_is_told() -> None:
    with pytest.raises(AttributeError, match="module 'stepwire' has no attribute 'Sgd'"):
        stepwire.Sgd  # noqa: B018


# --- the table of errors --------------------------------------------------------------------------------------


def subclasses(base: type[errors.StepwireError]) -> set[type[errors.StepwireError]]:
    return {base}.union(*map(subclasses, base.__subclasses__()))


def own_classes() -> set[type[errors.StepwireError]]:
    return {kind for kind in subclasses(errors.StepwireError) if kind.__module__ == "stepwire.errors"}


def test_every_reason_has_a_row_and_every_row_a_real_status() -> None:
    assert set(errors.ERROR_TABLE) == set(errors.Reason)
    assert {row.code for row in errors.ERROR_TABLE.values()} <= {code.name for code in grpc.StatusCode}
    assert all(reason.value == reason.name for reason in errors.Reason)


def test_every_exception_is_in_the_table_under_its_own_reason() -> None:
    """But for the base, which is never raised."""
    assert {row.exception for row in errors.ERROR_TABLE.values()} == own_classes() - {errors.StepwireError}
    for kind in own_classes() - {errors.StepwireError}:
        assert errors.ERROR_TABLE[kind("x").reason].exception is kind


def test_a_class_has_one_status_and_the_drawing_shows_it() -> None:
    codes: dict[str, set[str]] = {}
    for row in errors.ERROR_TABLE.values():
        codes.setdefault(row.exception.__name__, set()).add(row.code)
    drawn = dict(re.findall(r"── (\w+) +([A-Z_]+)$", errors.__doc__ or "", re.MULTILINE))
    assert codes == {name: {code} for name, code in drawn.items()}


def test_every_exception_is_public() -> None:
    assert {kind.__name__ for kind in own_classes()} <= set(PUBLIC) & set(errors.__all__)


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK])
def test_every_status_becomes_an_error(code: grpc.StatusCode) -> None:
    error = errors.error_from_code(code.name, "text")
    assert type(error) in own_classes() - {errors.StepwireError}
    assert str(error) == f"text ({code.name})"


def test_the_contracts_comments_speak_of_the_tables_rows() -> None:
    """Each `CODE/REASON` in the comments is a row, and every row but the client's own is mentioned."""
    text = "".join(path.read_text() for path in sorted((ROOT / "proto").rglob("*.proto")))
    pairs = set(re.findall(r"\b([A-Z_]{5,})/([A-Z_]{5,})\b", text))
    rows = {(row.code, reason.value) for reason, row in errors.ERROR_TABLE.items()}
    assert pairs - rows == set()
    of_the_client = {"UNREACHABLE", "DEADLINE_EXCEEDED"}
    without_pair = {"UNAUTHENTICATED", "PERMISSION_DENIED", "INTERNAL"}
    for reason in set(errors.Reason) - of_the_client:
        assert re.search(rf"\b{reason}\b", text), f"{reason} is nowhere in the contract"
    assert {reason for _, reason in rows} - {reason for _, reason in pairs} - of_the_client - without_pair <= {
        "STEP_SUPERSEDED"
    }


class Raiser(grpc.GenericRpcHandler):
    """Raises the error of the reason that a request names."""

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        return grpc.unary_unary_rpc_method_handler(self._raise)

    def _raise(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        reason = errors.Reason(request.decode())
        raise errors.ERROR_TABLE[reason].exception(
            f"about {reason}", reason=reason, metadata={"value": 7, "name": "é\n%"}, retry_after_seconds=0.25
        )


@pytest.fixture(scope="module")
def raiser() -> Iterator[grpc.Channel]:
    server = grpc.server(concurrent.futures.ThreadPoolExecutor(2), interceptors=[ErrorInterceptor()])
    server.add_generic_rpc_handlers((Raiser(),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield channel
    server.stop(0).wait()


@pytest.mark.parametrize("reason", errors.Reason)
def test_every_error_survives_a_real_call(raiser: grpc.Channel, reason: errors.Reason) -> None:
    with pytest.raises(grpc.RpcError) as failed:
        raiser.unary_unary("/any/thing")(reason.encode(), timeout=30.0)
    assert isinstance(failed.value, grpc.Call)
    error, row = error_from_call(failed.value), errors.ERROR_TABLE[reason]
    assert failed.value.code() is grpc.StatusCode[row.code]
    assert (type(error), error.reason, str(error)) == (row.exception, reason, f"about {reason}")
    assert (error.metadata, error.retry_after_seconds) == ({"value": "7", "name": "é\n%"}, 0.25)


# --- files ----------------------------------------------------------------------------------------------------


def generator() -> str | None:
    """Find a Python that has the pinned toolchain: this one, or the one that `make proto` made."""
    probe = "import importlib.metadata as m; print(m.version('grpcio-tools'))"
    for python in (sys.executable, str(ROOT / ".venv-proto" / "bin" / "python")):
        if shutil.which(python) is None:
            continue
        done = subprocess.run([python, "-c", probe], capture_output=True, text=True, check=False)
        if done.stdout.strip() == GENERATOR:
            return python
    return None


def test_generated_code_is_fresh(tmp_path: pathlib.Path) -> None:
    """As `make proto` would make it now, to the byte."""
    python = generator()
    if python is None:
        pytest.skip(f"grpcio-tools=={GENERATOR} is neither installed here nor in .venv-proto; `make proto` installs it")
    protoc = [python, "-m", "grpc_tools.protoc", "-Iproto"]
    sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "proto").rglob("*.proto"))
    service = [source for source in sources if source.endswith("_service.proto")]
    for command in (
        [*protoc, f"--python_out={tmp_path}", f"--pyi_out={tmp_path}", *sources],
        [*protoc, f"--grpc_python_out={tmp_path}", *service],
    ):
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    fresh = {path.name: path.read_bytes() for path in (tmp_path / "stepwire" / "v1").iterdir()}
    committed = {path.name: path.read_bytes() for path in (CLIENT / "v1").glob("*_pb2*.py*")}
    assert set(fresh) == set(committed)
    assert [name for name in fresh if fresh[name] != committed[name]] == []


@functools.cache
def tracked() -> tuple[pathlib.Path, ...]:
    """List the files that are, or would be, in the repository."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("no git repository here")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return tuple(ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file())


def test_no_file_tells_of_the_machine_it_was_written_on() -> None:
    homes = re.compile(r"(?:^|[\s\"'`=(:])/(?:home|Users|root)/[\w.-]+|[A-Z]:\\Users\\")
    found = []
    for path in tracked():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if homes.search(text) or str(ROOT) in text:
            found.append(str(path.relative_to(ROOT)))
    assert found == []


def test_nothing_that_is_made_is_kept() -> None:
    made = re.compile(r"(^|/)(__pycache__|\.venv[^/]*|\.hypothesis|\.pytest_cache|dist|build)/|\.(pyc|so|egg-info)$")
    assert [str(path.relative_to(ROOT)) for path in tracked() if made.search(str(path.relative_to(ROOT)))] == []


def test_folders_that_are_no_packages_have_no_init() -> None:
    for folder in ("proto", "client", "server", "docker"):
        assert not (ROOT / folder / "__init__.py").exists()
    assert {path.parent.name for path in (CLIENT, SERVER)} == {"client", "server"}
    for package in (CLIENT, SERVER):
        assert (package / "py.typed").read_bytes() == b""
