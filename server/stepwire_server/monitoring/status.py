"""The status page: files for a browser, and a stream of what they show. It reads, and changes nothing."""

from __future__ import annotations

import base64
import binascii
import importlib.resources
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from http import HTTPStatus
from typing import Any, Final

from stepwire.errors import AuthenticationError, PermissionDeniedError, StepwireError
from stepwire_server.access.control import AccessControl
from stepwire_server.access.identity import STATUS_PATH, Identity
from stepwire_server.monitoring.endpoint import Request, Response
from stepwire_server.monitoring.histories import Histories
from stepwire_server.monitoring.refusals import Refusals
from stepwire_server.monitoring.view import View
from stepwire_server.sessions.registry import Registry

__all__ = ["StatusPage"]

_FILES: Final = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/charts.js": ("charts.js", "text/javascript; charset=utf-8"),
    "/uplot.css": ("uplot.css", "text/css; charset=utf-8"),
    "/uplot.js": ("uplot.js", "text/javascript; charset=utf-8"),
    "/uplot-license.txt": ("uplot-license.txt", "text/plain; charset=utf-8"),
}
_HEADERS: Final = {
    # Own files alone, no inline script or style, nothing in a frame, no form.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
_LOOPBACK_NAMES: Final = frozenset({"localhost", "127.0.0.1", "[::1]"})
_MOST_LISTENERS: Final = 16
_SECONDS: Final = 1.0


class StatusPage:
    """The status page of one server. Thread-safe."""

    def __init__(
        self,
        registry: Registry,
        access: AccessControl,
        draining: Callable[[], bool],
        histories: Histories,
        refusals: Refusals,
    ) -> None:
        """Show a server.

        Args:
            registry: the sessions.
            access: admits whoever asks.
            draining: tells whether new steps are refused.
            histories: the histories of the sessions.
            refusals: the last errors that clients were told.
        """
        self._access = access
        self._view = View(registry, draining, histories, refusals)
        self._ended = threading.Event()
        self._listeners = threading.BoundedSemaphore(_MOST_LISTENERS)
        self._hosts: frozenset[str] = _LOOPBACK_NAMES
        folder = importlib.resources.files(__package__) / "page"
        self._files = {path: (folder / name).read_bytes() for path, (name, _) in _FILES.items()}

    def allow(self, *hosts: str) -> None:
        """Respond to browsers that know the server by further names too."""
        self._hosts |= {host.lower() for host in hosts if host}

    def close(self) -> None:
        """End the streams. Closing twice is harmless."""
        self._ended.set()

    def get(self, request: Request) -> Response:
        """Respond to a browser; see `Get`."""
        # A page of another site may have its own name resolve to loopback, and so read what is here as its own.
        if _host_name(request.headers.get("host", "")) not in self._hosts:
            text = "this name of the server is not known to it; start it with --status-hosts NAME\n"
            return Response(HTTPStatus.MISDIRECTED_REQUEST, text.encode(), headers=_HEADERS)
        try:
            identity = self._identity(request)
        except AuthenticationError as error:
            return _refusal(HTTPStatus.UNAUTHORIZED, error, {"WWW-Authenticate": 'Basic realm="stepwire"'})
        except PermissionDeniedError as error:
            return _refusal(HTTPStatus.FORBIDDEN, error, {})
        if request.path in _FILES:
            return Response(HTTPStatus.OK, self._files[request.path], _FILES[request.path][1], _HEADERS)
        if request.path == "/events":
            stream = self._stream(request, identity)
            return Response(HTTPStatus.OK, b"retry: 2000\n\n", "text/event-stream", _HEADERS, stream)
        return Response(HTTPStatus.NOT_FOUND, b"not found\n", headers=_HEADERS)

    def _identity(self, request: Request) -> Identity:
        """Admit a browser, which brings its token as a password.

        Raises:
            StepwireError: as `AccessControl.admit`.
        """
        return self._access.admit(STATUS_PATH, _bearer(request.headers.get("authorization")), request.certificate)

    def _stream(self, request: Request, identity: Identity) -> Iterator[bytes]:
        if not self._listeners.acquire(blocking=False):
            yield b"event: full\ndata: %d\nretry: 30000\n\n" % _MOST_LISTENERS
            return
        try:
            rates = self._view.rates()
            while not self._ended.is_set():
                shown = self._view.shown(identity.sees, request.query.get("session", ""), rates)
                yield b"data: " + json.dumps(shown, separators=(",", ":"), allow_nan=False).encode() + b"\n\n"
                self._ended.wait(_SECONDS)
                identity = self._identity(request)
        except StepwireError:
            return  # the token has ended, and the browser asks for another one as it comes again
        finally:
            self._listeners.release()


def _host_name(host: str) -> str:
    """Return the name in a header `Host`, without its port."""
    name, separator, port = host.strip().lower().rpartition(":")
    return name if separator and port.isdigit() and (":" not in name or name.endswith("]")) else host.strip().lower()


def _bearer(authorization: str | None) -> str | None:
    """Return an authorization as a program gives it, for that of a browser: the password is the token."""
    kind, _, value = (authorization or "").partition(" ")
    if kind.lower() != "basic":
        return authorization
    try:
        _, _, token = base64.b64decode(value, validate=True).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError):
        return None
    return f"Bearer {token}" if token else None


def _refusal(status: HTTPStatus, error: StepwireError, headers: Mapping[str, Any]) -> Response:
    return Response(status, f"{error}\n".encode(), headers={**_HEADERS, **headers})
