"""Parameters of every kind: those that are stepped as by torch, and those that are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import Parameter

import stepwire
import stepwire.torch
from stepwire.errors import UnsupportedFeatureError
from tests.client.torch.twins import Twins, gradients, parameters

EPS = torch.finfo(torch.float32).eps

Make = Callable[[], Any]


def adam(client: stepwire.Client, **options: Any) -> Callable[[Any, Any], tuple[Any, Any]]:
    """Return a function that makes both optimizers."""
    return lambda params, remote_params: (
        torch.optim.Adam(params, lr=0.01, **options),
        stepwire.torch.Adam(remote_params, lr=0.01, server=client, **options),
    )


# --- parameters that are stepped ----------------------------------------------------------------------------------


def strided() -> list[Parameter]:
    """Return parameters that do not lie in memory as they are read."""
    base = gradients(((6, 4), (2, 3, 4, 4), (10, 3)), 0)
    return [
        Parameter(base[0].t()),
        Parameter(base[1].to(memory_format=torch.channels_last)),
        Parameter(base[2][::2]),
        Parameter(base[2].clone()[:, 1]),
    ]


KINDS: dict[str, Callable[[], list[Parameter]]] = {
    "strided": strided,
    "zero-dim": lambda: parameters(((), ())),
    "zero-size": lambda: parameters(((0,), (3, 0, 2), (5,))),
    "complex": lambda: parameters(((4, 3), ()), torch.complex64),
    "one long": lambda: parameters(((70_001,),)),
    "many small": lambda: parameters(tuple((k % 7,) for k in range(100))),
    "fifteen dimensions": lambda: parameters(((1, 2) * 7 + (1,),)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_is_stepped_as_torch_steps_it(kind: str, client: stepwire.Client) -> None:
    pair = Twins(adam(client, weight_decay=0.1), KINDS[kind])
    before = [(parameter.data_ptr(), parameter.stride()) for parameter in pair.remote_params]
    with pair.remote:
        pair.step(4)
        pair.assert_close(rtol=4 * EPS, atol=4 * EPS, what=kind)
        assert [(parameter.data_ptr(), parameter.stride()) for parameter in pair.remote_params] == before
        state = pair.remote.state_dict()["state"]
    for index, parameter in enumerate(pair.params):
        for key in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(state[index][key], pair.local.state[parameter][key], rtol=8 * EPS, atol=8 * EPS)


def test_mixed_dtypes(client: stepwire.Client) -> None:
    """Each has the values of its float32 masters, rounded; those that are float32 equal torch's."""
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.complex64]
    mixed = [parameters(((9, 4),), dtype)[0] for dtype in dtypes]
    full = [Parameter(p.detach() if p.is_complex() else p.detach().float()) for p in mixed]
    local, remote = adam(client)(full, mixed)
    with remote:
        for step in range(1, 5):
            for one, other in zip(full, mixed, strict=True):
                other.grad = gradients(((9, 4),), step, other.dtype)[0]
                one.grad = other.grad.to(one.dtype)
            local.step()
            remote.step()
        masters = remote.state_dict()["stepwire"]["masters"]
    for index, (one, other) in enumerate(zip(full, mixed, strict=True)):
        torch.testing.assert_close(masters[index], one.detach(), rtol=4 * EPS, atol=4 * EPS)
        assert torch.equal(other.detach(), masters[index].to(other.dtype))


def test_small_updates_add_up_in_the_masters_of_half_precision(remote: Any) -> None:
    """Torch would leave 1 where it is: 1 + 1/1024 is no bfloat16."""
    parameter = Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = remote("SGD", [parameter], lr=2.0**-10)
    seen = []
    for _ in range(16):
        parameter.grad = torch.full((3,), -1.0, dtype=torch.bfloat16)
        optimizer.step()
        seen.append(parameter[0].item())
    assert (seen[0], seen[-1]) == (1.0, 1.0 + 16 / 1024)


