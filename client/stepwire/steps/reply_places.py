"""The places of a step's reply: new arrays, those of `out`, or none where `out` shows the server's own memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from stepwire.arrays.packing import Arrays, Container, Flat, Packer
from stepwire.arrays.recognised import RecognisedArrays
from stepwire.errors import InvalidRequestError
from stepwire.transports.cuda.views import shows_parameters
from stepwire.transports.host.memory import lies_in_parameters

__all__ = ["SHOWN", "ReplyPlaces", "is_listed"]


SHOWN: Final = object()
"""Stands for arrays of `out` that show the server's own memory."""


class ReplyPlaces:
    """The places of the replies of one session. The session serialises its calls."""

    def __init__(self, packer: Packer) -> None:
        """Recognise no arrays yet."""
        self._packer = packer
        layout = packer.layout
        order, elements = tuple(layout.tensor_indices()), sum(tensor.count for tensor in layout.tensors)
        self._written = RecognisedArrays(order, elements, written=True)
        self._shown = RecognisedArrays(order, elements, written=False)
        self._apart: tuple[object, object] | None = None  # the marks of gradients and arrays that share no memory

    def recognise(self, out: object) -> object | None:
        """Return the mark of arrays of `out` that are known from the step before; `SHOWN`, or None for others."""
        if self._written.form is not None and (mark := self._written.knows(out)) is not None:
            return mark
        return None if self._shown.knows(out) is None else SHOWN

    def of(
        self,
        gradients: Arrays,
        out: Container | None,
        known: object | None,
        received: np.dtype[Any],
    ) -> tuple[Container | None, Flat]:
        """Return the container of a reply, as the user sees it, and its arrays in layout order.

        Args:
            gradients: the gradients, whose container and order a new reply has.
            out: the user's arrays; None for a new reply.
            known: what `recognise` has returned for `out`.
            received: the encoding of the reply.

        Returns:
            The container: `out`, or one with tables; None for the container of the arrays, which are `Ranges` then.

        Raises:
            InvalidRequestError: as `Packer.targets`.
        """
        if out is not None:
            if known is not None and known is not SHOWN:
                return out, self._written.again(out)
            if known is None and not self._shows_parameters(out):
                return out, self._written.views(out, lambda: self._packer.targets(out, "out"))
        as_list = is_listed(gradients)
        if not self._packer.layout.tables:
            return None, self._packer.to_come(received, None if as_list else list(gradients))
        reply, targets = self._packer.allocate_dense(received, as_list=as_list)
        if isinstance(reply, dict) and list(reply) != (names := list(gradients)) and reply.keys() == set(names):
            reply = {name: reply[name] for name in names}
        return reply, targets

    def check_apart(self, flat: Flat, targets: Flat, given: object | None, known: object | None) -> None:
        """Refuse a reply over the gradient: it may break off, and then the gradient is sent, or told, again.

        Args:
            flat: the gradients, in layout order.
            targets: the arrays of `out`, in layout order.
            given: the mark of the gradients; None for others than the last ones.
            known: the mark of `out`; None for others than the last ones.

        Raises:
            InvalidRequestError: an array of both shares memory.
        """
        pair = None if given is None or known is None else (given, known)
        if pair is not None and pair == self._apart:
            return
        for index, (gradient, target) in enumerate(zip(flat, targets, strict=True)):
            if np.may_share_memory(gradient, target):
                name = self._packer.layout.tensors[index].spec.name
                raise InvalidRequestError.of(
                    f"out[{name!r}]", "the array shares memory with the gradient, which a repetition needs; use another"
                )
        self._apart = pair

    def _shows_parameters(self, out: Container) -> bool:
        """Tell whether a reply needs no copy: all its arrays came from `Session.shared_parameters`."""
        arrays = list(out.values()) if isinstance(out, Mapping) else list(out) if isinstance(out, list) else []
        shows = bool(arrays) and all(shows_parameters(array) or lies_in_parameters(array) for array in arrays)
        if shows:
            self._shown.views(out, list)  # nothing of them is looked at again
        return shows


def is_listed(arrays: Arrays) -> bool:
    """Tell whether arrays have positions in the place of names, so that their reply is a list."""
    return type(arrays) is not dict and not isinstance(arrays, Mapping)
