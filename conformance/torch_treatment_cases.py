"""Torch's treatment of gradients before its optimizers: clipping, accumulation, scaling, absence, precision."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from conformance.case import Case
from conformance.torch_case import ADAM, torch_case

__all__ = ["torch_treatment_cases"]

_SGD = {"lr": 0.02}
_GROUPS = [["weight"], ["bias", "scale"]]
_TENSOR_GROUPS = {"bias": 1, "scale": 1}


def torch_treatment_cases() -> Iterator[Case]:
    """Yield all of them."""
    yield from _norm_clipping()
    yield from _group_clipping()
    yield from _value_clipping()
    yield from _accumulation()
    yield from _loss_scaling()
    yield from _non_finite()
    yield from _missing()
    yield from _frozen_and_averaged()
    yield from _precision()


def _clip(name: str, rule: str, hyper: Mapping[str, Any], gradient: Any, words: str, **reference: Any) -> Case:
    return torch_case(
        f"clip-torch-{name}",
        "clipping",
        rule,
        hyper,
        config={"gradient": gradient},
        reference=reference,
        words=f"{words} before",
    )


def _norm_clipping() -> Iterator[Case]:
    for name, rule, hyper, bound in (
        ("above", "SGD", _SGD, 0.5),
        ("below", "SGD", _SGD, 1000.0),
        ("momentum-l2", "SGD", _SGD | {"momentum": 0.8, "weight_decay": 0.1}, 0.5),
        ("adam", "ADAM", ADAM, 0.5),
        ("adam-below", "ADAM", ADAM, 1000.0),
    ):
        yield _clip(name, rule, hyper, {"clip_grad_norm": bound}, f"clip_grad_norm_({bound})", clip=bound)

    # torch's 1e-6 beside the norm shows only where the norm is small.
    yield torch_case(
        "clip-torch-tiny",
        "clipping",
        "SGD",
        _SGD,
        config={"gradient": {"clip_grad_norm": 1e-4}},
        reference={"clip": 1e-4},
        words="gradients times 2^-13, clip_grad_norm_(1e-4) before",
        steps=[{"first": 1, "gradient_factor": 2.0**-13}],
    )


def _group_clipping() -> Iterator[Case]:
    for name, bounds, whole in (("groups", (0.5, 0.1), None), ("group-and-global", (None, 0.1), 0.5)):
        groups = [{} if bound is None else {"clipGradNorm": bound} for bound in bounds]
        words = f"clip_grad_norm_ of each group, {bounds}" + (f", then of all, {whole}" if whole else "")
        yield torch_case(
            f"clip-torch-{name}",
            "clipping",
            "SGD",
            _SGD,
            config={
                "gradient": {"clip_grad_norm": whole} if whole else None,
                "groups": groups,
                "tensor_groups": _TENSOR_GROUPS,
            },
            reference={"clip_groups": bounds, "clip": whole, "groups": _GROUPS},
            words=f"{words} before",
        )
    yield torch_case(
        "clip-torch-global-over-groups",
        "clipping",
        "SGD",
        _SGD,
        config={"gradient": {"clip_grad_norm": 0.5}, "groups": [{}, {}], "tensor_groups": _TENSOR_GROUPS},
        reference={"clip": 0.5, "groups": _GROUPS},
        words="two equal parameter groups, clip_grad_norm_(0.5) over both before",
    )


def _value_clipping() -> Iterator[Case]:
    value = {"clip_grad_value": 0.05}
    yield _clip("value", "SGD", _SGD, value, "clip_grad_value_(0.05)", clip_value=0.05)
    yield _clip("value-adam", "ADAM", ADAM, value, "clip_grad_value_(0.05)", clip_value=0.05)
    both = {"clip_grad_norm": 0.5, "clip_grad_value": 0.05}
    words = "clip_grad_norm_(0.5), then clip_grad_value_(0.05)"
    yield _clip("norm-then-value", "SGD", _SGD, both, words, clip=0.5, clip_value=0.05)


def _accumulation() -> Iterator[Case]:
    scale: Any = [{"first": 1, "begin": {"lossScale": 4.0}}]
    for name, rule, hyper, treatment, reference, words, special in (
        ("sum", "SGD", _SGD, {"accumulation_steps": 2}, {"accumulate": 2}, "2 backward passes", ()),
        ("adam", "ADAM", ADAM, {"accumulation_steps": 2}, {"accumulate": 2}, "2 backward passes", ()),
        ("mean", "ADAM", ADAM, {"accumulation_steps": 4}, {"accumulate": 4}, "4 backward passes of loss / 4", scale),
        (
            "clipped",
            "SGD",
            _SGD,
            {"accumulation_steps": 2, "clip_grad_norm": 0.5},
            {"accumulate": 2, "clip": 0.5},
            "2 backward passes, clip_grad_norm_(0.5)",
            (),
        ),
    ):
        every = reference["accumulate"]
        yield torch_case(
            f"accumulation-{name}",
            "accumulation",
            rule,
            hyper,
            config={"gradient": treatment},
            reference=reference,
            words=f"{words} to a step",
            steps=special,
            checkpoints=(1, every, 2 * every, 10 * every, 1000),
            counts=rule == "ADAM",
        )
    yield from _dropped_accumulations()


def _dropped_accumulations() -> Iterator[Case]:
    """Yield sums of three gradients, one of which is not finite: the second, the last, the first."""
    spoilt: Any = [
        {"first": 5, "every": 90, "first_element": "inf"},
        {"first": 36, "every": 90, "first_element": "nan"},
        {"first": 64, "every": 90, "first_element": "nan"},
    ]
    scaler = {"init_scale": 1024.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 8}
    contract = {"initialScale": 1024.0, "growthFactor": 2.0, "backoffFactor": 0.5, "growthInterval": 8}
    written = ", ".join(f"{key}={value}" for key, value in scaler.items())
    left_out = "sums with a gradient that is not finite left out, as torch.amp.GradScaler does"
    for name, treatment, reference, words in (
        ("skip", {"non_finite": "NON_FINITE_POLICY_SKIP"}, {"skip_non_finite": True}, left_out),
        ("loss-scale", {"loss_scaling": contract}, {"scaler": scaler}, f"torch.amp.GradScaler({written})"),
    ):
        yield torch_case(
            f"accumulation-{name}",
            "accumulation",
            "ADAM",
            ADAM,
            config={"gradient": {"accumulation_steps": 3} | treatment},
            reference={"accumulate": 3} | reference,
            words=f"3 backward passes to a step; {words}",
            steps=spoilt,
            checkpoints=(3, 6, 33, 36, 66, 999),
            counts=True,
        )


def _loss_scaling() -> Iterator[Case]:
    for name, rule, hyper in (("adam", "ADAM", ADAM), ("sgd", "SGD", _SGD)):
        yield torch_case(
            f"loss-scale-{name}",
            "loss_scale",
            rule,
            hyper,
            words="gradients arrive multiplied by 1024 and are unscaled",
            steps=[{"first": 1, "gradient_factor": 1024.0, "begin": {"lossScale": 1024.0}}],
        )
    scaler = {"init_scale": 1024.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 5}
    contract = {"initialScale": 1024.0, "growthFactor": 2.0, "backoffFactor": 0.5, "growthInterval": 5}
    written = ", ".join(f"{key}={value}" for key, value in scaler.items())
    yield torch_case(
        "loss-scale-dynamic",
        "loss_scale",
        "ADAM",
        ADAM,
        config={"gradient": {"loss_scaling": contract}},
        reference={"scaler": scaler},
        words=f"torch.amp.GradScaler({written}), NaN in every tenth gradient",
        steps=[{"first": 3, "every": 10, "first_element": "nan"}],
        counts=True,
    )


def _non_finite() -> Iterator[Case]:
    for value in ("nan", "inf"):
        yield torch_case(
            f"non-finite-skip-{value}",
            "loss_scale",
            "ADAM",
            ADAM,
            config={"gradient": {"non_finite": "NON_FINITE_POLICY_SKIP"}},
            reference={"skip_non_finite": True},
            words=f"steps whose gradient holds {value} left out, as torch.amp.GradScaler does",
            steps=[{"first": 2, "every": 4, "first_element": value}],
            counts=True,
        )


def _missing() -> Iterator[Case]:
    for name, rule, hyper, optimizer in (
        ("adam", "ADAM", ADAM, {}),
        ("adamw", "ADAM", ADAM | {"weight_decay": 0.1}, {"decoupled_weight_decay": True}),
        ("sgd", "SGD", _SGD | {"momentum": 0.8, "dampening": 0.3}, {}),
    ):
        yield torch_case(
            f"missing-{name}",
            "missing",
            rule,
            hyper,
            optimizer=optimizer,
            config={"gradient": {"missing_gradient": "MISSING_GRADIENT_POLICY_KEEP"}},
            words="some gradients None",
            steps=[
                {"first": 1, "last": 1, "begin": {"missingTensors": [2]}},
                {"first": 2, "every": 3, "begin": {"missingTensors": [1]}},
                {"first": 6, "every": 3, "begin": {"missingTensors": [0, 2]}},
            ],
            counts=rule == "ADAM",
        )


def _frozen_and_averaged() -> Iterator[Case]:
    yield torch_case(
        "frozen-adamw",
        "missing",
        "ADAM",
        ADAM | {"weight_decay": 0.1},
        optimizer={"decoupled_weight_decay": True},
        config={"frozen": ["bias", "scale"]},
        words="without gradients for bias and scale",
    )
    yield torch_case(
        "parameter-average",
        "average",
        "ADAM",
        ADAM,
        config={"gradient": {"parameter_average_decay": 0.9}},
        reference={"average": 0.9},
        words="torch.optim.swa_utils.get_ema_multi_avg_fn(0.9) after each step",
    )


def _precision() -> Iterator[Case]:
    for name, dtype in (("bfloat16", "DTYPE_BFLOAT16"), ("float16", "DTYPE_FLOAT16")):
        yield torch_case(
            f"gradient-{name}",
            "precision",
            "ADAM",
            ADAM,
            config={"session": {"gradient_dtype": dtype}},
            words=f"gradients that {name} holds exactly",
            bank="half",
        )
    loose: Any = {"ulp_checkpoints": 0, "checkpoints": (1, 2, 10), "states": False}
    yield torch_case(
        "state-bfloat16",
        "precision",
        "ADAM",
        ADAM,
        config={"session": {"state_precision": "STATE_PRECISION_BFLOAT16_MOMENTS"}},
        words="moments in full precision",
        tolerance={"absolute": 0.001},
        **loose,
    )
    yield torch_case(
        "state-int8",
        "precision",
        "ADAM",
        ADAM,
        config={"session": {"state_precision": "STATE_PRECISION_INT8_MOMENTS"}, "shapes": {"matrix": (64, 64)}},
        words="moments in full precision",
        bank="blocks",
        tolerance={"absolute": 0.005},
        **loose,
    )
    yield torch_case(
        "state-int8-outliers",
        "precision",
        "ADAM",
        ADAM | {"eps": 1e-8},
        config={"session": {"state_precision": "STATE_PRECISION_INT8_MOMENTS"}, "shapes": {"matrix": (64, 64)}},
        words="moments in full precision",
        bank="outliers",
        tolerance={"absolute": 0.1},
        **loose,
    )
    # float32 in the place of 8 bits, by the group and by the tensor: exact where 8 bits are not.
    eight, single = "STATE_PRECISION_INT8_MOMENTS", {"matrix": "FLOAT32"}
    for owner, group, tensors in (("group", "STATE_PRECISION_FLOAT32", None), ("tensor", eight, single)):
        yield torch_case(
            f"state-mixed-{owner}",
            "precision",
            "ADAM",
            ADAM | {"eps": 1e-8},
            config={
                "session": {"state_precision": eight},
                "shapes": {"matrix": (64, 64)},
                "groups": [{"statePrecision": group}],
                "tensor_precision": tensors,
            },
            words=f"float32 moments by the {owner} in a session of 8 bits",
            bank="outliers",
            checkpoints=(1, 2, 10),
            states=False,
        )
