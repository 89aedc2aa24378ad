"""Ids that are not yours, configs that lie, and memory that is asked for and not there (facts: attacks 2, 3, 5, 7)."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration

from stepwire.v1 import attach_pb2, optimizer_pb2, session_pb2, state_pb2, tensor_pb2
from stepwire.v1 import optimizer_service_pb2 as pb

pytestmark = pytest.mark.many

GUESSES = {
    "nothing": lambda known: "",
    "another": lambda known: secrets.token_hex(16),
    "one digit off": lambda known: known[:-1] + ("0" if known[-1] != "0" else "1"),
    "upper case": lambda known: known.upper() if known.upper() != known else known + "A",
    "spaces": lambda known: f" {known} ",
    "a prefix": lambda known: known[:31],
    "longer": lambda known: known + "0",
    "a path": lambda known: f"../{known}",
    "a pattern": lambda known: "*",
    "lines": lambda known: f"{known}\n2026-01-01 [error] forged",
}

BY_ID: dict[str, Callable[[Any, str], object]] = {
    "GetSession": lambda wire, name: wire.get(name),
    "DeleteSession": lambda wire, name: wire.unary("DeleteSession", pb.DeleteSessionRequest(session_id=name)),
    "Attach": lambda wire, name: wire.stream("Attach", [pb.AttachRequest(open=attach_pb2.AttachOpen(session_id=name))]),
    "Step": lambda wire, name: wire.unary("Step", pb.StepRequest(session_id=name, attach_token=1)),
    "Pull": lambda wire, name: wire.pull(name),
    "Load": lambda wire, name: wire.stream(
        "Load", [pb.LoadRequest(open=state_pb2.LoadOpen(session_id=name, attach_token=1, load=1, slots=["param"]))]
    ),
}


@pytest.mark.parametrize("guess", GUESSES)
@pytest.mark.parametrize("method", BY_ID)
def test_an_id_that_is_not_a_sessions_is_not_found(live: Any, untouched: Any, method: str, guess: str) -> None:
    """The answer is the same however near the guess was, and the guess comes back in it escaped."""
    guessed = GUESSES[guess](live.id)
    refused = untouched(lambda: BY_ID[method](live.wire, guessed), "NOT_FOUND", "SESSION_NOT_FOUND", repr(guessed[:64]))
    assert refused.metadata == {"session_id": guessed[:64]}
    assert refused.text.replace(repr(guessed[:64]), "…") == (
        "session … does not exist here: it was never created, was closed, its lease ran out, or its server was "
        "restarted; create a new one and load your last saved state"
    )


def test_ids_are_128_random_bits(wire: Any, make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Taken from the system's generator, and unrelated to one another."""
    created = [wire.create(make_config((1,))).session.session_id for _ in range(64)]
    assert all(len(name) == 32 and set(name) <= set("0123456789abcdef") for name in created)
    bits = [int(name, 16) for name in created]
    assert all(sum(bit >> place & 1 for bit in bits) not in (0, 64) for place in range(128))
    asked: list[int] = []
    monkeypatch.setattr(secrets, "token_hex", lambda count: asked.append(count) or "ab" * count)
    assert wire.create(make_config((1,)), request_id="mine").session.session_id == "ab" * 16
    assert asked == [16]
    wire.unary("DeleteSession", pb.DeleteSessionRequest(session_id="ab" * 16))


def tensors(*specs: tensor_pb2.TensorSpec) -> dict[str, Any]:
    return {"tensors": specs}


def spec(name: str = "w", shape: Iterable[int] = (1,), **fields: Any) -> tensor_pb2.TensorSpec:
    return tensor_pb2.TensorSpec(name=name, shape=shape, **fields)


def numbers(**values: Any) -> dict[str, Any]:
    return {
        "optimizer": optimizer_pb2.Optimizer(
            rule=optimizer_pb2.RULE_ADAM, hyperparameters=optimizer_pb2.Hyperparameters(**values)
        )
    }


def group(**values: Any) -> dict[str, Any]:
    return {"groups": [optimizer_pb2.ParameterGroup(overrides=optimizer_pb2.Hyperparameters(**values))]}


