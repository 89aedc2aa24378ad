"""The domain's own terms."""

from __future__ import annotations

import numpy as np
import pytest

from stepwire.v1 import optimizer_pb2
from stepwire_server.plan import NonFinitePolicy, StepOrder


def test_there_is_a_policy_for_every_one_of_the_contract() -> None:
    names = {name.removeprefix("NON_FINITE_POLICY_") for name in optimizer_pb2.NonFinitePolicy.keys()}
    assert names - {"UNSPECIFIED"} == {policy.name for policy in NonFinitePolicy}
    assert {policy.value for policy in NonFinitePolicy} == {"reject", "skip", "allow"}


def test_an_order_is_fixed() -> None:
    order = StepOrder(1, 0, np.dtype(np.float32), np.dtype(np.float16), True, 10, ())
    assert order._replace(step=2) == StepOrder(2, 0, np.dtype(np.float32), np.dtype(np.float16), True, 10, ())
    with pytest.raises(AttributeError):
        order.step = 3  # type: ignore[misc]
