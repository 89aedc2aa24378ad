"""The address of a server as people write it, and as gRPC reads it."""

from __future__ import annotations

import ipaddress
import os
import pathlib
import urllib.parse
from typing import Final

from stepwire.errors import InvalidRequestError

__all__ = [
    "MAX_UNIX_PATH_BYTES",
    "boot_id",
    "checked_unix_path",
    "grpc_target",
    "is_on_this_host",
    "named_host",
    "unix_path",
    "unix_target",
]

_UNIX: Final = "unix:"
# Schemes of gRPC's. The second kind has names that only gRPC's resolvers understand.
_RESOLVED: Final = ("dns", "ipv4", "ipv6")
_OTHER: Final = ("unix-abstract", "vsock", "xds", "google-c2p", "passthrough")
_EXAMPLE: Final = "a target is host:port, such as 'localhost:50051', or unix:/path"
_LARGEST_PORT: Final = 65535
MAX_UNIX_PATH_BYTES: Final = 107
"""The longest path that the kernel's `sockaddr_un` has space for, without the zero at its end."""
_BOOT_ID: Final = pathlib.Path("/proc/sys/kernel/random/boot_id")


def unix_path(target: str) -> str | None:
    """Return the path in a target such as `unix:/run/stepwire.sock` or `unix:///run/stepwire.sock`; None in others."""
    if not target.startswith(_UNIX):
        return None
    path = target.removeprefix(_UNIX)
    return path.removeprefix("//") if path.startswith("///") else path


def unix_target(path: str) -> str:
    """Return the target of a Unix socket."""
    return _UNIX + path


def checked_unix_path(path: str, field: str) -> str:
    """Return the absolute path of a socket, after a check that a socket can have the path.

    Args:
        path: the path; the socket need not exist.
        field: the option that an error names.

    Returns:
        The absolute path.

    Raises:
        InvalidRequestError: the path is empty, too long, or contains a zero.
    """
    try:
        absolute = os.path.abspath(path) if path and "\0" not in path else ""
        length = len(os.fsencode(absolute))
    except UnicodeEncodeError:  # a surrogate that stands for no byte
        absolute, length = "", 0
    if not absolute:
        raise InvalidRequestError.of(
            field, f"{path!r} is no path of a socket; give one such as /run/stepwire/stepwire.sock"
        )
    if length > MAX_UNIX_PATH_BYTES:
        raise InvalidRequestError.of(
            field,
            f"the path {absolute!r} has {length} bytes, and a Unix socket's at most {MAX_UNIX_PATH_BYTES}; choose a "
            "shorter one",
        )
    return absolute


def grpc_target(target: str) -> str:
    """Return a target for gRPC, which decodes a `%41` in the path of a socket as an `A`.

    gRPC resolves any text: it takes ports modulo 65536, adds the port 443, and asks for the address of a URL until the
    deadline passes. So a target that no server can have is refused here.

    Raises:
        InvalidRequestError: the target is no address of a server, or no socket can have its path.
    """
    path = unix_path(target)
    if path is None:
        _hosts(target)
        return target
    return _UNIX + urllib.parse.quote(os.fsencode(checked_unix_path(path, "target")))


def is_on_this_host(target: str) -> bool:
    """Tell whether all addresses in a target are of this host by their form, so that no proxy reaches them."""
    if unix_path(target) is not None:
        return True
    hosts = _hosts(target)
    return bool(hosts) and all(map(_is_loopback, hosts))


def named_host(target: str) -> tuple[str, int] | None:
    """Return the host and the port of `dns:///host:port`; None for an address, for this host, and for other targets.

    A name may have several addresses. One that an authority of its own resolves, `dns://8.8.8.8/host:port`, is gRPC's
    alone.

    Raises:
        InvalidRequestError: the target is no address.
    """
    rest = target.removeprefix("dns:///") if target.startswith("dns:///") else target.removeprefix("dns:")
    if rest == target or rest.startswith("//"):
        return None
    (host,) = _hosts(target)
    if _is_loopback(host) or _is_literal(host):
        return None
    return host, int(target.rpartition(":")[2])


def _hosts(target: str) -> list[str]:
    """Return the hosts in a target with ports; empty for a scheme that gRPC alone understands.

    Raises:
        InvalidRequestError: the target is no address.
    """
    if not target.isascii() or not target.isprintable() or " " in target:
        raise _no_target(target, f"has blanks or characters that no address has; {_EXAMPLE}")
    scheme, separator, rest = target.partition("://")
    if not separator:
        scheme, _, rest = target.partition(":")
    scheme = scheme.lower()
    if scheme in _OTHER:
        return []
    if scheme in _RESOLVED:
        addresses = rest.rpartition("/")[2] if scheme == "dns" else rest.lstrip("/")
        return [_host(target, each) for each in (addresses.split(",") if scheme != "dns" else [addresses])]
    if separator:
        raise _no_target(
            target, f"has the scheme {scheme!r:.20}, which is none of gRPC's; use {rest.partition('/')[0]!r:.80}"
        )
    return [_host(target, target)]


def _host(target: str, address: str) -> str:
    """Return the host of `host:port`.

    Raises:
        InvalidRequestError: the address is something else.
    """
    if "," in address:
        raise _no_target(target, "has a comma; pass a list of targets for a model over several servers")
    host, separator, port = address.rpartition(":")
    if (not separator and address) or address.endswith("]"):
        raise _no_target(target, f"has no port; {_EXAMPLE}")
    if ":" in host and not (host.startswith("[") and host.endswith("]")):
        raise _no_target(target, "has more than one colon; an IPv6 address stands in brackets, such as '[::1]:50051'")
    if not host.strip("[]") or any(letter in host for letter in "/?#@"):
        raise _no_target(target, f"has no name of a host; {_EXAMPLE}")
    if not (port.isdigit() and len(port) <= 5 and 1 <= int(port) <= _LARGEST_PORT):
        raise _no_target(target, f"has the port {port!r:.20}; a port is a number from 1 to {_LARGEST_PORT}")
    return host.strip("[]")


def _is_loopback(host: str) -> bool:
    name = host.lower().rstrip(".")
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return name == "localhost" or name.endswith(".localhost")
    inner = getattr(address, "ipv4_mapped", None) or address
    return inner.is_loopback or inner.is_unspecified  # the kernel connects the latter to this host


def _is_literal(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _no_target(target: str, problem: str) -> InvalidRequestError:
    return InvalidRequestError.of("target", f"{target!r:.120} {problem}")


def boot_id(file: pathlib.Path = _BOOT_ID) -> str:
    """Return the id of this run of the kernel, the same in all its containers; empty if there is no id."""
    try:
        return file.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""