NAN, INF = float("nan"), float("inf")
LIES: dict[str, tuple[dict[str, Any], str, str, str]] = {
    # what: (fields of the config, reason, field, text)
    "no tensors": (tensors(), "INVALID_TENSOR", "config.tensors", "0 tensors; it must be 1 to 64"),
    "65 tensors": (
        tensors(*(spec(str(index)) for index in range(65))),
        "INVALID_TENSOR",
        "config.tensors",
        "65 tensors; it must be 1 to 64",
    ),
    "no name": (tensors(spec("")), "INVALID_TENSOR", "config.tensors[0].name", "'' is empty"),
    "a name twice": (tensors(spec(), spec()), "INVALID_TENSOR", "config.tensors[1].name", "'w' is used twice"),
    "513 characters": (tensors(spec("n" * 513)), "INVALID_TENSOR", "config.tensors[0].name", "513 characters"),
    "a line feed": (tensors(spec("a\nb")), "INVALID_TENSOR", "config.tensors[0].name", r"'a\nb'"),
    "a NUL": (tensors(spec("a\0b")), "INVALID_TENSOR", "config.tensors[0].name", r"'a\x00b'"),
    "an escape": (tensors(spec("\x1b[31mred")), "INVALID_TENSOR", "config.tensors[0].name", r"'\x1b[31mred'"),
    "a DEL": (tensors(spec("a\x7f")), "INVALID_TENSOR", "config.tensors[0].name", r"'a\x7f'"),
    "a C1 control": (tensors(spec("a\x9b")), "INVALID_TENSOR", "config.tensors[0].name", r"'a\x9b'"),
    "text turned round": (tensors(spec("a\u202eb")), "INVALID_TENSOR", "config.tensors[0].name", r"'a\u202eb'"),
    "a line separator": (
        tensors(spec("a\u2028b")),
        "INVALID_TENSOR",
        "config.tensors[0].name",
        "character U+2028",
    ),
    "17 dimensions": (tensors(spec(shape=[1] * 17)), "INVALID_TENSOR", "config.tensors[0].shape", "17 dimensions"),
    "a group that is not": (tensors(spec(group=1)), "INVALID_TENSOR", "config.tensors[0].group", "1; there are 1"),
    "a group far away": (
        tensors(spec(group=2**32 - 1)),
        "INVALID_TENSOR",
        "config.tensors[0].group",
        f"{2**32 - 1}; there are 1",
    ),
    "too many groups": (
        {"groups": [optimizer_pb2.ParameterGroup()] * 1025},
        "INVALID_CONFIG",
        "config.groups",
        "1025 groups",
    ),
    "a long label": ({"label": "l" * 129}, "INVALID_CONFIG", "config.label", "129 characters"),
    "a label of lines": ({"label": "x\r\ny"}, "INVALID_CONFIG", "config.label", r"'x\r\ny'"),
    "a negative lease": ({"lease": Duration(seconds=-1)}, "INVALID_CONFIG", "config.lease", "-1.0 s"),
    "an endless lease": ({"lease": Duration(seconds=2**62)}, "INVALID_CONFIG", "config.lease", f"{float(2**62)} s"),
    "no lease at all": ({"lease": Duration()}, "INVALID_CONFIG", "config.lease", "0.0 s; it must be above 0"),
    "a lease too long": (
        {"lease": Duration(seconds=3600, nanos=500_000_000)},
        "INVALID_CONFIG",
        "config.lease",
        "3600.5 s",
    ),
    "lr negative": (numbers(lr=-0.5), "INVALID_CONFIG", "config.optimizer.hyperparameters.lr", "-0.5"),
    "lr beyond float32": (numbers(lr=3.5e38), "INVALID_CONFIG", "config.optimizer.hyperparameters.lr", "in float32"),
    "lr nan": (numbers(lr=NAN), "INVALID_CONFIG", "config.optimizer.hyperparameters.lr", "nan"),
    "beta1 one": (numbers(beta1=1.0), "INVALID_CONFIG", "config.optimizer.hyperparameters.beta1", "1.0"),
    "beta2 inf": (numbers(beta2=INF), "INVALID_CONFIG", "config.optimizer.hyperparameters.beta2", "inf"),
    "eps negative": (numbers(eps=-1e-9), "INVALID_CONFIG", "config.optimizer.hyperparameters.eps", "-1e-09"),
    "decay inf": (
        numbers(weight_decay=INF),
        "INVALID_CONFIG",
        "config.optimizer.hyperparameters.weight_decay",
        "inf",
    ),
    "a group's lr": (group(lr=-2.0), "INVALID_CONFIG", "config.groups[0].overrides.lr", "-2.0"),
    "a group's beta": (group(beta2=1.5), "INVALID_CONFIG", "config.groups[0].overrides.beta2", "1.5"),
}
# Numbers that belong to other rules, or to none yet, are refused, not ignored.
LIES |= {
    f"foreign {name}": (
        numbers(**{name: 0.5}),
        "INVALID_CONFIG",
        f"config.optimizer.hyperparameters.{name}",
        f"unknown hyper-parameter '{name}'" if name == "beta3" else f"'{name}' is a hyper-parameter of other rules",
    )
    for name in (
        field.name
        for field in optimizer_pb2.Hyperparameters.DESCRIPTOR.fields
        if field.name not in ("lr", "beta1", "beta2", "eps", "weight_decay", "maximize")
    )
}


