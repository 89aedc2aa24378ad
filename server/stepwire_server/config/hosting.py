"""The settings of hosting: where a server listens, where its sessions live, and what keeps them beyond its end."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from stepwire_server.config.constraints import BYTES, KIB, MIB, Count, Positive, Seconds, text

__all__ = ["HostingSettings"]


class HostingSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The first of the settings; `ServerConfig` has the others."""

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
            "auto for a private one, off for none. With --tls-client-ca auto is off: nobody shows a certificate there."
        ),
        text("an absolute path, auto or off", r"^(auto|off|/.+)$"),
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
        text(
            "auto, cpu, cuda, or GPUs by number such as cuda:0 or cuda:0,cuda:2",
            r"^(auto|cpu|cuda|cuda:[0-9]{1,3}(,cuda:[0-9]{1,3})*)$",
        ),
    ] = "auto"
    threads: Annotated[
        Count, Meta(description="The number of CPU threads of the engine; 0 means one for each core.")
    ] = 0
    max_sessions: Annotated[Positive, Meta(description="The largest number of sessions at a time.")] = 1024
    memory_budget: Annotated[
        Count,
        BYTES,
        Meta(
            description="The bytes that sessions may hold on each device, such as 8G. 0 means 80 % of the memory; of a "
            "GPU, 80 % of the memory that is free at start."
        ),
    ] = 0
    memory_limit: Annotated[
        Count,
        BYTES,
        Meta(
            description="The bytes of memory that this process may have in all, such as 16G. From 90 % of them on, "
            "calls and streams are ended that wait for messages, of which gRPC may have parts. 0 means the "
            "memory of the machine or the container."
        ),
    ] = 0
    gpu_bus_buffers: Annotated[
        int, Meta(ge=3, le=64, description="The number of buffers on the bus of a GPU, in each direction.")
    ] = 4
    gpu_bus_buffer_bytes: Annotated[
        int,
        BYTES,
        Meta(
            ge=64 * KIB,
            le=256 * MIB,
            description="The bytes of each buffer, pinned on the host and held on the GPU.",
        ),
    ] = 16 * MIB
    gpu_gradient_cache_bytes: Annotated[
        Count,
        BYTES,
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
        text("a path, or empty", r"^.*$"),
    ] = ""
    checkpoint_store: Annotated[
        str,
        Meta(
            description="The object store that gets a copy of every checkpoint in the data directory: "
            "s3://bucket/prefix, gs://bucket/prefix, az://container/prefix, or file:///path. Credentials come "
            "from the environment. Empty: none."
        ),
        text("a URL of s3, gs, az or file, or empty", r"^.*$"),  # checked where its text is not repeated
    ] = ""
    checkpoint_seconds: Annotated[
        Seconds, Meta(description="The time between two checkpoints of a session that names none.")
    ] = 300.0
    checkpoints_kept: Annotated[
        Positive, Meta(description="The number of automatic checkpoints that a session keeps.")
    ] = 2
    journal_segment_bytes: Annotated[
        int,
        BYTES,
        Meta(ge=MIB, le=1024 * MIB, description="The bytes of one file of the journal."),
    ] = 64 * MIB
    journal_bytes: Annotated[
        Positive,
        BYTES,
        Meta(
            description="The bytes of journal beyond which sessions are checkpointed, so that old files can be removed."
        ),
    ] = 4096 * MIB
    standby: Annotated[
        str,
        Meta(
            description="A standby may follow this server, for sessions with durability replicated. required: they "
            "take steps with a standby alone. preferred: they go on without one, after a claim in --directory. Empty: "
            "no standby; one that was promoted goes on as with preferred."
        ),
        text("required, preferred, or empty", r"^(required|preferred)?$"),
    ] = ""
    standby_of: Annotated[
        str,
        Meta(
            description="The address of the primary, host:port: this server follows it, and serves once it is "
            "promoted. directory: it follows whoever has the shard by the claims in --directory, and serves where "
            "nobody has. Empty: this server serves."
        ),
        text("host:port, directory, or empty", r"^(\S+:[0-9]{1,5}|directory)?$"),
    ] = ""
    standby_token: Annotated[
        str,
        Meta(
            description="The file of the token that this standby shows its primary, of the role standby. Empty: none."
        ),
        text("a path, or empty", r"^.*$"),
    ] = ""
    standby_ca: Annotated[
        str,
        Meta(
            description="The file of the certificates that the primary's is signed by, PEM; --tls-cert is this "
            "standby's own. Empty: the connection is not encrypted."
        ),
        text("a path, or empty", r"^.*$"),
    ] = ""
    promote_after_seconds: Annotated[
        Count,
        Meta(
            description="The time in whole seconds without its primary after which a standby is promoted by itself. "
            "0 means never."
        ),
    ] = 0
    digest_seconds: Annotated[
        Seconds, Meta(description="The time between two comparisons of all replicated sessions with the standby's.")
    ] = 600.0
