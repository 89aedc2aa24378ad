"""Lines that strangers cause: a handshake that fails, and a message that is refused before its call, write none."""

from __future__ import annotations

import pathlib
import socket

import grpc
import pytest

import stepwire
from tests.integration.processes import ServerProcess

trustme = pytest.importorskip("trustme")
pytestmark = pytest.mark.slow

TIMES = 20
STEP = "/stepwire.v1.OptimizerService/Step"


def test_failed_handshakes_and_compressed_messages_write_no_line(tmp_path: pathlib.Path) -> None:
    authority = trustme.CA()
    issued = authority.issue_cert("localhost", "127.0.0.1")
    ca, cert, key = (str(tmp_path / name) for name in ("ca.pem", "cert.pem", "key.pem"))
    authority.cert_pem.write_to_path(ca)
    issued.cert_chain_pems[0].write_to_path(cert)
    issued.private_key_pem.write_to_path(key)
    path = tmp_path / "errors"
    with path.open("w") as errors, ServerProcess("--tls-cert", cert, "--tls-key", key, errors=errors) as process:
        host, _, port = process.target.rpartition(":")
        for _ in range(TIMES):
            with socket.create_connection((host, int(port)), timeout=60) as stranger:
                stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
                while stranger.recv(1000):  # until the server closes it
                    pass
        credentials = grpc.ssl_channel_credentials(authority.cert_pem.bytes())
        with grpc.secure_channel(process.target, credentials, compression=grpc.Compression.Gzip) as channel:
            for _ in range(TIMES):
                with pytest.raises(grpc.RpcError) as refused:
                    channel.unary_unary(STEP)(bytes(10_000), timeout=60.0)
                assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED
        with stepwire.connect(process.target, tls=stepwire.TLS(ca=ca)) as client:
            assert client.info().sessions == 0
    assert path.read_text() == ""
