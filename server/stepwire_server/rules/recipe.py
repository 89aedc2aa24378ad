"""The arithmetic of one pass over memory, as a list of pure functions: what engines make kernels of."""

from __future__ import annotations

import dataclasses
import enum
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

from stepwire_server.rules.rule import Decay, Rule
from stepwire_server.rules.treatment import added, averaged, decayed, drawn, lessened, limited, moved, scaled

__all__ = ["ACCUMULATED", "AVERAGE", "EIGHT_BIT_SLOTS", "FLOAT32_SLOTS", "Precision", "Recipe", "Stage"]

ACCUMULATED = "grad_accumulation"
"""The slot of the sum of micro-steps."""

AVERAGE = "param_average"
"""The slot of the parameters' moving average."""

EIGHT_BIT_SLOTS: Final = {"exp_avg": True, "momentum_buffer": True, "exp_avg_sq": False, "square_avg": False}
"""Slots that 8 bits hold well, means of the gradient and its square, and whether each has a sign."""

FLOAT32_SLOTS: Final = ("grad_avg",)
"""Slots whose square is taken from another slot: in fewer bits the difference of the two is their rounding."""


class Precision(enum.Enum):
    """How a rule's slots are held; parameters, averages and accumulated gradients are always float32."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    INT8 = "int8"


class Stage(NamedTuple):
    """One call: `results = function(*arguments)`, all by the names of variables."""

    function: Callable[..., Any]
    results: tuple[str, ...]
    arguments: tuple[str, ...]


# The stages of decay before the rule, and after it.
_DECAY_STAGES: Final[dict[Decay, tuple[tuple[Stage, ...], tuple[Stage, ...]]]] = {
    Decay.NONE: ((), ()),
    Decay.GRADIENT: ((Stage(decayed, ("g",), ("g", "p", "decay_scalar")),), ()),
    Decay.BEFORE: ((Stage(scaled, ("p",), ("p", "decay_scalar")),), ()),
    Decay.APART: ((Stage(lessened, ("p",), ("p", "decay_scalar")),), ()),
    Decay.WITHIN: ((Stage(drawn, ("way",), ("p", "decay_scalar")),), (Stage(moved, ("p",), ("p", "way")),)),
    Decay.AFTER: ((), (Stage(scaled, ("p",), ("p", "decay_scalar")),)),
}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The arithmetic of one pass on each element; kernels belong to recipes that are equal but for `rule.scalars`.

    Variables are `p`, `g`, the rule's own names for its slots and scalars, and those of `rules.treatment`.

    Attributes:
        rule: the formula.
        decay: the place of weight decay.
        accumulates: the micro-steps before are added to the gradient and cleared.
        limits: the gradient is clipped by value.
        averages: a moving average of the parameters is kept.
        measures: the pass returns the sums of the squares of the update and of the new parameters; with `limits` also
            that of the clipped gradient.
        precision: the form in which the rule's slots are held.
        forgotten: slots that keep nothing of the past: see `Rule.forgotten`.
        faded: slots of rows that are multiplied first by what sleep has left of them: see `rows`.
    """

    rule: Rule
    decay: Decay = Decay.NONE
    accumulates: bool = False
    limits: bool = False
    averages: bool = False
    measures: bool = False
    precision: Precision = Precision.FLOAT32
    forgotten: tuple[str, ...] = ()
    faded: tuple[str, ...] = ()

    def __hash__(self) -> int:
        """Hash the `key`, once: every pass of a step looks its kernel up."""
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        return hash(self.key)

    @functools.cached_property
    def key(self) -> tuple[Any, ...]:
        """The values that a kernel depends on."""
        flags = (self.accumulates, self.limits, self.averages, self.measures)
        return (self.rule.update, self.decay, *flags, self.precision, self.forgotten, self.faded)

    @functools.cached_property
    def name(self) -> str:
        """A name for the kernel, unique among recipes of different keys."""
        flags = ("accumulates", "limits", "averages", "measures")
        parts = [self.rule.update.__name__, *(flag for flag in flags if getattr(self, flag))]
        parts += [] if self.decay is Decay.NONE else [f"decay_{self.decay.value}"]
        parts += [f"no_{slot}" for slot in self.forgotten] + (["faded"] if self.faded else [])
        return "_".join(parts + ([] if self.precision is Precision.FLOAT32 else [self.precision.value]))

    @functools.cached_property
    def _by_precision(self) -> dict[Precision, Recipe]:
        return {each: dataclasses.replace(self, precision=each) for each in Precision if each is not self.precision}

    def held(self, precision: Precision) -> Recipe:
        """Return the same for slots in this precision; always the same object, so that its hash is computed once."""
        return self if precision is self.precision else self._by_precision[precision]

    @property
    def in_float32(self) -> Recipe:
        """The same for slots held as float32."""
        return self.held(Precision.FLOAT32)

    @functools.cached_property
    def slots(self) -> dict[str, str]:
        """The state arrays besides the parameters: the variable of each, by slot."""
        names = list(inspect.signature(self.rule.update).parameters)[2:]
        slots = dict(zip(self.rule.slots, names, strict=False))
        slots |= {ACCUMULATED: "accumulated"} if self.accumulates else {}
        return slots | ({AVERAGE: "average"} if self.averages else {})

    @functools.cached_property
    def rule_scalars(self) -> tuple[str, ...]:
        """The rule's own scalars, in order."""
        return tuple(inspect.signature(self.rule.update).parameters)[2 + len(self.rule.slots) :]

    @functools.cached_property
    def scalars(self) -> tuple[str, ...]:
        """Every scalar of the pass, in order: a kernel's last arguments, in float32."""
        names = ["factor", "clip"]
        names += ["limit"] if self.limits else []
        names += [] if self.decay is Decay.NONE else ["decay_scalar"]
        names += ["average_rate"] if self.averages else []
        names += [f"fade_{self.slots[slot]}" for slot in self.faded]
        return (*names, *self.rule_scalars)

    @functools.cached_property
    def sums(self) -> tuple[str, ...]:
        """The sums of squares that the pass returns, in order."""
        if not self.measures:
            return ()
        return ("update", "param", "gradient") if self.limits else ("update", "param")

    @functools.cached_property
    def treatment(self) -> tuple[Stage, ...]:
        """The stages before the rule."""
        stages = [Stage(scaled, ("g",), ("g", "factor"))]
        stages += [Stage(added, ("g",), ("g", "accumulated"))] if self.accumulates else []
        stages += [Stage(scaled, ("g",), ("g", "clip"))]
        stages += [Stage(limited, ("g",), ("g", "limit"))] if self.limits else []
        return tuple(stages)

    @functools.cached_property
    def stages(self) -> tuple[Stage, ...]:
        """The whole pass.

        With decay WITHIN, the rule steps `way` for `p`: from −lr·λ·p to −(d + lr·λ·p), because it only ever subtracts
        from its first argument. So no rule knows of decay, and its kernel without decay stays as it is.
        """
        stages, (_, *slots) = list(self.treatment), self._state
        before, after = _DECAY_STAGES[self.decay]
        stepped = "way" if self.decay is Decay.WITHIN else "p"
        stages += [Stage(scaled, (name,), (name, f"fade_{name}")) for name in map(self.slots.__getitem__, self.faded)]
        arguments = (stepped, "g", *self._past, *self.rule_scalars)
        stages += [*before, Stage(self.rule.update, (stepped, *slots), arguments), *after]
        if self.averages:
            stages.append(Stage(averaged, ("average",), ("average", "p", "average_rate")))
        return tuple(stages)

    @functools.cached_property
    def direction_stages(self) -> tuple[Stage, ...]:
        """The pass that measures a layerwise rule's direction `u`; it changes nothing."""
        assert self.rule.direction is not None
        arguments = ("p", "g", *self._state[1:], *self.rule_scalars[:-1])
        return (*self.treatment, Stage(self.rule.direction, ("u",), arguments))

    @functools.cached_property
    def temporaries(self) -> tuple[str, ...]:
        """The variables that stages make, besides `g` and those of the state."""
        return ("way",) if self.decay is Decay.WITHIN else ()

    @functools.cached_property
    def _state(self) -> tuple[str, ...]:
        return ("p", *tuple(self.slots.values())[: len(self.rule.slots)])

    @functools.cached_property
    def _past(self) -> tuple[str, ...]:
        """The rule's arguments for its slots.

        Of a forgotten slot the argument is g, which the rule weighs by 0. So m + 1·(g − m) is g exactly, and an
        infinite v is not multiplied by 0.
        """
        return tuple("g" if slot in self.forgotten else self.slots[slot] for slot in self.rule.slots)

    def evaluate(self, stages: Sequence[Stage], variables: dict[str, Any]) -> dict[str, Any]:
        """Run stages on NumPy arrays or floats by the names of variables; the reference of every kernel."""
        values = dict(variables)
        for function, results, arguments in stages:
            value = function(*[values[name] for name in arguments])
            values.update(zip(results, value if isinstance(value, tuple) else (value,), strict=True))
        return values
