"""Steps are chosen by their number, and as slow beside those before them."""

from __future__ import annotations

import pytest

from stepwire.errors import InvalidRequestError
from stepwire.tracing.sampling import StepSampling, check_one_in


def test_the_first_of_every_n_steps_is_chosen() -> None:
    sampling = StepSampling(3)
    assert [sampling.is_chosen() for _ in range(7)] == [True, False, False, True, False, False, True]


def test_a_step_is_slow_beyond_99_percent_of_the_last_thousand() -> None:
    sampling = StepSampling(1)
    assert not any(sampling.is_slow(float(step)) for step in range(100, 0, -1))  # the first hundred have no bound
    assert [sampling.is_slow(seconds) for seconds in (99.0, 99.5)] == [False, True]
    for _ in range(1098):
        sampling.is_slow(1.0)  # the larger ones are forgotten
    assert [sampling.is_slow(seconds) for seconds in (1.0, 1.5)] == [False, True]


@pytest.mark.parametrize("one_in", [-1, 1.5, True, "2", 1 << 53, None])
def test_a_number_of_steps_is_a_whole_number(one_in: object) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        check_one_in(one_in, "trace_one_in")  # type: ignore[arg-type]
    assert refused.value.metadata == {"field": "trace_one_in"}
