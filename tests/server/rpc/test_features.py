"""Nothing that a client may ask for is silently ignored.

The contract's messages are walked field by field. Every field, set to something else than its default, must either be
in the list of what is served, and then change what is done, or be refused by its name. A field that is added to the
contract falls into neither and fails here until somebody decides.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterator
from typing import Any

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor

from stepwire.errors import InvalidRequestError, UnsupportedFeatureError
from stepwire.v1 import attach_pb2, move_pb2, optimizer_pb2, session_pb2, state_pb2, step_pb2, tensor_pb2
from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire_server.config import ServerConfig
from stepwire_server.records.session_config import SessionConfig
from stepwire_server.rpc.decode_config import decode_session_config
from stepwire_server.rpc.decode_step import decode_step_request, decode_trace
from stepwire_server.rpc.features import SERVED_FEATURES, refuse_unserved, unsupported

NUMBERS = tuple(
    name for name in (field.name for field in optimizer_pb2.Hyperparameters.DESCRIPTOR.fields) if name != "beta3"
)
ANY = None
PARTS = ("seconds", "nanos")

# What is served: a path and the values of it that are. Everything else must be refused.
SERVED_CONFIG: dict[str, tuple[Any, ...] | None] = {
    "tensors.name": ANY,
    "tensors.shape": ANY,
    "tensors.group": ANY,
    "tensors.frozen": ANY,
    **{f"groups.overrides.{name}": ANY for name in NUMBERS},
    **{f"groups.schedule.{field.name}": ANY for field in optimizer_pb2.Schedule.DESCRIPTOR.fields},
    "groups.schedule.kind": (1, 2, 3, 4, 5, 6, 7),
    "groups.clip_grad_norm": ANY,
    "groups.state_precision": (1, 2, 3),
    "tensors.state_precision": (1, 2, 3),
    "tensors.table.semantics": (1, 2, 3, 4, 5),
    "tensors.table.uniform_bound": ANY,
    "tensors.table.seed": ANY,
    "tensors.table.hashed": ANY,
    "tensors.table.max_age_steps": ANY,
    "optimizer.rule": (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11),
    "optimizer.formula": (1, 2, 3, 4, 5),
    "optimizer.amsgrad": (1, 2, 3),
    "optimizer.decoupled_weight_decay": ANY,
    "optimizer.nesterov": ANY,
    "optimizer.centered": ANY,
    "optimizer.initial_accumulator_value": ANY,
    **{f"optimizer.hyperparameters.{name}": ANY for name in NUMBERS},
    "gradient.non_finite": (1, 2, 3),
    "gradient.clip_grad_norm": ANY,
    "gradient.clip_formula": (1, 2, 3),
    "gradient.clip_grad_value": ANY,
    "gradient.accumulation_steps": ANY,
    **{f"gradient.loss_scaling.{field.name}": ANY for field in optimizer_pb2.LossScaling.DESCRIPTOR.fields},
    "gradient.missing_gradient": (1, 2),
    "gradient.parameter_average_decay": ANY,
    "gradient.two_phase": ANY,
    "aggregation.mode": (1, 2),
    "aggregation.reduction": (1, 2, 3, 4, 5, 6),
    **dict.fromkeys(
        (
            f"aggregation.{name}"
            for name in (
                "workers",
                "required_workers",
                "max_staleness_steps",
                "max_clock_lead",
                "staleness_correction",
                *(f"{time}.{part}" for time in ("round_timeout", "least_grace", "most_grace") for part in PARTS),
                "uploads_at_once",
                "trimmed",
                "norm_bound",
            )
        ),
        ANY,
    ),
    "durability": (1, 2, 3),
    "checkpoints.every_steps": ANY,
    "checkpoints.every.seconds": ANY,
    "checkpoints.every.nanos": ANY,
    "initialization": (1, 2),
    "gradient_dtype": (1, 2, 3, 4),
    "reply_dtype": (1, 2, 3),
    "state_precision": (1, 2, 3),
    "lease.seconds": ANY,
    "lease.nanos": ANY,
    "label": ANY,
    "device": ANY,  # and refused where the session is placed, if the server does not have it
    "telemetry": (1, 2, 3),
}
SERVED_BEGIN: dict[str, tuple[Any, ...] | None] = {
    "step": ANY,
    "epoch": ANY,
    "gradient_dtype": (1, 2, 3, 4),
    "load": ANY,
    "reply.dtype": (1, 2, 3),
    "reply.mode": (1, 2, 3),
    "reply.first": ANY,
    "reply.base": ANY,
    "reply.chunk_bytes": ANY,
    "overlap": ANY,
    "in_shared_memory": ANY,
    **{f"hyperparameters.{name}": ANY for name in NUMBERS},
    "loss_scale": ANY,
    "missing_tensors": ANY,
    "base_step": ANY,
    "weight": ANY,
    "await_admission": ANY,
    "tables.tensor": ANY,
    "tables.entries": ANY,
    "reply.omit_rows": ANY,
}
# Values that say what would hold anyway.
DEFAULTS = {
    "aggregation.reduction": 1,
    "optimizer.rule": 1,
    "optimizer.formula": 1,
    "optimizer.amsgrad": 1,
    "gradient.non_finite": 1,
    "gradient.clip_formula": 1,
    "gradient.missing_gradient": 1,
    "durability": 1,
    "initialization": 1,
    "gradient_dtype": 1,
    "reply_dtype": 1,
    "reply.dtype": 1,
    "reply.mode": 1,
    "state_precision": 1,
    "groups.state_precision": 1,
    "tensors.state_precision": 1,
    "telemetry": 2,
}
# What must be set besides, by the field's path or its last name.
MOMENTUM = {"optimizer.rule": optimizer_pb2.RULE_SGD, "optimizer.hyperparameters.momentum": 0.25}
SCALED = {"gradient.loss_scaling.initial_scale": 2.0}
JOURNALLED = {"durability": session_pb2.DURABILITY_JOURNAL}
CONSTANT = {"groups.schedule.kind": 1, "groups.schedule.warmup_steps": 2}
LINEAR = {"groups.schedule.kind": 2, "groups.schedule.total_steps": 9}
STAIRS = {"groups.schedule.kind": 4, "groups.schedule.gamma": 0.25, "groups.schedule.interval_steps": 9}
ROUNDS = {"aggregation.mode": 1, "aggregation.workers": 9}
ASYNC = {"aggregation.mode": 2, "aggregation.workers": 9}
CONTEXT: dict[Any, dict[str, Any]] = {
    **dict.fromkeys(("required_workers", "uploads_at_once", "aggregation.reduction"), ROUNDS),
    **dict.fromkeys(("max_staleness_steps", "max_clock_lead", "staleness_correction"), ASYNC),
    ("aggregation.reduction", 5): {**ROUNDS, "aggregation.trimmed": 1},
    "workers": {"aggregation.mode": 1},
    "trimmed": {**ROUNDS, "aggregation.reduction": 5, "aggregation.trimmed": 1},
    "norm_bound": {**ROUNDS, "aggregation.reduction": 6},
    "base_step": ROUNDS,
    "weight": {**ROUNDS, "aggregation.reduction": 3},
    "momentum": MOMENTUM,
    "dampening": MOMENTUM,
    "nesterov": MOMENTUM,
    "alpha": {"optimizer.rule": optimizer_pb2.RULE_ADADELTA},
    "centered": {"optimizer.rule": optimizer_pb2.RULE_RMSPROP},
    "decay": {"optimizer.rule": optimizer_pb2.RULE_ADAGRAD},
    "initial_accumulator_value": {"optimizer.rule": optimizer_pb2.RULE_ADAGRAD},
    "trust_coefficient": {"optimizer.rule": optimizer_pb2.RULE_LAMB},
    "eps_root": {"optimizer.formula": optimizer_pb2.FORMULA_OPTAX},
    ("optimizer.amsgrad", optimizer_pb2.AMSGRAD_CORRECTED): {"optimizer.formula": optimizer_pb2.FORMULA_OPTAX},
    "gradient.clip_formula": {"gradient.clip_grad_norm": 2.0},
    **dict.fromkeys(("checkpoints.every_steps", "checkpoints.every.seconds", "checkpoints.every.nanos"), JOURNALLED),
    **dict.fromkeys(("initial_scale", "growth_factor", "backoff_factor", "growth_interval"), SCALED),
    "warmup_steps": CONSTANT,
    "warmup_start_factor": CONSTANT,
    "total_steps": LINEAR,
    "final_factor": LINEAR,
    "gamma": STAIRS,
    "interval_steps": STAIRS,
    ("groups.schedule.kind", 2): {"groups.schedule.total_steps": 9},
    ("groups.schedule.kind", 3): {"groups.schedule.total_steps": 9},
    ("groups.schedule.kind", 4): {"groups.schedule.gamma": 0.5, "groups.schedule.interval_steps": 9},
    ("groups.schedule.kind", 5): {"groups.schedule.gamma": 0.5},
    ("groups.schedule.kind", 6): {"groups.schedule.gamma": 0.5, "groups.schedule.total_steps": 9},
    ("groups.schedule.kind", 7): {"groups.schedule.warmup_steps": 1, "groups.schedule.total_steps": 9},
    "missing_tensors": {"gradient.missing_gradient": optimizer_pb2.MISSING_GRADIENT_POLICY_KEEP},
    "uniform_bound": {"tensors.table.semantics": 1, "initialization": 2},
    "seed": {"tensors.table.semantics": 1},
    "hashed": {"tensors.table.semantics": 1, "initialization": 2},
    "max_age_steps": {"tensors.table.semantics": 1, "initialization": 2, "tensors.table.hashed": True},
    ("tensors.table.semantics", tensor_pb2.ROW_SEMANTICS_ROW_WISE): {"optimizer.rule": optimizer_pb2.RULE_ADAGRAD},
    **dict.fromkeys(("tables.tensor", "tables.entries", "omit_rows"), {"tensors.table.semantics": 1}),
    "overlap": {"gradient.non_finite": optimizer_pb2.NON_FINITE_POLICY_ALLOW},
    ("reply.mode", step_pb2.REPLY_MODE_CHANGED): {"reply_dtype": tensor_pb2.DTYPE_BFLOAT16},
}


def context_of(path: str, value: Any) -> dict[str, Any]:
    if path.startswith("aggregation.") and path.endswith(PARTS):
        return ROUNDS
    return CONTEXT.get((path, value)) or CONTEXT.get(path) or CONTEXT.get(path.rpartition(".")[2]) or {}


def minimal() -> session_pb2.SessionConfig:
    return session_pb2.SessionConfig(
        tensors=[tensor_pb2.TensorSpec(name="w", shape=[2]), tensor_pb2.TensorSpec(name="v", shape=[3])],
        groups=[optimizer_pb2.ParameterGroup(), optimizer_pb2.ParameterGroup()],
        optimizer=optimizer_pb2.Optimizer(rule=optimizer_pb2.RULE_ADAM),
    )


LIMITS = ServerConfig(data_dir="/")
CONFIG = decode_session_config(minimal(), LIMITS)


def paths(message: Descriptor, prefix: str = "") -> Iterator[tuple[str, FieldDescriptor]]:
    """Yield every field below a message that holds a value of its own."""
    for field in message.fields:
        if field.message_type is None:
            yield prefix + field.name, field
        else:
            yield from paths(field.message_type, f"{prefix}{field.name}.")


def values_of(path: str, field: FieldDescriptor) -> list[Any]:
    """Return values that differ from the default: all of an enum and one beyond it, else one of the field's type."""
    if field.enum_type is not None:
        numbers = [value.number for value in field.enum_type.values if value.number]
        return [*numbers, max(numbers) + 40]
    return {
        "reply.chunk_bytes": [4096],
        "lease.seconds": [100],
        "lease.nanos": [5],
        "checkpoints.every.seconds": [100],
        "checkpoints.every.nanos": [5],
        "aggregation.round_timeout.seconds": [100],
        "aggregation.round_timeout.nanos": [5],
        "aggregation.least_grace.seconds": [1],
        "aggregation.least_grace.nanos": [5],
        "aggregation.most_grace.seconds": [100],
        "aggregation.most_grace.nanos": [500_000_000],
        "tensors.group": [1],
        "missing_tensors": [1],
        "tables.tensor": [1],  # tables are last in their group
        "reply.first": [1],
        "gradient.loss_scaling.growth_factor": [1.5],
        "gradient.loss_scaling.backoff_factor": [0.25],
    }.get(path) or {
        FieldDescriptor.CPPTYPE_BOOL: [True],
        FieldDescriptor.CPPTYPE_STRING: ["text"],
        FieldDescriptor.CPPTYPE_DOUBLE: [0.5],
        FieldDescriptor.CPPTYPE_UINT32: [3],
        FieldDescriptor.CPPTYPE_UINT64: [3],
    }[field.cpp_type]


