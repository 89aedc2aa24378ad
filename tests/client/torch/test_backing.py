"""The session follows the model: changes between steps, more parameters, and other structure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import Parameter

import stepwire
import stepwire.torch
from stepwire.errors import InvalidRequestError, UnavailableError, UnsupportedFeatureError
from tests.client.torch.twins import Twins, assert_same_bits, gradients, parameters, same_bits

EPS = torch.finfo(torch.float32).eps
BOUND = {"rtol": 8 * EPS, "atol": 8 * EPS}


def made(rule: str, client: stepwire.Client, **options: Any) -> Callable[[Any, Any], tuple[Any, Any]]:
    """Return a function that makes both optimizers."""
    return lambda params, remote_params: (
        getattr(torch.optim, rule)(params, lr=0.01, **options),
        getattr(stepwire.torch, rule)(remote_params, lr=0.01, server=client, **options),
    )


# --- changes between steps ------------------------------------------------------------------------------


@torch.no_grad()
def clamp(params: list[Any]) -> None:
    params[0].clamp_(-0.5, 0.5)


def load_model(params: list[Any]) -> None:
    """Change the parameters as `model.load_state_dict` does."""
    module = torch.nn.ParameterList(params)
    module.load_state_dict({str(k): values for k, values in enumerate(gradients([p.shape for p in params], 77))})


def replace(params: list[Any]) -> None:
    params[0].data = gradients([params[0].shape], 78)[0]


def turn(params: list[Any]) -> None:
    """Put the same memory in another order."""
    params[0].data = params[0].data.as_strided((33, 17), (1, 33))


@torch.no_grad()
def initialize(params: list[Any]) -> None:
    torch.nn.init.constant_(params[1], 0.25)


@pytest.mark.parametrize("change", [clamp, load_model, replace, turn, initialize], ids=lambda change: change.__name__)
@pytest.mark.parametrize("rule", ["Adam", "SGD"])
def test_a_change_of_parameters_is_noticed(rule: str, change: Callable[[Any], None], client: stepwire.Client) -> None:
    pair = Twins(made(rule, client))
    with pair.remote:
        pair.step(2)
        change(pair.params)
        change(pair.remote_params)
        pair.step(2)
        pair.assert_close(**BOUND)
        change(pair.params)
        change(pair.remote_params)
        pair.step(1)
        pair.assert_close(**BOUND)


def test_a_change_of_one_element_through_data_is_noticed_when_told(remote: Any) -> None:
    """Samples miss the second element of a large parameter, as docs/torch.md warns."""
    parameter = Parameter(torch.zeros(5000))
    optimizer = remote("SGD", [parameter], lr=1.0)
    parameter.grad = torch.ones(5000)
    optimizer.step()
    parameter.data[1] += 10.0
    optimizer.step()
    assert parameter[:2].tolist() == [-2.0] * 2
    parameter.data[1] += 10.0
    optimizer.upload_parameters()
    optimizer.step()
    assert parameter[:2].tolist() == [-3.0, 7.0]


def test_nothing_is_uploaded_without_a_change(client: stepwire.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Twins(made("Adam", client))
    with pair.remote:
        loads: list[Any] = []
        monkeypatch.setattr(pair.remote.session, "load", lambda *args, **options: loads.append(args))
        pair.step(3)
        pair.remote.state_dict()
        assert loads == []


def test_masters_survive_a_change_of_another_parameter(remote: Any) -> None:
    """Only values that differ from the rounding of their masters come from the model."""
    params = [Parameter(torch.ones(3, dtype=torch.bfloat16)) for _ in range(2)]
    optimizer = remote("SGD", params, lr=2.0**-10)
    for _ in range(3):
        for parameter in params:
            parameter.grad = torch.full((3,), -1.0, dtype=torch.bfloat16)
        optimizer.step()
    with torch.no_grad():
        params[1][0] = 3.0
    for parameter in params:
        parameter.grad = torch.full((3,), -1.0, dtype=torch.bfloat16)
    optimizer.step()
    masters = optimizer.state_dict()["stepwire"]["masters"]
    assert masters[0].tolist() == [1 + 4 / 1024] * 3
    assert masters[1].tolist() == [3 + 1 / 1024] + [1 + 4 / 1024] * 2


def test_a_change_of_shape_needs_a_change_of_state(remote: Any) -> None:
    """Torch's own optimizers fail in the arithmetic of the moments then, and go on once the state is dropped."""
    params = parameters(((4,), (3,)))
    optimizer = remote("Adam", params, lr=0.5, eps=0.0)
    for shape, fits in (((7,), True), ((2, 2), False)):
        params[1].data, params[1].grad = torch.zeros(shape), torch.ones(shape)
        if not fits:
            with pytest.raises(
                InvalidRequestError, match=r"param_groups\[0\]\[1\].* has another shape now, \(2, 2\), and its state"
            ):
                optimizer.step()
            del optimizer.state[params[1]]
        optimizer.step()
        torch.testing.assert_close(params[1].data, torch.full(shape, -0.5))
    assert optimizer.applied_step == 2


