"""Settings: flag > environment > file > default, and nothing unknown or wrong among them."""

from __future__ import annotations

import pathlib
import re
from typing import Any

import msgspec
import pytest

from stepwire.errors import InvalidRequestError
from stepwire_server.config import MIB, ServerConfig, environment_of, kubernetes_variables, load_config, named_bind
from stepwire_server.config.parse import SETTINGS, format_bytes, parse_bytes
from tests.guards.source import SERVER, modules

# A value of each setting that is not the default: as the environment has it, and as it is meant.
SAMPLES: dict[str, tuple[str, Any]] = {
    "bind": ("0.0.0.0:1", "0.0.0.0:1"),
    "unix_socket": ("/run/stepwire/stepwire.sock", "/run/stepwire/stepwire.sock"),
    "processes": ("4", 4),
    "device": ("cuda:3,cuda:0", "cuda:3,cuda:0"),
    "threads": ("7", 7),
    "standby": ("preferred", "preferred"),
    "standby_of": ("node7:50051", "node7:50051"),
    "standby_token": ("/etc/stepwire/standby", "/etc/stepwire/standby"),
    "standby_ca": ("/etc/stepwire/ca.pem", "/etc/stepwire/ca.pem"),
    "promote_after_seconds": ("30", 30),
    "digest_seconds": ("60", 60.0),
    "max_sessions": ("5", 5),
    "data_dir": ("/var/lib/stepwire", "/var/lib/stepwire"),
    "checkpoint_store": ("s3://bucket/prefix", "s3://bucket/prefix"),
    "checkpoint_seconds": ("12.5", 12.5),
    "checkpoints_kept": ("7", 7),
    "journal_segment_bytes": ("8388608", 8 << 20),
    "journal_bytes": ("1000000", 1_000_000),
    "memory_budget": ("123456789012", 123456789012),
    "memory_limit": ("16G", 16 << 30),
    "gpu_bus_buffers": ("5", 5),
    "gpu_bus_buffer_bytes": ("65536", 65536),
    "gpu_gradient_cache_bytes": ("7", 7),
    "max_streams": ("6", 6),
    "tenant_max_sessions": ("7", 7),
    "tenant_max_streams": ("8", 8),
    "tenant_memory": ("9M", 9 * MIB),
    "tenant_disk": ("9G", 9 << 30),
    "tenant_steps_per_second": ("13", 13),
    "max_kernels": ("11", 11),
    "tenant_max_kernels": ("12", 12),
    "max_tensors": ("8", 8),
    "max_chunk_bytes": ("65536", 65536),
    "max_lease_seconds": ("12.5", 12.5),
    "step_idle_seconds": ("3", 3.0),
    "drain_seconds": ("0.5", 0.5),
    "sweep_seconds": ("0.25", 0.25),
    "insecure": ("true", True),
    "tls_cert": ("/run/tls/server.pem", "/run/tls/server.pem"),
    "tls_key": ("/run/tls/server.key", "/run/tls/server.key"),
    "tls_client_ca": ("/run/tls/clients.pem", "/run/tls/clients.pem"),
    "tokens": ("/run/tokens.json", "/run/tokens.json"),
    "jwt_key": ("/run/jwt.pem", "/run/jwt.pem"),
    "jwt_issuer": ("https://login.example.com", "https://login.example.com"),
    "jwt_audience": ("stepwire", "stepwire"),
    "metrics": ("127.0.0.1:9464", "127.0.0.1:9464"),
    "status": ("127.0.0.1:8088", "127.0.0.1:8088"),
    "status_hosts": ("a.example,b.example", "a.example,b.example"),
    "reflection": ("true", True),
    "trace_one_in": ("1000", 1000),
    "tenant_weights": ("lab=3,shop=1", "lab=3,shop=1"),
    "open_health": ("false", False),
    "port_file": ("/run/port", "/run/port"),
    "directory": ("/run/directory", "/run/directory"),
    "shard": ("shard-0", "shard-0"),
    "advertise": ("node7:50051", "node7:50051"),
    "shared_memory": ("false", False),
    "packets": ("false", False),
    "compiled_lanes": ("false", False),
    "lane_spin_microseconds": ("50", 50),
    "cuda_ipc": ("false", False),
    "handoff_socket": ("/run/stepwire/handoff.sock", "/run/stepwire/handoff.sock"),
    "handoff_uids": ("1000,1001", "1000,1001"),
    "parent_pid": ("17", 17),
    "log_level": ("debug", "debug"),
    "log_json": ("false", False),
}


