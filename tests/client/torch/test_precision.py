"""Moments in several precisions: by a key of a parameter group, and by the names of parameters and modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import stepwire
import stepwire.torch
from stepwire.errors import InvalidRequestError


class Model(torch.nn.Module):
    """An embedding, a block of two layers, and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(70, 64)
        self.block = torch.nn.ModuleDict({"wide": torch.nn.Linear(64, 70), "norm": torch.nn.LayerNorm(70)})
        self.head = torch.nn.Linear(70, 70)


def gradients(model: Model, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def precisions(optimizer: Any) -> dict[str, str]:
    return dict(optimizer.session.config.tensor_precision)


def test_names_of_parameters_and_of_modules_have_precisions(remote: Any) -> None:
    own = {"block": "bfloat16", "block.norm": "float32", "embedding.weight": "float32"}
    model = Model()
    optimizer = remote("Adam", model.named_parameters(), state_precision="int8", tensor_precision=own)
    assert precisions(optimizer) == {
        "embedding.weight": "float32",
        "block.wide.weight": "bfloat16",
        "block.wide.bias": "bfloat16",
        "block.norm.weight": "float32",
        "block.norm.bias": "float32",
        "head.weight": "int8",
        "head.bias": "int8",
    }


def test_a_group_has_its_own_precision_and_is_stepped_as_alone(remote: Any) -> None:
    model, exact = Model(), Model()
    groups = [
        {"params": model.embedding.parameters(), "state_precision": "float32"},
        {"params": [*model.block.parameters(), *model.head.parameters()], "lr": 0.02},
    ]
    mixed = remote("Adam", groups, lr=0.01, state_precision="int8")
    whole = remote("Adam", exact.parameters(), lr=0.01)
    assert set(precisions(mixed).values()) == {"float32", "int8"}
    for step in range(1, 6):
        for twin, optimizer in ((model, mixed), (exact, whole)):
            gradients(twin, step)
            optimizer.step()
    assert torch.equal(model.embedding.weight, exact.embedding.weight)
    assert not torch.equal(model.head.weight, exact.head.weight)


def test_a_further_group_has_its_own_precision_and_the_others_keep_theirs(remote: Any) -> None:
    model = Model()
    optimizer = remote(
        "Adam", [{"params": model.embedding.parameters(), "state_precision": "float32"}], state_precision="int8"
    )
    gradients(model, 1)
    optimizer.step()
    before = optimizer.state_dict()["state"][0]
    optimizer.add_param_group({"params": model.head.parameters(), "state_precision": "bfloat16"})
    optimizer.add_param_group({"params": model.block.parameters()})
    assert list(precisions(optimizer).values()) == ["float32", *["bfloat16"] * 2, *["int8"] * 4]
    after = optimizer.state_dict()["state"][0]
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_state_dict_brings_no_precision(remote: Any) -> None:
    """It is a state, in whatever precision it was held; torch's own dict knows none."""
    model, other = Model(), Model()
    groups = [{"params": model.embedding.parameters(), "state_precision": "bfloat16"}, {"params": model.head.weight}]
    optimizer = remote("Adam", groups)
    local = torch.optim.Adam([{"params": other.embedding.parameters()}, {"params": other.head.weight}])
    gradients(other, 1)
    local.step()
    optimizer.load_state_dict(local.state_dict())
    theirs = remote("Adam", [{"params": Model().embedding.weight}, {"params": Model().head.weight}])
    theirs.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups[0]["state_precision"] == "bfloat16"
    assert [group.get("state_precision") for group in theirs.param_groups] == [None, None]
    assert [*precisions(optimizer).values(), *precisions(theirs).values()] == ["bfloat16", *["float32"] * 3]
    gradients(model, 2)
    optimizer.step()


def test_a_precision_that_is_changed_on_the_way_is_refused_until_a_load(remote: Any) -> None:
    model = Model()
    optimizer = remote("Adam", [{"params": model.embedding.parameters(), "state_precision": "bfloat16"}])
    gradients(model, 1)
    optimizer.step()
    optimizer.param_groups[0]["state_precision"] = "float32"
    gradients(model, 2)
    with pytest.raises(InvalidRequestError, match="state_precision of group 0 was changed from 'bfloat16' to 'float32"):
        optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert set(precisions(optimizer).values()) == {"float32"}
    optimizer.step()


def test_a_session_of_other_precisions_is_not_resumed(remote: Any, target: str) -> None:
    owner = remote("Adam", Model().named_parameters(), tensor_precision={"embedding": "bfloat16"})
    options: dict[str, Any] = {"server": target, "session": owner.session_id}
    words = "the moments of 'embedding.weight' are in 'bfloat16' there and in 'float32' here"
    with pytest.raises(InvalidRequestError, match=words):
        stepwire.torch.Adam(Model().named_parameters(), **options)
    resumed = remote("Adam", Model().named_parameters(), **options, tensor_precision={"embedding": "bfloat16"})
    assert resumed.session_id == owner.session_id


@pytest.mark.parametrize(
    ("own", "words"),
    [
        ({"tensor_precision": {"embed": "float32"}}, r"tensor_precision\['embed'\]: it is the name of no parameter"),
        ({"tensor_precision": {"block": "half"}}, r"tensor_precision\['block'\]: 'half'; use one of: float32, bfloat1"),
    ],
)
def test_a_wrong_name_or_precision_is_refused(own: Any, words: str, target: str) -> None:
    with pytest.raises(InvalidRequestError, match=words):
        stepwire.torch.Adam(Model().named_parameters(), server=target, **own)


def test_a_wrong_precision_of_a_group_is_refused(target: str) -> None:
    with pytest.raises(InvalidRequestError, match=r"groups\[0\]\.state_precision: 'half'; use one of"):
        stepwire.torch.Adam([{"params": Model().parameters(), "state_precision": "half"}], server=target)
