"""Tokens that somebody else signs: the key decides the algorithm, and the claims decide the rest."""

from __future__ import annotations

import base64
import json
import math
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import pytest

from stepwire.errors import AuthenticationError, InvalidRequestError, PermissionDeniedError
from stepwire_server.access.control import AccessControl, Caller
from stepwire_server.access.identity import Role
from stepwire_server.access.signed_tokens import SignedTokens
from stepwire_server.access.tokens import TokenFile, TokenRecord, digest_of, new_token, write_tokens

jwt = pytest.importorskip("jwt")
pytest.importorskip("cryptography")

from cryptography.hazmat.primitives import serialization  # noqa: E402
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa  # noqa: E402

STEP = "/stepwire.v1.OptimizerService/Step"
NOW = 2_000_000_000.0
CLAIMS = {"sub": "ann", "role": "trainer", "tenant": "lab", "exp": NOW + 60}
SECRET = "0123456789abcdef0123456789abcdef"
RSA_KEY = rsa.generate_private_key(65537, 2048)
KINDS: dict[str, Any] = {
    "EdDSA": ed25519.Ed25519PrivateKey.generate(),
    "ES256": ec.generate_private_key(ec.SECP256R1()),
    "RS256": RSA_KEY,
}


def public_pem(key: Any) -> bytes:
    made = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return bytes(made)