SAMPLES_IN_ORDER = [field.name for field in msgspec.structs.fields(ServerConfig)]


def load(flags: dict[str, Any] | None = None, environment: dict[str, str] | None = None, **options: Any) -> Any:
    return load_config(flags or {}, environment=environment or {}, **options)


def write(folder: pathlib.Path, text: str) -> pathlib.Path:
    path = folder / "server.toml"
    path.write_text(text)
    return path


def toml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)


def test_there_is_a_sample_of_every_setting() -> None:
    assert set(SAMPLES) == set(SAMPLES_IN_ORDER)
    assert all(getattr(ServerConfig(), name) != value for name, (_, value) in SAMPLES.items())


def test_without_anything_the_defaults_hold() -> None:
    assert load() == ServerConfig()
    assert (ServerConfig().bind, ServerConfig().max_chunk_bytes, ServerConfig().insecure) == (
        "127.0.0.1:50051",
        4 * MIB,
        False,
    )


@pytest.mark.parametrize("name", SAMPLES)
def test_every_setting_comes_from_each_place(name: str, tmp_path: pathlib.Path) -> None:
    text, value = SAMPLES[name]
    expected = msgspec.structs.replace(ServerConfig(), **{name: value})
    assert load({name: value}) == expected
    assert load(environment={f"STEPWIRE_{name.upper()}": text}) == expected
    assert load(file=write(tmp_path, f"{name} = {toml(value)}\n")) == expected


def test_a_flag_beats_the_environment_and_that_the_file(tmp_path: pathlib.Path) -> None:
    path = write(tmp_path, "max_sessions = 2\nmax_streams = 2\nthreads = 2\n")
    environment = {"STEPWIRE_MAX_SESSIONS": "3", "STEPWIRE_MAX_STREAMS": "3"}
    loaded = load({"max_sessions": 4, "max_streams": None}, environment, file=path)
    assert (loaded.max_sessions, loaded.max_streams, loaded.threads) == (4, 3, 2)
    assert loaded.max_tensors == ServerConfig().max_tensors


def test_a_flag_may_say_no() -> None:
    assert load({"insecure": False}, {"STEPWIRE_INSECURE": "true"}).insecure is False


def test_the_environment_may_name_the_file_and_a_flag_another(tmp_path: pathlib.Path) -> None:
    one = write(tmp_path, "threads = 2\n")
    other = tmp_path / "other.toml"
    other.write_text("threads = 3\n")
    environment = {"STEPWIRE_CONFIG": str(one)}
    assert load(environment=environment).threads == 2
    assert load(environment=environment, file=other).threads == 3
    assert load(environment={"STEPWIRE_CONFIG": ""}).threads == 0


def test_variables_of_others_are_left_alone() -> None:
    environment = {
        "STEPWIRE_CACHE_DIR": "/x",
        "STEPWIRE_TARGET": "h:1",
        "STEPWIRE_TRANSPORT": "tcp",
        "PATH": "/bin",
        "OTHER_THREADS": "3",
    }
    assert load(environment=environment) == ServerConfig()


@pytest.mark.parametrize("flags", [{}, *({name: value} for name, (_, value) in SAMPLES.items())], ids=str)
def test_settings_survive_the_environment_of_another_process(flags: dict[str, Any]) -> None:
    config = load(flags)
    base = {"STEPWIRE_CONFIG": "/nowhere.toml", "STEPWIRE_THREADS": "63", "STEPWIRE_LOG_JSON": "true", "PATH": "/bin"}
    environment = environment_of(config, base)
    assert load(environment=environment) == config
    assert environment["PATH"] == "/bin"


