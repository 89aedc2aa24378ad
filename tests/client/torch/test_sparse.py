"""Sparse gradients of torch: `SparseAdam`, and embeddings whose table is on the server alone."""

from __future__ import annotations

import pickle
import uuid
from typing import Any

import numpy as np
import pytest
import torch

import stepwire
import stepwire.torch
from stepwire.links.hold import Hold
from stepwire.torch import RemoteEmbedding, RemoteEmbeddingBag, SparseAdam
from tests.integration.workers.together import together
from tests.support.lost_replies import lost_replies

ROWS, WIDTH = 9, 5
OPTIONS: dict[str, Any] = {"lr": 0.05, "betas": (0.8, 0.9), "eps": 1e-3}


def embeddings(count: int = 2) -> list[torch.nn.Embedding]:
    """Make embeddings of the same values, with sparse gradients."""
    torch.manual_seed(1)
    made = [torch.nn.Embedding(ROWS, WIDTH, sparse=True) for _ in range(count)]
    for other in made[1:]:
        other.load_state_dict(made[0].state_dict())
    return made


def batches(count: int, repeated: bool) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    if repeated:
        return [torch.randint(0, ROWS, (2, 4), generator=generator) for _ in range(count)]
    return [torch.randperm(ROWS, generator=generator)[:4] for _ in range(count)]


def backward(embedding: Any, ids: torch.Tensor) -> None:
    (embedding(ids) ** 3).sum().backward()


def test_sparse_adam_is_that_of_torch_with_the_bits_of_its_moments(target: str) -> None:
    """Each row comes once, since torch adds repeated rows in any order; nor does it round every root correctly.

    So the gradients are those of one model, and parameters differ by their last digits. A scheduler changes the rate.
    """
    local, remote = embeddings()
    theirs = torch.optim.SparseAdam(local.parameters(), **OPTIONS)
    with SparseAdam(remote.parameters(), server=target, **OPTIONS) as ours:
        schedulers = [torch.optim.lr_scheduler.ExponentialLR(each, 0.7) for each in (theirs, ours)]
        for ids in batches(5, repeated=False):
            theirs.zero_grad()
            backward(local, ids)
            remote.weight.grad = local.weight.grad.clone()
            for each in (theirs, ours, *schedulers):
                each.step()
            torch.testing.assert_close(remote.weight, local.weight, rtol=3e-7, atol=3e-7)
        state, wanted = ours.state_dict(), theirs.state_dict()
        assert state["param_groups"] == wanted["param_groups"]
        for key in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(torch.as_tensor(state["state"][0][key]), torch.as_tensor(wanted["state"][0][key]))


def test_sparse_adam_goes_on_from_the_state_of_torch_and_hands_its_own_over(target: str) -> None:
    local, remote = embeddings()
    theirs = torch.optim.SparseAdam(local.parameters(), **OPTIONS)
    with SparseAdam(remote.parameters(), server=target, lr=9.0) as ours:
        for turn, ids in enumerate(batches(6, repeated=True)):
            if turn == 2:
                remote.load_state_dict(local.state_dict())
                ours.load_state_dict(theirs.state_dict())
                assert ours.param_groups[0]["lr"] == 0.05
            for embedding, optimizer in ((local, theirs), (remote, ours)):
                optimizer.zero_grad()
                backward(embedding, ids)
                optimizer.step()
            if turn >= 2:
                torch.testing.assert_close(remote.weight, local.weight, rtol=2e-6, atol=2e-6)
        back = torch.optim.SparseAdam(local.parameters())
        back.load_state_dict(ours.state_dict())
        assert back.state[local.weight]["step"] == 6


def test_a_table_that_the_user_changed_is_loaded_again(target: str) -> None:
    (remote,) = embeddings(1)
    with SparseAdam(remote.parameters(), lr=1.0, server=target) as optimizer:
        with torch.no_grad():
            remote.weight.fill_(2.0)
        remote(torch.tensor([3])).sum().backward()
        optimizer.step()
        assert np.all(optimizer.session.pull()["0"][:3] == 2.0)
        assert remote.weight[3].tolist() == pytest.approx([1.0] * WIDTH)


def test_dense_gradients_and_late_groups_are_refused(target: str) -> None:
    (remote,) = embeddings(1)
    with SparseAdam(remote.parameters(), server=target) as optimizer:
        optimizer.step()  # no gradient: nothing to do
        remote.weight.grad = torch.ones(ROWS, WIDTH)
        with pytest.raises(stepwire.InvalidRequestError, match=r"Embedding\(sparse=True\)"):
            optimizer.step()
        with pytest.raises(stepwire.InvalidRequestError, match="an optimizer of all groups"):
            optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2, 2))]})
        assert optimizer.session.applied_step == 0
    with pytest.raises(stepwire.InvalidRequestError, match="it is closed"):
        optimizer.step()