@pytest.mark.parametrize("what", LIES)
def test_a_config_that_lies_creates_nothing(live: Any, make_config: Any, untouched: Any, what: str) -> None:
    fields, reason, field, text = LIES[what]
    config = make_config((1,), **{name: value for name, value in fields.items()})
    sessions = live.wire.info().sessions
    untouched(lambda: live.wire.create(config), "INVALID_ARGUMENT", reason, text, field=field)
    assert live.wire.info().sessions == sessions


@pytest.mark.parametrize("request_id", ["", "x" * 65, "a b", "a/b", "../x", "ä", "a\n", "\0"])
def test_a_request_id_of_other_characters_is_refused(
    live: Any, make_config: Any, untouched: Any, request_id: str
) -> None:
    request = pb.CreateSessionRequest(request_id=request_id, config=make_config((1,)))
    untouched(
        lambda: live.wire.unary("CreateSession", request),
        "INVALID_ARGUMENT",
        "INVALID_CONFIG",
        repr(request_id[:80]),
        field="request_id",
    )


HUGE = {
    "2^63 x 2^63": [(2**63, 2**63)],
    "all that fits a field, sixteen times": [(2**64 - 1,) * 16],
    "wraps to 0": [(2**32, 2**32)],
    "wraps to 4": [(2**62 + 1, 4)],
    "just beyond the budget": [(6 << 20, 4)],
    "two halves": [(3 << 20, 4), (3 << 20, 4)],
    "many": [(2**60,)] * 64,
}


@pytest.mark.parametrize("shapes", HUGE.values(), ids=HUGE)
def test_declared_sizes_are_held_against_the_budget_before_anything_is_allocated(
    server: Any, live: Any, make_config: Any, untouched: Any, monkeypatch: pytest.MonkeyPatch, shapes: Any
) -> None:
    def allocate(*arguments: object) -> None:
        raise AssertionError("memory was allocated")

    monkeypatch.setattr(server.registry.pool.named("cpu").engine, "allocate", allocate)
    sessions = live.wire.info().sessions
    refused = untouched(
        lambda: live.wire.create(make_config(*shapes)), "RESOURCE_EXHAUSTED", "MEMORY_EXHAUSTED", "bytes"
    )
    assert int(refused.metadata["requested_bytes"]) > int(refused.metadata["available_bytes"])
    assert refused.metadata["requested_bytes"] in refused.text
    assert live.wire.info().sessions == sessions