@pytest.mark.parametrize(
    "name",
    [
        "STEPWIRE_THREAD",
        "STEPWIRE_MEMORY_BUDGET_BYTES",
        "STEPWIRE_",
        "STEPWIRE_FOO_BAR",
        "STEPWIRE_PORT",
        "STEPWIRE_PORT_FIEL",
        "STEPWIRE_SERVICE",
    ],
)
def test_an_unknown_variable_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"environment variable {name} is unknown; use one of: STEPWIRE_BIND"):
        load(environment={name: "1"})


KUBERNETES = {
    "STEPWIRE_SERVICE_HOST": "10.0.0.7",
    "STEPWIRE_SERVICE_PORT": "50051",
    "STEPWIRE_SERVICE_PORT_GRPC": "50051",
    "STEPWIRE_PORT": "tcp://10.0.0.7:50051",
    "STEPWIRE_PORT_50051_TCP": "tcp://10.0.0.7:50051",
    "STEPWIRE_PORT_50051_TCP_PROTO": "tcp",
    "STEPWIRE_PORT_50051_TCP_PORT": "50051",
    "STEPWIRE_PORT_50051_TCP_ADDR": "10.0.0.7",
    "STEPWIRE_GPU_0_SERVICE_HOST": "10.0.0.8",
    "STEPWIRE_GPU_0_PORT": "udp://10.0.0.8:1",
    "STEPWIRE_GPU_0_PORT_1_UDP_ADDR": "10.0.0.8",
    # of a link of Docker's
    "STEPWIRE_NAME": "/client/stepwire",
    "STEPWIRE_PORT_50051_TCP_START": "tcp://10.0.0.7:50051",
    "STEPWIRE_PORT_50051_TCP_PORT_END": "50052",
    "STEPWIRE_ENV_STEPWIRE_BIND": "0.0.0.0:50051",
}


def test_variables_that_kubernetes_makes_of_a_service_are_ignored() -> None:
    environment = KUBERNETES | {"STEPWIRE_THREADS": "3", "STEPWIRE_PORT_FILE": "/run/port", "OTHER_PORT": "tcp://h:1"}
    assert load(environment=environment) == ServerConfig(threads=3, port_file="/run/port")
    assert kubernetes_variables(environment) == sorted(KUBERNETES)
    assert not set(environment_of(ServerConfig(), environment)) & set(KUBERNETES)


def test_a_port_without_the_address_of_a_service_is_an_unknown_variable() -> None:
    with pytest.raises(InvalidRequestError, match="environment variable STEPWIRE_PORT is unknown"):
        load(environment={"STEPWIRE_PORT": "50051"})
    with pytest.raises(InvalidRequestError, match="environment variable STEPWIRE_NAME is unknown"):
        load(environment={"STEPWIRE_NAME": "mine"})
    assert kubernetes_variables({"STEPWIRE_PORT": "50051", "STEPWIRE_NAME": "mine"}) == []


@pytest.mark.parametrize(
    ("text", "key"), [("thread = 3", "thread"), ("[server]\nthreads = 3", "server"), ("slots = '8G'", "slots")]
)
def test_an_unknown_key_is_refused_with_its_file_and_the_known_ones(
    tmp_path: pathlib.Path, text: str, key: str
) -> None:
    path = write(tmp_path, text)
    with pytest.raises(InvalidRequestError) as refused:
        load(file=path)
    assert str(refused.value) == (
        f"settings file {str(path)!r}: the key {key!r} is unknown; use one of: {', '.join(SAMPLES_IN_ORDER)}"
    )
    assert refused.value.metadata == {"field": "settings"}


