"""The messages that docs/security.md quotes are those that clients get."""

from __future__ import annotations

import datetime
import functools
import pathlib
import re
from collections.abc import Callable, Iterator

import pytest

import stepwire
from stepwire.connection import handshake
from stepwire.connection.config_file import read_config_file
from stepwire.connection.remedy import with_remedy
from stepwire.errors import Reason, StepwireError, UnavailableError
from stepwire_server.access.certificates import CertificateFiles
from stepwire_server.access.client_certificates import ClientCertificates
from stepwire_server.access.control import AccessControl, Caller
from stepwire_server.access.identity import Role
from stepwire_server.access.signed_tokens import SignedTokens
from stepwire_server.access.tokens import TokenFile, TokenRecord, digest_of, new_token, write_tokens
from stepwire_server.devices import kernels
from stepwire_server.rpc import call_rooms as rpc_rooms
from stepwire_server.sessions.step_rate import StepRate
from stepwire_server.sharing import handoff

jwt = pytest.importorskip("jwt")
trustme = pytest.importorskip("trustme")
ed25519 = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.ed25519")

PAGE = pathlib.Path(__file__).parents[3] / "docs" / "security.md"
STEP = "/stepwire.v1.OptimizerService/Step"
NOW = 2_000_000_000.0
CLAIMS = {"sub": "ann", "role": "trainer", "exp": NOW + 60}


def quoted() -> dict[str, re.Pattern[str]]:
    """Return the messages of the table by their causes; "…" stands for anything."""
    table = PAGE.read_text().partition("## Messages to clients")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| ([^|]+) \| `\w+`: ([^|]+) \|$", table, re.MULTILINE)
    return {cause: re.compile(".*".join(map(re.escape, text.split("…")))) for cause, text in rows}


def of_tokens(folder: pathlib.Path) -> Iterator[tuple[str, Callable[[], object]]]:
    path, token = folder / "tokens", new_token()
    records = [TokenRecord(name=name, digest=digest_of(name), role=role) for name, role in (("eve", Role.READER),)]
    ann = TokenRecord(name="ann", digest=digest_of(token), role=Role.TRAINER, expires=NOW + 60)
    write_tokens(path, [*records, ann])
    access = AccessControl(TokenFile(path), clock=lambda: NOW)
    admitted = Caller(access.admit(STEP, f"Bearer {token}"))
    late = AccessControl(TokenFile(path), clock=lambda: NOW + 60)
    write_tokens(path, records)
    access.look()
    yield "no token", lambda: access.admit(STEP, None)
    yield "an unknown token", lambda: access.admit(STEP, "Bearer sw_other")
    yield "an expired token", lambda: late.check(admitted)
    yield "a revoked token, on an attached stream", lambda: access.check(admitted)
    yield "the wrong role", lambda: access.admit(STEP, "Bearer eve")


def of_signed_tokens(folder: pathlib.Path) -> Iterator[tuple[str, Callable[[], object]]]:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    def write(key: ed25519.Ed25519PrivateKey) -> None:  # type: ignore[name-defined]
        path.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))

    def bearer(**claims: object) -> str:
        return "Bearer " + jwt.encode(CLAIMS | claims, key, "EdDSA")

    path, key, other = folder / "key", *(ed25519.Ed25519PrivateKey.generate() for _ in range(2))
    write(key)
    access = AccessControl(signed=SignedTokens(path, clock=lambda: NOW), clock=lambda: NOW)
    admitted = Caller(access.admit(STEP, bearer()))
    replaced = AccessControl(signed=SignedTokens(path, clock=lambda: NOW), clock=lambda: NOW)
    write(other)
    replaced.look()
    yield "a JWT that the key has not signed", lambda: replaced.admit(STEP, bearer())
    yield "a JWT of another issuer or audience", lambda: access.admit(STEP, bearer(aud="elsewhere"))
    yield "a JWT without the claims", lambda: access.admit(STEP, bearer(role="root"))
    yield "a JWT before its time", lambda: access.admit(STEP, bearer(nbf=NOW + 1))
    yield "a JWT whose key was replaced, on an attached stream", lambda: replaced.check(admitted)


