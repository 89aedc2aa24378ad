"""The certificates of clients after the handshake: a connection outlives neither its certificate nor its authority.

The handshake verifies a certificate once, and gRPC keeps a connection for as long as it lasts. So the end of each
certificate is compared at every call and step. After the authorities have changed, each certificate is verified again,
once, by those that the server asks for now. gRPC tells the certificate alone, without those behind it. So an authority
in between has to be among those that the server asks for.
"""

from __future__ import annotations

import datetime
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, NamedTuple

import structlog

from stepwire.errors import AuthenticationError, InvalidRequestError
from stepwire_server.access.certificates import CertificateFiles

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.x509.verification import ClientVerifier, Policy

__all__ = ["ClientCertificate", "ClientCertificates"]

_log = structlog.get_logger()

_MOST_KNOWN: Final = 1024


class ClientCertificate(NamedTuple):
    """The certificate of a connection.

    Attributes:
        name: its subject, such as "CN=ann".
        expires: the time of its end, in seconds since 1970.
        rotation: how often the authorities had changed when it was verified.
        pem: the certificate itself.
    """

    name: str
    expires: float
    rotation: int
    pem: bytes


class ClientCertificates:
    """Tells which certificates of clients count now. Thread-safe."""

    def __init__(self, files: CertificateFiles, clock: Callable[[], float] = time.time) -> None:
        """Begin with the authorities that the handshakes ask for now.

        Args:
            files: the files of the server's certificates, with those of the clients' authorities.
            clock: returns seconds since 1970.

        Raises:
            InvalidRequestError: the package `cryptography` is missing, or cannot read the authorities.
        """
        self.clock = clock
        self._files = files
        self._authorities = files.present().client_ca or b""
        self._rotation = 0
        self._verifier = _Verifier(self._authorities)
        self._known: dict[bytes, ClientCertificate] = {}
        self._lock = threading.Lock()
        self._on_change: Callable[[], object] = lambda: None

    def on_change(self, tell: Callable[[], object]) -> None:
        """Call a function after the authorities have changed."""
        self._on_change = tell

    def look(self) -> None:
        """Read the authorities again, if their file has changed."""
        if self._rotated():
            self._on_change()

    def admit(self, pem: bytes) -> ClientCertificate:
        """Return the certificate of a connection that may call.

        Args:
            pem: the certificate.

        Raises:
            AuthenticationError: it has expired, or no authority vouches for it any more.
        """
        certificate = self._known.get(pem) or self._verified(pem)
        self.check(certificate)
        return certificate

    def check(self, certificate: ClientCertificate) -> None:
        """Refuse a certificate that was admitted before.

        Raises:
            AuthenticationError: as `admit`.
        """
        if certificate.expires <= self.clock():
            raise _expired(certificate)
        if certificate.rotation != self._rotation and certificate.pem not in self._known:
            self._verified(certificate.pem)

    def _rotated(self) -> bool:
        """Take over new authorities; all certificates are verified anew."""
        present = self._files.present().client_ca or b""
        with self._lock:
            if present == self._authorities:
                return False
            self._authorities = present
            try:
                self._verifier = _Verifier(present)
            except InvalidRequestError as problem:  # handshakes have them; nobody passes who is not vouched for here
                _log.error("the authorities of clients stay as they were", problem=str(problem))
                return False
            self._known = {}
            self._rotation += 1
        _log.info("authorities of clients read", rotation=self._rotation)
        return True

    def _verified(self, pem: bytes) -> ClientCertificate:
        if self._rotated():
            self._on_change()
        with self._lock:
            verifier, rotation, known = self._verifier, self._rotation, self._known
        read = verifier.read(pem)
        name = read.subject.rfc4514_string()
        certificate = ClientCertificate(name, read.not_valid_after_utc.timestamp(), rotation, pem)
        if certificate.expires <= self.clock():
            raise _expired(certificate)
        # Before the first change, the handshake of every connection has verified what it shows, by these authorities.
        if rotation and not verifier.vouches_for(read, self.clock()):
            raise AuthenticationError(
                f"no authority in --tls-client-ca vouches for the certificate {name!r} any more; connect with one that "
                "the new authority has signed",
                metadata={"certificate": name},
            )
        with self._lock:
            if len(known) >= _MOST_KNOWN:
                known.clear()
            known[pem] = certificate
        return certificate


def _expired(certificate: ClientCertificate) -> AuthenticationError:
    return AuthenticationError(
        f"the certificate {certificate.name!r} has expired; connect with a new one",
        metadata={"certificate": certificate.name},
    )


class _Verifier:
    """Reads certificates, and verifies them by authorities."""

    def __init__(self, authorities: bytes) -> None:
        """Trust authorities, PEM.

        Raises:
            InvalidRequestError: `cryptography` is missing, or cannot read them.
        """
        try:
            from cryptography import x509
        except ImportError:
            raise InvalidRequestError.of(
                "tls_client_ca",
                "certificates of clients need the package cryptography, which is missing here; "
                "`pip install 'stepwire[tls]'`",
            ) from None
        try:
            self._authorities = x509.load_pem_x509_certificates(authorities)
        except ValueError as error:
            raise InvalidRequestError.of(
                "tls_client_ca", f"it has a certificate that cannot be read: {error}"
            ) from None

    def read(self, pem: bytes) -> x509.Certificate:
        """Return a certificate.

        Raises:
            AuthenticationError: it cannot be read.
        """
        from cryptography import x509

        try:
            return x509.load_pem_x509_certificate(pem)
        except ValueError as error:
            raise AuthenticationError(f"the client's certificate cannot be read: {error}; use another one") from None

    def vouches_for(self, certificate: x509.Certificate, now: float) -> bool:
        """Tell whether an authority has signed a certificate."""
        from cryptography.x509.verification import VerificationError

        if certificate in self._authorities:  # it vouches for itself
            return True
        try:
            self._client_verifier(now).verify(certificate, [])
        except VerificationError:
            return False
        return True

    def _client_verifier(self, now: float) -> ClientVerifier:
        """Return a verifier that minds signatures, times and the marks of authorities.

        The rules of public websites are stricter: a name among alternative names, for one. Authorities for clients are
        private ones, and the handshake has none of these rules either.
        """
        from cryptography import x509
        from cryptography.x509.verification import Criticality, ExtensionPolicy, PolicyBuilder, Store

        anything = ExtensionPolicy.permit_all()
        authority = anything.require_present(x509.BasicConstraints, Criticality.AGNOSTIC, _require_authority)
        return (
            PolicyBuilder()
            .store(Store(self._authorities))
            .time(datetime.datetime.fromtimestamp(now, datetime.UTC))
            .extension_policies(ca_policy=authority, ee_policy=anything)
            .build_client_verifier()
        )


def _require_authority(policy: Policy, certificate: x509.Certificate, constraints: x509.BasicConstraints) -> None:
    if not constraints.ca:
        raise ValueError("it is no authority")
