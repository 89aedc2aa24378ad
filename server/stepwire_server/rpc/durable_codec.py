"""The contract's messages, for data that outlives the server."""

from __future__ import annotations

from google.protobuf import json_format

from stepwire.errors import DataLossError, Reason
from stepwire.v1 import session_pb2, step_pb2
from stepwire_server.config import MIB, ServerConfig
from stepwire_server.records.session_config import SessionConfig
from stepwire_server.records.step_request import StepRequest
from stepwire_server.rpc.decode_config import decode_session_config
from stepwire_server.rpc.decode_step import decode_step_request
from stepwire_server.rpc.encode import encode_config

__all__ = ["DurableCodec"]

_LONGEST_SECONDS = 1e9
_MOST_TENSORS = 1 << 31


class DurableCodec:
    """Encodes and decodes configs and openings of steps. The limits of today do not refuse sessions of yesterday."""

    def __init__(self) -> None:
        """Be ready."""
        self._limits = ServerConfig(
            data_dir="/",
            standby="required",
            max_tensors=_MOST_TENSORS,
            max_lease_seconds=_LONGEST_SECONDS,
            max_chunk_bytes=64 * MIB,
        )

    def encode_config(self, config: SessionConfig) -> bytes:
        """See `Codec`."""
        return encode_config(config, whole=True).SerializeToString()

    def config_text(self, config: SessionConfig) -> str:
        """See `Codec`."""
        return json_format.MessageToJson(encode_config(config, whole=True), preserving_proto_field_name=True)

    def decode_config(self, data: bytes) -> SessionConfig:
        """See `Codec`."""
        try:
            message = session_pb2.SessionConfig.FromString(data)
        except Exception as error:  # protobuf's DecodeError has no importable common base across versions
            raise DataLossError(
                f"a session's config cannot be decoded: {error}; restore its folder from a copy",
                reason=Reason.CHECKPOINT_DAMAGED,
            ) from error
        return decode_session_config(message, self._limits)

    def decode_opening(self, data: bytes, config: SessionConfig) -> StepRequest:
        """See `Codec`."""
        return decode_step_request(step_pb2.StepBegin.FromString(data), config, self._limits.max_chunk_bytes)
