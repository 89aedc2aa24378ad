"""Reflection: off by default, and then admitted by roles, with the contract as it is."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pb2

from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire_server.access.identity import Role
from stepwire_server.access.tokens import TokenRecord, digest_of, write_tokens
from tests.support.numpy_server import numpy_server

_REASON = "grpcio-reflection is not installed: pip install 'stepwire[reflection]'"
reflection_pb2 = pytest.importorskip("grpc_reflection.v1alpha.reflection_pb2", reason=_REASON)

METHOD = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"


def asked(target: str, requests: Sequence[Any], token: str = "") -> list[Any]:
    with grpc.insecure_channel(target) as channel:
        call: Any = channel.stream_stream(
            METHOD,
            request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
            response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
        )
        metadata = [("authorization", f"Bearer {token}")] if token else []
        return list(call(iter(requests), metadata=metadata, timeout=120.0))


def test_a_server_tells_its_contract_if_it_is_allowed_to() -> None:
    name = "stepwire.v1.OptimizerService"
    requests = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol=name),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="no.such.Thing"),
    ]
    with numpy_server(reflection=True) as server:
        services, files, nothing = asked(server.target, requests)
    listed = {service.name for service in services.list_services_response.service}
    assert listed == {name, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
    told = [
        descriptor_pb2.FileDescriptorProto.FromString(each)
        for each in files.file_descriptor_response.file_descriptor_proto
    ]
    wanted = descriptor_pb2.FileDescriptorProto()
    pb.DESCRIPTOR.CopyToProto(wanted)
    assert wanted in told
    assert nothing.error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0]


def test_without_the_setting_there_is_no_such_method() -> None:
    with numpy_server() as server, pytest.raises(grpc.RpcError) as refused:
        asked(server.target, [reflection_pb2.ServerReflectionRequest(list_services="")])
    assert refused.value.code() == grpc.StatusCode.UNIMPLEMENTED  # type: ignore[attr-defined]


def test_with_tokens_it_is_for_readers(tmp_path: pathlib.Path) -> None:
    path, request = tmp_path / "tokens", reflection_pb2.ServerReflectionRequest(list_services="")
    roles = {"reads": Role.READER, "counts": Role.METRICS}
    write_tokens(path, [TokenRecord(name=name, digest=digest_of(f"sw_{name}"), role=roles[name]) for name in roles])
    with numpy_server(reflection=True, tokens=str(path)) as server:
        assert len(asked(server.target, [request], "sw_reads")) == 1
        for token, code in (("", "UNAUTHENTICATED"), ("sw_counts", "PERMISSION_DENIED")):
            with pytest.raises(grpc.RpcError) as refused:
                asked(server.target, [request], token)
            assert refused.value.code().name == code  # type: ignore[attr-defined]
