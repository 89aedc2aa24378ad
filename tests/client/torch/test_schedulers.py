"""Every learning-rate scheduler of torch, unmodified: the rates and the parameters are those of torch's optimizer."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler, swa_utils

import stepwire
import stepwire.torch
from tests.client.torch.twins import Twins

STEPS = 12
BOUND = 4 * torch.finfo(torch.float32).eps
RATES = (0.05, 0.02)
"""Of the two groups."""

Scheduler = Any
Make = Callable[[Any], Scheduler]


def sequential(optimizer: Any) -> Scheduler:
    parts = [
        lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=4),
        lr_scheduler.CosineAnnealingLR(optimizer, T_max=8),
    ]
    return lr_scheduler.SequentialLR(optimizer, parts, milestones=[4])


def chained(optimizer: Any) -> Scheduler:
    return lr_scheduler.ChainedScheduler(
        [
            lr_scheduler.ConstantLR(optimizer, factor=0.2, total_iters=3),
            lr_scheduler.ExponentialLR(optimizer, gamma=0.8),
        ]
    )


# One for each class. The list also has the policies of a class that change other numbers of the groups.
SCHEDULERS: dict[str, list[Make]] = {
    "LambdaLR": [lambda o: lr_scheduler.LambdaLR(o, [lambda t: 1 / (1 + t), lambda t: 0.9**t])],
    "MultiplicativeLR": [lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 0.9)],
    "StepLR": [lambda o: lr_scheduler.StepLR(o, step_size=3, gamma=0.5)],
    "MultiStepLR": [lambda o: lr_scheduler.MultiStepLR(o, milestones=[2, 7], gamma=0.3)],
    "ConstantLR": [lambda o: lr_scheduler.ConstantLR(o, factor=0.25, total_iters=4)],
    "LinearLR": [lambda o: lr_scheduler.LinearLR(o, start_factor=0.1, total_iters=6)],
    "ExponentialLR": [lambda o: lr_scheduler.ExponentialLR(o, gamma=0.8)],
    "PolynomialLR": [lambda o: lr_scheduler.PolynomialLR(o, total_iters=8, power=1.5)],
    "CosineAnnealingLR": [lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=8, eta_min=1e-3)],
    "CosineAnnealingWarmRestarts": [lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=3, T_mult=2)],
    "CyclicLR": [
        lambda o: lr_scheduler.CyclicLR(o, 1e-3, 0.05, step_size_up=3, mode="triangular2"),
        lambda o: lr_scheduler.CyclicLR(
            o, 1e-3, 0.05, step_size_up=4, mode="exp_range", gamma=0.9, cycle_momentum=False
        ),
    ],
    "OneCycleLR": [
        lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.05, total_steps=STEPS + 1),
        lambda o: lr_scheduler.OneCycleLR(
            o, [0.05, 0.1], total_steps=STEPS + 1, three_phase=True, cycle_momentum=False
        ),
    ],
    "ReduceLROnPlateau": [lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=1)],
    "SequentialLR": [sequential],
    "ChainedScheduler": [chained],
    "SWALR": [lambda o: swa_utils.SWALR(o, swa_lr=1e-3, anneal_epochs=5)],
}
CASES = [(name, place) for name, made in SCHEDULERS.items() for place in range(len(made))]


def test_no_scheduler_of_torch_is_forgotten() -> None:
    known = {
        name
        for module in (lr_scheduler, swa_utils)
        for name, value in vars(module).items()
        if inspect.isclass(value) and issubclass(value, lr_scheduler.LRScheduler) and not name.startswith("_")
    }
    assert known - {"LRScheduler"} == set(SCHEDULERS)


def optimizers(rule: str, client: stepwire.Client, tensors: bool, options: dict[str, Any]) -> Any:
    """Return a function that makes both optimizers, of two groups with rates of their own."""

    def groups(params: list[Any]) -> list[dict[str, Any]]:
        rates = [torch.tensor(rate) if tensors else rate for rate in RATES]
        return [{"params": params[:1], "lr": rates[0]}, {"params": params[1:], "lr": rates[1]}]

    def made(params: list[Any], remote_params: list[Any]) -> tuple[Any, Any]:
        local = getattr(torch.optim, rule)(groups(params), **options)
        return local, getattr(stepwire.torch, rule)(groups(remote_params), server=client, **options)

    return made


def advance(scheduler: Scheduler, step: int) -> None:
    """Step a scheduler, with a constant loss for a scheduler that needs one."""
    if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
        scheduler.step(metrics=1.0 if step else 2.0)
    else:
        scheduler.step()


def numbers(optimizer: Any) -> list[Any]:
    """Return the numbers that schedulers change."""
    return [(float(group["lr"]), group.get("betas"), group.get("momentum")) for group in optimizer.param_groups]


@pytest.mark.parametrize("tensors", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize(
    ("rule", "options"), [("AdamW", {"betas": (0.9, 0.99)}), ("SGD", {"momentum": 0.9})], ids=["AdamW", "SGD"]
)
@pytest.mark.parametrize(("name", "place"), CASES)
def test_scheduler_gives_the_rates_and_parameters_of_torch(
    name: str, place: int, rule: str, options: dict[str, Any], tensors: bool, client: stepwire.Client
) -> None:
    pair = Twins(optimizers(rule, client, tensors, options))
    with pair.remote:
        schedulers = [SCHEDULERS[name][place](optimizer) for optimizer in (pair.local, pair.remote)]
        seen = set()
        for step in range(STEPS):
            pair.step()
            for scheduler in schedulers:
                advance(scheduler, step)
            assert numbers(pair.remote) == numbers(pair.local)
            assert schedulers[1].get_last_lr() == schedulers[0].get_last_lr()
            seen.add(str(numbers(pair.remote)))
            pair.assert_close(rtol=BOUND, atol=BOUND, what=f"step {step}")
        assert len(seen) > 1, "the schedule changed nothing"


def test_a_schedule_goes_on_from_its_state_dict(client: stepwire.Client) -> None:
    """The state of a scheduler is its own; that of the optimizer carries `initial_lr`."""
    pair = Twins(optimizers("AdamW", client, False, {}))
    with pair.remote:
        local, remote = (lr_scheduler.OneCycleLR(o, 0.05, total_steps=STEPS) for o in (pair.local, pair.remote))
        for _ in range(4):
            pair.step()
            local.step()
            remote.step()
        with stepwire.torch.AdamW(
            [{"params": pair.remote_params[:1]}, {"params": pair.remote_params[1:]}], server=client
        ) as again:
            resumed = lr_scheduler.OneCycleLR(again, 0.05, total_steps=STEPS)
            again.load_state_dict(pair.remote.state_dict())
            resumed.load_state_dict(remote.state_dict())
            pair.remote.close()
            pair.remote = again
            for _ in range(4):
                pair.step()
                local.step()
                resumed.step()
            assert numbers(again) == numbers(pair.local)
        pair.assert_close(rtol=BOUND, atol=BOUND)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("early", ["before", "overridden"])
def test_warnings_about_the_order_of_calls_are_torchs(early: str, client: stepwire.Client) -> None:
    pair = Twins(optimizers("SGD", client, False, {}))
    said = []
    with pair.remote:
        for optimizer in (pair.local, pair.remote):
            scheduler = lr_scheduler.StepLR(optimizer, 2)
            if early == "overridden":
                optimizer.step = lambda: None
            with pytest.warns(UserWarning) as caught:
                scheduler.step()
            said.append([str(warning.message) for warning in caught])
    assert said[0] == said[1] != []


def test_no_warning_in_the_right_order(remote: Any) -> None:
    """Warnings are errors in these tests."""
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = remote("SGD", [parameter], lr=0.5)
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
    parameter.grad = torch.ones(3)
    optimizer.step()
    scheduler.step()
    optimizer.step()
    assert parameter.tolist() == [0.25] * 3
