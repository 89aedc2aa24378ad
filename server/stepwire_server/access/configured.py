"""The certificates and the admission of a server, as its settings name them."""

from __future__ import annotations

import pathlib

from stepwire.errors import InvalidRequestError
from stepwire_server.access.certificates import CertificateFiles
from stepwire_server.access.client_certificates import ClientCertificates
from stepwire_server.access.control import AccessControl
from stepwire_server.access.signed_tokens import SignedTokens
from stepwire_server.access.tokens import TokenFile
from stepwire_server.config import ServerConfig

__all__ = ["access_of"]


def access_of(config: ServerConfig) -> tuple[CertificateFiles | None, AccessControl]:
    """Return the certificates of the port, None for plaintext, and the admission of calls.

    Raises:
        InvalidRequestError: settings contradict each other, or a file is none.
        UnsupportedFeatureError: a package is missing.
    """
    certificates = _certificates(config)
    tokens = TokenFile(pathlib.Path(config.tokens)) if config.tokens else None
    clients = ClientCertificates(certificates) if certificates is not None and config.tls_client_ca else None
    return certificates, AccessControl(
        tokens, signed=_signed_tokens(config), certificates=clients, open_health=config.open_health
    )


def _signed_tokens(config: ServerConfig) -> SignedTokens | None:
    if config.jwt_key:
        return SignedTokens(pathlib.Path(config.jwt_key), issuer=config.jwt_issuer, audience=config.jwt_audience)
    for name in ("jwt_issuer", "jwt_audience"):
        if getattr(config, name):
            raise InvalidRequestError.of(name, "it is of signed tokens, which need --jwt-key; give it too")
    return None


def _certificates(config: ServerConfig) -> CertificateFiles | None:
    if not (config.tls_cert or config.tls_key or config.tls_client_ca):
        return None
    return CertificateFiles(config.tls_cert, config.tls_key, config.tls_client_ca)