def test_a_size_of_nothing_times_everything_is_nothing(wire: Any, make_config: Any) -> None:
    session = wire.create(make_config((2**63, 0, 2**63))).session
    assert (session.layout.size, session.memory_bytes) == (0, 0)
    assert list(session.layout.tensors[0].spec.shape) == [2**63, 0, 2**63]
    wire.unary("DeleteSession", pb.DeleteSessionRequest(session_id=session.session_id))


def test_an_allocation_that_fails_gives_its_reservation_back(
    server: Any, live: Any, make_config: Any, untouched: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The budget said yes and the machine says no: told as what it is, and nothing stays reserved."""
    import numpy as np

    def no_memory(*arguments: object, **options: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(np, "empty", no_memory)
        untouched(lambda: live.wire.create(make_config((100,))), "RESOURCE_EXHAUSTED", "MEMORY_EXHAUSTED", "100")


PATHS = [
    "../../etc/passwd",
    "/etc/shadow",
    "C:\\con",
    "~/.ssh/id",
    "a;rm -rf $HOME",
    "%s%n",
    "<b>&amp;",
    "'\"`",
    "..",
    "é漢😀",
]


def test_names_like_paths_are_names(wire: Any, make_config: Any, make_live: Any, refusal: Any, tmp_path: Any) -> None:
    """Nothing is ever stored under a tensor's name, so there is nothing to forbid: they come back as they went."""
    import numpy as np

    config = make_config(tensors=[spec(name, (2,)) for name in PATHS], label="../label/%s")
    live = make_live(wire, wire.create(config))
    session = wire.get(live.id)
    assert [tensor.name for tensor in session.config.tensors] == PATHS
    assert [tensor.spec.name for tensor in session.layout.tensors] == PATHS
    assert session.config.label == "../label/%s"
    for index, name in enumerate(PATHS):
        gradient = live.gradient()
        gradient[2 * index] = np.nan
        refused = refusal(
            lambda gradient=gradient: live.step(1, gradient), "INVALID_ARGUMENT", "NON_FINITE_GRADIENT", repr(name)
        )
        assert refused.metadata["tensor"] == name


@pytest.mark.parametrize("letter", ["n", "é", "漢", "😀"])
def test_the_longest_names_fit_an_error(wire: Any, make_config: Any, make_live: Any, refusal: Any, letter: str) -> None:
    """A status that does not fit gRPC's 8 KiB of trailers is dropped, and the reason with it."""
    import numpy as np

    name = letter * 512
    live = make_live(wire, wire.create(make_config(tensors=[spec(name, (2,))])))
    refused = refusal(
        lambda: live.step(1, np.float32([np.inf, 1])), "INVALID_ARGUMENT", "NON_FINITE_GRADIENT", letter * 100
    )
    assert refused.metadata == {"tensor": name, "element": "0", "non_finite_count": "1"}


def test_a_device_that_is_not_there_is_refused_with_its_name_cut(live: Any, make_config: Any, untouched: Any) -> None:
    config: session_pb2.SessionConfig = make_config((1,), device="tpu:" + "9" * 1000)
    untouched(
        lambda: live.wire.create(config),
        "FAILED_PRECONDITION",
        "UNSUPPORTED_FEATURE",
        "tpu:" + "9" * 28,
        field="config.device",
    )


@pytest.mark.parametrize("token", ["x", "../..", "0" * 31, "f" * 33, "F" * 32, "\n", "g" * 32])
def test_a_page_token_that_no_page_gave_is_refused(live: Any, untouched: Any, token: str) -> None:
    untouched(
        lambda: live.wire.unary("ListSessions", pb.ListSessionsRequest(page_token=token)),
        "INVALID_ARGUMENT",
        "INVALID_CONFIG",
        repr(token),
        field="page_token",
    )


@pytest.mark.parametrize(
    "method", ["GetServerInfo", "CreateSession", "GetSession", "ListSessions", "DeleteSession", "Step", "Pull"]
)
def test_bytes_that_are_no_message_are_refused_as_such(live: Any, untouched: Any, method: str) -> None:
    untouched(lambda: live.wire.stream(method, [b"\xff\xff\xff"]), "INVALID_ARGUMENT", "INVALID_FRAME", "3 bytes")
