"""The interface of torch's optimizers: closures, hooks, signatures, files; and the refusal of copies of a session."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from typing import Any

import pytest
import torch
from torch.nn import Parameter
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import stepwire
import stepwire.torch
from stepwire.torch.rules import TORCH_RULES
from tests.client.torch.twins import assert_same_bits, parameters, same_bits

IN_TORCH = sorted(name for name in TORCH_RULES if hasattr(torch.optim, name))


def one(remote: Any, name: str = "SGD", **options: Any) -> tuple[Any, Parameter]:
    """Make an optimizer of one parameter at zero, whose gradient is one."""
    parameter = Parameter(torch.zeros(3))
    parameter.grad = torch.ones(3)
    return remote(name, [parameter], lr=1.0, **options), parameter


# --- classes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", IN_TORCH)
def test_is_torchs_class_with_torchs_signature_and_ours_behind_it(name: str) -> None:
    ours, theirs = getattr(stepwire.torch, name), getattr(torch.optim, name)
    assert issubclass(ours, theirs)
    shown = list(inspect.signature(ours).parameters.values())
    expected = list(inspect.signature(theirs).parameters.values())
    assert shown[: len(expected)] == expected
    assert {"server", "session", "transport"} <= {parameter.name for parameter in shown[len(expected) :]}
    assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in shown[len(expected) :])


@pytest.mark.parametrize("name", IN_TORCH)
def test_groups_and_defaults_are_torchs(name: str, remote: Any) -> None:
    params = parameters()
    ours, theirs = remote(name, params), getattr(torch.optim, name)(params)
    assert ours.defaults == theirs.defaults
    assert ours.param_groups == theirs.param_groups
    assert repr(ours) == repr(theirs)
    assert [list(ours.state.get(parameter, {})) for parameter in params] == [
        list(theirs.state.get(parameter, {})) for parameter in params
    ]


def test_a_subclass_of_a_user_is_served(target: str) -> None:
    class Mine(stepwire.torch.AdamW):
        def step(self, closure: Any = None) -> Any:
            self.param_groups[0]["lr"] = 0.5
            return super().step(closure)

    parameter = Parameter(torch.zeros(3))
    with Mine([parameter], weight_decay=0.0, eps=0.0, server=target) as optimizer:
        parameter.grad = torch.ones(3)
        optimizer.step()
    assert parameter.tolist() == pytest.approx([-0.5] * 3, rel=1e-6)


# --- steps ----------------------------------------------------------------------------------------------


def test_a_closure_is_evaluated_with_gradients_and_its_loss_returned(remote: Any) -> None:
    optimizer, parameter = one(remote)
    enabled = []

    def closure() -> Any:
        enabled.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = ((parameter - 1) ** 2).sum() / 2
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 1.5
    assert (parameter.tolist(), enabled) == ([1.0] * 3, [True])
    with torch.no_grad():
        assert optimizer.step(closure).item() == 0.0
    assert enabled == [True, True]
    assert optimizer.applied_step == 2


def test_the_graph_sees_that_parameters_changed(remote: Any) -> None:
    """As with torch: a backward pass through values that were overwritten is an error, not a wrong gradient."""
    optimizer, parameter = one(remote)
    loss = (parameter**2).sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_results_are_told(remote: Any) -> None:
    optimizer, _ = one(remote)
    assert (optimizer.last_result, optimizer.applied_step) == (None, 0)
    optimizer.step()
    assert optimizer.last_result.step == optimizer.applied_step == 1
    assert optimizer.last_result.grad_norm == pytest.approx(3**0.5)
    assert optimizer.transport is not None
    assert optimizer.session_id == optimizer.session.session_id


def test_hooks_of_a_step(remote: Any) -> None:
    """Hooks of the optimizer and of all optimizers, in torch's order; a hook may change gradients and numbers."""
    optimizer, parameter = one(remote)
    called = []

    def before(_: Any, args: Any, kwargs: Any) -> None:
        called.append("before")
        parameter.grad.mul_(2.0)
        optimizer.param_groups[0]["lr"] = 0.25

    handles = [
        optimizer.register_step_pre_hook(before),
        optimizer.register_step_post_hook(lambda *_: called.append(f"after {parameter[0].item()}")),
        register_optimizer_step_pre_hook(lambda *_: called.append("before all")),
        register_optimizer_step_post_hook(lambda *_: called.append("after all")),
    ]
    try:
        optimizer.step()
    finally:
        for handle in handles:
            handle.remove()
    assert called == ["before all", "before", "after -0.5", "after all"]
    optimizer.step()
    assert len(called) == 4


