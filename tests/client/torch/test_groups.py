"""Parameters in `param_groups` that are replaced, removed, added, moved or cast in place: the session follows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import Parameter

import stepwire
import stepwire.torch
from stepwire.errors import InvalidRequestError, UnsupportedFeatureError
from tests.client.torch.twins import Twins, assert_same_bits, gradients, parameters, same_bits

EPS = torch.finfo(torch.float32).eps
BOUND = {"rtol": 16 * EPS, "atol": 16 * EPS}

WAYS: dict[str, dict[str, Any]] = {
    "tcp": {"transport": "tcp"},
    "shared_views": {"shared_views": True},
    "send_in_backward": {"transport": "tcp", "send_in_backward": True},
}


class Run:
    """Two lists of parameters in one order, which may change, and an optimizer for each."""

    def __init__(self, target: str, rule: str = "Adam", **options: Any) -> None:
        self.both = [parameters(), parameters()]
        ours = options.pop("ours", {})
        self.optimizers = [
            getattr(torch.optim, rule)(self.both[0], lr=0.05, **options),
            getattr(stepwire.torch, rule)(self.both[1], lr=0.05, server=target, **options, **ours),
        ]
        self.taken = 0

    @property
    def remote(self) -> Any:
        return self.optimizers[1]

    def step(self, steps: int = 1) -> None:
        """Step both; each parameter's gradient comes from a backward pass, so that hooks see it."""
        for _ in range(steps):
            self.taken += 1
            for params, optimizer in zip(self.both, self.optimizers, strict=True):
                optimizer.zero_grad()
                drawn = gradients([tuple(parameter.shape) for parameter in params], self.taken)
                sum((p * g.to(p.dtype)).sum() for p, g in zip(params, drawn, strict=True)).backward()
                optimizer.step()

    def change(self, change: Callable[[Any, list[Any]], None]) -> None:
        for params, optimizer in zip(self.both, self.optimizers, strict=True):
            change(optimizer, params)

    def compare(self) -> None:
        for place, (one, other) in enumerate(zip(*self.both, strict=True)):
            torch.testing.assert_close(other, one, **BOUND, msg=lambda text, place=place: f"{place}: {text}")
        local, remote = self.optimizers
        for one, other in zip(*self.both, strict=True):
            mine, theirs = local.state.get(one, {}), remote.state.get(other, {})
            assert list(mine) == list(theirs)
            for key in mine:
                torch.testing.assert_close(theirs[key], mine[key], **BOUND)


def replace(optimizer: Any, params: list[Any]) -> None:
    """Put another parameter in the place of one, and leave the state of the old one where it is."""
    params[0] = optimizer.param_groups[0]["params"][0] = Parameter(params[0].detach() * 0.5)


def prune(optimizer: Any, params: list[Any]) -> None:
    """Drop rows of a parameter and of its moments, as Gaussian splatting does."""
    old = optimizer.param_groups[0]["params"][0]
    kept = torch.arange(len(old)) % 3 != 0
    stored = optimizer.state.get(old, None)
    stored["exp_avg"] = stored["exp_avg"][kept]
    stored["exp_avg_sq"] = stored["exp_avg_sq"][kept]
    del optimizer.state[old]
    params[0] = optimizer.param_groups[0]["params"][0] = Parameter(old[kept].detach().clone())
    optimizer.state[params[0]] = stored


def grow(optimizer: Any, params: list[Any]) -> None:
    """Append rows to a parameter, and zeros to its moments."""
    old = optimizer.param_groups[0]["params"][0]
    more = torch.full((5, 17), 0.25)
    stored = optimizer.state.get(old, None)
    for key in ("exp_avg", "exp_avg_sq"):
        stored[key] = torch.cat((stored[key], torch.zeros_like(more)))
    params[0] = Parameter(torch.cat((old.detach(), more)))
    optimizer.state[params[0]] = stored
    del optimizer.state[old]
    optimizer.param_groups[0]["params"][0] = params[0]


def remove(optimizer: Any, params: list[Any]) -> None:
    del optimizer.param_groups[0]["params"][1]


def remove_and_put_back(optimizer: Any, params: list[Any]) -> None:
    """After a step without it, which no state forgets."""
    removed = optimizer.param_groups[0]["params"].pop(1)
    for parameter, gradient in zip(params, gradients([p.shape for p in params], 500), strict=True):
        parameter.grad = gradient
    optimizer.step()
    optimizer.param_groups[0]["params"].append(removed)


def append(optimizer: Any, params: list[Any]) -> None:
    params.append(Parameter(torch.full((40, 3), 0.5)))
    optimizer.param_groups[0]["params"].append(params[-1])


def reverse(optimizer: Any, params: list[Any]) -> None:
    optimizer.param_groups[0]["params"].reverse()


