"""A training program on a host of its own: it makes a step for each line that it reads, and prints the digest."""

from __future__ import annotations

import hashlib
import json
import sys
from typing import Any, Final

import numpy as np

import stepwire

__all__ = ["SHARDS", "START", "digest_of", "gradients", "options_of"]

SHARDS: Final = 4
_ELEMENTS: Final = 20_000
START: Final = {f"w{index}": np.linspace(-1.0, 1.0, _ELEMENTS, dtype=np.float32) for index in range(SHARDS)}


def gradients(step: int) -> dict[str, Any]:
    chance = np.random.default_rng(step)
    return {name: chance.standard_normal(_ELEMENTS).astype(np.float32) for name in START}


def digest_of(reply: dict[str, Any]) -> str:
    return hashlib.sha256(b"".join(reply[name].tobytes() for name in START)).hexdigest()


def options_of(durability: str) -> dict[str, Any]:
    """Return the options of the session: its shards decide together, by the norm of the whole gradient."""
    return {"optimizer": stepwire.Adam(lr=0.1), "clip_grad_norm": 1.0, "durability": durability, "request_id": "job"}


def main() -> None:
    target, durability = json.loads(sys.argv[1]), sys.argv[2]
    with stepwire.connect(target, timeout=120.0, transport="tcp") as client:
        session: Any = client.create_session(START, **options_of(durability))
        print("ready", flush=True)
        for step, _ in enumerate(sys.stdin):
            reply = session.step(gradients(step))
            print(json.dumps([session.applied_step, digest_of(reply)]), flush=True)


if __name__ == "__main__":
    main()