def test_hooks_of_state_dicts(remote: Any) -> None:
    optimizer, _ = one(remote, "Adam")
    optimizer.step()
    called = []

    def saved(_: Any, state: dict[str, Any]) -> dict[str, Any]:
        called.append(f"saved {sorted(state['state'][0])}")
        return {**state, "mine": 1}

    def loading(_: Any, state: dict[str, Any]) -> dict[str, Any]:
        called.append(f"loading {state['mine']}")
        state["state"][0]["step"] = torch.tensor(7.0)
        return state

    def loaded(_: Any) -> None:
        called.append(f"loaded {optimizer.state_dict()['state'][0]['step']}")

    optimizer.register_state_dict_pre_hook(lambda _: called.append("saving"))
    handle = optimizer.register_state_dict_post_hook(saved)
    optimizer.register_load_state_dict_pre_hook(loading)
    state = optimizer.state_dict()
    handle.remove()
    optimizer.register_load_state_dict_post_hook(loaded)
    assert state["mine"] == 1
    optimizer.load_state_dict(state)
    assert called == ["saving", "saved ['exp_avg', 'exp_avg_sq', 'step']", "loading 1", "saving", "loaded 7.0"]


# --- names and groups in state dicts --------------------------------------------------------------------


def test_named_parameters_are_the_sessions_names(remote: Any, client: stepwire.Client) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
    optimizer = remote("Adam", model.named_parameters())
    assert list(optimizer.session.shapes) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert client.session(optimizer.session_id).shapes["0.weight"] == (2, 3)
    state = optimizer.state_dict()
    assert state["param_groups"][0]["param_names"] == list(optimizer.session.shapes)
    theirs = torch.optim.Adam(model.named_parameters())
    theirs.load_state_dict(state)
    assert theirs.state_dict()["param_groups"] == state["param_groups"]


def test_numbers_of_groups_come_with_the_state_dict(remote: Any) -> None:
    params = parameters()
    theirs = torch.optim.AdamW([{"params": params[:1], "lr": 0.5}, {"params": params[1:], "betas": (0.5, 0.6)}])
    theirs.param_groups[1]["initial_lr"] = 0.25  # a scheduler's
    ours = remote("AdamW", [{"params": params[:1]}, {"params": params[1:]}])
    ours.load_state_dict(theirs.state_dict())
    assert ours.param_groups == theirs.param_groups


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_state_dicts_go_through_torchs_files(precision: str, dtype: torch.dtype, remote: Any) -> None:
    """With weights_only, which is the default: no code in the file is run."""
    params = parameters(dtype=dtype)
    optimizer = remote("Adam", params, state_precision=precision)
    for parameter in params:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    read = torch.load(file, weights_only=True)
    optimizer.load_state_dict(read)
    again = optimizer.state_dict()
    for index, entry in read["state"].items():
        assert_same_bits(entry.values(), again["state"][index].values())
    file = io.BytesIO()
    torch.save(optimizer.handle(), file)
    assert len(file.getvalue()) < 4096


# --- sessions are never copied --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "duplicate", [copy.copy, copy.deepcopy, pickle.dumps, lambda optimizer: torch.save(optimizer, io.BytesIO())]
)
def test_an_optimizer_is_not_copied(duplicate: Any, remote: Any) -> None:
    optimizer, parameter = one(remote)
    with pytest.raises(TypeError, match=r"two would step one session. Save state_dict\(\), or handle\(\)"):
        duplicate(optimizer)
    optimizer.step()
    assert parameter.tolist() == [-1.0] * 3


def test_closing_twice_is_harmless_and_ends_the_session(target: str, client: stepwire.Client) -> None:
    with stepwire.torch.SGD(parameters(), server=target) as optimizer:
        session = optimizer.session_id
        assert session in {info.session_id for info in client.sessions()}
        optimizer.close()
    assert session not in {info.session_id for info in client.sessions()}


def test_a_clients_optimizer_leaves_the_client_open(client: stepwire.Client) -> None:
    stepwire.torch.SGD(parameters(), server=client).close()
    assert client.info().protocol_max >= 1


def test_a_light_state_dict_is_the_session_alone(remote: Any) -> None:
    optimizer, parameter = one(remote, "Adam", light_state_dict=True)
    optimizer.step()
    state = optimizer.state_dict()
    assert (state["state"], state["stepwire"]) == (
        {},
        {"session_id": optimizer.session_id, "step": 1, "handle": True},
    )
    assert state["param_groups"] == torch.optim.Adam([parameter], lr=1.0).state_dict()["param_groups"]
    optimizer.load_state_dict(state)
    before = parameter.detach().clone()
    optimizer.step()
    assert optimizer.applied_step == 2
    assert not same_bits(parameter, before)
