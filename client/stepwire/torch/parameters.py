"""All parameters of an optimizer, in the order of its session."""

from __future__ import annotations

import logging
import multiprocessing
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from stepwire.errors import UnsupportedFeatureError
from stepwire.torch.rules import Group
from stepwire.torch.samples import Samples
from stepwire.torch.tensors import ParameterTensor, locations_of, marks_of, touch, touch_in_place
from stepwire.wire.dtypes import FLOAT32

__all__ = ["Parameters"]

_LOG = logging.getLogger(__name__)

Arrays = dict[str, npt.NDArray[Any]]


class Parameters:
    """The parameters of some groups.

    Attributes:
        tensors: one tensor for each parameter, group after group.
        membership: the group of each tensor, by name.
        sparse: the names of the tensors that have had sparse gradients, or are declared tables.
        tables: the names of those of them whose gradients and replies are rows. A sparse gradient of another one is
            made dense.
    """

    def __init__(self, groups: Sequence[Group], known: Mapping[int, str] | None = None) -> None:
        """Collect the parameters of the groups.

        Args:
            groups: torch's parameter groups.
            known: the names of parameters so far, by `id`; for groups whose names do not fit their parameters.

        Raises:
            UnsupportedFeatureError: a parameter cannot be stepped by a server, or two overlap in memory.
        """
        self.tensors: list[ParameterTensor] = []
        self.membership: dict[str, int] = {}
        seen: dict[int, str] = {}
        for index, group in enumerate(groups):
            for name, parameter in zip(_names(index, group, known or {}), group["params"], strict=True):
                if id(parameter) in seen:  # torch steps the parameter twice, with a warning of a later refusal
                    raise _unsupported(name, f"is {seen[id(parameter)]!r} once more; list each parameter once")
                seen[id(parameter)] = name
                if name in self.membership:
                    raise _unsupported(name, "is the name of two parameters; give each its own")
                self.tensors.append(ParameterTensor(name, parameter))
                self.membership[name] = index
        _refuse_overlaps(self.tensors)
        self._parameters = [tensor.parameter for tensor in self.tensors]
        self._identities = list(map(id, self._parameters))
        self._counts = [len(group["params"]) for group in groups]
        self._forms = [(parameter.dtype, parameter.shape) for parameter in self._parameters]
        self._samples = Samples(self.tensors)
        self._told = False
        self.sparse: frozenset[str] = frozenset()
        self.tables: frozenset[str] = frozenset()

    def expect_sparse(self, names: Collection[str], *, by_rows: bool) -> None:
        """Expect sparse gradients of some more tensors.

        Args:
            names: the tensors.
            by_rows: True if all sparse tensors are tables of the session. Samples leave out tables: a step passes over
                none of them.
        """
        before, self.sparse = self.tables, self.sparse | frozenset(names)
        self.tables = self.sparse if by_rows else frozenset()
        for tensor in self.tensors:
            tensor.made_dense = tensor.name in self.sparse - self.tables
        if self.tables != before:
            self._samples = Samples([tensor for tensor in self.tensors if tensor.name not in self.tables])

    def regrouped(self, groups: Sequence[Group], *, by_rows: bool) -> Parameters:
        """Return the parameters of other groups: those that are here too keep their names, and are sparse as before.

        Args:
            groups: torch's parameter groups.
            by_rows: as for `expect_sparse`.

        Raises:
            UnsupportedFeatureError: as the constructor.
        """
        made = Parameters(groups, {id(tensor.parameter): tensor.name for tensor in self.tensors})
        sparse = {id(tensor.parameter) for tensor in self.tensors if tensor.name in self.sparse}
        stay = [tensor.name for tensor in made.tensors if id(tensor.parameter) in sparse]
        made.expect_sparse(stay, by_rows=by_rows)
        return made

    @property
    def dtype(self) -> np.dtype[Any]:
        """The common dtype of all parameters; float32 if they have several."""
        dtypes = {tensor.dtype for tensor in self.tensors}
        return dtypes.pop() if len(dtypes) == 1 else FLOAT32

    def members(self, group: int) -> list[str]:
        """Return the names of a group's parameters."""
        return [name for name, index in self.membership.items() if index == group]

    def members_by_group(self) -> list[list[str]]:
        """Return the names of each group's parameters."""
        return [self.members(group) for group in range(max(self.membership.values(), default=-1) + 1)]

    def are_of(self, groups: Sequence[Group]) -> bool:
        """Tell whether groups have these parameters, in these groups and in the dtypes and shapes of the session."""
        given = [parameter for group in groups for parameter in group["params"]]
        if list(map(id, given)) != self._identities or [len(group["params"]) for group in groups] != self._counts:
            return False
        return [(parameter.dtype, parameter.shape) for parameter in given] == self._forms

    def fetch(self) -> Arrays:
        """Return the present values, by name."""
        arrays = {tensor.name: tensor.fetch() for tensor in self.tensors}
        self.synchronize()
        return arrays

    def gradients(self, but: Collection[str] = ()) -> dict[str, Any]:
        """Return the present gradients by name, without those of the names in `but`: arrays, and `Rows` of tables.

        Raises:
            InvalidRequestError: a gradient cannot be sent.
        """
        found = {
            tensor.name: gradient
            for tensor in self.tensors
            if tensor.name not in but
            and (gradient := tensor.rows() if tensor.name in self.tables else tensor.gradient()) is not None
        }
        self.synchronize()
        return found

    def shapes(self, names: Collection[str]) -> Arrays:
        """Return arrays in the shapes and dtypes of some tensors, by name, for a step whose gradients come later.

        They have no memory: even untouched memory would be in the place of gradients that are about to be made.
        """
        found = [tensor for tensor in self.tensors if tensor.name in names]
        return {tensor.name: np.broadcast_to(np.zeros((), tensor.dtype), tensor.shape) for tensor in found}

    def targets(self) -> Arrays | None:
        """Return the arrays that replies are written to, by name; None for replies in arrays of their own, with rows.

        A session with tables writes nothing into arrays of its caller.
        """
        if self.tables:
            return None
        locations = locations_of(self._parameters)
        return {tensor.name: tensor.array(at) for tensor, at in zip(self.tensors, locations, strict=True)}

    def stepped(self, reply: Any) -> None:
        """Copy the values of a step's reply into the parameters, and those that it wrote to `targets`."""
        if self.tables:
            self._put(reply)
        else:
            for tensor in self.tensors:
                tensor.settle()
            touch_in_place(self.tensors)
        self.note()

    def _put(self, reply: Any) -> None:
        """Write the values of a reply with rows into the parameters."""
        dense = [tensor for tensor in self.tensors if tensor.name not in self.tables]
        for tensor in dense:
            _write(tensor, reply[tensor.name])
            tensor.settle()
        touch(dense)
        for tensor in self.tensors:
            if tensor.name in self.tables and (rows := reply[tensor.name]) is not None:
                tensor.put_rows(rows)

    def adopt(self, values: Mapping[str, Any]) -> None:
        """Write values of the session into the parameters."""
        for tensor in self.tensors:
            _write(tensor, values[tensor.name])
            tensor.settle()
        touch(self.tensors)
        self.note()

    def uploaded(self) -> None:
        """Note that the session has all present values."""
        self.follow()

    def restored(self) -> None:
        """Note that values of the session were written to the parameters."""
        self.note()

    def release(self) -> None:
        """Do nothing: the model's memory is its own."""

    def follow(self) -> None:
        """Note that the session has all present values."""
        for tensor, mark in zip(self.tensors, marks_of(self._parameters), strict=True):
            tensor.follow(mark)
        self.note()

    def note(self) -> None:
        """Keep samples of the present values: a change that torch does not count is one after this moment."""
        self._samples.note()

    def changed(self) -> list[ParameterTensor]:
        """Return the tensors that other code has changed since `stepped` or `follow`.

        Torch counts changes. Of changes that torch does not count, samples reveal most.
        """
        return self.counted() or self._uncounted()

    def counted(self) -> list[ParameterTensor]:
        """Return the tensors of which torch has counted a change since `stepped` or `follow`."""
        followed, present = [tensor.followed for tensor in self.tensors], marks_of(self._parameters)
        if followed == present:
            return []
        return [tensor for tensor, one, other in zip(self.tensors, followed, present, strict=True) if one != other]

    def _uncounted(self) -> list[ParameterTensor]:
        """Return the tensors with another content than the session, although torch has counted no change.

        Raises:
            UnsupportedFeatureError: another process has changed them.
        """
        found = self._samples.changed()
        _refuse_other_writers(found)
        if found and not self._told:
            self._told = True
            _LOG.warning(
                "%r was changed through .data, which torch does not count; the change was found by samples of its "
                "values. Call optimizer.upload_parameters() after such a change: samples may miss the next one",
                found[0].name,
            )
        return found

    def synchronize(self) -> None:
        """Wait for the copies from GPUs that are under way."""
        for device in {parameter.device for parameter in self._parameters if parameter.is_cuda}:
            torch.cuda.current_stream(device).synchronize()