# --- more groups ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "precision"),
    [
        *[(rule, "float32") for rule in ("AdamW", "RMSprop", "Adagrad", "NAdam")],
        *[("AdamW", precision) for precision in ("bfloat16", "int8")],
    ],
)
def test_a_further_group_keeps_the_state(rule: str, precision: Any, client: stepwire.Client) -> None:
    """With moments of fewer bits, torch cannot be compared with; the same parameters without a group more can."""
    pair = Twins(made(rule, client), lambda: parameters(((33, 17), (129,), (65,))))
    alone = parameters(((33, 17), (129,), (65,)))
    optimizer = getattr(stepwire.torch, rule)
    pair.remote.close()
    pair.remote = optimizer(pair.remote_params[:2], lr=0.01, server=client, state_precision=precision)
    pair.local = getattr(torch.optim, rule)(pair.params[:2], lr=0.01)
    with pair.remote, optimizer(alone[:2], lr=0.01, server=client, state_precision=precision) as other:
        for step in range(1, 7):
            if step == 4:
                first = pair.remote.session_id
                pair.local.add_param_group({"params": pair.params[2:], "lr": 0.02})
                pair.remote.add_param_group({"params": pair.remote_params[2:], "lr": 0.02})
                assert first not in {info.session_id for info in client.sessions()}
            pair.draw()
            pair.local.step()
            pair.remote.step()
            for parameter, twin in zip(alone[:2], pair.remote_params, strict=False):
                parameter.grad = twin.grad
            other.step()
        assert pair.remote.applied_step == 6
        assert [e["step"].item() for e in pair.remote.state_dict()["state"].values()] == [6.0, 6.0, 3.0]
    assert_same_bits(alone[:2], pair.remote_params[:2])
    if precision == "float32":
        bound = 24 * EPS if rule == "NAdam" else 8 * EPS
        pair.assert_close(rtol=bound, atol=bound)


def test_the_state_goes_along_under_other_names(remote: Any) -> None:
    """A loaded state dict brings its names, as with torch."""
    params = parameters(((4,), (3,)))
    optimizer = remote("Adam", [("a", params[0]), ("b", params[1])])
    for parameter in params:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    saved = optimizer.state_dict()
    saved["param_groups"][0]["param_names"][:] = ["x", "y"]
    optimizer.load_state_dict(saved)
    optimizer.add_param_group({"params": [("z", Parameter(torch.zeros(2)))]})
    state = optimizer.state_dict()["state"]
    assert [entry["step"].item() for entry in state.values()] == [1.0, 1.0]
    assert all(same_bits(state[k]["exp_avg"], saved["state"][k]["exp_avg"]) for k in state)