@pytest.mark.parametrize("bag", [False, True])
def test_a_remote_embedding_trains_as_a_local_one(target: str, bag: bool) -> None:
    rule = stepwire.Adam(lr=0.05, betas=(0.8, 0.9), eps=1e-3)
    kind = RemoteEmbeddingBag if bag else RemoteEmbedding
    remote = kind(ROWS, WIDTH, optimizer=rule, seed=3, server=target)
    try:
        first = torch.from_numpy(remote.session.pull()["weight"])
        own = {"mode": "mean"} if bag else {}
        local = (torch.nn.EmbeddingBag if bag else torch.nn.Embedding)(ROWS, WIDTH, sparse=True, _weight=first, **own)
        optimizer = torch.optim.SparseAdam(local.parameters(), **OPTIONS)
        assert list(remote.parameters()) == [] and float(first.abs().max()) <= WIDTH**-0.5
        for ids in batches(4, repeated=True):
            optimizer.zero_grad()
            backward(local, ids)
            backward(local, ids[:1])
            optimizer.step()
            with torch.no_grad():
                remote(ids)  # of which no gradient is sent
            backward(remote, ids)
            backward(remote, ids[:1])
            result = remote.step()
            assert result is not None and result.grad_norm > 0
        assert remote.step() is None
        now = torch.from_numpy(remote.session.pull()["weight"])
        torch.testing.assert_close(now, local.weight.detach(), rtol=2e-6, atol=2e-6)
        with pytest.raises(stepwire.UnsupportedFeatureError, match="is not copied"):
            pickle.dumps(remote)
        with pytest.raises(stepwire.InvalidRequestError, match="int64 or int32"):
            remote(torch.ones(2))
    finally:
        remote.close()