def assign(message: Any, path: str, value: Any) -> None:
    """Set a field by its path, in the first element of a repeated message."""
    *parents, name = path.split(".")
    for parent in parents:
        below = getattr(message, parent)
        if hasattr(below, "add"):
            message = below[0] if len(below) else below.add()
        else:
            below.SetInParent()
            message = below
    if hasattr(getattr(message, name), "append"):
        del getattr(message, name)[:]
        getattr(message, name).append(value)
    else:
        setattr(message, name, value)


def cases(message: Descriptor) -> list[Any]:
    return [
        pytest.param(path, value, id=f"{path}={value}")
        for path, field in paths(message)
        for value in values_of(path, field)
    ]


def named_by(error: UnsupportedFeatureError | InvalidRequestError, path: str, prefix: str) -> bool:
    """Tell whether an error names the field, or the message that the field made be there."""
    field = re.sub(r"\[\d+\]", "", error.metadata["field"])
    return f"{prefix}.{path}" == field or f"{prefix}.{path}".startswith(field + ".")


@pytest.mark.parametrize("level", [session_pb2.DURABILITY_CHECKPOINT, session_pb2.DURABILITY_JOURNAL])
def test_a_server_without_a_data_directory_refuses_durable_sessions(level: session_pb2.Durability) -> None:
    config = minimal()
    config.durability = level
    with pytest.raises(UnsupportedFeatureError, match="start it with --data-dir") as refused:
        decode_session_config(config, ServerConfig())
    assert refused.value.metadata["field"] == "config.durability"
    assert refused.value.metadata["feature"] in ("durability_checkpoint", "durability_journal")


