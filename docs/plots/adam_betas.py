"""Draw docs/images/adam_betas.svg and print every figure that docs/adam.md quotes.

    python docs/plots/adam_betas.py

The Adam below is torch's formula written out in float64; it shares nothing with the server.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable

import matplotlib
import numpy as np
import numpy.typing as npt

matplotlib.use("svg")
# The same bytes on every run, and words as words: small, and searchable.
matplotlib.rcParams.update({"svg.hashsalt": "stepwire", "svg.fonttype": "none", "path.simplify_threshold": 1.0})

from matplotlib import pyplot  # noqa: E402  (after the backend is chosen)

Array = npt.NDArray[np.float64]
Gradient = Callable[[Array], Array]

IMAGE = pathlib.Path(__file__).parents[1] / "images" / "adam_betas.svg"
LR = 0.01
STEPS = 3_000
REST = 1_000  # the last steps of a run, where the steadiness is read off
BETA1, BETA2 = 0.9, 0.999
VARIED = {
    "beta1": [(beta1, BETA2) for beta1 in (0.0, 0.9, 0.99, 0.997)],
    "beta2": [(BETA1, beta2) for beta2 in (0.5, 0.9, 0.99, 0.999, 0.9999)],
}


def adam(gradient: Gradient, start: Array, beta1: float, beta2: float, lr: float = LR) -> Array:
    """Return the parameters before and after each of `STEPS` updates."""
    p, m, v = start, np.zeros_like(start), np.zeros_like(start)
    path = [p]
    for t in range(1, STEPS + 1):
        g = gradient(p)
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        p = p - lr * (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + 1e-8)
        path.append(p)
    return np.array(path)


# --- the two problems: paths of shape (steps + 1, runs, dimensions) -------------------------------------------


def noisy_quadratic(beta1: float, beta2: float, lr: float = LR) -> Array:
    """Descend p²/2 from 3, the gradient p + noise of standard deviation 1; 500 runs at once."""
    random = np.random.default_rng(1)
    return adam(lambda p: p + random.standard_normal(p.shape), np.full((500, 1), 3.0), beta1, beta2, lr)


def valley(beta1: float, beta2: float) -> Array:
    """Descend a quadratic of curvatures 1 and 100 along the diagonals, without noise, from 3 along and 0.3 across."""
    turn = np.sqrt(0.5) * np.array([[1.0, -1.0], [1.0, 1.0]])
    curvature = turn @ np.diag([1.0, 100.0]) @ turn.T
    return adam(lambda p: p @ curvature, (turn @ [3.0, 0.3])[None, :], beta1, beta2)


PROBLEMS = {"noisy quadratic": noisy_quadratic, "valley": valley}


def distances(path: Array) -> Array:
    """Return the distance to the optimum after each update, root mean square over the runs."""
    squares: Array = np.square(path).sum(2).mean(1)
    return np.sqrt(squares)


def first_below(distance: Array, part: float) -> int:
    """Return the first update after which no more than a part of the first distance is left."""
    return int(np.argmax(distance <= part * distance[0]))


def at_rest(path: Array) -> float:
    """Return the root mean square distance over the last steps."""
    return float(np.sqrt(np.square(distances(path)[-REST:]).mean()))


def step_length(path: Array) -> float:
    """Return the root mean square length of the updates at rest, in units of the learning rate."""
    return float(np.sqrt(np.square(np.diff(path, axis=0)[-REST:]).sum(2).mean()) / LR)


# --- figures --------------------------------------------------------------------------------------------------


def print_windows() -> None:
    """Print how far back an average looks, and what it leaves of independent noise."""
    print("beta     1/(1-beta)   weight of that window   half-life   noise left")
    for beta in (0.5, 0.9, 0.95, 0.99, 0.997, 0.999):
        window, left = round(1 / (1 - beta)), np.sqrt((1 - beta) / (1 + beta))
        print(f"{beta:<8} {window:>6} {1 - beta**window:>20.2f} {np.log(0.5) / np.log(beta):>18.1f} {left:>11.2f}")


def print_bounds() -> None:
    """Print the largest steps that a pair of betas allows, in units of the learning rate, long after the start."""
    print("\nbeta1   beta2   after zeros, one gradient   worst sequence")
    for beta1, beta2 in ((0.9, 0.9), (0.9, 0.95), (0.9, 0.99), (0.9, 0.999), (0.5, 0.999), (0.99, 0.999)):
        alone = (1 - beta1) / np.sqrt(1 - beta2)
        print(f"{beta1:<7} {beta2:<7} {alone:>12.2f} {alone / np.sqrt(1 - beta1**2 / beta2):>25.2f}")


def print_first_steps() -> None:
    """Print the first displacement of each formula with its own default eps, in units of the learning rate."""
    sizes = np.array([1.0, 1e-4, 1e-6, 1e-8])
    m, v, c1, c2 = (1 - BETA1) * sizes, (1 - BETA2) * sizes**2, 1 - BETA1, 1 - BETA2
    ahead = BETA1 * m / (1 - BETA1**2) + (1 - BETA1) * sizes / c1
    first = {
        "torch, decay_after": m / c1 / (np.sqrt(v) / np.sqrt(c2) + 1e-8),
        "optax": m / c1 / (np.sqrt(v / c2) + 1e-8),
        "optax, nesterov": ahead / (np.sqrt(v / c2) + 1e-8),
        "keras": np.sqrt(c2) / c1 * m / (np.sqrt(v) + 1e-7),
        "keras, eps=1e-8": np.sqrt(c2) / c1 * m / (np.sqrt(v) + 1e-8),
        "no_bias_correction": m / (np.sqrt(v) + 1e-6),
    }
    print(f"\nat t = 1: sqrt(c2) = {np.sqrt(c2):.3f}, 1 / sqrt(c2) = {1 / np.sqrt(c2):.1f}")
    print("first step            " + "".join(f"|g| = {size:<10g}" for size in sizes))
    for name, values in first.items():
        print(f"{name:<22}" + "".join(f"{value:<16.4f}" for value in values))


def print_no_memory() -> None:
    """Print the steps of betas of 0 in float32, in units of the learning rate: g / (√g² + eps)."""
    sizes = np.array([1.0, 1e-6, 1e-8, 1e-10, 1e-22, 1e-23], np.float32)
    print("\nbeta1 = beta2 = 0     " + "".join(f"|g| = {size:<10g}" for size in sizes))
    with np.errstate(all="ignore"):
        for eps in (1e-8, 0.0):
            steps = sizes / (np.sqrt(sizes * sizes) + np.float32(eps))
            print(f"eps = {eps:<16g}" + "".join(f"{step:<16.3g}" for step in steps))


def print_no_bias_correction() -> None:
    """Print its steps for a constant gradient, in units of the learning rate."""
    t = np.arange(1, 10_001)
    steps = (1 - BETA1**t) / np.sqrt(1 - BETA2**t)
    print(f"\nno_bias_correction, constant gradient: largest {steps.max():.2f} at t = {t[steps.argmax()]}")
    print(", ".join(f"{steps[at - 1]:.2f} at t = {at}" for at in (1, 10, 100, 1_000, 5_000)))


def print_amsgrad() -> None:
    """Print 100 steps after one gradient of 1 and then 0.1 for ever, in units of the learning rate."""
    m = v = raw = corrected = 0.0
    ways = dict.fromkeys(("none", "raw", "corrected"), 0.0)
    for t in range(1, 101):
        g = 1.0 if t == 1 else 0.1
        m, v = BETA1 * m + (1 - BETA1) * g, BETA2 * v + (1 - BETA2) * g * g
        c1, c2 = 1 - BETA1**t, 1 - BETA2**t
        raw, corrected = max(raw, v), max(corrected, v / c2)
        for name, square in (("none", v / c2), ("raw", raw / c2), ("corrected", corrected)):
            ways[name] += m / c1 / np.sqrt(square)
    print("\nAMSGrad, way of 100 steps: " + ", ".join(f"{name} {way:.1f}" for name, way in ways.items()))


def print_runs(paths: dict[tuple[str, str, float, float], Array]) -> None:
    """Print speed and steadiness of every curve."""
    print(f"\nlr = {LR}; steps to a tenth of the way, distance at step 500, and over the last {REST} steps:")
    print(f"{'problem':<16} {'beta1':<6} {'beta2':<7} tenth   at 500   distance  largest   step length / lr")
    for (problem, _, beta1, beta2), path in paths.items():
        distance, rest = distances(path), at_rest(path)
        print(
            f"{problem:<16} {beta1:<6} {beta2:<7} {first_below(distance, 0.1):>5} {distance[500]:>8.3f} {rest:>10.2g}"
            f" {distance[-REST:].max():>9.2g} {step_length(path):>9.2g}"
        )


def print_learning_rates() -> None:
    """Print where the noisy quadratic comes to rest under other learning rates."""
    print("\nnoisy quadratic at rest: ", end="")
    print(
        ", ".join(f"{at_rest(noisy_quadratic(BETA1, BETA2, lr)):.3f} with lr = {lr}" for lr in (0.005, LR, 0.02, 0.04))
    )


# --- the plot -------------------------------------------------------------------------------------------------


def draw(paths: dict[tuple[str, str, float, float], Array]) -> None:
    """Draw distance over steps: a row for each problem, a column for each beta; the legend says what is left."""
    figure, axes = pyplot.subplots(2, 2, figsize=(10, 6.6), sharex=True, sharey="row", layout="constrained")
    shown = np.arange(0, STEPS + 1, 12)
    for row, problem in enumerate(PROBLEMS):
        for column, (varied, pairs) in enumerate(VARIED.items()):
            panel, fixed = axes[row, column], f"β2 = {BETA2}" if varied == "beta1" else f"β1 = {BETA1}"
            for index, (beta1, beta2) in enumerate(pairs):
                path = paths[problem, varied, beta1, beta2]
                usual = (beta1, beta2) == (BETA1, BETA2)
                panel.semilogy(
                    shown,
                    distances(path)[shown],
                    color=pyplot.get_cmap("viridis")(0.95 * index / len(pairs)),
                    linewidth=2.2 if usual else 1.2,
                    label=label(varied, beta1 if varied == "beta1" else beta2, problem, path),
                )
            panel.set_title(f"{problem}, {fixed}", fontsize=10)
            panel.legend(fontsize=8, loc="lower left" if problem == "valley" else "upper right")
            panel.grid(alpha=0.25)
    axes[1, 0].set_ylim(bottom=1e-7)
    for panel in axes[:, 0]:
        panel.set_ylabel("distance to the optimum")
    for panel in axes[-1]:
        panel.set_xlabel(f"updates (lr = {LR})")
    IMAGE.parent.mkdir(exist_ok=True)
    figure.savefig(IMAGE, metadata={"Date": None, "Creator": None})
    pyplot.close(figure)


def label(varied: str, value: float, problem: str, path: Array) -> str:
    """Say what a curve is, and how steady it ends."""
    if problem == "valley":
        return f"{'β1' if varied == 'beta1' else 'β2'} = {value:g}, ends within {distances(path)[-REST:].max():.1g}"
    return f"{'β1' if varied == 'beta1' else 'β2'} = {value:g}, steps at rest {step_length(path):.2f} lr"


def main() -> None:
    """Print and draw everything."""
    print_windows()
    print_bounds()
    print_first_steps()
    print_no_memory()
    print_no_bias_correction()
    print_amsgrad()
    paths = {
        (problem, varied, beta1, beta2): run(beta1, beta2)
        for problem, run in PROBLEMS.items()
        for varied, pairs in VARIED.items()
        for beta1, beta2 in pairs
    }
    print_runs(paths)
    print_learning_rates()
    draw(paths)
    print(f"\n{IMAGE.name}: {IMAGE.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
