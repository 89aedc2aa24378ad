"""Guards of the table of errors: total, both ways, over a real call, and in the contract's comments."""

from __future__ import annotations

import concurrent.futures
import re
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from stepwire import errors
from stepwire.v1 import reason_pb2
from stepwire.wire.error_details import error_from_call
from stepwire_server.rpc.interceptor import ErrorInterceptor
from tests.guards.source import ROOT
from tests.guards.test_public import PUBLIC


def subclasses(base: type[errors.StepwireError]) -> set[type[errors.StepwireError]]:
    return {base}.union(*map(subclasses, base.__subclasses__()))


def own_classes() -> set[type[errors.StepwireError]]:
    return {kind for kind in subclasses(errors.StepwireError) if kind.__module__ == "stepwire.errors"}


def test_every_reason_has_a_row_and_every_row_a_real_status() -> None:
    assert set(errors.ERROR_TABLE) == set(errors.Reason)
    assert {row.code for row in errors.ERROR_TABLE.values()} <= {code.name for code in grpc.StatusCode}
    assert all(reason.value == reason.name for reason in errors.Reason)


def test_every_exception_is_in_the_table_under_its_own_reason() -> None:
    """But for the base, which is never raised."""
    assert {row.exception for row in errors.ERROR_TABLE.values()} == own_classes() - {errors.StepwireError}
    for kind in own_classes() - {errors.StepwireError}:
        assert errors.ERROR_TABLE[kind("x").reason].exception is kind


def test_a_class_has_one_status_and_the_drawing_shows_it() -> None:
    codes: dict[str, set[str]] = {}
    for row in errors.ERROR_TABLE.values():
        codes.setdefault(row.exception.__name__, set()).add(row.code)
    drawn = dict(re.findall(r"── (\w+) +([A-Z_]+)$", errors.__doc__ or "", re.MULTILINE))
    assert codes == {name: {code} for name, code in drawn.items()}


def test_every_exception_is_public() -> None:
    assert {kind.__name__ for kind in own_classes()} <= set(PUBLIC) & set(errors.__all__)


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK])
def test_every_status_becomes_an_error(code: grpc.StatusCode) -> None:
    error = errors.error_from_code(code.name, "text")
    assert type(error) in own_classes() - {errors.StepwireError}
    assert str(error) == f"text ({code.name})"


def test_the_contracts_comments_speak_of_the_tables_rows() -> None:
    """Each `CODE/REASON` in the comments is a row, and every row but the client's own is mentioned."""
    text = "".join(path.read_text() for path in sorted((ROOT / "proto").rglob("*.proto")))
    pairs = set(re.findall(r"\b([A-Z_]{5,})/([A-Z_]{5,})\b", text))
    rows = {(row.code, reason.value) for reason, row in errors.ERROR_TABLE.items()}
    assert pairs - rows == set()
    of_the_client = {"UNREACHABLE", "DEADLINE_EXCEEDED", "STATE_LOST"}
    without_pair = {"UNAUTHENTICATED", "PERMISSION_DENIED", "INTERNAL"}
    for reason in set(errors.Reason) - of_the_client:
        assert re.search(rf"\b{reason}\b", text), f"{reason} is nowhere in the contract"
    assert {reason for _, reason in rows} - {reason for _, reason in pairs} - of_the_client - without_pair <= {
        "STEP_SUPERSEDED"
    }


def contract_rows() -> dict[str, reason_pb2.ReasonRow]:
    values = reason_pb2.Reason.DESCRIPTOR.values[1:]
    row = reason_pb2.reason_row
    return {value.name.removeprefix("REASON_"): value.GetOptions().Extensions[row] for value in values}


def test_the_table_is_that_of_the_contract() -> None:
    """The strings on the wire are the names there without the prefix."""
    contract = [(name, row.code, row.repeatable) for name, row in contract_rows().items()]
    assert sorted(contract) == sorted(
        (reason.value, row.code, row.retryable) for reason, row in errors.ERROR_TABLE.items()
    )
    assert {reason_pb2.REASON_UNSPECIFIED, *range(1, len(contract) + 1)} == set(reason_pb2.Reason.values())


def test_every_reason_of_the_contract_says_its_cause_and_what_to_do() -> None:
    text = (ROOT / "proto/stepwire/v1/reason.proto").read_text()
    for name, row in contract_rows().items():
        assert row.remedy.endswith("."), f"{name} has no remedy"
        assert re.search(rf"  // .*\.\n  REASON_{name} = ", text), f"{name} has no cause"


def test_every_reason_is_in_the_page_of_the_protocol() -> None:
    """But for those that no status needs a word of its own for."""
    page = (ROOT / "docs/protocol.md").read_text()
    by_status_alone = {"INVALID_ARGUMENT", "RESOURCE_EXHAUSTED", "UNAVAILABLE"}
    for name, row in contract_rows().items():
        assert f"`{name}`" in page or row.code in by_status_alone and f"`{row.code}`" in page, name


class Raiser(grpc.GenericRpcHandler):
    """Raises the error of the reason that a request names."""

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        return grpc.unary_unary_rpc_method_handler(self._raise)

    def _raise(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        reason = errors.Reason(request.decode())
        raise errors.ERROR_TABLE[reason].exception(
            f"about {reason}", reason=reason, metadata={"value": 7, "name": "é\n%"}, retry_after_seconds=0.25
        )


@pytest.fixture(scope="module")
def raiser() -> Iterator[grpc.Channel]:
    server = grpc.server(concurrent.futures.ThreadPoolExecutor(2), interceptors=[ErrorInterceptor()])
    server.add_generic_rpc_handlers((Raiser(),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield channel
    server.stop(0).wait()


@pytest.mark.parametrize("reason", errors.Reason)
def test_every_error_survives_a_real_call(raiser: grpc.Channel, reason: errors.Reason) -> None:
    with pytest.raises(grpc.RpcError) as failed:
        raiser.unary_unary("/any/thing")(reason.encode(), timeout=120.0)
    assert isinstance(failed.value, grpc.Call)
    error, row = error_from_call(failed.value), errors.ERROR_TABLE[reason]
    assert failed.value.code() is grpc.StatusCode[row.code]
    assert (type(error), error.reason, str(error)) == (row.exception, reason, f"about {reason}")
    assert (error.metadata, error.retry_after_seconds) == ({"value": "7", "name": "é\n%"}, 0.25)
