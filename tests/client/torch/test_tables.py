"""Sparse gradients in the classes of torch's names: the rows that came, or a dense step, as torch does with them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch

import stepwire
import stepwire.torch
from tests.client.torch.twins import assert_same_bits, same_bits
from tests.support.lost_replies import lost_replies

ROWS, WIDTH = 9, 5
EPS = torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True)
def trusted() -> Iterator[None]:
    """Torch's own Adagrad makes sparse tensors, and warns unless somebody has chosen whether they are checked."""
    with torch.sparse.check_sparse_tensor_invariants(enable=False):
        yield


def assert_close(one: Iterable[torch.Tensor], other: Iterable[torch.Tensor]) -> None:
    """Compare parameters: torch fuses products and sums, and its root is not always rounded correctly."""
    for left, right in zip(one, other, strict=True):
        torch.testing.assert_close(left, right, rtol=8 * EPS, atol=8 * EPS)


def models(count: int = 2, dtype: torch.dtype = torch.float32) -> list[torch.nn.Sequential]:
    """Make models of the same values: a table with sparse gradients, and a dense layer."""
    made = []
    for _ in range(count):
        torch.manual_seed(1)
        made.append(torch.nn.Sequential(torch.nn.Embedding(ROWS, WIDTH, sparse=True), torch.nn.Linear(WIDTH, 3)))
    return [model.to(dtype) for model in made]


