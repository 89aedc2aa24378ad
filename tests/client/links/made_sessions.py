"""The model of the tests of links: three parameters, and gradients that are told apart by one number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

import stepwire

__all__ = ["FOURS", "ONES", "START", "TWOS", "Create", "first"]

START = {"w": np.zeros(3, np.float32)}
ONES, TWOS, FOURS = ({"w": np.full(3, value, np.float32)} for value in (1.0, 2.0, 4.0))
Create = Callable[..., stepwire.Session]


def first(parameters: Any) -> float:
    return float(parameters["w"][0])