@pytest.fixture
def path(tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "key"
    path.write_text(SECRET + "\n")
    return path


def signed(claims: dict[str, Any] = CLAIMS, key: Any = SECRET, algorithm: str = "HS256") -> str:
    return str(jwt.encode(claims, key, algorithm))


def make(path: pathlib.Path, **options: Any) -> SignedTokens:
    return SignedTokens(path, clock=lambda: NOW, **options)


def test_a_secret_verifies_and_the_claims_say_who_it_is(path: pathlib.Path) -> None:
    identity = make(path).find(signed())
    assert (identity.name, identity.tenant, identity.role) == ("ann", "lab", Role.TRAINER)
    assert (identity.expires, identity.digest) == (NOW + 60, "")


@pytest.mark.parametrize("algorithm", KINDS)
def test_a_public_key_verifies_what_its_private_key_has_signed(path: pathlib.Path, algorithm: str) -> None:
    path.write_bytes(public_pem(KINDS[algorithm]))
    tokens = make(path)
    assert tokens.find(signed(key=KINDS[algorithm], algorithm=algorithm)).name == "ann"
    for other in KINDS.keys() - {algorithm}:
        with pytest.raises(AuthenticationError, match=f"has signed with {algorithm}"):
            tokens.find(signed(key=KINDS[other], algorithm=other))


def unsigned(header: dict[str, Any]) -> str:
    parts = [base64.urlsafe_b64encode(json.dumps(each).encode()).rstrip(b"=").decode() for each in (header, CLAIMS)]
    return ".".join([*parts, ""])


def signed_with_the_public_key(public: bytes) -> str:
    """The public key as the secret of HS256: a server that believes the header takes it."""
    import hashlib
    import hmac

    head = unsigned({"alg": "HS256", "typ": "JWT"}).rstrip(".")
    signature = hmac.new(public, head.encode(), hashlib.sha256).digest()
    return f"{head}.{base64.urlsafe_b64encode(signature).rstrip(b'=').decode()}"


FORGED: dict[str, Callable[[bytes], str]] = {
    "none": lambda public: unsigned({"alg": "none"}),
    "None": lambda public: unsigned({"alg": "None"}),
    "no algorithm": lambda public: unsigned({"typ": "JWT"}),
    "confused": signed_with_the_public_key,
    "another secret": lambda public: signed(key=SECRET[::-1]),
    "another algorithm": lambda public: signed(key=SECRET * 2, algorithm="HS512"),
    "dots": lambda public: "..",
    "not base64": lambda public: "é.é.é",
}


@pytest.mark.parametrize("forged", FORGED)
@pytest.mark.parametrize("kind", ["HS256", *KINDS])
def test_nothing_forged_is_accepted(path: pathlib.Path, kind: str, forged: str) -> None:
    public = public_pem(KINDS.get(kind, RSA_KEY))
    if kind in KINDS:
        path.write_bytes(public)
    with pytest.raises(AuthenticationError, match=f"the token is no JWT that this server's key has signed with {kind}"):
        make(path).find(FORGED[forged](public))


@pytest.mark.parametrize(
    "claims",
    [
        {"sub": None},
        {"sub": ""},
        {"sub": 7},
        {"sub": "a\nb"},
        {"role": None},
        {"role": "root"},
        {"exp": None},
        {"exp": "soon"},
        {"exp": True},
        {"exp": -1},
        {"exp": math.inf},
        {"exp": math.nan},
        {"nbf": math.nan},
        {"tenant": "a/b"},
        {"tenant": 3},
    ],
)
def test_claims_that_are_wrong_are_told(path: pathlib.Path, claims: dict[str, Any]) -> None:
    kept = {name: value for name, value in (CLAIMS | claims).items() if value is not None}
    with pytest.raises(AuthenticationError, match="the token's claims are wrong: "):
        make(path).find(signed(kept))


def test_an_expired_token_is_told_as_expired_and_never_as_forbidden(path: pathlib.Path) -> None:
    now = [NOW]
    access = AccessControl(signed=SignedTokens(path, clock=lambda: now[0]), clock=lambda: now[0])
    token = f"Bearer {signed()}"
    caller = Caller(access.admit(STEP, token))
    now[0] = NOW + 60
    late: list[Callable[[], object]] = [lambda: access.admit(STEP, token), lambda: access.check(caller)]
    for again in (*late, lambda: access.admit(STEP, f"Bearer {signed(CLAIMS | {'role': 'metrics'})}")):
        with pytest.raises(AuthenticationError, match="the token 'ann' has expired"):
            again()
    now[0] = NOW
    with pytest.raises(PermissionDeniedError, match="the role metrics"):
        access.admit(STEP, f"Bearer {signed(CLAIMS | {'role': 'metrics'})}")


def test_a_token_of_the_future_has_to_wait(path: pathlib.Path) -> None:
    with pytest.raises(AuthenticationError, match="'ann' is not valid yet"):
        make(path).find(signed(CLAIMS | {"nbf": NOW + 1}))
    assert make(path).find(signed(CLAIMS | {"nbf": NOW, "iat": NOW + 5})).name == "ann"


def test_issuer_and_audience_are_compared_where_they_are_set(path: pathlib.Path) -> None:
    here = CLAIMS | {"iss": "https://login", "aud": ["other", "stepwire"]}
    assert make(path, issuer="https://login", audience="stepwire").find(signed(here)).name == "ann"
    for options, claims in (
        ({"issuer": "https://login"}, CLAIMS),
        ({"issuer": "https://elsewhere", "audience": "stepwire"}, here),
        ({"audience": "stepwire"}, CLAIMS),
        ({"audience": "another"}, here),
        ({}, here),
    ):
        with pytest.raises(AuthenticationError, match="the token is not for this server"):
            make(path, **options).find(signed(claims))


def test_a_signature_is_verified_once(path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    decode = jwt.decode
    monkeypatch.setattr(jwt, "decode", lambda *arguments, **options: calls.append(1) or decode(*arguments, **options))
    tokens = make(path)
    assert tokens.find(signed()) is tokens.find(signed())
    assert len(calls) == 1
    tokens.find(signed(CLAIMS | {"exp": NOW}))
    tokens.find(signed(CLAIMS | {"exp": NOW}))
    assert len(calls) == 3, "what has expired is not kept"


def test_not_all_tokens_are_kept(path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stepwire_server.access.signed_tokens._MOST_KNOWN", 2)
    tokens = make(path)
    for number in range(5):
        assert tokens.find(signed(CLAIMS | {"sub": f"n{number}"})).name == f"n{number}"
    assert len(tokens._known) <= 2


def test_a_replaced_key_ends_what_the_old_one_has_signed(path: pathlib.Path) -> None:
    access, told = AccessControl(signed=make(path), clock=lambda: NOW), list[str]()
    access.on_change(lambda: told.append("changed"))
    ann = Caller(access.admit(STEP, f"Bearer {signed()}"))
    access.look()
    access.check(ann)
    path.write_text("short")
    os.utime(path, (1, 1))
    access.look()
    access.check(ann)
    assert told == []
    path.write_text(SECRET[::-1])
    access.look()
    assert told == ["changed"]
    with pytest.raises(AuthenticationError, match="the key that has signed the token 'ann' was replaced"):
        access.check(ann)
    with pytest.raises(AuthenticationError, match="no JWT that this server's key has signed"):
        access.admit(STEP, f"Bearer {signed()}")
    assert access.admit(STEP, f"Bearer {signed(key=SECRET[::-1])}").name == "ann"


def test_tokens_of_both_kinds_are_accepted_together(path: pathlib.Path, tmp_path: pathlib.Path) -> None:
    own, file = new_token(), tmp_path / "tokens"
    write_tokens(file, [TokenRecord(name="bob", digest=digest_of(own), role=Role.READER)])
    access = AccessControl(TokenFile(file), signed=make(path), clock=lambda: NOW)
    assert access.identify(f"Bearer {own}").name == "bob"
    assert access.identify(f"bearer {signed()}").name == "ann"
    access.check(Caller(access.identify(f"Bearer {own}")))
    for token in ("sw_unknown", "Bearer"):
        with pytest.raises(AuthenticationError):
            access.identify(f"Bearer {token}")


KEYS: dict[str, tuple[Callable[[], bytes], str]] = {
    "short secret": (lambda: b"secret", "a secret of 6 bytes, which can be guessed"),
    "empty": (lambda: b"\n", "a secret of 0 bytes"),
    "private": (
        lambda: KINDS["EdDSA"].private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ),
        "give its public key",
    ),
    "no PEM": (lambda: b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", "that can be read"),
    "Ed448": (lambda: public_pem(ed448.Ed448PrivateKey.generate()), "of another kind"),
    "P-384": (lambda: public_pem(ec.generate_private_key(ec.SECP384R1())), "of another kind"),
    "RSA of 1024 bits": (lambda: public_pem(rsa.generate_private_key(65537, 1024)), "RSA of 2048 bits or more"),
    "huge": (lambda: b"s" * (1 << 17), "more than 65536 bytes"),
}


@pytest.mark.parametrize("kind", KEYS)
def test_a_key_that_is_none_is_refused(path: pathlib.Path, kind: str) -> None:
    made, match = KEYS[kind]
    path.write_bytes(made())
    with pytest.raises(InvalidRequestError, match=match) as caught:
        make(path)
    assert caught.value.metadata == {"field": "jwt_key"}


def test_a_key_that_others_may_write_or_that_is_not_there_is_refused(path: pathlib.Path) -> None:
    path.chmod(0o620)
    with pytest.raises(InvalidRequestError, match="chmod go-w"):
        make(path)
    with pytest.raises(InvalidRequestError, match="No such file"):
        make(path.with_name("none"))


@pytest.mark.parametrize("missing", ["jwt", "cryptography"])
def test_without_the_packages_the_server_names_them(
    path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(InvalidRequestError, match=rf"{missing} is missing here; `pip install 'stepwire\[jwt\]'`"):
        make(path)