def draw(model: torch.nn.Sequential, others: list[torch.nn.Sequential], seed: int, repeated: bool = False) -> None:
    """Give models the same gradients, of some rows of the table, each once unless they repeat."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, ROWS, (7,), generator=generator) if repeated else torch.randperm(ROWS, generator=generator)
    model.zero_grad()
    model(ids[:4]).sin().sum().backward()
    for other in others:
        for mine, its in zip(model.parameters(), other.parameters(), strict=True):
            assert mine.grad is not None
            its.grad = mine.grad.clone()


@pytest.mark.parametrize(
    ("name", "options", "tables"),
    [
        ("Adagrad", {"lr": 0.1, "lr_decay": 0.2, "initial_accumulator_value": 0.3, "eps": 1e-6}, True),
        ("SGD", {"lr": 0.125, "maximize": True}, True),
        ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.25}, False),
        ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}, False),
    ],
)
def test_rows_are_stepped_as_torch_does(
    name: str, options: dict[str, Any], tables: bool, remote: Callable[..., Any]
) -> None:
    """Each row comes once; torch adds repeated rows in any order. State dicts go over both ways, sparse buffers too.

    The sums of Adagrad, and SGD with a rate whose products are exact, have torch's bits.
    """
    model, mirrored = models()
    local = getattr(torch.optim, name)(model.parameters(), **options)
    ours = remote(name, mirrored.named_parameters(), **options)
    for step in range(6):
        if step == 3:
            ours.load_state_dict(local.state_dict())
        draw(model, [mirrored], step)
        local.step()
        ours.step()
        assert_close(model.parameters(), mirrored.parameters())
        assert options["lr"] != 0.125 or same_bits(model[0].weight, mirrored[0].weight)
    assert ours.session.config.tables == ({"0.weight": "torch_sparse"} if tables else {})
    assert ours.applied_step == 6
    mine, its = ours.state_dict()["state"], local.state_dict()["state"]
    for one, other in zip(mine.values(), its.values(), strict=True):
        assert one.keys() == other.keys()
        assert_close(*[[torch.as_tensor(state[key]).to_dense() for key in one] for state in (one, other)])
    assert name != "Adagrad" or same_bits(mine[0]["sum"], its[0]["sum"])
    if "nesterov" in options:  # torch adds no dense buffer to a sparse gradient
        return
    back = getattr(torch.optim, name)(model.parameters(), **options)
    back.load_state_dict(ours.state_dict())
    draw(model, [mirrored], 6)
    back.step()
    ours.step()
    assert_close(model.parameters(), mirrored.parameters())


def test_the_first_sparse_gradient_moves_the_state_once_and_a_declared_table_never(remote: Callable[..., Any]) -> None:
    late, early = models()
    options = {"lr": 0.1, "label": "rows"}
    moved = remote("Adagrad", late.named_parameters(), **options)
    declared = remote("Adagrad", early.named_parameters(), tables=["0"], **options)
    before = [moved.session.own_id, declared.session.own_id]
    dense = torch.ones(ROWS, WIDTH)
    for model in (late, early):
        model[0].weight.grad = dense.clone()  # a dense gradient of a table has every row
    for optimizer in (moved, declared):
        optimizer.step()
    draw(late, [early], 1)
    for optimizer in (moved, declared):
        optimizer.step()
    second = [moved.session.own_id, declared.session.own_id]
    assert second[0] != before[0] and second[1] == before[1]
    draw(late, [early], 2, repeated=True)
    for optimizer in (moved, declared):
        optimizer.step()
    assert [moved.session.own_id, declared.session.own_id] == second
    assert moved.applied_step == declared.applied_step == 3
    assert_same_bits(late.parameters(), early.parameters())
    late[0].weight.grad = early[0].weight.grad = dense
    for optimizer in (moved, declared):
        optimizer.step()
    assert_same_bits(late.parameters(), early.parameters())


def test_adam_refuses_sparse_gradients_as_torch_does_unless_a_meaning_is_named(remote: Callable[..., Any]) -> None:
    options: dict[str, Any] = {"lr": 0.05, "betas": (0.8, 0.9), "eps": 1e-3}
    refused, sparse, dense, lone, whole = models(5)
    plain = remote("Adam", refused.named_parameters(), **options)
    draw(refused, [], 0)
    with pytest.raises(stepwire.InvalidRequestError, match="Adam does not support sparse gradients, please consider"):
        plain.step()
    assert plain.applied_step == 0
    by_rows = remote("Adam", sparse.named_parameters(), row_semantics="torch_sparse", **options)
    as_dense = remote("Adam", dense.named_parameters(), row_semantics="global", **options)
    theirs = torch.optim.SparseAdam(lone[0].parameters(), **options)
    beside = torch.optim.Adam(whole.parameters(), **options)
    for step in range(3):
        draw(sparse, [dense, lone, whole], step)
        whole[0].weight.grad = whole[0].weight.grad.to_dense()
        for optimizer in (by_rows, as_dense, theirs, beside):
            optimizer.step()
        torch.testing.assert_close(sparse[0].weight, lone[0].weight, rtol=3e-7, atol=3e-7)
        for one, other in zip(dense.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=2e-6, atol=2e-6)
    assert by_rows.session.config.tables == {"0.weight": "torch_sparse"} and not as_dense.session.config.tables


def test_a_change_by_the_user_and_a_new_group_keep_the_table(remote: Callable[..., Any]) -> None:
    model, mirrored = models()
    extra = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    local = torch.optim.Adagrad(model.parameters(), lr=0.1)
    ours = remote("Adagrad", mirrored.parameters(), lr=0.1)
    for step in range(4):
        if step == 1:
            for each in (model, mirrored):
                with torch.no_grad():
                    each[0].weight.mul_(0.5)
        if step == 2:
            for optimizer, parameter in zip((local, ours), extra, strict=True):
                optimizer.add_param_group({"params": [parameter], "lr": 0.2})
        draw(model, [mirrored], step)
        for parameter in extra:
            parameter.grad = torch.full((2,), 0.5)
        local.step()
        ours.step()
        assert_close([*model.parameters(), extra[0]], [*mirrored.parameters(), extra[1]])
    assert list(ours.session.config.tables.values()) == ["torch_sparse"]


def test_momentum_that_begins_makes_a_dense_step_of_the_table(remote: Callable[..., Any]) -> None:
    model, mirrored = models()
    local = torch.optim.SGD(model.parameters(), lr=0.1)
    ours = remote("SGD", mirrored.parameters(), lr=0.1)
    for step in range(4):
        if step == 2:
            for optimizer in (local, ours):
                optimizer.param_groups[0]["momentum"] = 0.5
            with pytest.raises(stepwire.InvalidRequestError, match="momentum was changed from 0"):
                ours.step()
            ours.load_state_dict(ours.state_dict())
            assert not ours.session.config.tables
        draw(model, [mirrored], step)
        local.step()
        ours.step()
        assert_close(model.parameters(), mirrored.parameters())


def test_a_step_whose_reply_is_lost_is_applied_once(remote: Callable[..., Any]) -> None:
    model, mirrored = models()
    local = torch.optim.Adagrad(model.parameters(), lr=0.1)
    ours = remote("Adagrad", mirrored.parameters(), lr=0.1, tables=["param_groups[0][0]"], transport="tcp")
    for step in range(3):
        draw(model, [mirrored], step)
        local.step()
        if step == 1:
            with lost_replies(), pytest.raises(stepwire.StepwireError):
                ours.step()
        ours.step()
        assert_close(model.parameters(), mirrored.parameters())
    assert ours.applied_step == 3


@pytest.mark.parametrize("meaning", ["row_counter", "skipped"])
@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD"])
def test_other_meanings_step_declared_tables(
    name: str, meaning: str, remote: Callable[..., Any], client: stepwire.Client
) -> None:
    """Beside a session of the table with that meaning; a state with moments is refused and changes nothing."""
    (model,) = models(1)
    options: dict[str, Any] = {"lr": 0.05, "momentum": 0.9} if name == "SGD" else {"lr": 0.05, "weight_decay": 0.0}
    ours = remote(name, model.named_parameters(), row_semantics=meaning, tables=["0"], **options)
    rule: Any = stepwire.SGD(lr=0.05, momentum=0.9) if name == "SGD" else stepwire.Adam(lr=0.05)
    start = model[0].weight.detach().numpy().copy()
    with client.create_session({"t": start}, optimizer=rule, tables={"t": meaning}) as session:
        for step in range(5):
            draw(model, [], step, repeated=True)
            gradient: Any = model[0].weight.grad
            rows, values = gradient._indices()[0].numpy(), gradient._values().numpy()
            ours.step()
            session.step({"t": stepwire.Rows(rows, values)})
        whole: Any = session.pull()
        assert whole["t"].tobytes() == model[0].weight.detach().numpy().tobytes()
        saved, before = ours.state_dict(), [each.detach().clone() for each in model.parameters()]
        assert int(saved["state"][0]["step"] if "step" in saved["state"][0] else 5) == 5
        with pytest.raises(stepwire.UnsupportedFeatureError, match="numbers of its rows"):
            ours.load_state_dict(saved)
        assert_same_bits(before, model.parameters())
        draw(model, [], 5)
        gradient = model[0].weight.grad
        ours.step()
        session.step({"t": stepwire.Rows(gradient._indices()[0].numpy(), gradient._values().numpy())})
        whole = session.pull()
        assert whole["t"].tobytes() == model[0].weight.detach().numpy().tobytes() and ours.applied_step == 6


def test_a_session_with_tables_is_resumed_as_it_is(remote: Callable[..., Any]) -> None:
    model, mirrored, third = models(3)
    local = torch.optim.Adagrad(model.parameters(), lr=0.1)
    ours = remote("Adagrad", mirrored.parameters(), lr=0.1)
    draw(model, [mirrored], 0)
    local.step()
    ours.step()
    session_id = ours.session_id
    ours.detach()
    with pytest.raises(stepwire.InvalidRequestError, match="stepped as 'torch_sparse' there and as 'global' here"):
        remote("Adagrad", third.parameters(), lr=0.1, session=session_id, row_semantics="global")
    resumed = remote("Adagrad", third.parameters(), lr=0.1, session=session_id)
    assert_close(model.parameters(), third.parameters())
    draw(model, [third], 1)
    local.step()
    resumed.step()
    assert_close(model.parameters(), third.parameters())


def test_a_model_of_bfloat16_and_backward_sending_and_shared_views_take_rows(target: str) -> None:
    """A table shares no memory, and its rows are sent at the end of a step."""
    reference, *mirrored = models(4)
    ways: list[dict[str, Any]] = [
        {"transport": "tcp"},
        {"transport": "tcp", "send_in_backward": True},
        {"shared_views": True},
    ]
    optimizers = [
        stepwire.torch.SGD(model.parameters(), lr=0.1, server=target, **way)
        for model, way in zip(mirrored, ways, strict=True)
    ]
    local = torch.optim.SGD(reference.parameters(), lr=0.1)
    try:
        for step in range(4):
            draw(reference, mirrored, step)
            for optimizer in (local, *optimizers):
                optimizer.step()
            for model in mirrored:
                assert_close(reference.parameters(), model.parameters())
    finally:
        for optimizer in optimizers:
            optimizer.close()
    (half,) = models(1, torch.bfloat16)
    with stepwire.torch.Adagrad(half.parameters(), lr=0.1, server=target) as optimizer:
        for step in range(2):
            draw(half, [], step)
            optimizer.step()
        masters: Any = optimizer.session.pull()
        for values, parameter in zip(masters.values(), half.parameters(), strict=True):
            assert same_bits(torch.from_numpy(values).bfloat16(), parameter.detach())


REFUSALS: dict[str, tuple[str, dict[str, Any], str]] = {
    "meaning": ("Adagrad", {"row_semantics": "row_wise"}, "or RemoteEmbedding with this meaning"),
    "late table": ("Adam", {"row_semantics": "skipped"}, r"name tables from the beginning, by tables=\[…\]"),
    "name": ("SGD", {"tables": ["1", "none"]}, "'none' is the name of no parameter and no module"),
    "rule": ("Adam", {"tables": ["0"]}, "'0.weight' cannot be a table: Adam does not support sparse gradients"),
    "decay": ("Adagrad", {"weight_decay": 0.1}, "has no meaning for rows that sleep"),
    "moments": ("Adagrad", {"state_precision": "bfloat16"}, "tables have float32 ones"),
    "workers": (
        "SGD",
        {"tables": ["0"], "workers": 2, "worker": 0, "job": "rows"},
        "'0.weight' cannot be a table of sev",
    ),
    "formula": ("RMSprop", {"row_semantics": "torch_sparse"}, "tables are stepped by adam, sgd, adagrad"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_name_the_value_and_leave_everything_as_it_was(case: str, remote: Callable[..., Any]) -> None:
    name, options, words = REFUSALS[case]
    (model,) = models(1)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(stepwire.StepwireError, match=words):
        optimizer = remote(name, model.named_parameters(), lr=0.1, **options)
        draw(model, [], 0)
        optimizer.step()
    assert_same_bits(before, model.parameters())


def test_sparse_gradients_of_other_forms_are_refused(remote: Callable[..., Any]) -> None:
    parameter = torch.nn.Parameter(torch.zeros(4, 3))
    optimizer = remote("SGD", [parameter], lr=1.0)
    parameter.grad = torch.eye(4, 3).to_sparse()
    with pytest.raises(stepwire.InvalidRequestError, match=r"2 sparse dimensions of torch.float32; a table takes rows"):
        optimizer.step()
    parameter.grad = torch.eye(4, 3).to_sparse(1)
    optimizer.step()
    assert same_bits(parameter.detach(), -torch.eye(4, 3) + 0.0)


def test_tables_over_several_servers_have_the_bits_of_one(remote: Callable[..., Any], target: str) -> None:
    models = []
    for _ in range(2):
        torch.manual_seed(1)
        models.append(torch.nn.Sequential(torch.nn.Embedding(1000, 8, sparse=True), torch.nn.Linear(8, 2)))
    cut, whole = (
        remote("Adagrad", model.named_parameters(), lr=0.1, server=server)
        for model, server in zip(models, ([target, target], target), strict=True)
    )
    for step in range(3):
        ids = torch.randint(0, 1000, (30,), generator=torch.Generator().manual_seed(step))
        for model, optimizer in zip(models, (cut, whole), strict=True):
            model.zero_grad()
            model(ids).sin().sum().backward()
            optimizer.step()
        assert_same_bits(models[0].parameters(), models[1].parameters())
    assert len(cut.session.shards) == 2 and cut.session.config.tables == {"0.weight": "torch_sparse"}