def _write(tensor: ParameterTensor, values: npt.NDArray[Any]) -> None:
    """Write values into the array of a tensor; those beyond its dtype become infinite."""
    with np.errstate(over="ignore"):
        tensor.array()[...] = values


def _names(index: int, group: Group, known: Mapping[int, str]) -> list[str]:
    """Return the names of a group's parameters: the group's own, or the known ones and positions."""
    names, parameters = group.get("param_names"), group["params"]
    if names and len(names) == len(parameters):
        return list(names)
    made = [f"param_groups[{index}][{position}]" for position in range(len(parameters))]
    if not names:
        return made
    return [known.get(id(parameter), name) for parameter, name in zip(parameters, made, strict=True)]


def _refuse_overlaps(tensors: Sequence[ParameterTensor]) -> None:
    """Refuse parameters that overlap in memory: torch steps a common element once for each of them."""
    extents = sorted(_extents(tensors), key=lambda extent: extent[:2])
    for (_, end, one), (start, _, other) in zip(extents, extents[1:], strict=False):
        if start < end:
            raise _unsupported(
                other.name,
                f"shares memory with {one.name!r}; tie parameters by using one Parameter twice (module.weight = "
                "other.weight), not two over one storage",
            )


def _refuse_other_writers(changed: Sequence[ParameterTensor]) -> None:
    """Refuse to step a model in shared memory that another process steps too: each would overwrite the other's steps.

    A process alone may step such a model, and others read it. So the first change by another process tells.
    """
    if multiprocessing.parent_process() is None:
        return
    for tensor in changed:
        if tensor.parameter.device.type == "cpu" and tensor.parameter.is_shared():
            raise _unsupported(
                tensor.name,
                "lies in memory shared with other processes, and one of them has changed it. Steps of several "
                "processes on one model (Hogwild) would overwrite each other: give each a model of its own, and make "
                "them workers of one job (worker=, workers=, job=). After a change that was over before this step, "
                "call optimizer.upload_parameters()",
            )


def _extents(tensors: Sequence[ParameterTensor]) -> Iterator[tuple[int, int, ParameterTensor]]:
    for tensor in tensors:
        parameter = tensor.parameter
        if parameter.numel():
            last = sum((size - 1) * stride for size, stride in zip(parameter.shape, parameter.stride(), strict=True))
            start = parameter.data_ptr()
            yield start, start + (last + 1) * parameter.element_size(), tensor


def _unsupported(name: str, problem: str) -> UnsupportedFeatureError:
    return UnsupportedFeatureError(
        f"the parameter {name!r} {problem}", metadata={"field": f"params[{name!r}]", "feature": "torch_parameter"}
    )