def test_an_unknown_flag_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="the setting 'thread' is unknown; use one of: bind, "):
        load({"thread": 3})


def test_the_environment_may_name_the_address() -> None:
    assert named_bind({"STEPWIRE_BIND": "h:1"}) == "h:1"
    assert named_bind({}) == ""


def test_the_environment_is_read_in_one_room() -> None:
    """Engines and what they stand on take it as an argument, whose default it is."""
    reading = {
        str(path.relative_to(SERVER))
        for path in modules(SERVER)
        if re.search(r"\b(os\.environ|os\.getenv|from os import .*environ)\b", path.read_text())
    }
    assert reading == {"config/environment.py"}


WRONG = {
    "bind": [5, None],
    "unix_socket": ["", "on", "relative/path", 5],
    "processes": [0, -1, 1025, "many"],
    "device": ["gpu", "cuda:", "cuda:x", "CPU", "", "cuda:0,", "cuda:0,1", "cpu,cuda:0", "cuda,cuda:1", 5],
    "threads": [-1, "many", 1.5, ""],
    "max_sessions": [0, -5, "x"],
    "memory_budget": [-1, "-1G", "8X", "G", "", 1.5, "1.5"],
    "memory_limit": [-1, "8X"],
    "gpu_bus_buffers": [0, 2, 65],
    "gpu_bus_buffer_bytes": [0, 65535, 256 * MIB + 1, "63K", "1G"],
    "gpu_gradient_cache_bytes": [-1, "1GG", "1e999G"],
    "max_streams": [0],
    "tenant_max_sessions": [-1],
    "tenant_max_streams": [-1],
    "tenant_memory": [-1],
    "max_tensors": [0],
    "max_chunk_bytes": [0, 65535, 64 * MIB + 1],
    "max_lease_seconds": [0, -1.0, "soon", "inf", "nan", 1e300],
    "step_idle_seconds": [0.0, "inf", "nan"],
    "drain_seconds": [-0.1, "inf", "nan"],
    "sweep_seconds": [0, "inf", "nan"],
    "insecure": ["maybe", 3, "yes please"],
    "tenant_weights": ["lab", "lab=0", "lab=1000", "lab=1,", "lab=-1", "la b=1"],
    "port_file": [7],
    "directory": [7],
    "shard": ["../a", "a b", ".a", "a" * 65],
    "advertise": ["node7", "node 7:1", "node7:port"],
    "shared_memory": ["perhaps"],
    "packets": ["perhaps"],
    "compiled_lanes": ["perhaps"],
    "lane_spin_microseconds": [51, -1, "soon"],
    "cuda_ipc": ["perhaps"],
    "handoff_socket": ["relative/path", 5],
    "handoff_uids": ["root", "1000,", "-1", "1000 1001"],
    "parent_pid": [-1, "init"],
    "log_level": ["loud", "", "DEBUG"],
    "log_json": ["perhaps"],
}


@pytest.mark.parametrize(
    ("name", "value"),
    [pytest.param(name, value, id=f"{name}={value!r}") for name, values in WRONG.items() for value in values],
)
def test_a_wrong_value_is_refused_by_its_name(name: str, value: Any, tmp_path: pathlib.Path) -> None:
    """From every source, which the message names with the value and what is allowed."""
    rest = f" is {value!r}; it must be {SETTINGS[name].allowed}"
    if value is not None:
        with pytest.raises(InvalidRequestError) as refused:
            load({name: value})
        assert str(refused.value) == f"--{name.replace('_', '-')}{rest}"
        assert refused.value.metadata == {"field": name}
    if isinstance(value, str):
        with pytest.raises(InvalidRequestError) as refused:
            load(environment={f"STEPWIRE_{name.upper()}": value})
        assert str(refused.value) == f"STEPWIRE_{name.upper()}{rest}"
    if isinstance(value, (str, int)):
        path = write(tmp_path, f"{name} = {value!r}\n")
        with pytest.raises(InvalidRequestError) as refused:
            load(file=path)
        assert str(refused.value) == f"settings file {str(path)!r}: {name}{rest}"


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("processes", "a whole number from 1 to 1024"),
        ("max_sessions", "a whole number from 1 up"),
        ("device", "auto, cpu, cuda, or GPUs by number such as cuda:0 or cuda:0,cuda:2"),
        ("gpu_bus_buffer_bytes", "a number of bytes from 64KiB to 256MiB, such as 8M, 8MiB or 8388608"),
        ("memory_budget", "a number of bytes from 0 up, such as 8M, 8MiB or 8388608"),
        ("drain_seconds", "a number of seconds above 0 and not above 1000000000"),
        ("log_level", "debug, info, warning or error"),
        ("log_json", "true or false"),
        ("insecure", "true or false"),
    ],
)
def test_what_is_allowed_is_told_in_words(name: str, allowed: str) -> None:
    assert SETTINGS[name].allowed == allowed


