"""A session's state under the names of other frameworks, both ways: pure functions of names, numbers and arrays."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from stepwire.errors import InvalidRequestError
from stepwire.layout import SCALE_SUFFIX
from stepwire.optimizers import Optimizer
from stepwire_server.cli.tensor_file import Tensor

__all__ = ["FORMS", "Form", "Numbers", "State", "arrays_of", "decoded_slots", "params_of", "state_of"]

_PARAM: Final = "param"
_ACCUMULATED: Final = "grad_accumulation"
_MOST_STEPS: Final = 2**53


class Form(NamedTuple):
    """The names that a framework has.

    Attributes:
        param: the template of a parameter's name.
        slot: the template of the name of a slot of a parameter.
        names: by rule, the framework's name of each slot; None for the session's own names.
        step: the template of the name of a parameter's t; empty for none.
        shared_step: the name of the one t of all parameters; empty for none.
        counted: the rules with that t.
    """

    param: str
    slot: str
    names: Mapping[str, Mapping[str, str]] | None
    step: str = ""
    shared_step: str = ""
    counted: frozenset[str] = frozenset()


class Numbers(NamedTuple):
    """The numbers of a state.

    Attributes:
        step: the last step; None if nobody said.
        tensor_steps: t of each tensor, by name.
        tensor_scalars: the scalar of each tensor, by name; empty for rules without.
        loss_scale: the scale and its clean steps; None without one.
    """

    step: int | None = None
    tensor_steps: Mapping[str, int] = {}
    tensor_scalars: Mapping[str, float] = {}
    loss_scale: tuple[float, int] | None = None


class State(NamedTuple):
    """A whole state.

    Attributes:
        slots: by slot and name, the arrays.
        numbers: the numbers beside them.
    """

    slots: Mapping[str, Mapping[str, Tensor]]
    numbers: Numbers


def _same(*slots: str) -> dict[str, str]:
    return {slot: slot for slot in slots}


_MOMENTS: Final = _same("exp_avg", "exp_avg_sq")
_OPTAX_MOMENTS: Final = {"exp_avg": "mu", "exp_avg_sq": "nu"}
_KERAS_MOMENTS: Final = {"exp_avg": "momentum", "exp_avg_sq": "velocity"}

FORMS: Final[dict[str, Form]] = {
    "stepwire": Form("param/{}", "{slot}/{name}", None),
    "torch": Form(
        "param.{}",
        "state.{name}.{slot}",
        {
            "adam": {**_MOMENTS, **_same("max_exp_avg_sq")},
            "nadam": _MOMENTS,
            "radam": _MOMENTS,
            "adamax": _same("exp_avg", "exp_inf"),
            "sgd": _same("momentum_buffer"),
            "rmsprop": _same("square_avg", "momentum_buffer", "grad_avg"),
            "adagrad": _same("sum"),
            "adadelta": _same("square_avg", "acc_delta"),
            "lion": _same("exp_avg"),
            "lamb": _MOMENTS,
            "lars": _same("momentum_buffer"),
        },
        step="state.{}.step",
    ),
    "optax": Form(
        "params/{}",
        "{slot}/{name}",
        {
            "adam": {**_OPTAX_MOMENTS, "max_exp_avg_sq": "nu_max"},
            "radam": _OPTAX_MOMENTS,
            "adamax": {"exp_avg": "mu", "exp_inf": "nu"},
            "sgd": {"momentum_buffer": "trace"},
            "rmsprop": {"square_avg": "nu", "grad_avg": "mu"},
            "adagrad": {"sum": "sum_of_squares"},
            "adadelta": {"square_avg": "e_g", "acc_delta": "e_x"},
            "lion": {"exp_avg": "mu"},
            "lamb": _OPTAX_MOMENTS,
        },
        shared_step="count",
        counted=frozenset(("adam", "radam", "adamax", "lion", "lamb")),
    ),
    "keras": Form(
        "{}",
        "{name}/{slot}",
        {
            "adam": {**_KERAS_MOMENTS, "max_exp_avg_sq": "velocity_hat"},
            "adamax": {"exp_avg": "momentum", "exp_inf": "norm"},
            "sgd": {},
            "rmsprop": {"square_avg": "velocity", "grad_avg": "average_gradient"},
            "adagrad": {"sum": "accumulator"},
            "adadelta": {"square_avg": "accumulated_grad", "acc_delta": "accumulated_delta_var"},
            "lion": {"exp_avg": "momentum"},
            "lamb": _KERAS_MOMENTS,
        },
        shared_step="iterations",
        counted=frozenset(("adam", "adamax", "sgd", "rmsprop", "adagrad", "adadelta", "lion", "lamb")),
    ),
}
"""The forms by name. Keras's momentum of SGD has the learning rate within it, which no session's buffer has."""


# --- out of a session --------------------------------------------------------------------------------------


def decoded_slots(form: str, slots: Iterable[str]) -> list[str]:
    """Return the slots of 8 bits that a form has as float32 alone, without the maxima of their blocks."""
    return [] if form == "stepwire" else [s.removesuffix(SCALE_SUFFIX) for s in slots if s.endswith(SCALE_SUFFIX)]


def arrays_of(form: str, state: State, optimizer: Optimizer, frozen: Iterable[str] = ()) -> dict[str, Tensor]:
    """Return a state under the names of a form.

    Args:
        form: the name of the form.
        state: the state, with the session's own names.
        optimizer: the session's optimizer.
        frozen: the tensors that are never stepped, which frameworks keep no state of.

    Raises:
        InvalidRequestError: the form has no counterpart of a slot, or of tensors with different t. The message names
            them.
    """
    names, still = _names(form, optimizer, state.slots), set(frozen)
    found: dict[str, Tensor] = {}
    for slot, arrays in state.slots.items():
        for name, tensor in arrays.items():
            if slot == _PARAM:
                _put(found, FORMS[form].param.format(name), tensor)
            elif form == "stepwire" or (slot in names and name not in still and _kept(form, state, optimizer, name)):
                _put(found, _slot_key(form, names.get(slot, slot), name), tensor)
            elif slot == _ACCUMULATED and tensor.read().any():
                raise _without(form, slot, "which holds gradients of a step that is not complete; export after it")
    moved = [name for name in state.slots[_PARAM] if name not in still]
    for key, values in _numbers_out(form, state.numbers, optimizer, moved):
        _put(found, key, Tensor.of(values))
    return found


def _names(form: str, optimizer: Optimizer, slots: Iterable[str]) -> Mapping[str, str]:
    """Return the form's name of each slot of a rule.

    Raises:
        InvalidRequestError: the form has not the rule, or not one of the slots.
    """
    known = FORMS[form].names
    if known is None:
        return {slot: slot for slot in slots}
    if (names := known.get(optimizer.rule)) is None:
        raise _without(form, optimizer.rule, "a rule of other frameworks; use the form torch or stepwire")
    for slot in slots:
        beside = slot in (_PARAM, _ACCUMULATED) or slot.endswith(SCALE_SUFFIX)
        if not beside and slot not in names:
            raise _without(form, slot, "use the form stepwire, which has every slot")
    amsgrad = optimizer.structure().amsgrad
    if amsgrad != "none" and (amsgrad == "corrected") != (form == "optax"):
        raise _without(form, "max_exp_avg_sq", f"whose amsgrad is {amsgrad!r}; use the form stepwire")
    return names


def _kept(form: str, state: State, optimizer: Optimizer, name: str) -> bool:
    """Tell whether a framework has state of a tensor: torch has none before the first update."""
    numbers = state.numbers
    if form != "torch" or optimizer.rule == "adagrad":
        return True
    if optimizer.rule == "sgd" and numbers.tensor_scalars:
        return bool(numbers.tensor_scalars[name])
    return numbers.tensor_steps[name] > 0


def _numbers_out(
    form: str, numbers: Numbers, optimizer: Optimizer, names: Sequence[str]
) -> Iterable[tuple[str, npt.NDArray[Any]]]:
    kind, steps = FORMS[form], numbers.tensor_steps
    if kind.step and optimizer.rule != "sgd":
        for name in names:
            if steps[name] or optimizer.rule == "adagrad":
                yield kind.step.format(name), np.array(steps[name], np.float32)
                if optimizer.rule == "nadam":
                    yield f"state.{name}.mu_product", np.array(numbers.tensor_scalars[name], np.float32)
    if kind.shared_step and optimizer.rule in kind.counted and names:
        first = names[0]
        for name in names:
            if steps[name] != steps[first]:
                problem = f"with {steps[first]} updates of {first!r} and {steps[name]} of {name!r}: it has one number"
                raise _without(form, kind.shared_step, f"{problem}; use the form torch or stepwire")
        yield kind.shared_step, np.array(steps[first], np.int32 if form == "optax" else np.int64)


def _slot_key(form: str, slot: str, name: str) -> str:
    return FORMS[form].slot.format(slot=slot, name=name)


def _put(found: dict[str, Tensor], key: str, tensor: Tensor) -> None:
    if key in found:
        raise InvalidRequestError.of("form", f"two arrays would have the name {key!r}; use another form")
    found[key] = tensor


def _without(form: str, what: str, more: str) -> InvalidRequestError:
    return InvalidRequestError.of("form", f"{form} has no counterpart of {what!r}, {more}")


# --- into a session ----------------------------------------------------------------------------------------


def state_of(
    form: str, tensors: Mapping[str, Tensor], given: Numbers, optimizer: Optimizer, slots: Sequence[str]
) -> State:
    """Return the state that a file of a form describes, for a session with these slots.

    Args:
        form: the name of the form.
        tensors: the arrays of the file.
        given: the numbers beside them; those in arrays count more.
        optimizer: the session's optimizer.
        slots: the session's slots.

    Raises:
        InvalidRequestError: an array or a number is missing, is not the session's, or has a wrong value. The message
            names it.
    """
    rest = dict(tensors)
    names = _names(form, optimizer, slots)
    params = _params(form, rest, names)
    found: dict[str, dict[str, Tensor]] = {slot: {} for slot in slots}
    found[_PARAM] = params
    for slot in slots:
        for name in params if slot != _PARAM else ():
            key = _slot_key(form, names.get(slot, slot), name)
            if (slot in names or form == "stepwire") and (tensor := rest.pop(key, None)) is not None:
                found[slot][name] = _shaped(tensor, key, params[name].shape)
    numbers = _numbers_in(form, rest, given, optimizer, found)
    if rest:
        raise InvalidRequestError.of("file", f"{min(rest)[:200]!r} is nothing that this session has in form {form}")
    for slot in slots:
        _complete(form, slot, found, numbers, optimizer)
    return State(found, numbers)


def params_of(form: str, tensors: Mapping[str, Tensor], optimizer: Optimizer) -> dict[str, Tensor]:
    """Return the parameters alone, by name.

    Raises:
        InvalidRequestError: the form has not the optimizer's rule, or there are none.
    """
    return _params(form, dict(tensors), _names(form, optimizer, ()))


def _params(form: str, rest: dict[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """Move the parameters out of the arrays of a file."""
    prefix = FORMS[form].param.removesuffix("{}")
    own = set(names.values())
    keys = [key for key in rest if key.startswith(prefix) and key != FORMS[form].shared_step]
    if not prefix:
        keys = [key for key in keys if not _is_slot(key, own, rest)]
    if not keys:
        raise InvalidRequestError.of("file", f"has no parameters: no name is like {FORMS[form].param.format('NAME')!r}")
    return {key.removeprefix(prefix): rest.pop(key) for key in sorted(keys)}


def _is_slot(key: str, own: set[str], rest: Mapping[str, Tensor]) -> bool:
    name, _, slot = key.rpartition("/")
    return slot in own and name in rest


def _shaped(tensor: Tensor, key: str, shape: tuple[int, ...]) -> Tensor:
    if tensor.shape != shape:
        raise InvalidRequestError.of(
            "file", f"{key[:200]!r} has the shape {list(tensor.shape)}, and its parameter {list(shape)}"
        )
    return tensor


def _numbers_in(
    form: str, rest: dict[str, Tensor], given: Numbers, optimizer: Optimizer, found: Mapping[str, Mapping[str, Tensor]]
) -> Numbers:
    """Return the numbers, those in arrays first."""
    kind, params = FORMS[form], found[_PARAM]
    steps = {name: given.tensor_steps.get(name, 0) for name in params}
    scalars = dict(given.tensor_scalars)
    if kind.shared_step and (tensor := rest.pop(kind.shared_step, None)) is not None:
        steps = dict.fromkeys(params, _whole(tensor, kind.shared_step))
    buffers = found.get("momentum_buffer") if optimizer.rule == "sgd" else None
    for name in params if form == "torch" else ():
        key, product = kind.step.format(name), f"state.{name}.mu_product"
        if (tensor := rest.pop(key, None)) is not None:
            steps[name] = _whole(tensor, key)
        elif optimizer.rule != "sgd":
            steps[name] = 0
        if (tensor := rest.pop(product, None)) is not None:
            scalars[name] = _product(tensor, product, scalars.get(name))
        elif optimizer.rule == "nadam":
            scalars[name] = 1.0
    if buffers is not None and form != "stepwire":
        scalars = {name: float(name in buffers) for name in params}
        steps = {name: steps[name] or int(name in buffers) for name in params}
    last = max(steps.values(), default=0) if given.step is None else given.step
    return Numbers(last if form == "stepwire" else max(last, *steps.values()), steps, scalars, given.loss_scale)


def _complete(
    form: str, slot: str, found: Mapping[str, dict[str, Tensor]], numbers: Numbers, optimizer: Optimizer
) -> None:
    """Fill in what a framework has no state of, or refuse the lack of it."""
    if form != "stepwire" and slot.endswith(SCALE_SUFFIX):
        raise InvalidRequestError.of(
            "form", f"{form} has no counterpart of {slot!r}, which moments of 8 bits need; use the form stepwire"
        )
    for name, parameter in found[_PARAM].items():
        if name in found[slot]:
            continue
        steps = numbers.tensor_steps[name]
        if form == "stepwire" or (steps and slot != _ACCUMULATED and slot not in _optional(numbers, name, optimizer)):
            raise InvalidRequestError.of("file", f"lacks {slot!r} of {name[:200]!r}, which has {steps} updates")
        first = getattr(optimizer, "initial_accumulator_value", 0.0) if slot == "sum" else 0.0
        found[slot][name] = Tensor.of(np.full(parameter.shape, first, np.float32))


def _optional(numbers: Numbers, name: str, optimizer: Optimizer) -> tuple[str, ...]:
    """Return the slots that torch may lack of a tensor that has had updates."""
    begun = numbers.tensor_scalars.get(name, 1.0)
    return ("momentum_buffer",) if optimizer.rule == "sgd" and not begun else ()


def _number(tensor: Tensor, key: str) -> float:
    if int(np.prod(tensor.shape, dtype=object)) != 1:
        raise InvalidRequestError.of("file", f"{key[:200]!r} has the shape {list(tensor.shape)[:8]}; it is one number")
    return float(tensor.read().reshape(())[()])


def _whole(tensor: Tensor, key: str) -> int:
    value = _number(tensor, key)
    if not (0 <= value <= _MOST_STEPS and value == int(value)):
        raise InvalidRequestError.of("file", f"{key[:200]!r} is {value!r}, which is no number of updates")
    return int(value)


def _product(tensor: Tensor, key: str, exact: float | None) -> float:
    """Return the product of momenta: the exact one, if the array is that one rounded."""
    value = _number(tensor, key)
    if not 0.0 <= value <= 1.0:
        raise InvalidRequestError.of("file", f"{key[:200]!r} is {value!r}, which is no product of momenta, in [0, 1]")
    return exact if exact is not None and np.float32(exact) == np.float32(value) else value
