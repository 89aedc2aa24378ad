"""torch itself: its optimizers, its clipping, its gradient scaler, its schedulers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch

from conformance.case import Build, Json
from conformance.inputs import Tensors

__all__ = ["VERSION", "DecayAfter", "TorchReference", "torch_build"]

VERSION: Final = torch.__version__.partition("+")[0]

_SLOTS: Final = (
    "exp_avg",
    "exp_avg_sq",
    "exp_inf",
    "max_exp_avg_sq",
    "momentum_buffer",
    "square_avg",
    "grad_avg",
    "acc_delta",
    "sum",
)

Parameters = dict[str, torch.nn.Parameter]
Make = Callable[[Any], torch.optim.Optimizer]


def _norm(gradients: Iterable[torch.Tensor | None]) -> float:
    return math.sqrt(sum(float((g.double() ** 2).sum()) for g in gradients if g is not None))


class DecayAfter(torch.optim.Adam):
    """torch's Adam with bitsandbytes' order: the update first, then p = p (1 - lr wd)."""

    def __init__(self, params: Any, decay: float, **options: Any) -> None:
        """Keep the decay from torch, which would decay before the update."""
        super().__init__(params, **options)
        self._decay = decay

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update, then decay."""
        super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.mul_(1 - group["lr"] * self._decay)


