"""Levels of processors: targets for kernels that run on machines other than the one that compiles them.

Numba compiles for the very processor it runs on, and finds a kept kernel by that processor's name. So a kernel of the
machine that built a container image is of no use on the next machine. The levels that compilers agree on (x86-64-v2 to
v4) are few enough to compile for all of them, and each processor has a highest one. Results do not differ: no kernel
depends on the width of a vector.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

__all__ = ["LEVELS", "Level", "aim", "level_of", "level_of_this_processor"]

_V2: Final = frozenset(("cx16", "popcnt", "sahf", "sse3", "sse4.1", "sse4.2", "ssse3"))
_V3: Final = _V2 | {"avx", "avx2", "bmi", "bmi2", "f16c", "fma", "lzcnt", "movbe"}
_V4: Final = _V3 | {"avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl"}


class Level(NamedTuple):
    """The abilities of a range of processors.

    Attributes:
        name: the level's name in LLVM.
        needs: the abilities of a processor of this level, by their names in LLVM.
        features: the features that LLVM is told besides the name; with an empty text Numba would use this machine's.
    """

    name: str
    needs: frozenset[str]
    features: str


LEVELS: Final = (
    Level("x86-64-v4", _V4, "-prefer-256-bit"),  # whole vectors, as in `numba_kernels.prefer_wide_vectors`
    Level("x86-64-v3", _V3, "+avx2"),
    Level("x86-64-v2", _V2, "+sse4.2"),
)
"""From the highest down."""


def level_of(features: Mapping[str, bool]) -> Level | None:
    """Return the highest level of a processor with these features; None below all of them and on other than x86-64."""
    has = {name for name, there in features.items() if there}
    return next((level for level in LEVELS if level.needs <= has), None)


def level_of_this_processor() -> Level | None:
    """Return the highest level of the processor this runs on."""
    import llvmlite.binding

    with contextlib.suppress(RuntimeError):  # LLVM does not know the processor
        return level_of(llvmlite.binding.get_host_cpu_features())
    return None


def aim(level: Level) -> None:
    """Have Numba compile for a level; for the whole process, and only before it first compiles."""
    import numba

    settings: Any = numba.config
    settings.CPU_NAME, settings.CPU_FEATURES = level.name, level.features
