"""Write the digits, the first parameters and the batches of `digits_numpy.py` into a JSON file, for other languages.

    pip install '.[demo]'
    python examples/export_digits.py digits.json [--steps 600]

So a client in another language trains the same model on the same batches, and its losses are those of the example.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from typing import Any

import numpy as np

from digits_numpy import LR, SEED
from stepwire_server.demo import MLP, Digits

_BATCH = 128
_GREYS = 16
_SIZES = (64, 64, 10)


def contents(steps: int) -> dict[str, Any]:
    """Return the file as plain data.

    Images are lists of 64 greys from 0 to 16, which the model divides by 16. Parameters are row-major lists, in the
    order of the session's tensors, and batches are lists of indices into the training images, one a step.
    """
    digits, rng = Digits.load(), np.random.default_rng(SEED)
    model = MLP(_SIZES, np.random.default_rng(SEED))
    return {
        "lr": LR,
        "train": _images(digits.train_x, digits.train_y),
        "test": _images(digits.test_x, digits.test_y),
        "tensors": [
            {"name": name, "shape": list(value.shape), "values": value.ravel().tolist()}
            for name, value in model.parameters.items()
        ],
        "batches": [rng.integers(0, len(digits.train_y), _BATCH).tolist() for _ in range(steps)],
    }


def main() -> int:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=pathlib.Path, help="the file to write")
    parser.add_argument("--steps", type=int, default=600, help="the number of batches; default 600")
    options = parser.parse_args()
    options.file.write_text(json.dumps(contents(options.steps)))
    return 0


def _images(x: Any, y: Any) -> dict[str, Any]:
    return {"greys": (x * _GREYS).astype(int).tolist(), "digits": y.tolist()}


if __name__ == "__main__":
    sys.exit(main())
