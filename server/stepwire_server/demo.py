"""The demo: a client trains a small network against a server in another process.

The client holds the model, computes its gradients in NumPy and keeps no optimizer. Beside it a float64 Adam, written
from the paper, gets the same gradients, so that the report can tell the difference at the end.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import tempfile
import time
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import stepwire
from stepwire.errors import InvalidRequestError, UnsupportedFeatureError
from stepwire_server.processes.spawn import server_process

__all__ = ["DemoReport", "run_demo"]

Parameters: TypeAlias = dict[str, npt.NDArray[Any]]

_SEED = 7
_HIDDEN = 64
_BATCH = 128
_LR = 3e-3


class Digits(NamedTuple):
    """The handwritten digits bundled with scikit-learn: 1,797 images of 8 × 8.

    Attributes:
        train_x: the images to train on, `(n, 64) float32` in [0, 1].
        train_y: their digits, `(n,) int64`.
        test_x: the images to test on, as `train_x`.
        test_y: their digits, as `train_y`.
    """

    train_x: npt.NDArray[np.float32]
    train_y: npt.NDArray[np.int64]
    test_x: npt.NDArray[np.float32]
    test_y: npt.NDArray[np.int64]

    @classmethod
    def load(cls) -> Digits:
        """Read the data, and set every fifth image aside for tests."""
        try:
            from sklearn.datasets import load_digits
        except ModuleNotFoundError:
            raise UnsupportedFeatureError(
                "the demo needs scikit-learn; install it: pip install 'stepwire[demo]'", metadata={"feature": "demo"}
            ) from None

        data = load_digits()
        order = np.random.default_rng(_SEED).permutation(len(data.target))
        x, y = (data.data[order] / 16).astype(np.float32), data.target[order].astype(np.int64)
        test = np.arange(len(y)) % 5 == 0
        return cls(x[~test], y[~test], x[test], y[test])

    def batch(self, rng: np.random.Generator) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        """Draw a training batch: 128 images and their digits."""
        drawn = rng.integers(0, len(self.train_y), _BATCH)
        return self.train_x[drawn], self.train_y[drawn]


class MLP:
    """A network with one hidden layer, softmax cross-entropy, and gradients by hand."""

    def __init__(self, sizes: tuple[int, int, int], rng: np.random.Generator) -> None:
        """Draw He-initialised float32 parameters."""
        inputs, hidden, outputs = sizes
        self.parameters: Parameters = {
            "w1": (rng.normal(size=(inputs, hidden)) * np.sqrt(2 / inputs)).astype(np.float32),
            "b1": np.zeros(hidden, np.float32),
            "w2": (rng.normal(size=(hidden, outputs)) * np.sqrt(2 / hidden)).astype(np.float32),
            "b2": np.zeros(outputs, np.float32),
        }

    def logits(self, x: npt.NDArray[np.float32]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Return the hidden activations and the logits."""
        p = self.parameters
        hidden = np.maximum(x @ p["w1"] + p["b1"], 0)
        return hidden, hidden @ p["w2"] + p["b2"]

    def loss_and_gradients(self, x: npt.NDArray[np.float32], y: npt.NDArray[np.int64]) -> tuple[float, Parameters]:
        """Return the mean loss of a batch and the gradient of every parameter."""
        hidden, logits = self.logits(x)
        shifted = logits - logits.max(axis=1, keepdims=True)
        log_probabilities = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
        d_logits = np.exp(log_probabilities)
        d_logits[np.arange(len(y)), y] -= 1
        d_logits /= len(y)
        d_hidden = (d_logits @ self.parameters["w2"].T) * (hidden > 0)
        gradients = {
            "w1": x.T @ d_hidden,
            "b1": d_hidden.sum(axis=0),
            "w2": hidden.T @ d_logits,
            "b2": d_logits.sum(axis=0),
        }
        return float(-log_probabilities[np.arange(len(y)), y].mean()), gradients

    def accuracy(self, x: npt.NDArray[np.float32], y: npt.NDArray[np.int64]) -> float:
        """Return the fraction of images that are classified right."""
        return float((self.logits(x)[1].argmax(axis=1) == y).mean())


class ReferenceAdam:
    """Adam in float64, written from algorithm 1 of the paper: the reference for the server."""

    def __init__(self, parameters: Parameters, lr: float) -> None:
        """Start from copies of the parameters."""
        self.parameters = {name: value.astype(np.float64) for name, value in parameters.items()}
        self._m = {name: np.zeros_like(value) for name, value in self.parameters.items()}
        self._v = {name: np.zeros_like(value) for name, value in self.parameters.items()}
        self._lr = lr
        self._t = 0

    def step(self, gradients: Parameters) -> None:
        """Apply one update."""
        self._t += 1
        for name, gradient in gradients.items():
            g = gradient.astype(np.float64)
            self._m[name] = 0.9 * self._m[name] + 0.1 * g
            self._v[name] = 0.999 * self._v[name] + 0.001 * g * g
            m_hat = self._m[name] / (1 - 0.9**self._t)
            v_hat = self._v[name] / (1 - 0.999**self._t)
            self.parameters[name] -= self._lr * m_hat / (np.sqrt(v_hat) + 1e-8)

    def largest_difference(self, parameters: Parameters) -> float:
        """Return the largest absolute difference to other parameters."""
        return max(float(np.abs(self.parameters[name] - value).max()) for name, value in parameters.items())