def test_every_setting_is_described() -> None:
    for setting in SETTINGS.values():
        assert setting.description.endswith("."), setting
        assert all(len(sentence.split()) <= 25 for sentence in setting.description.split(". ")), setting


BYTES = [name for name in SAMPLES_IN_ORDER if SETTINGS[name].unit == "bytes"]


def test_sizes_are_these() -> None:
    assert BYTES == [
        "memory_budget",
        "memory_limit",
        "gpu_bus_buffer_bytes",
        "gpu_gradient_cache_bytes",
        "journal_segment_bytes",
        "journal_bytes",
        "tenant_memory",
        "tenant_disk",
        "max_chunk_bytes",
    ]


@pytest.mark.parametrize("name", BYTES)
def test_sizes_are_read_alike_from_every_source(name: str, tmp_path: pathlib.Path) -> None:
    assert getattr(load({name: "1M"}), name) == MIB
    assert getattr(load(environment={SETTINGS[name].variable: "1MiB"}), name) == MIB
    assert getattr(load(file=write(tmp_path, f"{name} = '1mb'\n")), name) == MIB


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", 0),
        ("123", 123),
        ("8G", 8 << 30),
        ("512MiB", 512 << 20),
        ("512mb", 512 << 20),
        ("1.5k", 1536),
        (" 2T ", 2 << 40),
        ("7B", 7),
    ],
)
def test_bytes_are_read_as_people_write_them(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected
    assert parse_bytes(format_bytes(expected)) == expected


@pytest.mark.parametrize("text", ["", "G", "many", "8X", "1e999", "1e999G", "inf", "nan", "nanG", "8GG", "0x10", "1.5"])
def test_what_is_no_number_of_bytes_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("count_bytes", "text"), [(0, "0"), (1000, "1000"), (65536, "64KiB"), (8 * MIB, "8MiB"), (3 << 40, "3TiB")]
)
def test_bytes_are_written_as_people_read_them(count_bytes: int, text: str) -> None:
    assert format_bytes(count_bytes) == text


@pytest.mark.parametrize("content", [b"threads = ", b"threads = 1\nthreads = 2\n", b"\xff\xfe"])
def test_a_file_that_is_no_toml_is_refused_with_its_path(tmp_path: pathlib.Path, content: bytes) -> None:
    path = tmp_path / "server.toml"
    path.write_bytes(content)
    with pytest.raises(InvalidRequestError) as refused:
        load(file=path)
    assert str(refused.value).startswith(f"settings file {str(path)!r}: ")


def test_a_file_that_is_not_there_is_refused_with_its_path(tmp_path: pathlib.Path) -> None:
    with pytest.raises(InvalidRequestError, match="No such file"):
        load(file=tmp_path / "missing.toml")


def test_settings_are_fixed_and_named() -> None:
    with pytest.raises(AttributeError):
        ServerConfig().threads = 3  # type: ignore[misc]
    with pytest.raises(TypeError):
        ServerConfig("127.0.0.1:1")  # type: ignore[misc]