def split(optimizer: Any, params: list[Any]) -> None:
    """Give one parameter a group with a rate of its own."""
    group = optimizer.param_groups[0]
    optimizer.param_groups.insert(0, {**group, "params": [group["params"].pop(0)], "lr": 0.2})


def new_list(optimizer: Any, params: list[Any]) -> None:
    optimizer.param_groups = [{**group, "params": list(group["params"])[1:]} for group in optimizer.param_groups]


def empty_group(optimizer: Any, params: list[Any]) -> None:
    optimizer.param_groups.append({**optimizer.param_groups[0], "params": []})


def drop_all(optimizer: Any, params: list[Any]) -> None:
    """Step without any parameter, and go on with one of them."""
    group, kept = optimizer.param_groups[0], optimizer.param_groups[0]["params"]
    group["params"] = []
    optimizer.step()
    optimizer.zero_grad()
    group["params"] = kept[:1]


CHANGES = [
    *(replace, prune, grow, remove, remove_and_put_back, append, reverse, split, new_list, empty_group, drop_all),
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("way", WAYS)
def test_groups_are_followed(change: Callable[[Any, list[Any]], None], way: str, target: str) -> None:
    run = Run(target, ours=WAYS[way])
    with run.remote:
        run.step(3)
        run.change(change)
        run.step(3)
        run.compare()
        run.change(change) if change in (append, reverse, grow) else None
        run.step(1)
        run.compare()


@pytest.mark.parametrize("rule", ["SGD", "NAdam", "Adagrad"])
@pytest.mark.parametrize("change", [replace, remove_and_put_back, split], ids=lambda change: change.__name__)
def test_groups_of_other_rules(rule: str, change: Callable[[Any, list[Any]], None], target: str) -> None:
    run = Run(target, rule, **({"momentum": 0.9} if rule == "SGD" else {}))
    with run.remote:
        run.step(3)
        run.change(change)
        run.step(3)
        for one, other in zip(*run.both, strict=True):
            torch.testing.assert_close(other, one, rtol=32 * EPS, atol=32 * EPS)


def test_a_state_that_leaves_is_kept_as_in_torch(target: str, client: stepwire.Client) -> None:
    others = {info.session_id for info in client.sessions()}
    run = Run(target)
    with run.remote:
        run.step(2)
        leaving = run.both[1][1]
        held = run.remote.state[leaving]["exp_avg"]
        before, first = held.clone(), run.remote.session_id
        run.change(remove)
        run.step()
        assert run.remote.session_id != first
        assert {info.session_id for info in client.sessions()} - others == {run.remote.session_id}
        assert list(run.remote.state) == [run.both[1][0], run.both[1][2], leaving]
        assert same_bits(run.remote.state[leaving]["exp_avg"].clone(), before)
        assert same_bits(held.clone(), before)
        assert list(run.remote.state_dict()["state"]) == [0, 1]  # torch itself raises KeyError


def test_names_of_the_model_go_along(target: str) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
    with stepwire.torch.Adam(model.named_parameters(), server=target) as optimizer:
        group = optimizer.param_groups[0]
        del group["params"][1]  # and its name stays in the list, as it would in torch
        group["params"].append(Parameter(torch.zeros(4)))
        group["params"].append(Parameter(torch.zeros(4)))
        model(torch.ones(3)).sum().backward()
        optimizer.step()
        assert list(optimizer.session.shapes) == [
            *("0.weight", "1.weight", "1.bias"),
            *("param_groups[0][3]", "param_groups[0][4]"),
        ]


@pytest.mark.parametrize("bad", [torch.zeros(2, dtype=torch.float64), torch.eye(3).to_sparse()], ids=["f64", "sparse"])
def test_a_parameter_that_cannot_be_stepped_is_refused_and_nothing_is_moved(bad: Any, target: str) -> None:
    run = Run(target)
    with run.remote:
        run.step(2)
        session, before = run.remote.session_id, [parameter.detach().clone() for parameter in run.both[1]]
        run.remote.param_groups[0]["params"].append(Parameter(bad))
        for parameter in run.both[1]:
            parameter.grad = torch.ones_like(parameter)
        for _ in range(2):
            with pytest.raises(UnsupportedFeatureError, match=r"param_groups\[0\]\[3\]"):
                run.remote.step()
        assert run.remote.session_id == session
        assert_same_bits(before, run.both[1])
        run.remote.param_groups[0]["params"].pop()
        run.step(2)
        run.compare()


def test_8_bit_moments_keep_their_values_in_other_places(target: str) -> None:
    """Blocks of 256 elements have other neighbours in the new session: no element is cut off by a smaller maximum."""
    params = parameters(((50, 100), (7001,), (90, 101)))
    with stepwire.torch.Adam(params, lr=0.05, server=target, state_precision="int8") as optimizer:
        for factor in (1.0, 2.0, 3.0):
            for place, parameter in enumerate(params):
                parameter.grad = torch.full_like(parameter, factor * 100.0**place)
            optimizer.step()
        before = {parameter: optimizer.state[parameter]["exp_avg"].clone() for parameter in params}
        group = optimizer.param_groups[0]
        group["params"][:] = [params[2], params[1]]
        optimizer.state_dict()
        for parameter in (params[2], params[1]):
            torch.testing.assert_close(
                optimizer.state[parameter]["exp_avg"].clone(), before[parameter], rtol=0.05, atol=0.0
            )


# --- casts ----------------------------------------------------------------------------------------------


def cast(dtype: torch.dtype) -> Callable[[Any, list[Any]], None]:
    def change(optimizer: Any, params: list[Any]) -> None:
        for parameter in params:
            gradient, parameter.grad = parameter.grad, None
            parameter.data = parameter.data.to(dtype)
            parameter.grad = None if gradient is None else gradient.to(dtype)

    return change


@pytest.mark.parametrize("way", WAYS)
def test_a_model_that_becomes_float32_is_exact_from_then_on(way: str, target: str) -> None:
    run = Run(target, ours=WAYS[way])
    with run.remote:
        run.change(cast(torch.bfloat16))
        run.remote.state_dict()
        run.change(cast(torch.float32))
        run.step(4)
        run.compare()
        assert run.remote.backing.parameters.dtype == "float32"
        assert run.remote.state_dict()["stepwire"]["masters"] == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_a_model_that_loses_bits_keeps_its_masters(dtype: torch.dtype, way: str, target: str) -> None:
    run = Run(target, "SGD", momentum=0.9, ours=WAYS[way])
    with run.remote:
        run.step(2)
        exact = [parameter.detach().clone() for parameter in run.both[1]]
        run.change(cast(dtype))
        assert_same_bits(run.remote.state_dict()["stepwire"]["masters"].values(), exact)
        run.step(2)
        for one, other in zip(*run.both, strict=True):
            assert other.dtype == dtype
            torch.testing.assert_close(other, one, rtol=0.02, atol=0.02)
        masters = run.remote.state_dict()["stepwire"]["masters"]
        assert_same_bits((values.to(dtype) for values in masters.values()), run.both[1])


def test_half_of_a_model_is_cast(target: str) -> None:
    run = Run(target, "SGD", momentum=0.9)
    with run.remote:
        run.step(2)
        for params in run.both:
            params[0].grad = None
            params[0].data = params[0].data.to(torch.bfloat16)
        run.step(3)
        one, other = run.both
        torch.testing.assert_close(other[0], one[0], rtol=0.02, atol=0.02)
        for mine, theirs in zip(one[1:], other[1:], strict=True):
            torch.testing.assert_close(theirs, mine, **BOUND)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_a_model_that_becomes_float64_is_told_so(dtype: torch.dtype, target: str) -> None:
    run = Run(target)
    with run.remote:
        run.step(1)
        run.change(cast(dtype))
        with pytest.raises(UnsupportedFeatureError, match=rf"has dtype {dtype}, and a session has float32; cast the"):
            run.remote.step()
        if not dtype.is_complex:
            run.change(cast(torch.float32))
            run.step(1)
            run.compare()


def test_a_gradient_of_another_dtype_is_told_so(remote: Any) -> None:
    parameter = Parameter(torch.zeros(3))
    optimizer = remote("SGD", [parameter])
    parameter.grad_dtype = None  # any dtype
    parameter.grad = torch.zeros(3, dtype=torch.float64)
    with pytest.raises(InvalidRequestError, match=r"has dtype torch.float64; cast it to torch.float32"):
        optimizer.step()


# --- gradients that other code keeps ----------------------------------------------------------------------


def test_a_gradient_that_is_kept_keeps_its_values(target: str) -> None:
    """Shared views put each gradient into the place of the one before."""
    pair = Twins(
        lambda params, remote_params: (
            torch.optim.SGD(params, lr=0.05),
            stepwire.torch.SGD(remote_params, lr=0.05, server=target, shared_views=True),
        )
    )
    with pair.remote:
        for _ in range(3):
            kept = []
            for params, optimizer in ((pair.params, pair.local), (pair.remote_params, pair.remote)):
                optimizer.zero_grad()
                sum((parameter * 3).sum() for parameter in params).backward()
                kept.append([parameter.grad for parameter in params])
                optimizer.zero_grad()
                sum((parameter * 5).sum() for parameter in params).backward()
                optimizer.step()
            assert_same_bits(*kept)
        pair.assert_close(rtol=0, atol=2 * EPS)