def test_sessions_in_memory_have_no_checkpoints() -> None:
    config = minimal()
    config.checkpoints.every_steps = 3
    with pytest.raises(InvalidRequestError, match="ask for another level") as refused:
        decode_session_config(config, LIMITS)
    assert refused.value.metadata["field"] == "config.checkpoints"


@pytest.mark.parametrize(("path", "value"), cases(session_pb2.SessionConfig.DESCRIPTOR))
def test_every_option_of_a_session_is_served_or_refused(path: str, value: Any) -> None:
    config, usual = minimal(), minimal()
    for name, needed in context_of(path, value).items():
        assign(config, name, needed)
        # Without its kind the rest of a schedule is refused, and so is a trim without its reduction.
        if path != "groups.schedule.kind" and (path, value) != ("aggregation.reduction", 5):
            assign(usual, name, needed)
    assign(config, path, value)
    served = SERVED_CONFIG.get(path, ())
    if served is ANY or value in served:
        same = decode_session_config(config, LIMITS) == decode_session_config(usual, LIMITS)
        assert same is (DEFAULTS.get(path) == value)
        return
    reply_in_int8 = path == "reply_dtype" and value == tensor_pb2.DTYPE_INT8_BLOCKWISE
    number_of_another_rule = ".overrides." in path or ".hyperparameters." in path or path == "groups.schedule.kind"
    is_wrong = number_of_another_rule or reply_in_int8
    with pytest.raises(InvalidRequestError if is_wrong else UnsupportedFeatureError) as refused:
        decode_session_config(config, LIMITS)
    assert named_by(refused.value, path, "config")


