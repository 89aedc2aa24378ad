"""Forks of this process, and the refusal of a parent's objects in its children.

A forked child has the objects of its parent, and none of its threads. Two processes with one object would step one
session: the server would take the steps of both for one client's, and replays for new steps. So objects of the parent
refuse their use in a child.
"""

from __future__ import annotations

import os

from stepwire.errors import InvalidRequestError

__all__ = ["Birthplace", "forks"]


class _Forks:
    """The count of the forks of this process, noted before the connections are closed for one."""

    def __init__(self) -> None:
        self.count = 0

    def note(self) -> None:
        self.count += 1


forks = _Forks()


class Birthplace:
    """The process in which an object was made.

    Attributes:
        process_id: the id of the process.
    """

    __slots__ = ("process_id",)

    def __init__(self) -> None:
        """Be born in this process."""
        self.process_id = os.getpid()

    @property
    def is_here(self) -> bool:
        """Tell whether this is the process, and no forked child of it."""
        return os.getpid() == self.process_id

    def check(self, name: str, remedy: str) -> None:
        """Refuse the use of an object in a child.

        Args:
            name: the object in one word.
            remedy: the next action.

        Raises:
            InvalidRequestError: this is a child.
        """
        if os.getpid() != self.process_id:
            raise InvalidRequestError.of(
                name,
                f"the {name} is of process {self.process_id}, and this is its forked child {os.getpid()}; {remedy}",
            )
