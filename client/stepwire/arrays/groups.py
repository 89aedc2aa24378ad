"""From a user's parameter groups to the contract's: the members of each group, and each group's own options."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

from stepwire.arrays.trees import SEPARATOR, expanded
from stepwire.errors import InvalidRequestError
from stepwire.optimizers import Optimizer
from stepwire.optimizers.arguments import check_choice, checked_instance
from stepwire.optimizers.hyperparameters import number
from stepwire.optimizers.schedules import Schedule, schedule_to_wire
from stepwire.v1 import optimizer_pb2
from stepwire.wire.messages import PRECISIONS, overrides_to_wire

__all__ = ["grouped", "precisions_by_name"]

_OWN_OPTIONS: Final = ("params", "schedule", "clip_grad_norm", "state_precision")
"""The keys of a group besides its hyper-parameters."""


def grouped(
    named: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], optimizer: Optimizer, schedule: Schedule | None
) -> tuple[dict[str, int], list[optimizer_pb2.ParameterGroup]]:
    """Return each tensor's group index and the groups' messages.

    Args:
        named: the tensors, by name.
        groups: mappings with "params", the names of tensors or of branches, and the group's own options. The tensors in
            no mapping form one more group, the first.
        optimizer: the optimizer; its numbers are the defaults of every group.
        schedule: the schedule of groups without their own.

    Returns:
        The group index of each tensor by name, and one message for each group.

    Raises:
        InvalidRequestError: an option of a group is missing, unknown or out of range. The message names the group, the
            field and the value.
    """
    checked_instance(optimizer, Optimizer, "optimizer", "give one such as stepwire.Adam(lr=1e-3)")
    for index, group in enumerate(checked_instance(groups, Sequence, "groups", "give a list of dicts")):
        checked_instance(group, Mapping, f"groups[{index}]", 'give a dict, such as {"params": ["w"], "lr": 1e-4}')
    membership: dict[str, int] = {}
    members = [list(expanded(group.get("params", ()), named)) for group in groups]
    listed = {name for names in members for name in names}
    first = 0 if groups and listed >= set(named) else 1
    messages = [_group_message({}, optimizer, schedule, "optimizer") for _ in range(first)]
    for index, group in enumerate(groups):
        field = f"groups[{index}]"
        if "params" not in group:
            raise InvalidRequestError.of(f"{field}.params", "is missing; name the group's tensors")
        for name in members[index]:
            if name not in named or name in membership:
                problem = "is in two groups" if name in membership else "is not a parameter"
                raise InvalidRequestError.of(f"{field}.params", f"{name!r} {problem}")
            membership[name] = first + index
        messages.append(_group_message(group, optimizer, schedule, field))
    return {name: membership.get(name, 0) for name in named}, messages


def _group_message(
    group: Mapping[str, Any], optimizer: Optimizer, schedule: Schedule | None, field: str
) -> optimizer_pb2.ParameterGroup:
    overrides = {name: value for name, value in group.items() if name not in _OWN_OPTIONS}
    message = optimizer_pb2.ParameterGroup(
        overrides=overrides_to_wire(optimizer, optimizer.hyperparameters(), overrides, field)
    )
    own, path = group.get("schedule", schedule), f"{field}.schedule" if "schedule" in group else "schedule"
    if own is not None:
        if not isinstance(own, Schedule):
            raise InvalidRequestError.of(path, f"{own!r:.80} is not a stepwire.Schedule")
        own.check(path)
        message.schedule.CopyFrom(schedule_to_wire(own))
    if group.get("clip_grad_norm") is not None:
        bound = number(group["clip_grad_norm"], f"{field}.clip_grad_norm")
        if not 0.0 < bound < math.inf:
            raise InvalidRequestError.of(f"{field}.clip_grad_norm", f"{bound!r}; it must be finite and > 0")
        message.clip_grad_norm = bound
    if (precision := group.get("state_precision")) is not None:
        check_choice(f"{field}.state_precision", precision, PRECISIONS)
        message.state_precision = PRECISIONS[precision]
    return message


def precisions_by_name(
    named: Collection[str], precisions: Mapping[str, str], separator: str = SEPARATOR
) -> dict[str, str]:
    """Return the precision of each tensor that has one of its own.

    Args:
        named: the names of the tensors.
        precisions: precisions by the names of tensors or of branches. That of a tensor comes before that of its branch,
            and that of a branch before that of a larger one.
        separator: the separator of the names of a branch.

    Raises:
        InvalidRequestError: a name is no tensor's and no branch's, or a precision does not exist.
    """
    if not isinstance(precisions, Mapping):
        raise InvalidRequestError.of("tensor_precision", f"{precisions!r:.80} is no mapping of names to precisions")
    found: dict[str, str] = {}
    for name in sorted(precisions, key=len):  # a branch has a longer name than the branch around it
        field = f"tensor_precision[{name!r}]"
        check_choice(field, precisions[name], PRECISIONS)
        for tensor in expanded([name], named, separator):
            if tensor not in named:
                raise InvalidRequestError.of(field, "it is the name of no parameter and no branch")
            found[tensor] = precisions[name]
    return found