def test_a_group_that_cannot_be_added_leaves_everything(client: stepwire.Client) -> None:
    pair = Twins(made("Adam", client))
    with pair.remote:
        pair.step(2)
        session = pair.remote.session_id
        for group, problem in (
            ({"params": [Parameter(torch.zeros(2, dtype=torch.float64))]}, "torch.float64"),
            ({"params": [Parameter(torch.zeros(2))], "capturable": True}, "CUDA graph"),
            ({"params": [Parameter(torch.zeros(2))], "amsgrad": True}, "a session has one value for all its groups"),
        ):
            with pytest.raises((UnsupportedFeatureError, InvalidRequestError), match=problem):
                pair.remote.add_param_group(group)
            assert len(pair.remote.param_groups) == 1
        assert pair.remote.session_id == session
        pair.step(2)
        pair.assert_close(**BOUND)


# --- other structure ------------------------------------------------------------------------------------

SWITCHES = [("Adam", "amsgrad", True, False), ("SGD", "momentum", 0.0, 0.9), ("SGD", "nesterov", False, True)]


@pytest.mark.parametrize(("rule", "name", "before", "after"), SWITCHES)
def test_a_change_of_structure_is_refused_with_what_helps(
    rule: str, name: str, before: Any, after: Any, client: stepwire.Client
) -> None:
    more = {"momentum": 0.9} if name == "nesterov" else {}
    pair = Twins(made(rule, client, **more, **{name: before}))
    with pair.remote:
        pair.step(2)
        pair.local.param_groups[0][name] = pair.remote.param_groups[0][name] = after
        pair.draw()
        pair.local.step()
        was = [parameter.detach().clone() for parameter in pair.remote_params]
        with pytest.raises(InvalidRequestError, match=rf"param_groups: {name} was changed .*load_state_dict\("):
            pair.remote.step()
        assert_same_bits(pair.remote_params, was)
        pair.remote.load_state_dict(pair.remote.state_dict())
        pair.remote.step()
        pair.step(2)
        pair.assert_close(**BOUND)


@pytest.mark.parametrize("call", ["add_param_group", "load_state_dict"])
def test_a_move_that_fails_at_its_end_leaves_everything_as_before(
    call: str, client: stepwire.Client, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shared views are the last part of a move that can fail."""
    straight, params = parameters(), parameters()
    options = {"lr": 0.01, "amsgrad": True, "server": target}
    others = {info.session_id for info in client.sessions()}  # of tests before this one
    plain = stepwire.torch.Adam(straight, **options)
    with stepwire.torch.Adam(params, transport="shm", shared_views=True, **options) as optimizer:

        def step(number: int) -> None:
            for given in (straight, params):
                for parameter, gradient in zip(given, gradients([p.shape for p in given], number), strict=True):
                    parameter.grad = gradient
            plain.step()
            optimizer.step()

        step(1)
        made, state = optimizer.session_id, optimizer.state_dict()
        state["param_groups"][0]["amsgrad"] = False
        with monkeypatch.context() as patched, pytest.raises(UnavailableError, match="lost just now"):
            patched.setattr(stepwire.torch.placement, "SharedViews", lost)
            if call == "add_param_group":
                optimizer.add_param_group({"params": [Parameter(torch.zeros(3))]})
            else:
                optimizer.load_state_dict(state)
        assert (optimizer.session_id, len(optimizer.param_groups)) == (made, 1)
        assert optimizer.param_groups[0]["amsgrad"]
        assert {info.session_id for info in client.sessions()} - others == {made, plain.session_id}
        step(2)
        optimizer.add_param_group({"params": [Parameter(torch.zeros(3))]})
        assert {info.session_id for info in client.sessions()} - others == {optimizer.session_id, plain.session_id}
        step(3)
        assert_same_bits(params, straight)
    plain.close()


def lost(*_: Any) -> Any:
    raise UnavailableError("the connection was lost just now")
