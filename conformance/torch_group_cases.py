"""Parameter groups, values for one step only, and learning-rate schedules, as torch runs them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch.optim import lr_scheduler

from conformance.case import Case, camel
from conformance.long_runs import ALTERNATING, ALTERNATING_WORDS
from conformance.torch_case import ADAM, keywords, torch_case

__all__ = ["torch_group_cases"]

_GROUPS = [["weight"], ["bias", "scale"]]
_TENSOR_GROUPS = {"bias": 1, "scale": 1}


def torch_group_cases() -> Iterator[Case]:
    """Yield all of them."""
    yield from _groups()
    yield from _overrides()
    yield from _changed_numbers()
    yield from _extremes()
    yield from _schedules()
    yield from _warm_ups()


def _grouped(name: str, rule: str, hyper: Mapping[str, Any], first: Any, second: Any, **case: Any) -> Case:
    """Write a case of two groups, each with its own overrides."""
    overrides, family = [first, second], case.pop("family", "groups")
    reference = case.pop("reference", {})
    return torch_case(
        name,
        family,
        rule,
        hyper,
        config={
            "groups": [{"overrides": camel(own)} if own else {} for own in overrides],
            "tensor_groups": _TENSOR_GROUPS,
        },
        reference={
            "groups": _GROUPS,
            "group_options": [keywords(rule, own) for own in overrides],
            **reference,
        },
        words=case.pop("words", "groups with their own options: see config.groups"),
        **case,
    )


def _groups() -> Iterator[Case]:
    other = {"lr": 0.03, "beta1": 0.5, "beta2": 0.9, "eps": 1e-2, "weight_decay": 0.05}
    yield _grouped("groups-adam", "ADAM", ADAM, {}, other)
    yield _grouped("groups-adam-maximize", "ADAM", ADAM, {"maximize": True}, {"lr": 0.002})
    yield _grouped(
        "groups-adamw",
        "ADAM",
        ADAM | {"weight_decay": 0.1},
        {"weight_decay": 0.0},
        {"lr": 0.03},
        optimizer={"decoupled_weight_decay": True},
    )
    yield _grouped("groups-sgd", "SGD", {"lr": 0.02}, {"momentum": 0.8}, {"lr": 0.005, "weight_decay": 0.1})
    yield _grouped("groups-rmsprop", "RMSPROP", {"lr": 0.005, "eps": 1e-3}, {"momentum": 0.6}, {"alpha": 0.9})


def _overrides() -> Iterator[Case]:
    lr, other = {"lr": 0.05}, {"beta1": 0.5, "beta2": 0.9}
    yield torch_case(
        "override-all-groups",
        "groups",
        "ADAM",
        ADAM,
        reference={"overrides": {2: [lr], 7: [keywords("ADAM", other)]}},
        words="step 2 with lr=0.05, step 7 with betas=(0.5, 0.9)",
        steps=[
            {"first": 2, "last": 2, "begin": {"hyperparameters": [lr]}},
            {"first": 7, "last": 7, "begin": {"hyperparameters": [other]}},
        ],
    )
    yield _grouped(
        "override-each-group",
        "ADAM",
        ADAM,
        {},
        {"lr": 0.03},
        reference={"overrides": {2: [lr, {"weight_decay": 0.1}]}},
        words="step 2 with lr=0.05 for the first group, weight_decay=0.1 for the second",
        steps=[{"first": 2, "last": 2, "begin": {"hyperparameters": [lr, {"weightDecay": 0.1}]}}],
    )
    yield torch_case(
        "override-sgd",
        "groups",
        "SGD",
        {"lr": 0.02, "momentum": 0.8},
        reference={"overrides": {n: [{"lr": 0.05}] for n in range(2, 1001, 5)}},
        words="every fifth step, from step 2, with lr=0.05",
        steps=[{"first": 2, "every": 5, "begin": {"hyperparameters": [lr]}}],
    )


def _changed_numbers() -> Iterator[Case]:
    yield from _idle_momentum()
    yield from _running_products()


def _idle_momentum() -> Iterator[Case]:
    """Yield groups whose momentum is 0 at first, later for a while, beside a group that keeps its own."""
    still = {"momentum": 0.0, "dampening": 0.0}
    periods = ((1, 3), (7, 8), (500, 502))
    for name, rule, own, off in (
        ("sgd", "SGD", {"momentum": 0.8, "dampening": 0.3}, periods),
        ("rmsprop", "RMSPROP", {"momentum": 0.6}, periods[1:]),  # torch makes its buffer at the first step, or never
    ):
        idle = {key: still[key] for key in own}
        steps = [{"first": first, "last": last, "begin": {"hyperparameters": [idle, {}]}} for first, last in off]
        yield _grouped(
            f"changed-momentum-{name}",
            rule,
            {"lr": 0.02} if rule == "SGD" else {"lr": 0.005, "eps": 1e-3},
            own,
            own | {"momentum": 0.5},
            family="changed",
            reference={"overrides": {n: [idle, {}] for first, last in off for n in range(first, last + 1)}},
            words=f"the first group with momentum 0 in steps {', '.join(f'{low} to {high}' for low, high in off)}",
            steps=steps,
            checkpoints=(1, 2, 4, 5, 6, 8, 9, 10, 1000),
            ulp_checkpoints=6,
        )


def _running_products() -> Iterator[Case]:
    """Yield NAdam with numbers that change, and with tensors that miss updates."""
    other = {"beta1": 0.5, "beta2": 0.9, "decay": 0.1}
    for name, missing in (("changed-betas-nadam", False), ("changed-betas-nadam-missing", True)):
        steps: list[Any] = [{"first": 2, "every": 3, "begin": {"hyperparameters": [other]}}]
        steps += [{"first": 2, "every": 4, "begin": {"missingTensors": [1]}}] if missing else []
        yield torch_case(
            name,
            "changed",
            "NADAM",
            ADAM | {"decay": 0.01},
            config={"gradient": {"missing_gradient": "MISSING_GRADIENT_POLICY_KEEP"}} if missing else {},
            reference={"overrides": {n: [keywords("NADAM", other)] for n in range(2, 1001, 3)}},
            words="every third step, from step 2, with betas=(0.5, 0.9), momentum_decay=0.1"
            + ("; some gradients None" if missing else ""),
            steps=steps,
            checkpoints=(1, 2, 3, 4, 10, 1000),
            ulp_checkpoints=4,
            counts=missing,
        )


def _extremes() -> Iterator[Case]:
    """Yield gradients whose squares are beyond float32 or lost, and means without a past."""
    yield torch_case(
        "radam-huge",
        "extremes",
        "RADAM",
        words="gradients times 2^70",
        steps=[{"first": 1, "gradient_factor": 2.0**70}],
        states=False,
    )
    no_memory = {"lr": 0.01, "beta1": 0.0, "beta2": 0.0, "eps": 1e-3}
    for rule in ("ADAM", "NADAM"):
        yield torch_case(
            f"no-memory-{rule.lower()}", "extremes", rule, no_memory, words=ALTERNATING_WORDS, steps=ALTERNATING
        )


def _scheduled(name: str, schedule: Mapping[str, Any], words: str, make: Any, end: int = 1000) -> Case:
    contract = camel({**schedule, "kind": f"SCHEDULE_KIND_{schedule['kind']}"})
    return torch_case(
        f"schedule-{name}",
        "schedules",
        "ADAM",
        ADAM,
        config={"groups": [{"schedule": contract}]},
        reference={"schedule": (make, end)},
        words=f"lr from {words}",
        checkpoints=(1, 2, 10, 11, 12, 30, 31, 40, 1000),
    )


def _schedules() -> Iterator[Case]:
    end = {"total_steps": 30, "final_factor": 0.1}
    yield _scheduled(
        "linear",
        {"kind": "LINEAR", **end},
        "LinearLR(1, 0.1, 30)",
        lambda optimizer: lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 30),
        30,
    )
    yield _scheduled(
        "cosine",
        {"kind": "COSINE", **end},
        "CosineAnnealingLR(30, eta_min=0.001)",
        lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 30, 0.001),
        30,
    )
    yield _scheduled(
        "step",
        {"kind": "STEP", "gamma": 0.5, "interval_steps": 10},
        "StepLR(10, 0.5)",
        lambda optimizer: lr_scheduler.StepLR(optimizer, 10, 0.5),
    )
    yield _scheduled(
        "exponential",
        {"kind": "EXPONENTIAL", "gamma": 0.95},
        "ExponentialLR(0.95)",
        lambda optimizer: lr_scheduler.ExponentialLR(optimizer, 0.95),
    )
    yield _scheduled(
        "polynomial",
        {"kind": "POLYNOMIAL", "gamma": 2.0, "total_steps": 30},
        "PolynomialLR(30, 2)",
        lambda optimizer: lr_scheduler.PolynomialLR(optimizer, 30, 2.0),
        30,
    )


def _warm_ups() -> Iterator[Case]:
    yield _scheduled(
        "warm-up",
        {"kind": "CONSTANT", "warmup_steps": 10},
        "LambdaLR(lambda s: min(1, s / 10)), the equation by hand: torch's LinearLR starts above 0",
        lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda s: min(1.0, s / 10)),
    )
    yield _scheduled(
        "warm-up-cosine",
        {"kind": "COSINE", "warmup_steps": 10, "warmup_start_factor": 0.1, "total_steps": 30, "final_factor": 0.1},
        "SequentialLR([LinearLR(0.1, 1, 10), CosineAnnealingLR(20, eta_min=0.001)], [10])",
        _warm_up_cosine,
        30,
    )
    # torch counts both ends of its cycle, so its 31 is 30 updates; momentum stays out of it.
    yield _scheduled(
        "one-cycle",
        {"kind": "ONE_CYCLE", "warmup_steps": 10, "warmup_start_factor": 0.2, "total_steps": 30, "final_factor": 0.01},
        "OneCycleLR(0.01, total_steps=31, pct_start=11/31, div_factor=5, final_div_factor=20, cycle_momentum=False)",
        lambda optimizer: lr_scheduler.OneCycleLR(
            optimizer,
            0.01,
            total_steps=31,
            pct_start=11 / 31,
            div_factor=5.0,
            final_div_factor=20.0,
            cycle_momentum=False,
        ),
        30,
    )


def _warm_up_cosine(optimizer: Any) -> lr_scheduler.LRScheduler:
    rise = lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 10)
    return lr_scheduler.SequentialLR(optimizer, [rise, lr_scheduler.CosineAnnealingLR(optimizer, 20, 0.001)], [10])