def test_the_list_of_what_is_served_speaks_of_real_fields() -> None:
    assert set(SERVED_CONFIG) <= {path for path, _ in paths(session_pb2.SessionConfig.DESCRIPTOR)}
    assert set(SERVED_BEGIN) <= {path for path, _ in paths(step_pb2.StepBegin.DESCRIPTOR)}


@pytest.mark.parametrize(("path", "value"), cases(step_pb2.StepBegin.DESCRIPTOR))
def test_every_option_of_a_step_is_served_or_refused(path: str, value: Any) -> None:
    usual = step_pb2.StepBegin(step=1)
    begin = step_pb2.StepBegin(step=1)
    assign(begin, path, value)
    config = minimal()
    for name, needed in context_of(path, value).items():
        assign(config, name, needed)
    decoded = decode_session_config(config, LIMITS)
    served = SERVED_BEGIN.get(path, ())
    if path == "tables.entries":
        begin.tables[0].tensor = 1
    if path == "reply.base":
        for message in (begin, usual):
            message.reply.mode, message.reply.dtype = step_pb2.REPLY_MODE_CHANGED, tensor_pb2.DTYPE_BFLOAT16
    if served is ANY or value in served:
        changed = decode_step_request(begin, decoded, 1 << 20) != decode_step_request(usual, decoded, 1 << 20)
        assert changed is (DEFAULTS.get(path) != value)
        return
    with pytest.raises((InvalidRequestError, UnsupportedFeatureError)) as refused:
        decode_trace(begin)
        decode_step_request(begin, decoded, 1 << 20)
    assert named_by(refused.value, path, "begin")
    if "hyperparameters" not in path and "dtype" not in path and path != "traceparent":
        assert isinstance(refused.value, UnsupportedFeatureError)


