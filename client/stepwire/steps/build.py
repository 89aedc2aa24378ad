"""From the arguments of `Session.step` to a checked call; nothing is sent here."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Final, Literal, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from stepwire.arrays.packing import Arrays, Container, Flat
from stepwire.arrays.ranges import Ranges
from stepwire.arrays.recognised import FITTING, RecognisedArrays
from stepwire.arrays.rows import RowGradient, Rows, RowTarget, split_rows, targets_of
from stepwire.arrays.trees import Structure, Tree, expanded, flattened, is_nested
from stepwire.errors import InvalidRequestError, Reason
from stepwire.lifetimes.forks import Birthplace
from stepwire.optimizers.arguments import check_callable, check_choice, checked_flag, checked_instance, checked_names
from stepwire.optimizers.gradient_treatment import check_scale
from stepwire.optimizers.hyperparameters import number
from stepwire.steps.alike import AlikeSteps
from stepwire.steps.call import Decide, OnTensor, StepCall
from stepwire.steps.carry import Carry
from stepwire.steps.description import SessionDescription
from stepwire.steps.exchanges import Remember
from stepwire.steps.gradient_feed import GradientFeed
from stepwire.steps.notices import Notices, OnReady
from stepwire.steps.reply_places import ReplyPlaces, is_listed
from stepwire.transports.cuda.stand_ins import StandIn, stood_in
from stepwire.v1 import optimizer_pb2, step_pb2
from stepwire.wire.dtypes import BFLOAT16, FLOAT32, INT8, dtype_from_wire, dtype_named, dtype_to_wire
from stepwire.wire.messages import hyperparameters_from_wire, optimizer_from_wire, overrides_to_wire

__all__ = ["Overrides", "Reply", "StepBuilder", "StepOptions"]

Overrides: TypeAlias = Mapping[str, Any] | Sequence[Mapping[str, Any]]
"""Hyper-parameters of one step: one mapping for all groups, or one a group."""

Reply: TypeAlias = Literal["parameters", "none", "changed"]
"""The reply to a step: all parameters, none of them, or the parameters that changed in bfloat16."""

_NO_PLACES: Final[Flat] = ()
_NONE_MISSING: Final[frozenset[int]] = frozenset()
_NO_ROWS: Final[tuple[RowGradient, ...]] = ()
_NONE_ON_DEVICE: Final[Mapping[int, StandIn]] = {}
_REPLY_MODES: Final = {
    "parameters": step_pb2.REPLY_MODE_PARAMETERS,
    "none": step_pb2.REPLY_MODE_NONE,
    "changed": step_pb2.REPLY_MODE_CHANGED,
}


@dataclasses.dataclass(slots=True, kw_only=True)
class StepOptions:
    """The arguments of `Session.step` beside the gradients; documented there."""

    lr: float | None = None
    hyperparameters: Overrides | None = None
    loss_scale: float | None = None
    gradient_dtype: npt.DTypeLike | None = None
    reply_dtype: npt.DTypeLike | None = None
    reply: Reply = "parameters"
    reply_first: Sequence[str] = ()
    on_tensor: OnReady | None = None
    overlap: bool = False
    out: Container | None = None
    decide: Decide | None = None
    feed: GradientFeed | None = None
    weight: float | None = None


class StepBuilder:
    """Builds the steps of one session.

    Attributes:
        notices: the calls of the user's functions in the session's steps.
    """

    def __init__(self, description: SessionDescription, carry: Carry) -> None:
        """Build steps of a session as the server described it.

        Args:
            description: the session.
            carry: the arrays that steps leave for the next.
        """
        config, self._packer = description.message.config, description.packer
        tensors = self._packer.layout.tensors
        self._chunk_bytes = description.chunk_bytes
        self._carry = carry
        self._optimizer = optimizer_from_wire(config.optimizer, "optimizer")
        self._groups = [hyperparameters_from_wire(group.overrides) for group in config.groups]
        self._gradient_dtype = dtype_from_wire(config.gradient_dtype, FLOAT32, "gradient_dtype", gradients=True)
        self._reply_dtype = dtype_from_wire(config.reply_dtype, FLOAT32, "reply_dtype")
        self._frozen = frozenset(index for index, tensor in enumerate(tensors) if tensor.spec.frozen)
        keeps = config.gradient.missing_gradient == optimizer_pb2.MISSING_GRADIENT_POLICY_KEEP
        self._optional = frozenset(tensor.spec.name for tensor in tensors if keeps or tensor.spec.frozen)
        self._indices = self._packer.layout.tensor_indices()
        order, elements = tuple(tensor.spec.name for tensor in tensors), sum(tensor.count for tensor in tensors)
        self._given = RecognisedArrays(order, elements, written=False)
        self._places = ReplyPlaces(self._packer)
        self._tables = {table.spec.name: index for index, table in self._packer.layout.tables.items()}
        self.notices = Notices()
        self._birthplace = Birthplace()
        self._beginnings: dict[tuple[object, ...], step_pb2.StepBegin] = {}

    def check(self) -> None:
        """Refuse a call of the session in a forked child, or from within a function of the user's.

        Raises:
            InvalidRequestError: the session is of the parent, or this thread is within `on_tensor` or the logger.
        """
        if os.getpid() == self._birthplace.process_id and not self.notices.within:  # as almost always
            return
        self._birthplace.check(
            "session", "both would step one session. Make a session in the child, through a client of its own"
        )
        self.notices.check()

    def alike(self, remember: Remember) -> AlikeSteps:
        """Return the steps that need not be built, since they are like those that were."""
        sent, received = self._gradient_dtype, self._reply_dtype
        begin = self._begin(StepOptions(), sent, received)
        return AlikeSteps(self._packer, begin, (sent, received), self._given, self._places, remember)

    def build_tree(
        self, gradients: Arrays, options: StepOptions, structure: Structure
    ) -> tuple[StepCall, Callable[[], Tree]]:
        """Build a call as `build` does, and the function that makes its reply into what its caller gets.

        Args:
            gradients: the arrays, perhaps nested.
            options: the options, whose `out` may be nested.
            structure: the structure of the reply if tensors are left out.

        Raises:
            InvalidRequestError: as `build`.
        """
        out, known = options.out, None if self._tables else self._given.recalls(gradients)
        known_out = None if out is None else self._places.recognise(out)
        is_flat = known is not None or not is_nested(gradients)
        if is_flat and (out is None or known_out is not None or not is_nested(out)):
            call, reply = self.build(gradients, options, known, known_out)
            return call, functools.partial(_arrived, call, reply, listed=is_listed(gradients))
        given = flattened(gradients, "gradients")
        out = None if out is None else flattened(out, "out").named
        call, reply = self.build(given.named, dataclasses.replace(options, out=out))
        if options.out is not None and reply is out:
            return call, lambda: options.out
        return call, lambda: given.structure.restored(_arrived(call, reply, listed=False), structure)

    def build(
        self,
        gradients: Arrays,
        options: StepOptions,
        known: object | None = None,
        known_out: object | None = None,
    ) -> tuple[StepCall, Container | None]:
        """Check everything, and return the call without its number, and the container of its reply.

        The container is None where `_arrived` finds it, as `ReplyPlaces.of` says.

        Args:
            gradients: the arrays, not nested.
            options: the options, whose `out` is not nested.
            known: how the gradients are recognised; see `RecognisedArrays.recalls`.
            known_out: the mark of `out`; see `ReplyPlaces.recognise`.

        Raises:
            InvalidRequestError: names, shapes, dtypes or values are wrong; the message names them.
        """
        sent, received = self._dtypes(options)
        begin = self._begin(options, sent, received)
        flat, missing, rows, on_device = (
            (self._given.again(gradients), _NONE_MISSING, _NO_ROWS, _NONE_ON_DEVICE)
            if known is not None
            else self._gradients(gradients, options, begin)
        )
        mark = None if known is FITTING else known
        views: Container | None = None
        reply, targets = None, _NO_PLACES
        if options.reply != "none":
            reply, targets = self._places.of(gradients, options.out, known_out, received)
        row_targets = targets_of(rows, received) if rows and reply is not None else ()
        if reply is not None and reply is options.out:
            self._places.check_apart(flat, targets, mark, known_out)
        elif options.out is not None:
            views = [] if is_listed(gradients) else {}
        call = StepCall(
            begin,
            flat,
            sent,
            targets,
            received,
            missing,
            feedback=self._carry.feedback if sent == INT8 else None,
            views=views,
            patched=self._carry.patched(begin) if options.reply == "changed" else None,
            on_tensor=None if options.on_tensor is None else self._notifier(options.on_tensor, reply, views, targets),
            decide=options.decide,
            feed=options.feed,
            on_device=on_device,
            rows=rows,
            row_targets=row_targets,
            recognised=mark,
        )
        return call, self._with_rows(reply, row_targets) if self._tables else reply

    def _dtypes(self, options: StepOptions) -> tuple[np.dtype[Any], np.dtype[Any]]:
        """Return the encodings of the gradient and of the reply.

        Raises:
            InvalidRequestError: one is none, or the reply's is at odds with other options.
        """
        sent, received = self._gradient_dtype, self._reply_dtype
        if options.gradient_dtype is not None and options.gradient_dtype is not sent:
            sent = dtype_named(options.gradient_dtype, "gradient_dtype", gradients=True)
        if options.reply_dtype is not None and options.reply_dtype is not received:
            received = dtype_named(options.reply_dtype, "reply_dtype")
        if options.reply != "parameters":  # with which no other option is at odds
            _check_reply(options, received)
        return sent, received

    def _gradients(
        self, gradients: Arrays, options: StepOptions, begin: step_pb2.StepBegin
    ) -> tuple[Flat, frozenset[int], tuple[RowGradient, ...], Mapping[int, StandIn]]:
        """Check the gradients, and note in `begin` which of them came.

        Returns:
            Their views, the indices of the tensors without one, the gradients of tables, and those on a device.

        Raises:
            InvalidRequestError: a gradient or an option is wrong.
        """
        given, rows = self._parted(gradients, options)
        given, on_device = stood_in(given)
        flat, missing = self._present(given)
        left_out = self._name_rows(begin, rows, missing) if self._tables else missing
        if left := left_out - self._frozen:
            begin.missing_tensors.extend(sorted(left))
        return flat, missing, rows, {self._indices[name]: stand_in for name, stand_in in on_device.items()}

    def _parted(self, gradients: Arrays, options: StepOptions) -> tuple[Arrays, tuple[RowGradient, ...]]:
        """Part the gradients of tables from the others, and refuse options that tables exclude.

        Raises:
            InvalidRequestError: a gradient or an option is wrong.
        """
        if not self._tables:
            return gradients, ()
        for field in ("out", "feed", "overlap", "reply_first"):
            if getattr(options, field):
                raise InvalidRequestError.of(field, "it is not served in a session with tables; leave it out")
        if options.reply == "changed":
            raise InvalidRequestError.of("reply", "'changed' is not served in a session with tables; use 'parameters'")
        if not isinstance(gradients, Mapping) and isinstance(gradients, Sequence):
            gradients = {str(place): value for place, value in enumerate(gradients)}
        return split_rows(gradients, self._packer.layout) if isinstance(gradients, Mapping) else (gradients, ())

    def _name_rows(
        self, begin: step_pb2.StepBegin, rows: Sequence[RowGradient], missing: frozenset[int]
    ) -> frozenset[int]:
        """Tell the server of the rows of a step; return the tensors of `missing` that have no rows either.

        Raises:
            InvalidRequestError: a table has no gradient, and the session lets no tensor be left out.
        """
        for table in rows:
            begin.tables.add(tensor=table.tensor, entries=len(table.indices))
        left_out = missing.difference(table.tensor for table in rows)
        for name, index in self._tables.items():
            if index in left_out and name not in self._optional:
                raise InvalidRequestError.of(
                    f"gradients[{name!r}]",
                    "the table has no gradient; pass stepwire.Rows, perhaps without rows, or create the session with "
                    "missing_gradient='keep'",
                    reason=Reason.INVALID_TENSOR,
                )
        return left_out

    def _with_rows(self, reply: Container | None, rows: Sequence[RowTarget]) -> Container | None:
        """Put the rows that come back in the places of their tables, and leave out tables without rows."""
        if reply is None or not self._tables:
            return reply
        came = {target.tensor: target for target in rows}
        for name, index in self._tables.items():
            shape, found = self._packer.layout.tensors[index].spec.shape[1:], came.get(index)
            value = None if found is None else Rows(found.indices, found.values.reshape(-1, *shape))
            if isinstance(reply, list):
                reply[int(name)] = value
            else:
                reply[name] = value
        return reply

    def _present(self, gradients: Arrays) -> tuple[Flat, frozenset[int]]:
        """Return the views of the gradients, and the indices of the tensors without one."""
        missing: frozenset[int] = frozenset()

        def checked() -> list[npt.NDArray[Any]]:
            nonlocal missing
            flat, missing = self._packer.present(gradients, "gradients", self._optional | self._tables.keys())
            return flat

        return self._given.views(gradients, checked), missing

    def _begin(self, options: StepOptions, sent: np.dtype[Any], received: np.dtype[Any]) -> step_pb2.StepBegin:
        """Return the opening of a step without its number: a copy of the opening that steps of its kind share."""
        kind = (sent, received, options.reply)
        if (known := self._beginnings.get(kind)) is None:
            known = self._beginnings[kind] = step_pb2.StepBegin(
                gradient_dtype=dtype_to_wire(sent),
                reply=step_pb2.ReplyOptions(
                    mode=_REPLY_MODES[options.reply], dtype=dtype_to_wire(received), chunk_bytes=self._chunk_bytes
                ),
            )
        begin = step_pb2.StepBegin()
        begin.CopyFrom(known)
        if options.overlap:
            begin.overlap = checked_flag(options.overlap, "overlap")
        if options.lr is not None or options.hyperparameters is not None:
            begin.hyperparameters.extend(self._overrides(options.lr, options.hyperparameters))
        if options.reply_first:
            begin.reply.first.extend(self._first(options.reply_first))
        if options.loss_scale is not None:
            check_scale(options.loss_scale, "loss_scale")
            begin.loss_scale = float(options.loss_scale)
        if options.weight is not None:
            begin.weight = number(options.weight, "weight")
        return begin

    def _first(self, names: Sequence[str]) -> Iterator[int]:
        for name in expanded(checked_names(names, "reply_first"), self._indices):
            if (index := self._indices.get(name)) is None:
                raise InvalidRequestError.of("reply_first", f"{name!r} is not a tensor of this session")
            yield index

    def _notifier(
        self, notify: OnReady, reply: Container | None, views: Container | None, targets: Flat
    ) -> OnTensor | None:
        check_callable(notify, "on_tensor")
        if targets is _NO_PLACES:
            return None
        tensors = self._packer.layout.tensors

        def arrived(index: int) -> None:
            name = tensors[index].spec.name
            named: Any = reply if reply is not None else views or cast(Ranges, targets).container
            values = named[name] if isinstance(named, Mapping) else named[int(name)]
            self.notices.give("on_tensor", notify, name, values)

        return arrived

    def _overrides(self, lr: float | None, overrides: Overrides | None) -> list[Any]:
        kinds = (Mapping, Collection, np.ndarray, type(None))
        checked_instance(overrides, kinds, "hyperparameters", "give a dict of numbers, or a list of one a group")
        per_group = (
            [overrides or {}] * len(self._groups) if overrides is None or isinstance(overrides, Mapping) else overrides
        )
        if len(per_group) != len(self._groups):
            raise InvalidRequestError.of("hyperparameters", f"{len(per_group)} entries for {len(self._groups)} groups")
        shared = {} if lr is None else {"lr": lr}
        made = []
        for index, (group, values) in enumerate(zip(self._groups, per_group, strict=True)):
            field = f"hyperparameters[{index}]"
            given = checked_instance(values, Mapping, field, "give a dict of numbers")
            made.append(overrides_to_wire(self._optimizer, group, {**shared, **given}, field))
        return made


def _arrived(call: StepCall, reply: Container | None, *, listed: bool) -> Any:
    """Return the container of a reply that has come: the one that is known, or that of the arrays; an empty one."""
    if reply is not None:
        return reply
    if type(targets := call.targets) is Ranges:
        return call.views or targets.made()[1]
    return [] if listed else {}


def _check_reply(options: StepOptions, received: np.dtype[Any]) -> None:
    check_choice("reply", options.reply, _REPLY_MODES)
    if options.reply == "changed" and received != BFLOAT16:
        raise InvalidRequestError.of("reply", f"'changed' is for bfloat16 replies, and reply_dtype is {received.name}")
    if options.reply != "parameters" and options.on_tensor is not None:
        raise InvalidRequestError.of("on_tensor", f"tensors do not arrive one by one with reply={options.reply!r}")
    if options.reply == "none" and options.out is not None:
        raise InvalidRequestError.of("out", "nothing is written to it with reply='none'")
