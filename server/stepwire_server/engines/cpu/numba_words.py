"""Words in memory that compiled loops and Python change one after the other, and memory by its address."""

from __future__ import annotations

from typing import Any, Final

import llvmlite.ir as ir
import numba.core.types as numba_types
from numba.core import cgutils
from numba.core.imputils import impl_ret_borrowed
from numba.extending import intrinsic

__all__ = ["as_source", "as_target", "exchange", "pointer", "publish"]

_WORD: Final = ir.IntType(64)
_ORDER: Final = "seq_cst"
borrowed: Any = impl_ret_borrowed


@intrinsic
def pointer(typing: Any, address: Any) -> Any:
    """Return an address, int64, as the pointer that `carray` takes."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return numba_types.voidptr(numba_types.int64), generate


@intrinsic
def exchange(typing: Any, address: Any, expected: Any, value: Any) -> Any:
    """Put a value in the place of the expected one, atomically; return False where another one is there."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = builder.inttoptr(arguments[0], _WORD.as_pointer())
        return builder.extract_value(builder.cmpxchg(place, *arguments[1:], _ORDER, _ORDER), 1)

    return numba_types.boolean(numba_types.int64, numba_types.int64, numba_types.int64), generate


@intrinsic
def publish(typing: Any, address: Any, value: Any) -> Any:
    """Store a value, after everything that was written before."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = builder.inttoptr(arguments[0], _WORD.as_pointer())
        builder.store_atomic(arguments[1], place, _ORDER, 8)
        return context.get_dummy_value()

    return numba_types.void(numba_types.int64, numba_types.int64), generate


def _unaligned(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    return borrowed(context, builder, signature.return_type, arguments[0])


@intrinsic
def as_source(typing: Any, array: Any) -> Any:
    """Return an array as kernels read a gradient: nothing is known of its alignment."""
    return numba_types.Array(array.dtype, 1, "C", readonly=True, aligned=False)(array), _unaligned


@intrinsic
def as_target(typing: Any, array: Any) -> Any:
    """Return an array as kernels write a reply: nothing is known of its alignment."""
    return numba_types.Array(array.dtype, 1, "C", aligned=False)(array), _unaligned