def of_certificates(folder: pathlib.Path) -> Iterator[tuple[str, Callable[[], object]]]:
    ca, following = trustme.CA(), trustme.CA()
    own = ca.issue_cert("localhost")
    paths = [folder / name for name in ("cert.pem", "key.pem", "ca.pem")]
    own.cert_chain_pems[0].write_to_path(paths[0])
    own.private_key_pem.write_to_path(paths[1])
    ca.cert_pem.write_to_path(paths[2])
    end = datetime.datetime.fromtimestamp(NOW, datetime.UTC)
    expired, good = (
        ca.issue_cert("a.example", common_name="ann", not_after=after).cert_chain_pems[0].bytes()
        for after in (end, end + datetime.timedelta(days=1))
    )
    known = ClientCertificates(CertificateFiles(*map(str, paths)), lambda: NOW)
    admitted = known.admit(good)
    following.cert_pem.write_to_path(paths[2])
    yield "a client's certificate that has expired", lambda: known.admit(expired)
    yield "a client's certificate of an authority that was removed", lambda: known.check(admitted)


def of_clients(folder: pathlib.Path) -> Iterator[tuple[str, Callable[[], object]]]:
    def failed(account: str, look: Callable[[], str | None] = lambda: None) -> object:
        raise with_remedy(
            UnavailableError(f"failed to connect: {account}", reason=Reason.UNREACHABLE), "host:1", {}, look
        )

    refused = {
        "a certificate of the server that has expired, or is of another authority": "CERTIFICATE_VERIFY_FAILED",
        "a certificate of the server that is of another host": "Hostname Verification Check failed",
        "no certificate, to a server that asks for one": "CERTIFICATE_REQUIRED",
        "TLS to a plaintext server": "WRONG_VERSION_NUMBER",
    }
    for cause, account in refused.items():
        yield cause, functools.partial(failed, account)
    closed = {
        "a client's certificate that had expired, or is of another authority, when it connects": "_OWN_CERTIFICATE",
        "plaintext to a server with TLS": "_SPEAKS_TLS",
    }
    for cause, name in closed.items():
        yield cause, functools.partial(failed, "socket closed", functools.partial(getattr, handshake, name))
    yield "a token in plaintext to another host", lambda: stepwire.connect("example.com:1", token="sw_a")


def of_config_files(folder: pathlib.Path) -> Iterator[tuple[str, Callable[[], object]]]:
    for cause, text, mode in (
        ("a config file that others may write", "", 0o666),
        ("a wrong key in a config file", 'tokenfile = "a"', 0o600),
    ):
        path = folder / f"{mode}.toml"
        path.write_text(text)
        path.chmod(mode)
        yield cause, functools.partial(read_config_file, {"STEPWIRE_CLIENT_CONFIG": str(path)})


def of_limits(folder: pathlib.Path) -> Iterator[tuple[str, Callable[[], object]]]:
    def step_too_often() -> None:
        rate = StepRate(100)
        for _ in range(101):
            rate.admit(NOW)

    def failed(error: StepwireError) -> object:
        raise error

    slow = rpc_rooms._too_many("messages", 32)
    many = kernels._too_many("the server", "max_kernels", 512)
    yield "steps faster than the tenant's limit, at the client's deadline", step_too_often
    yield "one compiled kernel too many", functools.partial(failed, many)
    yield "calls that are slow with their messages", functools.partial(failed, slow)
    yield "memory of a stream of another identity", functools.partial(failed, handoff._wrong_identity())


SOURCES = (of_tokens, of_signed_tokens, of_certificates, of_clients, of_config_files, of_limits)


def test_each_message_in_the_page_is_the_one_that_clients_get(tmp_path: pathlib.Path) -> None:
    page, made = quoted(), set()
    for source in SOURCES:
        folder = tmp_path / source.__name__
        folder.mkdir()
        for cause, fail in source(folder):
            with pytest.raises(StepwireError) as caught:
                fail()
            text = re.sub(r"'CN=ann,[^']*'", "'CN=ann'", str(caught.value))
            assert page[cause].search(text), f"{cause}: {text}"
            made.add(cause)
    assert made == page.keys()
