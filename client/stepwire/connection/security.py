"""The protection of a connection: TLS, and the token that a client shows.

A token never leaves over plaintext that is neither loopback nor a Unix socket: whoever reads it can use it.
"""

from __future__ import annotations

import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

import grpc
import numpy as np

from stepwire.connection.config_file import ConfigFile
from stepwire.errors import InvalidRequestError
from stepwire.optimizers.arguments import checked_instance
from stepwire.wire.addresses import is_on_this_host, unix_path

__all__ = ["PLAIN", "TLS", "Security", "security_of"]

_TOKEN, _TOKEN_FILE = "STEPWIRE_TOKEN", "STEPWIRE_TOKEN_FILE"
_CA, _CERT, _KEY = "STEPWIRE_CA", "STEPWIRE_CERT", "STEPWIRE_CERT_KEY"
_SYSTEM: Final = "system"
_PRINTABLE: Final = re.compile(r"[!-~]{1,4096}")
_NO_FILE: Final = ConfigFile()


class TLS(NamedTuple):
    """The files of TLS on a client; each is PEM.

    Attributes:
        ca: the certificates that the server's is signed by; None for those of gRPC, which are Mozilla's.
        cert: the client's own certificate, for a server that asks for one; None for none.
        key: the private key of `cert`.
    """

    ca: str | None = None
    cert: str | None = None
    key: str | None = None


class Security(NamedTuple):
    """The protection of a connection.

    Attributes:
        tls: the files of TLS; None for plaintext.
        token: the token; empty for none.
        server_name: the name in the server's certificate; empty for the host of the address.
    """

    tls: TLS | None = None
    token: str = ""
    server_name: str = ""

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """The metadata of every call."""
        return (("authorization", f"Bearer {self.token}"),) if self.token else ()

    def channel(self, target: str, address: str, options: Sequence[tuple[str, object]]) -> grpc.Channel:
        """Open a channel.

        Args:
            target: the target as the user wrote it.
            address: the same for gRPC.
            options: the options of the channel.
        """
        if self.tls is None or unix_path(target) is not None:
            return grpc.insecure_channel(address, options=options)
        credentials = grpc.ssl_channel_credentials(
            *(_bytes(each) for each in (self.tls.ca, self.tls.key, self.tls.cert))
        )
        named = [("grpc.ssl_target_name_override", self.server_name)] if self.server_name else []
        return grpc.secure_channel(address, credentials, options=[*options, *named])

    def check(self, target: str) -> None:
        """Refuse what would show a token to others, or cannot be opened.

        Raises:
            InvalidRequestError: the token would leave in plaintext, or a file of TLS cannot be read.
        """
        if self.token and self.tls is None and not is_on_this_host(target):
            raise InvalidRequestError.of(
                "token",
                f"{target!r} is not this host and the connection is not encrypted: the token would travel in the "
                "clear. Give tls=True, or tls=stepwire.TLS(ca=…)",
            )
        if self.tls is None:
            return
        if (self.tls.cert is None) != (self.tls.key is None):
            raise InvalidRequestError.of("tls", "a certificate and its key go together; give both, or none")
        for path in self.tls:
            _bytes(path)


PLAIN: Final = Security()


def security_of(
    tls: bool | TLS | None,
    token: str | None,
    environment: Mapping[str, str] = os.environ,
    file: ConfigFile = _NO_FILE,
) -> Security:
    """Return the protection that arguments ask for, or else the environment, or else the config file.

    Args:
        tls: True for TLS with the usual authorities, or its files; None for STEPWIRE_CA, STEPWIRE_CERT and
            STEPWIRE_CERT_KEY, where STEPWIRE_CA may be "system", or for `ca`, `cert` and `cert_key` of the file.
        token: the token; None for STEPWIRE_TOKEN, or the content of the file that STEPWIRE_TOKEN_FILE, or `token_file`
            of the config file, names.
        environment: the variables.
        file: the config file, as far as it is for the targets.

    Raises:
        InvalidRequestError: the token is none, or its file cannot be read.
    """
    tls = bool(tls) if isinstance(tls, np.bool_) else tls
    if not isinstance(tls, bool):
        checked_instance(tls, (TLS, type(None)), "tls", "give True, or stepwire.TLS(ca=…)")
    if not isinstance(token, str | None):  # its value is a secret, whatever it is
        raise InvalidRequestError.of("token", f"it is of the class {type(token).__name__}; give its text")
    if tls is None:
        named = (_CA, _CERT, _KEY) if environment.get(_CA) else ()
        ca, cert, key = [environment.get(each) for each in named] or (file.ca, file.cert, file.cert_key)
        tls = TLS(None if ca == _SYSTEM else ca, cert or None, key or None) if ca else None
    if token is None:
        token = environment.get(_TOKEN) or ""
        from_environment = environment.get(_TOKEN_FILE)
        if not token and (path := from_environment or file.token_file):
            token = (_bytes(path, _TOKEN_FILE if from_environment else "token_file") or b"").decode("utf-8", "replace")
            token = token.strip()
    if token and not _PRINTABLE.fullmatch(token):
        raise InvalidRequestError.of("token", "it has other characters than printable ASCII; give it as it was made")
    return Security(TLS() if tls is True else tls or None, token)


def _bytes(path: str | None, field: str = "tls") -> bytes | None:
    """Read a file; None for none.

    Raises:
        InvalidRequestError: it cannot be read.
    """
    if path is None:
        return None
    try:
        return pathlib.Path(path).read_bytes()
    except OSError as error:
        raise InvalidRequestError.of(field, f"{path!r} cannot be read: {error.strerror}") from None
    except TypeError:
        raise InvalidRequestError.of(field, f"{path!r:.80} is no path of a file") from None