# Of these messages every field is known to the tests that are named here; one that is added must be, too.
KNOWN_FIELDS: dict[Any, set[str]] = {
    step_pb2.StepCommit: {"clip_coefficient", "skip", "group_coefficients"},
    tensor_pb2.Chunk: {"offset", "count", "rows", "patch"},
    attach_pb2.AttachOpen: {
        "session_id",
        "worker",
        "attach_token",
        "epoch",
        "transport",
        "durable_step",
        "any_worker",
        "acquisition",
    },
    pb.AttachRequest: {"open", "begin", "chunk", "commit", "check", "over_stream", "padding", "payload"},
    pb.StepRequest: {"session_id", "worker", "attach_token", "begin", "payload"},
    pb.PullRequest: {"session_id", "slots", "dtype", "chunk_bytes", "rows", "row_ids"},
    tensor_pb2.TableRows: {"tensor", "rows"},
    pb.LoadRequest: {"open", "slot", "chunk", "commit", "padding", "payload"},
    state_pb2.LoadOpen: {
        "session_id",
        "worker",
        "epoch",
        "attach_token",
        "load",
        "slots",
        "dtype",
        "step",
        "tensor_steps",
        "by_rows",
        "tables",
        "tensor_scalars",
        "loss_scale",
    },
    pb.CreateSessionRequest: {"request_id", "config"},
    pb.ListSessionsRequest: {"page_size", "page_token"},
    pb.GetSessionRequest: {"session_id"},
    pb.DeleteSessionRequest: {"session_id", "attach_token"},
    pb.GetServerInfoRequest: set(),
    pb.SaveCheckpointRequest: {"session_id", "name"},
    pb.ListCheckpointsRequest: {"session_id"},
    pb.VerifyCheckpointRequest: {"session_id", "name"},
    pb.DeleteCheckpointRequest: {"session_id", "name"},
    pb.GetStatisticsRequest: {"interval"},
    pb.RollbackRequest: {"session_id", "attach_token", "load", "epoch", "applied_step", "checkpoint", "step", "worker"},
    pb.ForkSessionRequest: {
        "session_id",
        "request_id",
        "checkpoint",
        "step",
        "label",
        "device",
        "lease",
        "durability",
        "checkpoints",
    },
    pb.FreezeSessionRequest: {"session_id", "move_id", "last_step", "lease", "last_contributions"},
    pb.ThawSessionRequest: {"session_id", "move_id"},
    pb.ExportSessionRequest: {"session_id", "move_id", "chunk_bytes"},
    pb.ImportSessionRequest: {"open", "slot", "chunk", "numbers", "padding", "payload"},
    move_pb2.ImportOpen: {"session_id", "attach_token"},
    move_pb2.StateNumbers: {
        "step",
        "load",
        "tensor_steps",
        "tensor_scalars",
        "loss_scale",
        "sum_bound",
        "last_result",
        "workers",
    },
    pb.HandOverSessionRequest: {
        "session_id",
        "move_id",
        "successor",
        "decided",
        "step",
        "load",
        "epoch",
        "contributions",
    },
    pb.GetSuccessorRequest: {"session_id", "attach_token", "worker"},
}


