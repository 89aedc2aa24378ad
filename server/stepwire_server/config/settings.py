"""The fields of the settings: one frozen record that flags, environment variables and TOML keys are made from."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from stepwire.wire.packets import MOST_SPIN_MICROSECONDS
from stepwire_server.config.constraints import BYTES, KIB, MIB, Count, Positive, Seconds, text
from stepwire_server.config.hosting import HostingSettings

__all__ = ["MIB", "ServerConfig"]


class ServerConfig(HostingSettings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The settings of a server.

    Each field is a flag, an environment variable and a key of the TOML file. The description of a field is the help
    text of its flag. The constructor checks nothing; `load_config` checks every value.
    """

    max_streams: Annotated[
        Positive, Meta(description="The largest number of attached streams at a time; each stream costs a thread.")
    ] = 1024
    tenant_max_sessions: Annotated[
        Count, Meta(description="The largest number of sessions of one tenant. 0 means no limit of its own.")
    ] = 0
    tenant_max_streams: Annotated[
        Count,
        Meta(
            description="The largest number of attached streams of one tenant at a time. 0 means no limit of its own."
        ),
    ] = 0
    tenant_memory: Annotated[
        Count,
        BYTES,
        Meta(description="The bytes that sessions of one tenant may hold, such as 8G. 0 means no limit of its own."),
    ] = 0
    tenant_disk: Annotated[
        Count,
        BYTES,
        Meta(
            description="The bytes of a tenant's checkpoints on the disk, such as 50G; those of parked sessions count. "
            "Beyond them it makes no durable session and saves no checkpoint. 0 means no limit."
        ),
    ] = 0
    tenant_steps_per_second: Annotated[
        Count,
        Meta(
            description="The largest number of steps of one tenant in a second, with those of a second at once. "
            "0 means no limit."
        ),
    ] = 0
    max_kernels: Annotated[
        Positive,
        Meta(
            description="The largest number of compiled kernels on each device: about three for each combination of "
            "rule, options and dtypes. On the CPU a session that needs one more is refused; a GPU unloads another."
        ),
    ] = 512
    tenant_max_kernels: Annotated[
        Count,
        Meta(
            description="The largest number of compiled kernels that sessions of one tenant were the first to need. "
            "0 means no limit of its own."
        ),
    ] = 0
    max_tensors: Annotated[Positive, Meta(description="The largest number of tensors in a session.")] = 65536
    max_chunk_bytes: Annotated[
        int, BYTES, Meta(ge=64 * KIB, le=64 * MIB, description="The largest payload of one message, in bytes.")
    ] = 4 * MIB
    max_lease_seconds: Annotated[
        Seconds, Meta(description="The longest life of an unused session, and the default.")
    ] = 3600.0
    step_idle_seconds: Annotated[
        Seconds, Meta(description="The longest silence inside a step; after it the server drops the stream.")
    ] = 60.0
    drain_seconds: Annotated[Seconds, Meta(description="The time for steps under way after SIGTERM.")] = 30.0
    sweep_seconds: Annotated[
        Seconds, Meta(description="The pause between two searches for expired sessions and silent streams.")
    ] = 1.0
    insecure: Annotated[bool, Meta(description="Allow plaintext on an address that is not loopback.")] = False
    tls_cert: Annotated[
        str,
        Meta(
            description="The file of the server's certificate, PEM, with those that it is signed by. Read again when "
            "it changes. Empty: no TLS."
        ),
        text("a path, or empty", r"^.*$"),
    ] = ""
    tls_key: Annotated[
        str, Meta(description="The file of the certificate's private key, PEM."), text("a path, or empty", r"^.*$")
    ] = ""
    tls_client_ca: Annotated[
        str,
        Meta(
            description="The file of the certificates that clients' certificates are signed by, PEM: then every client "
            "on the port needs one. Empty: clients need none."
        ),
        text("a path, or empty", r"^.*$"),
    ] = ""
    tokens: Annotated[
        str,
        Meta(
            description="The file of the tokens that may call this server, made by `stepwire token create`. Read again "
            "when it changes. Empty: whoever reaches the server may call it."
        ),
        text("a path, or empty", r"^.*$"),
    ] = ""
    jwt_key: Annotated[
        str,
        Meta(
            description="The file of the key that verifies JSON web tokens: a public key, PEM, or a secret. "
            "Ed25519, P-256 and RSA keys serve; a secret has 32 bytes or more. Read again when it changes. Empty: no "
            "such token is accepted."
        ),
        text("a path, or empty", r"^.*$"),
    ] = ""
    jwt_issuer: Annotated[
        str,
        Meta(description="The claim `iss` that a JSON web token needs. Empty: any, or none."),
        text("text, or empty", r"^.*$"),
    ] = ""
    jwt_audience: Annotated[
        str,
        Meta(description="The claim `aud` that a JSON web token needs. Empty: a token that has one is refused."),
        text("text, or empty", r"^.*$"),
    ] = ""
    tenant_weights: Annotated[
        str,
        Meta(
            description="The shares of tenants in an engine that several use at a time: whole numbers from 1 to 999, "
            "such as lab=3,shop=1. Tenants that are not named have 1."
        ),
        text(
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
        text("host:port, or empty", r"^(.+:[0-9]{1,5})?$"),
    ] = ""
    status: Annotated[
        str,
        Meta(
            description="The address of the status page, such as 127.0.0.1:8088. Beyond loopback it needs --tokens, "
            "and a browser asks for a token of the role reader. Empty: none."
        ),
        text("host:port, or empty", r"^(.+:[0-9]{1,5})?$"),
    ] = ""
    status_hosts: Annotated[
        str,
        Meta(
            description="The names by which browsers may ask for the status page besides those of loopback, with "
            "commas between, such as trainer.example.com."
        ),
        text("names of hosts with commas between", r"^([A-Za-z0-9._:\[\]-]+(,[A-Za-z0-9._:\[\]-]+)*)?$"),
    ] = ""
    reflection: Annotated[
        bool,
        Meta(
            description="Tell tools such as grpcurl the methods and messages of the contract, by gRPC's reflection. "
            "With --tokens it needs the role reader."
        ),
    ] = False
    trace_one_in: Annotated[
        Count,
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
    lane_spin_microseconds: Annotated[
        Annotated[int, Meta(ge=0, le=MOST_SPIN_MICROSECONDS)],
        Meta(
            description="How long a compiled lane waits awake for the next step before it sleeps, up to 50. It "
            "saves the wake of a core that is idle, and costs that core. 0 means that it sleeps at once."
        ),
    ] = 0
    cuda_ipc: Annotated[
        bool, Meta(description="Share the memory of a GPU with clients on this machine, by CUDA IPC.")
    ] = True
    handoff_socket: Annotated[
        str,
        Meta(
            description="The path of the Unix socket over which clients fetch shared memory; empty for a private "
            "socket. Containers name a path in a volume that they share."
        ),
        text("an absolute path, or empty", r"^(/.+)?$"),
    ] = ""
    handoff_uids: Annotated[
        str,
        Meta(
            description="The users that may share memory besides root and the user of the server: numbers with commas "
            "between, such as 1000,1001."
        ),
        text("user numbers with commas between, such as 1000,1001", r"^([0-9]{1,10}(,[0-9]{1,10})*)?$"),
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
            "directory:PATH. It needs --shard, and --data-dir, --standby or --standby-of. Empty: none.",
            extra={"allowed": "a path, or empty"},
        ),
    ] = ""
    shard: Annotated[
        str,
        Meta(
            description="The name of this server's shard, such as shard-0, in the directory and for clients of one "
            "name of several servers."
        ),
        text("letters, digits, '.', '_' and '-'", r"^([A-Za-z0-9][A-Za-z0-9._-]{0,63})?$"),
    ] = ""
    advertise: Annotated[
        str,
        Meta(
            description="The address for clients in the directory, such as node7:50051; the port 0 stands for the port "
            "in use. Empty: the address of --bind, or this host's name for an address of all networks."
        ),
        text("host:port, or empty", r"^(\S+:[0-9]{1,5})?$"),
    ] = ""
    parent_pid: Annotated[
        Count,
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

    @property
    def socket_besides(self) -> str:
        """The setting of the Unix socket, where "auto" is none by the side of a port that asks for certificates."""
        return "off" if self.unix_socket == "auto" and self.tls_client_ca else self.unix_socket
