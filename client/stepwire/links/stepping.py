"""The way of a step from the user's arrays to the link: in the caller's own thread, or by an errand."""

from __future__ import annotations

import functools
import time
from typing import Any

from stepwire.arrays.packing import Arrays
from stepwire.arrays.trees import Structure, Tree
from stepwire.connection.errands import run
from stepwire.errors import SessionMovedError
from stepwire.links.link import SessionLink
from stepwire.links.observed import ObservedSteps
from stepwire.steps.build import StepBuilder, StepOptions
from stepwire.steps.exchanges import CallExchange, StepExchange
from stepwire.transports.shared import SharedArrays

__all__ = ["SessionSteps"]


class SessionSteps:
    """Makes the steps of one session object.

    Attributes:
        gradient_dtype: the encoding of gradients, where a step asks for no other one.
        reply_dtype: the encoding of replies likewise.
    """

    def __init__(self, link: SessionLink, builder: StepBuilder, observed: ObservedSteps, structure: Structure) -> None:
        """Make steps through a link.

        Args:
            link: the link.
            builder: checks steps, and builds them.
            observed: remembers steps, and shows them to observers.
            structure: the structure of a reply if tensors are left out.
        """
        self._link, self._builder, self._observed = link, builder, observed
        self._structure = structure
        self._alike = builder.alike(observed.remember)
        self.gradient_dtype, self.reply_dtype = self._alike.gradient_dtype, self._alike.reply_dtype

    def make(self, gradients: Arrays, out: Any, options: StepOptions | None, timeout: float | None) -> Tree:
        """Apply a step; see `Session.step`.

        Args:
            gradients: the arrays, perhaps nested.
            out: the arrays for the reply, perhaps nested; None for new ones.
            options: all options, `out` among them; None for those of the session's creation.
            timeout: seconds; None for the client's default.

        Raises:
            StepwireError: as `Session.step`.
        """
        self._builder.check()
        direct = self._link.direct
        if direct is not None and not self._observed.has_observers:
            try:
                reply = direct.step(functools.partial(self._exchange, gradients, out, options), timeout)
                if reply is not None:
                    return reply
            except SessionMovedError:  # the link follows
                pass
        return run(functools.partial(self._errand, gradients, options or StepOptions(out=out), timeout))

    def _errand(self, gradients: Arrays, options: StepOptions, timeout: float | None) -> Tree:
        link = self._link
        with link.lock:
            call, made = self._builder.build_tree(gradients, options, self._structure)
            past = self._observed.step(call, link.deadline(timeout))
        self._observed.tell(past, self._builder.notices)
        return made()

    def _exchange(
        self, gradients: Arrays, out: Any, options: StepOptions | None, shared: SharedArrays | None
    ) -> StepExchange[Tree]:
        """Return a step that is like those before, or build it as an errand does."""
        began = time.perf_counter()
        if options is None:
            if shared is not None and (alike := self._alike.exchange(gradients, out, shared, began)) is not None:
                return alike
            options = StepOptions(out=out)
        call, made = self._builder.build_tree(gradients, options, self._structure)
        return CallExchange(call, made, self._link.description, shared, self._observed.remember, began)
