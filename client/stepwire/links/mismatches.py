"""The errors of a session that others stepped or loaded, with the remedy of each case."""

from __future__ import annotations

from stepwire.errors import StepMismatchError

__all__ = ["loaded_elsewhere", "stepped_elsewhere"]


def stepped_elsewhere(step: int, applied: int) -> StepMismatchError:
    """Return the error of a step that does not follow on the one that the server has applied."""
    return StepMismatchError(
        f"this client is about to take step {step} and the session is at step {applied}: it moved without this client; "
        "pull the parameters and go on from there with a new Session object",
        metadata={"expected_step": applied + 1, "actual_step": step},
    )


def loaded_elsewhere(known: int, last: int, *, together: bool) -> StepMismatchError:
    """Return the error of a session whose last load this client does not know; `together`: several workers step it."""
    remedy = "it was loaded without this client; pull the parameters and go on from there with a new Session object"
    if together:
        remedy = "another worker loaded it; pull the parameters and compute the gradient again"
    return StepMismatchError(
        f"this client knows load {known} and the session is at load {last}: {remedy}",
        metadata={"applied_load": last, "load": known},
    )
