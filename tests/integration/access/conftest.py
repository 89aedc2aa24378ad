"""Servers with certificates and tokens."""

from __future__ import annotations

import pathlib
from typing import NamedTuple

import pytest

import stepwire
from stepwire_server.access.identity import Role
from stepwire_server.access.tokens import TokenRecord, digest_of, new_token, write_tokens

trustme = pytest.importorskip("trustme")


class Authority(NamedTuple):
    """A certificate authority with a certificate for this host, in files.

    Attributes:
        ca: the authority's certificate.
        cert: a certificate of "localhost" and 127.0.0.1.
        key: its key.
    """

    ca: str
    cert: str
    key: str

    @property
    def tls(self) -> stepwire.TLS:
        """TLS that trusts the authority."""
        return stepwire.TLS(ca=self.ca)


def authority(folder: pathlib.Path, name: str = "server") -> Authority:
    """Make an authority and a certificate."""
    folder.mkdir(exist_ok=True)
    made = trustme.CA()
    issued = made.issue_cert("localhost", "127.0.0.1", common_name=name)
    paths = [folder / each for each in ("ca.pem", "cert.pem", "key.pem")]
    made.cert_pem.write_to_path(paths[0])
    issued.cert_chain_pems[0].write_to_path(paths[1])
    issued.private_key_pem.write_to_path(paths[2])
    return Authority(*map(str, paths))


class Tokens:
    """A file of tokens.

    Attributes:
        path: the file.
    """

    def __init__(self, path: pathlib.Path) -> None:
        """Start without any."""
        self.path = path
        self._records: list[TokenRecord] = []
        write_tokens(path, [])

    def add(self, name: str, role: Role = Role.TRAINER, tenant: str = "", expires: float | None = None) -> str:
        """Add a token, and return it."""
        token = new_token()
        self._records.append(TokenRecord(name=name, digest=digest_of(token), role=role, tenant=tenant, expires=expires))
        write_tokens(self.path, self._records)
        return token

    def revoke(self, name: str) -> None:
        """Remove a token."""
        self._records = [record for record in self._records if record.name != name]
        write_tokens(self.path, self._records)


@pytest.fixture
def own(tmp_path: pathlib.Path) -> Authority:
    """An authority and a certificate of the server."""
    return authority(tmp_path / "own")


@pytest.fixture
def tokens(tmp_path: pathlib.Path) -> Tokens:
    """A file of tokens."""
    return Tokens(tmp_path / "tokens")