def test_a_tied_parameter_is_one(client: stepwire.Client) -> None:
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encode, self.decode = torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False)
            self.encode.weight = Parameter(parameters(((4, 4),))[0].detach())
            self.decode.weight = self.encode.weight

        def forward(self, x: Any) -> Any:
            return self.decode(torch.relu(self.encode(x)))

    models = Tied(), Tied()
    optimizers = adam(client)(list(models[0].parameters()), list(models[1].named_parameters()))
    with optimizers[1]:
        assert optimizers[1].session.shapes == {"encode.weight": (4, 4)}
        for _ in range(3):
            for model, optimizer in zip(models, optimizers, strict=True):
                optimizer.zero_grad()
                model(torch.arange(4.0)).sum().backward()
                optimizer.step()
    torch.testing.assert_close(models[1].decode.weight, models[0].decode.weight, rtol=4 * EPS, atol=4 * EPS)


# --- parameters that are refused --------------------------------------------------------------------------------------


def uninitialized() -> Any:
    return torch.nn.parameter.UninitializedParameter()


REFUSED: dict[str, tuple[Make, str, str]] = {
    "float64": (lambda: [Parameter(torch.zeros(2, dtype=torch.float64))], "torch.float64", "model.float()"),
    "complex128": (lambda: [Parameter(torch.zeros(2, dtype=torch.complex128))], "torch.complex128", "use torch.optim"),
    "meta": (lambda: [Parameter(torch.zeros(2, device="meta"))], "the device meta", "move the model to the CPU"),
    "uninitialized": (lambda: [uninitialized()], "no shape yet", "run the model once"),
    "expanded": (lambda: [Parameter(torch.zeros(2, 1).expand(2, 3))], "is expanded", "contiguous copy"),
    "conjugate": (lambda: [Parameter(torch.zeros(2, dtype=torch.complex64).conj())], "conjugates", "resolve_conj()"),
    "negative": (lambda: [Parameter(torch.ones(2, dtype=torch.complex64).conj().imag)], "negates", "make a copy"),
    "sparse": (lambda: [Parameter(torch.eye(3).to_sparse())], "is sparse", "make it dense"),
    "overlapping": (
        lambda: [Parameter(base := torch.zeros(6)), Parameter(base[2:4])],
        "shares memory",
        "one Parameter",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_is_refused_with_the_reason_and_a_remedy(kind: str, target: str, client: stepwire.Client) -> None:
    make, problem, remedy = REFUSED[kind]
    before = len(list(client.sessions()))
    with pytest.raises(UnsupportedFeatureError) as raised:
        stepwire.torch.Adam(make(), server=target)
    for words in (problem, remedy, "param_groups[0]["):
        assert words in str(raised.value)
    assert raised.value.metadata["feature"] == "torch_parameter"
    assert len(list(client.sessions())) == before


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
def test_a_parameter_listed_twice_is_refused(target: str) -> None:
    parameter = Parameter(torch.zeros(2))
    with pytest.raises(
        UnsupportedFeatureError, match=r"'param_groups\[0\]\[1\]' is .*\[0\]\[0\]' once more; list each .* once"
    ):
        stepwire.torch.Adam([parameter, parameter], server=target)


def test_two_parameters_of_one_name_are_refused(target: str) -> None:
    """Torch looks for that within one group only."""
    groups = [{"params": [("w", Parameter(torch.zeros(2)))]}, {"params": [("w", Parameter(torch.zeros(2)))]}]
    with pytest.raises(UnsupportedFeatureError, match="'w' is the name of two parameters; give each its own"):
        stepwire.torch.Adam(groups, server=target)


def test_neighbours_in_one_storage_do_not_overlap(remote: Any) -> None:
    base = torch.zeros(6)
    params = [Parameter(base[3:]), Parameter(base[:3])]
    optimizer = remote("SGD", params, lr=1.0)
    params[0].grad, params[1].grad = torch.ones(3), torch.full((3,), 2.0)
    optimizer.step()
    assert base.tolist() == [-2.0] * 3 + [-1.0] * 3