@dataclasses.dataclass(frozen=True)
class DemoReport:
    """The findings of the demo.

    Attributes:
        device: the device of the optimizer state, such as "cpu".
        transport: the name of the transport, such as "shm".
        steps: the number of optimizer steps.
        steps_per_second: the speed, computation of the gradients included.
        test_accuracy: the fraction of test images that are classified right.
        largest_difference: the largest difference between a parameter and the float64 reference.
        plot: the path of the loss curves.
    """

    device: str
    transport: str
    steps: int
    steps_per_second: float
    test_accuracy: float
    largest_difference: float
    plot: str

    def text(self) -> str:
        """Return the findings as lines of text."""
        return "\n".join(
            (
                f"optimizer state on      {self.device}, reached by {self.transport}",
                f"steps                   {self.steps} ({self.steps_per_second:.0f} steps/s, gradients included)",
                f"test accuracy           {self.test_accuracy:.4f}",
                f"difference to local     {self.largest_difference:.2e} (largest, against a float64 Adam fed the "
                "same gradients)",
                f"loss curves             {self.plot}",
            )
        )


def run_demo(
    *, steps: int, output: pathlib.Path, device: str = "auto", target: str | None = None, quiet: bool = False
) -> DemoReport:
    """Train against a server in another process and report.

    Args:
        steps: the number of optimizer steps.
        output: the folder for the plot; it is made if missing, before the training.
        device: the device of the server that is started.
        target: the address of a server that runs already; None starts one.
        quiet: True leaves the progress bar out.

    Raises:
        InvalidRequestError: the folder cannot be made or written.
        StepwireError: the server failed or could not be started.
    """
    _make_folder(output)
    digits = Digits.load()
    rng = np.random.default_rng(_SEED)
    model = MLP((64, _HIDDEN, 10), rng)
    reference = ReferenceAdam(model.parameters, _LR)
    losses: list[float] = []
    test_losses: list[tuple[int, float]] = []
    with _server(target, device) as address, stepwire.connect(address) as client:
        with client.create_session(model.parameters, optimizer=stepwire.Adam(lr=_LR), label="digits demo") as session:
            device, started = session.info().device, time.perf_counter()
            for step in _progress(steps, quiet):
                loss, gradients = model.loss_and_gradients(*digits.batch(rng))
                parameters = session.step(gradients)
                assert isinstance(parameters, dict)
                model.parameters = parameters
                reference.step(gradients)
                losses.append(loss)
                if step % 25 == 0:
                    test_losses.append((step, model.loss_and_gradients(digits.test_x, digits.test_y)[0]))
            seconds = time.perf_counter() - started
            assert session.transport is not None
            transport = session.transport.name
    return DemoReport(
        device=device,
        transport=transport,
        steps=steps,
        steps_per_second=steps / seconds,
        test_accuracy=model.accuracy(digits.test_x, digits.test_y),
        largest_difference=reference.largest_difference(model.parameters),
        plot=str(_plot(losses, test_losses, output)),
    )


def _make_folder(output: pathlib.Path) -> None:
    """Make the folder of the plot, and try it: nobody trains for a result that is lost at the end."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as problem:
        raise InvalidRequestError.of(
            "output", f"{str(output)!r} cannot be written: {problem.strerror}; name another folder with --output DIR"
        ) from None


@contextlib.contextmanager
def _server(target: str | None, device: str) -> Iterator[str]:
    """Yield the address of a server: `target`, or a new server until the block ends."""
    if target is not None:
        yield target
        return
    with server_process("--device", device) as server:
        yield server.target


def _progress(steps: int, quiet: bool) -> Iterator[int]:
    columns = (
        TextColumn("training on the server's optimizer"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, disable=quiet) as progress:
        yield from progress.track(range(1, steps + 1))


def _plot(losses: list[float], test_losses: list[tuple[int, float]], output: pathlib.Path) -> pathlib.Path:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    path = (output / "digits-loss.png").resolve()
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    axes.plot(range(1, len(losses) + 1), losses, linewidth=0.8, alpha=0.7, label="training batch")
    axes.plot(*zip(*test_losses, strict=True), linewidth=2, label="test set")
    axes.set(xlabel="step", ylabel="cross-entropy", yscale="log", title="Digits MLP, Adam on a stepwire server")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=140)
    pyplot.close(figure)
    return path