class TorchReference:
    """An optimizer of torch.

    Args:
        initial: the parameters.
        dtype: "float64" or "float32".
        make: a function that builds the optimizer from torch's `params`.
        groups: the names of each parameter group; by default all are in one.
        group_options: the options of each group.
        clip: the largest global norm, for `clip_grad_norm_`.
        clip_groups: the largest norm of each group alone, clipped before the global norm; None for no bound.
        clip_value: the bound for `clip_grad_value_`, clipped after the norms.
        accumulate: the number of backward passes for one step of the optimizer.
        overrides: the options of single steps by number, one mapping for all groups or one for each group.
        schedule: a function that builds a learning-rate scheduler, or an object that steps like one, and returns the
            number of updates after which the schedule ends.
        scaler: the options of a gradient scaler. Gradients then come unscaled and are scaled here, as a loss would be.
        average: the decay of an exponential moving average of the parameters.
        skip_non_finite: skip a step with a gradient of NaN or Inf, as a gradient scaler does.
        tells: describe the clipping of each step; without, nothing is measured.
    """

    def __init__(
        self,
        initial: Tensors,
        dtype: str,
        make: Make,
        groups: Sequence[Sequence[str]] | None = None,
        group_options: Sequence[Json] | None = None,
        clip: float | None = None,
        clip_groups: Sequence[float | None] = (),
        clip_value: float | None = None,
        accumulate: int = 1,
        overrides: Mapping[int, Sequence[Json]] | None = None,
        schedule: tuple[Callable[[torch.optim.Optimizer], Any], int] | None = None,
        scaler: Json | None = None,
        average: float | None = None,
        skip_non_finite: bool = False,
        tells: bool = True,
    ) -> None:
        """Build the optimizer."""
        kind = getattr(torch, dtype)
        # NAdam keeps the product of its momenta in the default type, with parameters of any type.
        torch.set_default_dtype(kind)
        self._all = {name: torch.nn.Parameter(torch.tensor(value, dtype=kind)) for name, value in initial.items()}
        self._groups = [list(names) for names in groups or [list(initial)]]
        options = group_options or [{} for _ in self._groups]
        self._optimizer = make(
            [{"params": self._members(i), **chosen} for i, chosen in enumerate(options)]
            if groups
            else list(self._all.values())
        )
        self._clip, self._clip_groups, self._clip_value = clip, clip_groups, clip_value
        self._accumulate, self._overrides = accumulate, overrides or {}
        self._scheduler, self._schedule_end = (schedule[0](self._optimizer), schedule[1]) if schedule else (None, 0)
        self._scaler = torch.amp.GradScaler("cpu", **scaler) if scaler else None
        if self._scaler is not None:
            self._scaler.scale(torch.zeros(()))
        self._decay, self._skip_non_finite, self._tells = average, skip_non_finite, tells
        self._average = [p.detach().clone() for p in self._all.values()]
        self._updates = 0

    def _members(self, group: int) -> list[torch.nn.Parameter]:
        return [self._all[name] for name in self._groups[group]]

    def step(self, number: int, gradients: Mapping[str, np.ndarray | None]) -> Json:
        """Add the gradients; clip, update and forget them when enough have come."""
        if (number - 1) % self._accumulate == 0:
            self._optimizer.zero_grad()
        for name, parameter in self._all.items():
            gradient = gradients.get(name)
            if gradient is not None:
                value = torch.tensor(gradient, dtype=parameter.dtype)
                parameter.grad = value if parameter.grad is None else parameter.grad + value
        if number % self._accumulate:
            return {}
        if self._scaler is not None:
            return self._scaled_update()
        if self._skip_non_finite and not all(math.isfinite(norm) for norm in self._norms()):
            return {}
        telemetry = self._treat()
        self._update(number)
        return telemetry

    def _scaled_update(self) -> Json:
        assert self._scaler is not None
        for parameter in self._all.values():
            if parameter.grad is not None:
                parameter.grad *= self._scaler.get_scale()
        self._scaler.step(self._optimizer)
        self._scaler.update()
        return {"lossScale": self._scaler.get_scale()}

    def _treat(self) -> Json:
        before = self._norms() if self._tells else []
        for group, bound in enumerate(self._clip_groups):
            if bound is not None:
                torch.nn.utils.clip_grad_norm_(self._members(group), bound)
        between = self._norms() if self._tells else []
        if self._clip is not None:
            torch.nn.utils.clip_grad_norm_(list(self._all.values()), self._clip)
        after = self._norms() if self._tells else []
        if self._clip_value is not None:
            torch.nn.utils.clip_grad_value_(list(self._all.values()), self._clip_value)
        return self._telemetry(before, between, after) if self._tells else {}

    def _norms(self) -> list[float]:
        return [_norm(p.grad for p in self._members(group)) for group in range(len(self._groups))]

    def _telemetry(self, before: list[float], between: list[float], after: list[float]) -> Json:
        """Describe the clipping, without the numbers that the contract leaves open: see the README's "telemetry"."""
        telemetry: Json = {
            "gradNorm": math.hypot(*before),
            "groups": [{"gradNorm": norm} for norm in before],
        }
        if self._clip_value is None:
            telemetry["clippedGradNorm"] = math.hypot(*after)
            for entry, norm in zip(telemetry["groups"], after, strict=True):
                entry["clippedGradNorm"] = norm
        for entry, old, new in zip(telemetry["groups"], before, after, strict=True):
            if old:
                entry["clipCoefficient"] = new / old
        if not self._clip_groups and math.hypot(*between):
            telemetry["clipCoefficient"] = math.hypot(*after) / math.hypot(*between)
        for entry, group in zip(telemetry["groups"], self._optimizer.param_groups, strict=True):
            if self._scheduler is not None:
                entry["hyperparameters"] = {"lr": float(group["lr"])}
        return telemetry

    def _update(self, number: int) -> None:
        """Step, with this step's options in place of the group's own."""
        saved = [dict(group) for group in self._optimizer.param_groups]
        chosen = self._overrides.get(number, ())
        for index, group in enumerate(self._optimizer.param_groups):
            group.update(chosen[index if len(chosen) > 1 else 0] if chosen else {})
        self._optimizer.step()
        for group, before in zip(self._optimizer.param_groups, saved, strict=True):
            group.update({key: value for key, value in before.items() if key != "params"})
        self._updates += 1
        if self._scheduler is not None and self._updates <= self._schedule_end:
            self._scheduler.step()
        if self._decay is not None:
            average = torch.optim.swa_utils.get_ema_multi_avg_fn(self._decay)
            average(self._average, [p.detach() for p in self._all.values()], None)

    def parameters(self) -> Tensors:
        """Return the parameters."""
        return {name: parameter.detach().numpy().copy() for name, parameter in self._all.items()}

    def slots(self) -> dict[str, Tensors]:
        """Return torch's state of the tensors that have a state."""
        states = {name: self._optimizer.state.get(parameter, {}) for name, parameter in self._all.items()}
        found: dict[str, Tensors] = {}
        for slot in _SLOTS:
            values_by_name = {
                name: state[slot] for name, state in states.items() if isinstance(state.get(slot), torch.Tensor)
            }
            if values_by_name:
                found[slot] = {name: value.numpy().copy() for name, value in values_by_name.items()}
        if self._decay is not None:
            found["param_average"] = {
                name: value.numpy().copy() for name, value in zip(self._all, self._average, strict=True)
            }
        return found

    def tensor_steps(self) -> dict[str, int]:
        """Return the `step` of each tensor's state."""
        states = {name: self._optimizer.state.get(parameter, {}) for name, parameter in self._all.items()}
        return {name: int(state.get("step", 0)) for name, state in states.items()}


def torch_build(make: Make, **options: Any) -> Build:
    """Return a function that builds this reference from parameters and a precision."""
    return lambda initial, dtype: TorchReference(initial, dtype, make, **options)
