"""The command `stepwire health`."""

from __future__ import annotations

import dataclasses
import json

import typer

import stepwire
from stepwire.errors import AuthenticationError, PermissionDeniedError, ResourceExhaustedError
from stepwire_server.cli.options import Json, Target, Timeout

__all__ = ["health"]


def health(target: Target, timeout: Timeout = 5.0, as_json: Json = False) -> None:
    """Ask a server for its state: exit code 0 if it serves, 1 if it drains or is a standby, 2 if it cannot be reached.

    Exit code 1 also says that another server has its sessions.

    A server that refuses the question is alive: it has too many calls, or wants another token. The exit code is 0 then,
    so that no supervisor restarts it, and ends every session, for that.
    """
    try:
        with stepwire.connect(target, timeout=timeout) as client:
            info = client.info()
    except (AuthenticationError, PermissionDeniedError, ResourceExhaustedError) as refused:
        if "handshake" in refused.metadata:
            raise
        reason = str(refused.reason)
        print(json.dumps({"refused": reason}) if as_json else f"{target}: serving, and refuses this call: {refused}")
        return
    if as_json:
        print(json.dumps(dataclasses.asdict(info)))
    else:
        devices = ", ".join(info.devices)
        state = "draining" if info.draining else "not serving" if info.not_serving else "serving"
        print(f"{target}: {state}, version {info.version}, {info.sessions} sessions on {devices}")
        if info.not_serving:
            print(info.not_serving)
    raise typer.Exit(1 if info.draining or info.not_serving else 0)
