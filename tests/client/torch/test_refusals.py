"""The table of docs/torch.md: every row is refused, and no other option of PyTorch's own tests."""

from __future__ import annotations

import copy
import inspect
import pathlib
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import Parameter

import stepwire
import stepwire.torch
from stepwire.errors import InvalidRequestError, StepwireError, UnsupportedFeatureError
from stepwire.torch.rules import TORCH_RULES
from tests.client.torch.torch_inputs import RULES, inputs
from tests.client.torch.twins import parameters

DOCS = pathlib.Path(__file__).parents[3] / "docs" / "torch.md"
FLAGS = ("capturable", "differentiable")

Make = Callable[[str], Any]


def rows() -> dict[str, str]:
    """Return the reasons of the table, by the refused option."""
    section = DOCS.read_text().partition("## Refused options and parameters")[2]
    return dict(re.findall(r"^\| (?!what|---)(.+?) \| (.+?) \|$", section, re.MULTILINE))


def made(rule: str, params: Callable[[], Any], **options: Any) -> Make:
    return lambda target: getattr(stepwire.torch, rule)(params(), **{"server": target} | options)


def of(*shape: int, dtype: torch.dtype = torch.float32) -> Callable[[], Any]:
    return lambda: [Parameter(torch.zeros(shape, dtype=dtype), requires_grad=dtype.is_floating_point)]


class Flattened(torch.Tensor):
    """A tensor subclass that is several tensors, as torch's own of quantised or sharded parameters."""

    def __tensor_flatten__(self) -> Any:
        return [], None


class FlatParameter(Parameter):
    """A class with the name of FSDP's own parameters."""


def overlapping() -> list[Any]:
    base = torch.zeros(6)
    return [Parameter(base), Parameter(base[2:4])]


def listed_twice() -> list[Any]:
    parameter = Parameter(torch.zeros(2))
    return [parameter, parameter]


def groups(name: str) -> Callable[[], Any]:
    return lambda: [{"params": of(2)()}, {"params": of(2)(), name: True}]


def sparse_gradient(target: str) -> Any:
    embedding = torch.nn.Embedding(5, 3, sparse=True)
    with stepwire.torch.RAdam(embedding.parameters(), server=target) as optimizer:
        embedding(torch.tensor([1, 2])).sum().backward()
        optimizer.step()


# Of each row, by its first words: everything that it names, and the words of the error.
CASES: dict[str, list[tuple[Make, str]]] = {
    "`capturable=True`": [
        (made("Adam", of(2), capturable=True), r"param_groups\[0\]\['capturable'\] is True, and a CUDA")
    ],
    "`differentiable=True`": [
        (made("SGD", of(2), differentiable=True), r"\['differentiable'\] is True, and no gradient")
    ],
    "sparse parameters": [
        (made("Adam", lambda: [Parameter(torch.eye(3).to_sparse())]), "is sparse .*; make it dense"),
        (sparse_gradient, r"the gradient of .* is sparse .*Embedding\(sparse=False\)"),
    ],
    "float64": [
        (made("Adam", of(2, dtype=dtype)), f"{dtype}, and a session has float32")
        for dtype in (torch.float64, torch.complex128, torch.int32)
    ],
    "parameters of FSDP": [
        (made("Adam", lambda: [Parameter(Flattened(torch.zeros(2)))]), "Flattened, whose values are not in one tensor"),
        (made("Adam", lambda: [FlatParameter(torch.zeros(2))]), r"shard of a parameter \(FSDP, DTensor\)"),
    ],
    "two parameters over one memory": [
        (made("Adam", overlapping), "shares memory with .*; tie parameters by using one Parameter twice"),
        (made("Adam", lambda: [Parameter(torch.zeros(2, 1).expand(2, 3))]), "is expanded: .* contiguous copy"),
        (made("Adam", listed_twice), "once more; list each parameter once"),
    ],
    "parameters that conjugate": [
        (made("Adam", lambda: [Parameter(torch.zeros(2, dtype=torch.complex64).conj())]), "conjugates or negates"),
        (made("Adam", lambda: [Parameter(torch.ones(2, dtype=torch.complex64).conj().imag)]), "conjugates or negates"),
    ],
    "parameters on the meta device": [
        (made("Adam", lambda: [Parameter(torch.zeros(2, device="meta"))]), "the device meta; move the model"),
        (made("Adam", lambda: [torch.nn.parameter.UninitializedParameter()]), "no shape yet; run the model once"),
    ],
    "two parameters of one name": [
        (made("Adam", lambda: [{"params": [("w", of(2)()[0])]}, {"params": [("w", of(2)()[0])]}]), "give each its own")
    ],
    "groups that differ in": [
        (made(rule, groups(name), **more), rf"param_groups\[1\]\['{name}'\] is True .* a session has one value for all")
        for rule, name, more in (
            ("Adam", "amsgrad", {}),
            ("SGD", "nesterov", {"momentum": 0.9}),
            ("RMSprop", "centered", {}),
            ("NAdam", "decoupled_weight_decay", {}),
        )
    ],
    "`lr=inf`": [
        (made("Adam", of(2), lr=float("inf")), "lr is inf; it must be finite"),
        (made("SGD", of(2), momentum=1.0), r"momentum is 1.0; it must be in \[0, 1\)"),
        (made("SGD", of(2), momentum=0.9, dampening=-0.5), r"dampening is -0.5; it must be in \[0, 1\]"),
        (made("RMSprop", of(2), alpha=1.0), r"alpha is 1.0; it must be in \[0, 1\)"),
        (made("Adadelta", of(2), rho=1.0), r"rho is 1.0; it must be in \[0, 1\)"),
    ],
    "several servers or channels": [
        (
            lambda target, option=option: made("Adam", of(2), **{option: True})([target, target]),
            words,
        )
        for option, words in (
            ("shared_views", "shared_views: the model is partitioned over several servers"),
            (
                "send_in_backward",
                "send_in_backward: the model is partitioned over several servers or channels; leave the option out",
            ),
        )
    ],
}
CASES["`gradient_dtype="] = [
    (made("Adam", of(2), gradient_dtype="int8", send_in_backward=True), "leave out one of send_in_backward and grad")
]
CASES["several workers with"] = [
    (made("Adam", of(2), worker=0, workers=2, job="a", **{option: True}), f"{option}: not with several workers")
    for option in ("shared_views", "send_in_backward", "light_state_dict")
]
CLASSES = {"`Adafactor`, `ASGD`, `Muon`, `Rprop`", "`LBFGS`"}


