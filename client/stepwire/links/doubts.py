"""The steps of one session whose outcome its client does not know; see `stepwire.steps.doubt`."""

from __future__ import annotations

from stepwire.links.hold import Hold
from stepwire.links.past import LinkPast
from stepwire.links.window import ReplayWindow
from stepwire.steps.call import StepCall
from stepwire.steps.carry import Carry
from stepwire.steps.doubt import Doubt, UntoldSteps

__all__ = ["Doubts"]


class Doubts:
    """The doubts of one session. The session serialises its calls.

    Attributes:
        present: the step in doubt; None without one.
        untold: the steps whose outcome nobody can tell.
    """

    def __init__(self, hold: Hold, carry: Carry, window: ReplayWindow) -> None:
        """Doubt nothing; what steps carry, and what is kept of them, is forgotten with the state that it belongs to."""
        self.present: Doubt | None = None
        self.untold = UntoldSteps()
        self._hold = hold
        self._carry = carry
        self._window = window
        self._load = hold.applied_load  # that the doubt and everything carried belong to

    @property
    def load(self) -> int:
        """The load that the doubt, and everything carried, belong to."""
        return self._load

    def succeed(self, past: LinkPast) -> None:
        """Go on from the doubts of another link, whose hold of the worker has come along."""
        self.present, self.untold = past.doubt and past.doubt.under(self._hold.acquisitions), past.untold
        if past.load is not None:
            self._load = past.load

    @property
    def are_none(self) -> bool:
        """The outcome of every step is known, and no load has come that a step is yet to follow."""
        return self.present is None and not self.untold.doubts and self._load == self._hold.applied_load

    def failed(self, call: StepCall) -> None:
        """Note a step that failed."""
        self.present = Doubt.after(call, self._hold.acquisitions)

    def resolved(self, *, lost: bool = False) -> None:
        """Settle the step in doubt by the number that the server has told since; it was not applied if it is lost."""
        hold, doubt, self.present = self._hold, self.present, None
        if not lost:
            hold.applied_step = hold.step_on_server
        if doubt is not None:
            doubt.resolve(applied=not lost and hold.step_on_server == doubt.step)

    def succeeded(self) -> None:
        """Note a step whose reply came: whoever has it can send any gradient."""
        self.present = None
        self.untold.forget()

    def undelivered(self, call: StepCall) -> None:
        """Put a step in doubt whose outcome reached nobody: the same gradient again is the same step."""
        hold = self._hold
        if self.present is None and (hold.applied_step, hold.applied_load) == (call.begin.step, call.begin.load):
            self._carry.failed(call)
            self.failed(call)

    def forget(self) -> None:
        """Forget everything that belongs to a state that is gone."""
        self._load, self.present = self._hold.applied_load, None
        self._carry.loaded()
        self._window.clear()
        self.untold.forget()

    def forget_settled(self) -> None:
        """Forget a step in doubt that a load has replaced, or that another client's hold has settled or hidden."""
        hold, doubt = self._hold, self.present
        if hold.applied_load != self._load:
            self.forget()
        elif doubt is not None and doubt.acquisitions != hold.acquisitions:
            self.present = None
            if hold.step_on_server < doubt.step:
                doubt.resolve(applied=False)
            else:  # by this client, or by another one
                self.untold.add(doubt)