def test_without_a_server_that_of_connect_is_used(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPWIRE_TARGET", target)
    (embedding,) = embeddings(1)
    with SparseAdam(embedding.parameters()) as optimizer:
        assert optimizer.session.info().applied_step == 0
    remote = RemoteEmbedding(ROWS, WIDTH)
    try:
        assert remote.session.shapes == {"weight": (ROWS, WIDTH)}
    finally:
        remote.close()


@pytest.mark.parametrize("applied", [False, True])
@pytest.mark.parametrize("again", ["the same", "another", "a state dict"])
def test_a_step_that_failed_after_a_changed_table_is_applied_once(target: str, again: str, applied: bool) -> None:
    """Repeated, or followed by another step, or saved: the model has the rows of the server, and each gradient once."""
    (remote,) = embeddings(1)
    with SparseAdam(remote.parameters(), lr=1.0, server=target) as optimizer:
        with torch.no_grad():
            remote.weight.fill_(2.0)
        remote(torch.tensor([3])).sum().backward()
        with lost_replies(applied=applied), pytest.raises(stepwire.DeadlineExceededError):
            optimizer.step()
        if again == "another":
            optimizer.zero_grad()
            remote(torch.tensor([1])).sum().backward()
        if again != "a state dict":
            optimizer.step()
        state = optimizer.state_dict()["state"]
        steps = {"the same": 1, "another": applied + 1, "a state dict": int(applied)}[again]
        assert (state[0]["step"] if state else 0) == steps
        assert np.array_equal(optimizer.session.pull()["0"], remote.weight.detach().numpy())
        assert (remote.weight[3].tolist() == [2.0] * WIDTH) == (not applied and again != "the same")


def test_a_table_changed_after_a_failure_is_loaded_with_the_rows_of_the_other(target: str) -> None:
    first, second = (torch.nn.Embedding(ROWS, WIDTH, sparse=True, _weight=torch.ones(ROWS, WIDTH)) for _ in range(2))
    with SparseAdam([first.weight, second.weight], lr=1.0, server=target) as optimizer:
        (first(torch.tensor([3])).sum() + second(torch.tensor([3])).sum()).backward()
        with lost_replies(), pytest.raises(stepwire.DeadlineExceededError):
            optimizer.step()
        with torch.no_grad():
            first.weight.fill_(2.0)
        optimizer.zero_grad()
        first(torch.tensor([1])).sum().backward()
        optimizer.step()
        pulled = optimizer.session.pull()
        assert pulled["0"][3].tolist() == [2.0] * WIDTH and pulled["1"][3] == pytest.approx([0.0] * WIDTH, abs=1e-5)
        assert np.array_equal(pulled["1"], second.weight.detach().numpy())


def test_a_state_that_is_refused_leaves_the_optimizer_as_it_was(target: str) -> None:
    (remote,) = embeddings(1)
    with SparseAdam(remote.parameters(), server=target) as optimizer:
        backward(remote, torch.tensor([3]))
        optimizer.step()
        session, good = optimizer.session, optimizer.state_dict()
        bad = {**good, "state": {0: {**good["state"][0], "exp_avg": torch.ones(2, 2)}}}
        bad["param_groups"] = [{**good["param_groups"][0], "lr": 9.0}]
        with pytest.raises(ValueError, match=r"exp_avg of a parameter of shape \(9, 5\) has \(2, 2\)"):
            optimizer.load_state_dict(bad)
        assert optimizer.session is session and optimizer.param_groups[0]["lr"] == 1e-3
        optimizer.step()
        assert optimizer.state_dict()["state"][0]["step"] == 2
    with SparseAdam(remote.parameters(), server=target, semantics="row_counter") as optimizer:
        session = optimizer.session
        with pytest.raises(stepwire.UnsupportedFeatureError, match="'row_counter' belong to the numbers"):
            optimizer.load_state_dict(good)
        assert optimizer.session is session and session.info().applied_step == 0
    with pytest.raises(stepwire.UnsupportedFeatureError, match="'global' moves all rows"):
        SparseAdam(remote.parameters(), server=target, semantics="global")


def test_the_rows_of_a_failed_step_are_applied_once_whatever_follows(target: str) -> None:
    """Rows that come after a lost reply are a step of their own; a refused step is one with them."""
    remote = RemoteEmbedding(ROWS, WIDTH, optimizer=stepwire.SGD(lr=1.0), uniform_bound=0.0, server=target)
    try:
        remote(torch.tensor([3])).sum().backward()
        with lost_replies(), pytest.raises(stepwire.DeadlineExceededError):
            remote.step(lr=2.0)
        remote(torch.tensor([3, 4])).sum().backward()
        remote.step()
        assert remote.session.pull()["weight"][2:5, 0].tolist() == [0, -3, -1] and remote.session.applied_step == 2
        remote(torch.tensor([3])).sum().backward()
        with pytest.raises(stepwire.InvalidRequestError):
            remote.step(lr=-1.0)
        remote(torch.tensor([4])).sum().backward()
        remote.step()
        assert remote.session.pull()["weight"][2:5, 0].tolist() == [0, -4, -2] and remote.session.applied_step == 3
        remote(torch.tensor([3])).sum().backward()
        with lost_replies(applied=False), pytest.raises(stepwire.DeadlineExceededError):
            remote.step()
        remote.zero_grad()
        assert remote.step() is None and remote.session.applied_step == 3
    finally:
        remote.close()


def test_the_timeout_is_that_of_every_call_with_a_client_of_the_callers(
    target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []
    step = Hold.attach

    def noted(self: Hold, deadline: Any, *args: Any, **options: Any) -> Any:
        seen.append(deadline.remaining())
        return step(self, deadline, *args, **options)

    monkeypatch.setattr(Hold, "attach", noted)
    (local,) = embeddings(1)
    with stepwire.connect(target) as client:
        remote = RemoteEmbedding(ROWS, WIDTH, server=client, timeout=1234.0)
        with SparseAdam(local.parameters(), server=client, timeout=1234.0) as optimizer:
            for embedding in (remote, local):
                embedding(torch.tensor([1])).sum().backward()
            optimizer.step()
            remote.step()
        remote.close()
    assert seen and all(1000 < seconds < 1234 for seconds in seen)


def test_two_workers_of_a_remote_embedding_step_as_one_with_both_batches(target: str) -> None:
    """A worker without rows steps too, and the last one that closes ends the session."""
    options: dict[str, Any] = {"optimizer": stepwire.SGD(lr=1.0), "uniform_bound": 0.0, "server": target}
    way = {"aggregation": stepwire.Aggregation(workers=2, reduction="sum"), "request_id": uuid.uuid4().hex}
    workers = [RemoteEmbedding(ROWS, WIDTH, worker=rank, **way, **options) for rank in range(2)]
    for batches in (([3, 3, 1], [3]), ([], [2])):
        for worker, ids in zip(workers, batches, strict=True):
            worker(torch.tensor(ids, dtype=torch.int64)).sum().backward()
        together(*(worker.step for worker in workers))
    assert workers[0].session.pull()["weight"][:, 0].tolist() == [0, -1, -1, -3, 0, 0, 0, 0, 0]
    session = workers[0].session
    for worker in workers:
        worker.close()
    with stepwire.connect(target) as client, pytest.raises(stepwire.SessionNotFoundError):
        client.session(session.own_id)


def test_the_classes_of_torch_step_tables_over_several_targets(target: str) -> None:
    trained: list[Any] = []
    for server in (target, [target] * 3):
        embedding = torch.nn.Embedding(3000, 64, sparse=True, _weight=torch.ones(3000, 64))
        remote = RemoteEmbedding(3000, 64, seed=3, server=server)
        with SparseAdam(embedding.parameters(), lr=0.1, server=server) as optimizer:
            for step in range(3):
                optimizer.zero_grad()
                ids = torch.tensor([5, 5, 2999, 1000 * step])
                for table in (embedding, remote):
                    (table(ids) ** 2).sum().backward()
                optimizer.step()
                remote.step()
            state = optimizer.state_dict()
            optimizer.load_state_dict(state)
            assert state["state"][0]["step"] == 3
        pulled = remote.session.pull()["weight"]
        trained.append((embedding.weight.detach().numpy().tobytes(), pulled.tobytes()))
        remote.close()
    assert trained[0] == trained[1]