def test_the_table_has_these_rows_and_no_other() -> None:
    tried = {row: [start for start in CASES if row.startswith(start)] for row in rows()}
    assert {row for row, found in tried.items() if len(found) != 1} == CLASSES
    assert {start for found in tried.values() for start in found} == set(CASES)


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
@pytest.mark.parametrize(
    ("make", "words"),
    [case for cases in CASES.values() for case in cases],
    ids=[w for c in CASES.values() for _, w in c],
)
def test_it_is_refused_with_the_reason(make: Make, words: str, target: str, client: stepwire.Client) -> None:
    before = {info.session_id for info in client.sessions()}
    with pytest.raises(StepwireError, match=words) as raised:
        make(target)
    assert isinstance(raised.value, (UnsupportedFeatureError, InvalidRequestError))
    assert raised.value.metadata["field"]
    assert {info.session_id for info in client.sessions()} <= before


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch is built without torch.distributed")
def test_a_sharded_parameter_of_torch_itself_is_refused(target: str) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        sharded = distribute_tensor(torch.zeros(4, 2), init_device_mesh("cpu", (1,)), [Shard(0)])
        with pytest.raises(
            UnsupportedFeatureError, match=r"one rank's shard .* \(FSDP, DTensor\); give the optimizer whole"
        ):
            stepwire.torch.Adam([Parameter(sharded)], server=target)
    finally:
        torch.distributed.destroy_process_group()


def test_every_class_of_torch_is_served_or_in_the_table() -> None:
    classes = {
        name
        for name, value in vars(torch.optim).items()
        if inspect.isclass(value) and issubclass(value, torch.optim.Optimizer) and value is not torch.optim.Optimizer
    }
    assert set(RULES) == classes & set(TORCH_RULES)
    reasons = {name: why for row, why in rows().items() if row in CLASSES for name in re.findall(r"`(\w+)`", row)}
    assert classes - set(TORCH_RULES) - {"SparseAdam"} == set(reasons)
    for name, why in reasons.items():
        with pytest.raises(UnsupportedFeatureError, match=f"stepwire.torch.{name}: {why}; use torch.optim.{name}"):
            getattr(stepwire.torch, name)(parameters())


@pytest.mark.parametrize("rule", RULES)
def test_of_torchs_own_cases_two_flags_are_refused(rule: str, target: str) -> None:
    pytest.importorskip("expecttest", reason="torch's own tests need it (pip install expecttest)")
    reasons = {flag: rows()[f"`{flag}=True`"] for flag in FLAGS}
    refused = [one for one in inputs(rule) if any(one.arguments.get(flag) for flag in FLAGS)]
    assert refused
    for one in refused:
        with pytest.raises(UnsupportedFeatureError) as raised:
            getattr(stepwire.torch, rule)(parameters(), server=target, **copy.deepcopy(one.arguments))
        flag = next(flag for flag in ("differentiable", "capturable") if one.arguments.get(flag))
        assert f"param_groups[0][{flag!r}] is True, and {reasons[flag]}; leave it out" in str(raised.value)
        assert raised.value.metadata["feature"] == f"torch_{flag}"
