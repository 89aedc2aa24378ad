"""What every test shares: hypothesis without a stopwatch, and servers that keep their log lines to themselves."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from typing import Any, NoReturn

import hypothesis
import pytest
import structlog

# A loaded machine is slow now and then; that is no property of the code. Seeds stay random, and a failure prints
# the blob that repeats it.
hypothesis.settings.register_profile(
    "stepwire",
    deadline=None,
    derandomize=False,
    print_blob=True,
    max_examples=100,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("stepwire")


def _drop(logger: object, method: str, event: MutableMapping[str, Any]) -> NoReturn:
    raise structlog.DropEvent


# Servers in this process log from many threads, also while a test captures a command's output. What a test wants to
# read, it takes with `structlog.testing.capture_logs`, which stands in for these processors.
structlog.configure(processors=[_drop])


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """Undo what a test, or a command that it ran, did to the logging of the whole process."""
    configuration = structlog.get_config()
    yield
    structlog.configure(**configuration)
