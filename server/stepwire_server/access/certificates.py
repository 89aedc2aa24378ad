"""The certificates of a server: read again when their files change, and checked before they are used."""

from __future__ import annotations

import pathlib
import ssl
import threading
from typing import NamedTuple

import structlog

from stepwire.errors import InvalidRequestError
from stepwire_server.access.watched_files import WatchedFiles

__all__ = ["CertificateFiles", "Certificates"]

_log = structlog.get_logger()


class Certificates(NamedTuple):
    """The certificate that a server shows, and those that it asks for.

    Attributes:
        key: its private key, PEM.
        chain: its certificate and those that it is signed by, PEM.
        client_ca: the certificates that clients' certificates are signed by, PEM; None to ask for none.
        context: the same, for addresses that are not gRPC's.
    """

    key: bytes
    chain: bytes
    client_ca: bytes | None
    context: ssl.SSLContext


class CertificateFiles:
    """The files of a server's certificates. Thread-safe."""

    def __init__(self, certificate: str, key: str, client_ca: str = "") -> None:
        """Read the files.

        Raises:
            InvalidRequestError: a file cannot be read, is no PEM, or the key is of another certificate.
        """
        if not (certificate and key):
            raise InvalidRequestError.of(
                "tls_cert" if key else "tls_key", "TLS needs --tls-cert and --tls-key together; give both"
            )
        self._paths = [pathlib.Path(each) for each in (certificate, key, client_ca) if each]
        self._lock = threading.Lock()
        self._files = WatchedFiles(*self._paths)
        self._present = self._read()

    def present(self) -> Certificates:
        """Return the certificates, read again if a file has changed; those before if the new ones are wrong."""
        with self._lock:
            if self._files.changed():
                try:
                    self._present = self._read()
                    _log.info("certificates read")
                except InvalidRequestError as problem:
                    _log.error("the certificates stay as they were", problem=str(problem))
            return self._present

    def _read(self) -> Certificates:
        certificate, key, *client_ca = self._paths
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(certificate, key, password=_no_password)
        except (OSError, ValueError) as error:  # an SSLError is an OSError
            raise InvalidRequestError.of(
                "tls_cert",
                f"{str(certificate)!r} with the key {str(key)!r}: {_reason(error)}; give a pair of PEM files",
            ) from None
        for path in client_ca:
            try:
                context.load_verify_locations(path)
            except (OSError, ValueError) as error:
                raise InvalidRequestError.of("tls_client_ca", f"{str(path)!r}: {_reason(error)}") from None
            context.verify_mode = ssl.CERT_REQUIRED
        authority = client_ca[0].read_bytes() if client_ca else None
        return Certificates(key.read_bytes(), certificate.read_bytes(), authority, context)


def _no_password() -> str:
    raise ValueError("the key is encrypted, and a server has nobody to ask for the password")


def _reason(error: OSError | ValueError) -> str:
    return getattr(error, "strerror", None) or getattr(error, "reason", None) or str(error)
