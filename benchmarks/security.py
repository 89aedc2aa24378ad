"""The price of protection: mTLS and tokens beside plaintext, in one run, and the checks of one step by themselves."""

from __future__ import annotations

import contextlib
import functools
import pathlib
import statistics
import tempfile
import time
from typing import Any, Final

import numpy as np

import stepwire
from contest import Action, Contender, needed, run_contest
from stepwire_server.access.control import AccessControl
from stepwire_server.access.identity import Role
from stepwire_server.access.tokens import TokenFile, TokenRecord, digest_of, new_token, write_tokens
from stepwire_server.processes.spawn import server_process
from stepwire_server.sessions.step_rate import StepRate

__all__ = ["AUTHENTICATION", "security"]

AUTHENTICATION: Final = "authentication of a step us"
_SIZES: Final = {"4 KiB": 1 << 10, "1 MiB": 1 << 18}
_BATCHES: Final = 9
_BATCH: Final = 10_000


def security(*, rounds: int, batch: int) -> dict[str, Any]:
    """Return the steps of each kind of connection, their ratios, and the time of the checks of one step."""
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        entrants = _contenders(stack, pathlib.Path(folder))
        for name, size in _SIZES.items():
            result = run_contest(entrants, size, rounds=rounds, batch=batch)
            found = result.figures() | result.ratios(
                {"mTLS to plaintext": ("mTLS", ("plaintext",)), "token to plaintext": ("token", ("plaintext",))}
            )
            figures |= {f"{name} {figure}": value for figure, value in found.items()}
        token = new_token()
        control = AccessControl(_token_file(pathlib.Path(folder), token))
        caller = control.caller(f"Bearer {token}")
    figures[AUTHENTICATION] = _microseconds(functools.partial(control.check, caller))
    figures["authentication of a call us"] = _microseconds(
        functools.partial(control.admit, "/stepwire.v1.OptimizerService/Step", f"Bearer {token}")
    )
    rate, now = StepRate(1_000_000_000), time.monotonic()
    figures["rate of a step us"] = _microseconds(functools.partial(rate.admit, now))
    return figures


def _contenders(stack: contextlib.ExitStack, folder: pathlib.Path) -> list[Contender]:
    """Return plaintext, plaintext with a token, and mTLS, each with a server of its own."""
    token = new_token()
    tokens = _token_file(folder, token)
    plain = stack.enter_context(server_process("--device", "cpu"))
    known = stack.enter_context(server_process("--device", "cpu", "--tokens", str(tokens.path)))

    def encrypted(stack: contextlib.ExitStack, size: int) -> Action:
        own = _certificates(folder)
        flags = ["--tls-cert", own["cert"], "--tls-key", own["key"], "--tls-client-ca", own["ca"]]
        server = stack.enter_context(server_process("--device", "cpu", *flags))
        target = f"localhost:{server.target.rpartition(':')[2]}"
        return _step(stack, size, target, tls=stepwire.TLS(ca=own["ca"], cert=own["client"], key=own["client_key"]))

    return [
        Contender("plaintext", lambda stack, size: _step(stack, size, plain.target)),
        Contender("token", lambda stack, size: _step(stack, size, known.target, token=token)),
        Contender("mTLS", encrypted),
    ]


def _step(stack: contextlib.ExitStack, size: int, target: str, **protection: Any) -> Action:
    client = stack.enter_context(stepwire.connect(target, transport="tcp", **protection))
    session: Any = stack.enter_context(client.create_session({"w": np.zeros(size, np.float32)}))
    gradient, out = {"w": np.full(size, 0.01, np.float32)}, {"w": np.empty(size, np.float32)}
    return lambda: session.step(gradient, out=out)


def _token_file(folder: pathlib.Path, token: str) -> TokenFile:
    path = folder / "tokens"
    write_tokens(path, [TokenRecord(name="bench", digest=digest_of(token), role=Role.TRAINER, tenant="lab")])
    return TokenFile(path)


def _certificates(folder: pathlib.Path) -> dict[str, str]:
    """Make an authority with a certificate of this host, and one of a client."""
    trustme: Any = needed("trustme")
    authority = trustme.CA()
    host, client = authority.issue_cert("localhost", "127.0.0.1"), authority.issue_cert("bench@example.com")
    written = {
        "ca": authority.cert_pem,
        "cert": host.cert_chain_pems[0],
        "key": host.private_key_pem,
        "client": client.cert_chain_pems[0],
        "client_key": client.private_key_pem,
    }
    for name, blob in written.items():
        blob.write_to_path(folder / f"{name}.pem")
        (folder / f"{name}.pem").chmod(0o600)
    return {name: str(folder / f"{name}.pem") for name in written}


def _microseconds(action: Action) -> float:
    """Return the time of a short action."""
    times = []
    for _ in range(_BATCHES):
        began = time.perf_counter()
        for _ in range(_BATCH):
            action()
        times.append((time.perf_counter() - began) / _BATCH)
    return statistics.median(times) * 1e6
