"""Certificates of clients after the handshake: their end, and authorities that changed."""

from __future__ import annotations

import datetime
import pathlib
import sys
from typing import Any

import pytest

from stepwire.errors import AuthenticationError, InvalidRequestError
from stepwire_server.access.certificates import CertificateFiles
from stepwire_server.access.client_certificates import ClientCertificates

trustme = pytest.importorskip("trustme")
pytest.importorskip("cryptography")

END = datetime.datetime(2040, 1, 1, tzinfo=datetime.UTC)


class Clients:
    """A server's files, and what it knows of its clients.

    Attributes:
        ca: the authority of the clients.
        now: the time, in seconds since 1970.
        known: the tested object.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        own, self.ca = trustme.CA(), trustme.CA()
        server = own.issue_cert("localhost")
        self._path = folder / "clients.pem"
        self.write(self.ca)
        server.cert_chain_pems[0].write_to_path(folder / "cert.pem")
        server.private_key_pem.write_to_path(folder / "key.pem")
        files = CertificateFiles(str(folder / "cert.pem"), str(folder / "key.pem"), str(self._path))
        self.now = END.timestamp() - 1000
        self.known = ClientCertificates(files, lambda: self.now)

    def write(self, *authorities: Any) -> None:
        self.write_bytes(b"".join(each.cert_pem.bytes() for each in authorities))

    def write_bytes(self, data: bytes) -> None:
        self._path.write_bytes(data)


def pem(authority: Any, name: str = "ann", end: datetime.datetime = END, **options: Any) -> bytes:
    """Make a certificate."""
    issued = authority.issue_cert(f"{name}.example", common_name=name, not_after=end, **options)
    return bytes(issued.cert_chain_pems[0].bytes())


def signed_by(issuer: bytes, key: bytes) -> bytes:
    """Make a certificate without alternative names, signed by the key of another one."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    signer: Any = serialization.load_pem_private_key(key, None)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "plain")])
    subject_of = x509.load_pem_x509_certificate(issuer).subject
    public = ec.generate_private_key(ec.SECP256R1()).public_key()
    builder = x509.CertificateBuilder(subject_of, name, public, 7, END - datetime.timedelta(days=9), END)
    return builder.sign(signer, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


@pytest.fixture
def clients(tmp_path: pathlib.Path) -> Clients:
    return Clients(tmp_path)


def test_a_certificate_counts_until_its_end(clients: Clients) -> None:
    admitted = clients.known.admit(pem(clients.ca))
    assert (admitted.name.split(",")[0], admitted.expires) == ("CN=ann", END.timestamp())
    clients.now = END.timestamp() - 1
    clients.known.check(admitted)
    clients.now += 1
    for late in (lambda: clients.known.check(admitted), lambda: clients.known.admit(admitted.pem)):
        with pytest.raises(AuthenticationError, match="has expired; connect with a new one") as caught:
            late()
        assert caught.value.metadata == {"certificate": admitted.name}


def test_after_a_change_a_certificate_counts_whose_authority_is_still_there(clients: Clients) -> None:
    ann, told, following = clients.known.admit(pem(clients.ca)), list[str](), trustme.CA()
    clients.known.on_change(lambda: told.append("changed"))
    clients.known.look()
    assert told == []
    clients.write(clients.ca, following)
    clients.known.look()
    assert told == ["changed"]
    clients.known.check(ann)
    assert clients.known.admit(ann.pem).rotation == 1
    assert clients.known.admit(pem(following, "bob")).rotation == 1
    clients.write(following)
    clients.known.look()
    for out in (lambda: clients.known.check(ann), lambda: clients.known.admit(ann.pem)):
        with pytest.raises(AuthenticationError, match="no authority in --tls-client-ca vouches for .*CN=ann"):
            out()
    clients.known.admit(pem(following, "bob"))


def test_a_new_connection_brings_a_change_before_the_next_sweep(clients: Clients) -> None:
    ann, following, told = clients.known.admit(pem(clients.ca)), trustme.CA(), list[str]()
    clients.known.on_change(lambda: told.append("changed"))
    clients.write(following)
    clients.known.admit(pem(following))
    assert told == ["changed"]
    with pytest.raises(AuthenticationError, match="vouches"):
        clients.known.check(ann)


def test_a_certificate_without_alternative_names_is_as_good_as_another(clients: Clients) -> None:
    """The handshake has let it in; the rules of public websites would not."""
    root = trustme.CA()
    certificate = signed_by(root.cert_pem.bytes(), root.private_key_pem.bytes())
    clients.write(root)
    assert clients.known.admit(certificate).name == "CN=plain"
    assert clients.known.admit(certificate).rotation == 1


def test_a_strangers_certificate_is_refused_once_each_is_verified_here(clients: Clients) -> None:
    clients.write(clients.ca, trustme.CA())
    with pytest.raises(AuthenticationError, match="vouches"):
        clients.known.admit(pem(trustme.CA()))
    clients.known.admit(pem(clients.ca))


def test_a_certificate_that_is_no_authority_vouches_for_nobody_but_itself(clients: Clients) -> None:
    leaf = clients.ca.issue_cert("leaf.example", not_after=END)
    clients.write_bytes(leaf.cert_chain_pems[0].bytes())
    clients.known.look()
    with pytest.raises(AuthenticationError, match="vouches"):
        clients.known.admit(signed_by(leaf.cert_chain_pems[0].bytes(), leaf.private_key_pem.bytes()))
    assert clients.known.admit(leaf.cert_chain_pems[0].bytes()).rotation == 1


def test_bytes_that_are_no_certificate_are_refused(clients: Clients) -> None:
    with pytest.raises(AuthenticationError, match="cannot be read"):
        clients.known.admit(b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")


def test_many_certificates_are_not_all_kept(clients: Clients, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stepwire_server.access.client_certificates._MOST_KNOWN", 2)
    admitted = [clients.known.admit(pem(clients.ca, f"c{number}")) for number in range(4)]
    assert len(clients.known._known) == 2
    for each in admitted:
        clients.known.check(each)


def test_without_the_package_the_server_names_it(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography", None)
    with pytest.raises(InvalidRequestError, match=r"the package cryptography, .*pip install 'stepwire\[tls\]'"):
        Clients(tmp_path)
