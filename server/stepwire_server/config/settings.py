"""The fields of the settings: one frozen record that flags, environment variables and TOML keys are made from."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

__all__ = ["MIB", "ServerConfig"]

MIB = 1 << 20

_KIB = 1 << 10
_Count = Annotated[int, Meta(ge=0)]
_Positive = Annotated[int, Meta(ge=1)]
# In every source a size may also be text such as 8G or 512MiB; see `parse_bytes`.
_BYTES = Meta(extra={"unit": "bytes"})
# Thirty years at most: dates and waits end before infinity.
_Seconds = Annotated[float, Meta(gt=0, le=1e9, extra={"unit": "seconds"})]


def _text(allowed: str, pattern: str) -> Meta:
    """Return the constraint of a text: its pattern, and the same in words for the error."""
    return Meta(pattern=pattern, extra={"allowed": allowed})


class ServerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The settings of a server.

    Each field is a flag, an environment variable and a key of the TOML file. The description of a field is the help
    text of its flag. The constructor checks nothing; `load_config` checks every value.
    """

    bind: Annotated[
        str,
        Meta(
            description="The address to listen on: host:port, with port 0 for a free port, or unix:/path for a Unix "
            "socket alone.",
            extra={"allowed": "host:port or unix:/path"},
        ),
    ] = "127.0.0.1:50051"
    unix_socket: Annotated[
        str,
        Meta(
            description="A Unix socket to listen on besides the port, for clients on this machine: an absolute path, "
            "auto for a private one, off for none."
        ),
        _text("an absolute path, auto or off", r"^(auto|off|/.+)$"),
    ] = "auto"
    processes: Annotated[
        int,
        Meta(
            ge=1,
            le=1024,
            description="The number of server processes. Each has sessions, threads, a budget and addresses of its "
            "own; ports count up from the port of --bind.",
        ),
    ] = 1
    device: Annotated[
        str,
        Meta(
            description="The devices where sessions live: auto, cpu, cuda (every GPU that works), or GPUs by number, "
            "such as cuda:0,cuda:2."
        ),
        _text(
            "auto, cpu, cuda, or GPUs by number such as cuda:0 or cuda:0,cuda:2",
            r"^(auto|cpu|cuda|cuda:[0-9]{1,3}(,cuda:[0-9]{1,3})*)$",
        ),
    ] = "auto"
    threads: Annotated[
        _Count, Meta(description="The number of CPU threads of the engine; 0 means one for each core.")
    ] = 0
    max_sessions: Annotated[_Positive, Meta(description="The largest number of sessions at a time.")] = 1024
    memory_budget: Annotated[
        _Count,
        _BYTES,
        Meta(
            description="The bytes that sessions may hold on each device, such as 8G. 0 means 80 % of the memory; of a "
            "GPU, 80 % of the memory that is free at start."
        ),
    ] = 0
    gpu_bus_buffers: Annotated[
        int, Meta(ge=3, le=64, description="The number of buffers on the bus of a GPU, in each direction.")
    ] = 4
    gpu_bus_buffer_bytes: Annotated[
        int,
        _BYTES,
        Meta(
            ge=64 * _KIB,
            le=256 * MIB,
            description="The bytes of each buffer, pinned on the host and held on the GPU.",
        ),
    ] = 16 * MIB
    gpu_gradient_cache_bytes: Annotated[
        _Count,
        _BYTES,
        Meta(
            description="The bytes that a GPU keeps for gradients from one step to the next, until memory is short or "
            "the server rests. 0 means a sixteenth of the memory that is free at start."
        ),
    ] = 0
    data_dir: Annotated[
        str,
        Meta(
            description="The folder that keeps sessions beyond the end of the server, for sessions that ask for it. "
            "Empty: every session is in memory alone."
        ),
        _text("a path, or empty", r"^.*$"),
    ] = ""
    checkpoint_store: Annotated[
        str,
        Meta(
            description="The object store that gets a copy of every checkpoint in the data directory: "
            "s3://bucket/prefix, gs://bucket/prefix, az://container/prefix, or file:///path. Credentials come "
            "from the environment. Empty: none."
        ),
        _text("a URL of s3, gs, az or file, or empty", r"^.*$"),  # checked where its text is not repeated
    ] = ""
    checkpoint_seconds: Annotated[
        _Seconds, Meta(description="The time between two checkpoints of a session that names none.")
    ] = 300.0
    checkpoints_kept: Annotated[
        _Positive, Meta(description="The number of automatic checkpoints that a session keeps.")
    ] = 2
    journal_segment_bytes: Annotated[
        int,
        _BYTES,
        Meta(ge=MIB, le=1024 * MIB, description="The bytes of one file of the journal."),
    ] = 64 * MIB
    journal_bytes: Annotated[
        _Positive,
        _BYTES,
        Meta(
            description="The bytes of journal beyond which sessions are checkpointed, so that old files can be removed."
        ),
    ] = 4096 * MIB
    max_streams: Annotated[
        _Positive, Meta(description="The largest number of attached streams at a time; each stream costs a thread.")
    ] = 1024
    tenant_max_sessions: Annotated[
        _Count, Meta(description="The largest number of sessions of one tenant. 0 means no limit of its own.")
    ] = 0
    tenant_max_streams: Annotated[
        _Count,
        Meta(
            description="The largest number of attached streams of one tenant at a time. 0 means no limit of its own."
        ),
    ] = 0
    tenant_memory: Annotated[
        _Count,
        _BYTES,
        Meta(description="The bytes that sessions of one tenant may hold, such as 8G. 0 means no limit of its own."),
    ] = 0
    tenant_disk: Annotated[
        _Count,
        _BYTES,
        Meta(
            description="The bytes of a tenant's checkpoints on the disk, such as 50G; those of parked sessions count. "
            "Beyond them it makes no durable session and saves no checkpoint. 0 means no limit."
        ),
    ] = 0
    tenant_steps_per_second: Annotated[
        _Count,
        Meta(
            description="The largest number of steps of one tenant in a second, with those of a second at once. "
            "0 means no limit."
        ),
    ] = 0
    max_kernels: Annotated[
        _Positive,
        Meta(
            description="The largest number of compiled kernels on each device: about three for each combination of "
            "rule, options and dtypes. On the CPU a session that needs one more is refused; a GPU unloads another."
        ),
    ] = 512
    tenant_max_kernels: Annotated[
        _Count,
        Meta(
            description="The largest number of compiled kernels that sessions of one tenant were the first to need. "
            "0 means no limit of its own."
        ),
    ] = 0
    max_tensors: Annotated[_Positive, Meta(description="The largest number of tensors in a session.")] = 65536
    max_chunk_bytes: Annotated[
        int, _BYTES, Meta(ge=64 * _KIB, le=64 * MIB, description="The largest payload of one message, in bytes.")
    ] = 4 * MIB
    max_lease_seconds: Annotated[
        _Seconds, Meta(description="The longest life of an unused session, and the default.")
    ] = 3600.0
    step_idle_seconds: Annotated[
        _Seconds, Meta(description="The longest silence inside a step; after it the server drops the stream.")
    ] = 60.0
    drain_seconds: Annotated[_Seconds, Meta(description="The time for steps under way after SIGTERM.")] = 30.0
    sweep_seconds: Annotated[
        _Seconds, Meta(description="The pause between two searches for expired sessions and silent streams.")
    ] = 1.0
    insecure: Annotated[bool, Meta(description="Allow plaintext on an address that is not loopback.")] = False
    tls_cert: Annotated[
        str,
        Meta(
            description="The file of the server's certificate, PEM, with those that it is signed by. Read again when "
            "it changes. Empty: no TLS."
        ),
        _text("a path, or empty", r"^.*$"),
    ] = ""
    tls_key: Annotated[
        str, Meta(description="The file of the certificate's private key, PEM."), _text("a path, or empty", r"^.*$")
    ] = ""
    tls_client_ca: Annotated[
        str,
        Meta(
            description="The file of the certificates that clients' certificates are signed by, PEM: then every client "
            "on the port needs one. Empty: clients need none."
        ),
        _text("a path, or empty", r"^.*$"),
    ] = ""
    tokens: Annotated[
        str,
        Meta(
            description="The file of the tokens that may call this server, made by `stepwire token create`. Read again "
            "when it changes. Empty: whoever reaches the server may call it."
        ),
        _text("a path, or empty", r"^.*$"),
    ] = ""
    jwt_key: Annotated[
        str,
        Meta(
            description="The file of the key that verifies JSON web tokens: a public key, PEM, or a secret. "
            "Ed25519, P-256 and RSA keys serve; a secret has 32 bytes or more. Read again when it changes. Empty: no "
            "such token is accepted."
        ),
        _text("a path, or empty", r"^.*$"),
    ] = ""
    jwt_issuer: Annotated[
        str,
        Meta(description="The claim `iss` that a JSON web token needs. Empty: any, or none."),
        _text("text, or empty", r"^.*$"),
    ] = ""
    jwt_audience: Annotated[
        str,
        Meta(description="The claim `aud` that a JSON web token needs. Empty: a token that has one is refused."),
        _text("text, or empty", r"^.*$"),
    ] = ""
    tenant_weights: Annotated[
        str,
        Meta(
            description="The shares of tenants in an engine that several use at a time: whole numbers from 1 to 999, "
            "such as lab=3,shop=1. Tenants that are not named have 1."
        ),
        _text(
            "tenants with weights from 1 to 999, such as lab=3,shop=1",
            r"^([A-Za-z0-9._-]{1,64}=[1-9][0-9]{0,2}(,[A-Za-z0-9._-]{1,64}=[1-9][0-9]{0,2})*)?$",
        ),
    ] = ""
    open_health: Annotated[bool, Meta(description="Answer health checks without a token.")] = True
    metrics: Annotated[
        str,
        Meta(
            description="The address of the metrics for Prometheus, such as 127.0.0.1:9464. Beyond loopback it needs "
            "--tokens, and a scrape a token of the role metrics. Empty: none."
        ),
        _text("host:port, or empty", r"^(.+:[0-9]{1,5})?$"),
    ] = ""
    status: Annotated[
        str,
        Meta(
            description="The address of the status page, such as 127.0.0.1:8088. Beyond loopback it needs --tokens, "
            "and a browser asks for a token of the role reader. Empty: none."
        ),
        _text("host:port, or empty", r"^(.+:[0-9]{1,5})?$"),
    ] = ""
    status_hosts: Annotated[
        str,
        Meta(
            description="The names by which browsers may ask for the status page besides those of loopback, with "
            "commas between, such as trainer.example.com."
        ),
        _text("names of hosts with commas between", r"^([A-Za-z0-9._:\[\]-]+(,[A-Za-z0-9._:\[\]-]+)*)?$"),
    ] = ""
    reflection: Annotated[
        bool,
        Meta(
            description="Tell tools such as grpcurl the methods and messages of the contract, by gRPC's reflection. "
            "With --tokens it needs the role reader."
        ),
    ] = False
    trace_one_in: Annotated[
        _Count,
        Meta(
            description="Trace one step in so many of each session, steps that their clients trace, and slow ones, by "
            "OpenTelemetry. The variables OTEL_… choose the exporter. 0 means no traces."
        ),
    ] = 0
    shared_memory: Annotated[bool, Meta(description="Share memory with clients on this machine.")] = True
    packets: Annotated[
        bool, Meta(description="Step clients on this machine over packets, without gRPC in the way of each step.")
    ] = True
    compiled_lanes: Annotated[
        bool,
        Meta(
            description="Make small steps that come over packets without the interpreter, where one step is like the "
            "one before."
        ),
    ] = True
    cuda_ipc: Annotated[
        bool, Meta(description="Share the memory of a GPU with clients on this machine, by CUDA IPC.")
    ] = True
    handoff_socket: Annotated[
        str,
        Meta(
            description="The path of the Unix socket over which clients fetch shared memory; empty for a private "
            "socket. Containers name a path in a volume that they share."
        ),
        _text("an absolute path, or empty", r"^(/.+)?$"),
    ] = ""
    handoff_uids: Annotated[
        str,
        Meta(
            description="The users that may share memory besides root and the user of the server: numbers with commas "
            "between, such as 1000,1001."
        ),
        _text("user numbers with commas between, such as 1000,1001", r"^([0-9]{1,10}(,[0-9]{1,10})*)?$"),
    ] = ""
    port_file: Annotated[
        str,
        Meta(
            description="The path of a file that the server writes once it listens: a line for the port of each "
            "process, 0 without a port. Empty means no file.",
            extra={"allowed": "a path, or empty"},
        ),
    ] = ""
    directory: Annotated[
        str,
        Meta(
            description="The folder in which servers announce where their shards are, for clients that connect to "
            "directory:PATH. It needs --shard and --data-dir. Empty: none.",
            extra={"allowed": "a path, or empty"},
        ),
    ] = ""
    shard: Annotated[
        str,
        Meta(
            description="The name of this server's shard in the directory, such as shard-0; it stays with the data "
            "directory."
        ),
        _text("letters, digits, '.', '_' and '-'", r"^([A-Za-z0-9][A-Za-z0-9._-]{0,63})?$"),
    ] = ""
    advertise: Annotated[
        str,
        Meta(
            description="The address for clients in the directory, such as node7:50051; the port 0 stands for the port "
            "in use. Empty: the address of --bind, or this host's name for an address of all networks."
        ),
        _text("host:port, or empty", r"^(\S+:[0-9]{1,5})?$"),
    ] = ""
    parent_pid: Annotated[
        _Count,
        Meta(
            description="The number of the process that started this one; at its end the server drains. 0 means none."
        ),
    ] = 0
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], Meta(description="The least level of the log lines.")
    ] = "info"
    log_json: Annotated[
        bool | None,
        Meta(description="Write log lines as JSON; by default lines are JSON unless standard output is a terminal."),
    ] = None
