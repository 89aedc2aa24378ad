"""The shared parts of all tests: hypothesis without a stopwatch, one kernel directory, and quiet servers."""

from __future__ import annotations

import gc
import pathlib
import signal
from collections import defaultdict
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

# A job in the background of a shell ignores Ctrl-C, and so would every process that tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option of `make test`."""
    parser.addoption(
        "--sample", action="store_true", help="leave out what is `long`, and three cases of four of what is `many`"
    )
    parser.addoption("--every", type=int, default=1, metavar="N", help="run every N-th case of what is `many`")
    parser.addoption("--offset", type=int, default=0, help="begin with this case, so that others are run than before")


def pytest_configure(config: pytest.Config) -> None:
    """Have fewer examples where a sample is asked for."""
    if config.getoption("sample"):
        hypothesis.settings.register_profile("sample", hypothesis.settings.get_profile("stepwire"), max_examples=30)
        hypothesis.settings.load_profile("sample")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is long, and cases of what is many, where that is asked for; some of each test stay."""
    sample = config.getoption("sample")
    every, offset = (4, 0) if sample else (config.getoption("every"), config.getoption("offset"))
    cases = defaultdict[tuple[str, str], list[pytest.Item]](list)
    for item in items:
        if item.get_closest_marker("many") is not None:
            cases[str(item.path), getattr(item, "originalname", item.name)].append(item)
    left_out = {item for item in items if sample and item.get_closest_marker("long") is not None}
    for each in cases.values():
        if len(each) > 2:
            left_out |= {item for index, item in enumerate(each) if (index - offset) % every}
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=list(left_out))


def pytest_collection_finish() -> None:
    """Leave modules and thousands of collected tests out of every later collection of garbage, which they slow down."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def kept_out_of_collections() -> Iterator[None]:
    """Leave out what the modules before have left for good, too: it was a fifth of the processor time of the suite."""
    yield
    gc.collect()
    gc.freeze()


def _drop(logger: object, method: str, event: MutableMapping[str, Any]) -> NoReturn:
    raise structlog.DropEvent


# Servers in this process log from many threads, also while a test captures a command's output. What a test wants to
# read, it takes with `structlog.testing.capture_logs`, which stands in for these processors.
structlog.configure(processors=[_drop])


@pytest.fixture(scope="session", autouse=True)
def no_config_file() -> Iterator[None]:
    """Keep the config file of whoever runs the tests out of all clients, their processes' too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STEPWIRE_CLIENT_CONFIG", "")
        yield


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """Undo what a test, or a command that it ran, did to the logging of the whole process."""
    configuration = structlog.get_config()
    yield
    structlog.configure(**configuration)


@pytest.fixture(scope="session", autouse=True)
def kernel_directory(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[pathlib.Path]:
    """Keep compiled kernels beside pytest's own cache, for all tests, their server processes and later runs.

    A kernel takes a third of a second to compile, and the suite uses hundreds.
    """
    cache = getattr(request.config, "cache", None)
    directory = pathlib.Path(cache.mkdir("stepwire-kernels")) if cache else tmp_path_factory.mktemp("kernels")
    directory.chmod(0o700)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STEPWIRE_CACHE_DIR", str(directory))
        yield directory