@pytest.mark.parametrize("message", KNOWN_FIELDS, ids=lambda message: message.DESCRIPTOR.name)
def test_every_field_of_a_request_is_known(message: Any) -> None:
    assert {field.name for field in message.DESCRIPTOR.fields} == KNOWN_FIELDS[message]


def test_every_request_is_looked_at() -> None:
    methods = pb.DESCRIPTOR.services_by_name["OptimizerService"].methods
    assert {method.input_type for method in methods} <= {message.DESCRIPTOR for message in KNOWN_FIELDS}


def test_features_are_named_as_the_contracts_comments_name_them(live: Any) -> None:
    """Each refusal says which feature would be needed, by a name that GetServerInfo could list."""
    proto = pathlib.Path(__file__).parents[3] / "proto" / "stepwire" / "v1"
    named = {
        name
        for path in proto.glob("*.proto")
        for name in re.findall(r'[Ff]eature\s+(?://\s+)?"([a-z0-9_]+)"', path.read_text())
    }
    refused = set()
    for path, field in paths(session_pb2.SessionConfig.DESCRIPTOR):
        for value in values_of(path, field)[:-1] if field.enum_type else values_of(path, field):
            config = minimal()
            assign(config, path, value)
            try:
                refuse_unserved(config)
            except UnsupportedFeatureError as error:
                refused.add(error.metadata["feature"])
    assert refused <= named
    assert set(SERVED_FEATURES) <= named
    assert tuple(sorted(SERVED_FEATURES)) == SERVED_FEATURES
    off = ("transport_cuda_ipc", "durability_checkpoint", "durability_journal", "durability_replicated")
    on_cpu = tuple(name for name in SERVED_FEATURES if name not in off)
    assert tuple(live.wire.info().features) == on_cpu


def test_a_refusal_says_what_to_do() -> None:
    error = unsupported("config.x", "y")
    assert str(error) == (
        "config.x asks for 'y', which this server does not serve; leave it out, or use a server whose GetServerInfo "
        "lists it"
    )
    assert error.metadata == {"field": "config.x", "feature": "y"}


def test_the_minimal_config_is_decoded() -> None:
    assert isinstance(CONFIG, SessionConfig)
    assert [tensor.spec.name for tensor in CONFIG.layout.tensors] == ["w", "v"]
