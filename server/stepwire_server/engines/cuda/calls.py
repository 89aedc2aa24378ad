"""Calls of kernels with the arguments that stay the same from range to range. Unverified on a GPU.

A step calls a kernel for every piece of its gradient and its reply. Names, scalars, seeds and grids are made once, and
a piece costs little more than its addresses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from stepwire.wire.int8_blocks import INT8
from stepwire_server.engines.cuda.kernels import head_of
from stepwire_server.engines.cuda.resources import CudaResources
from stepwire_server.engines.protocol import Pass
from stepwire_server.engines.stochastic_rounding import seeds_for
from stepwire_server.rules import Precision, Recipe

__all__ = ["UpdateCall"]


class UpdateCall:
    """A pass's fused kernel for ranges that are held alike.

    Attributes:
        rows: the number of sums that the kernel leaves for each block of threads.
    """

    __slots__ = ("_itemsizes", "_kernel", "_key", "_numbers", "_recipe", "_step", "_tables", "rows")

    def __init__(
        self,
        resources: CudaResources,
        step: Pass,
        precision: Precision | None,
        gradient: np.dtype[Any],
        reply: np.dtype[Any] | None,
    ) -> None:
        """Prepare a call.

        Args:
            resources: the resources of the device.
            step: the arithmetic.
            precision: the precision of the range's moments; None for a rule without any.
            gradient: the dtype of the gradient.
            reply: the dtype of the reply; None for no reply.
        """
        recipe = step.recipe if precision is None else step.recipe.held(precision)
        rounds, in_blocks = recipe.precision is Precision.BFLOAT16, recipe.precision is Precision.INT8
        seeds = seeds_for(step.seed, len(recipe.rule.slots)) if rounds else ()
        self.rows = len(recipe.sums)
        self._step, self._recipe = step, recipe
        self._key = (precision, gradient, reply)
        self._kernel = resources.kernels.update(recipe, gradient, reply)
        self._numbers = (*map(np.uint32, seeds), *map(np.float32, step.scalars))
        self._tables = (resources.tables_address,) if in_blocks else ()
        self._itemsizes = None if in_blocks else _itemsizes(recipe, gradient, reply)

    def serves(
        self, step: Pass, precision: Precision | None, gradient: np.dtype[Any], reply: np.dtype[Any] | None
    ) -> bool:
        """Tell whether this is the call for a range."""
        return self._step is step and self._key == (precision, gradient, reply)

    def blocks(self, size: int) -> int:
        """Return the blocks of threads for some elements."""
        return self._kernel.blocks_of(self._recipe, size)

    def launch(self, addresses: Sequence[int], place: tuple[int, ...], size: int, sums: tuple[int, ...] = ()) -> None:
        """Run in a thread whose device is current.

        Args:
            addresses: the addresses of the parameters, the slots, the gradient and the reply.
            place: for a gradient in blocks, the place of the first element in its block.
            size: the number of elements.
            sums: the address of the sums, where the kernel leaves any.
        """
        head = 0 if self._itemsizes is None else head_of(addresses, self._itemsizes, size)
        self._kernel.launch(
            self._kernel.blocks_of(self._recipe, size),
            (*addresses, *sums, *self._tables, size, head, *place, *self._numbers),
        )


def _itemsizes(recipe: Recipe, gradient: np.dtype[Any], reply: np.dtype[Any] | None) -> list[int]:
    """Return the bytes of an element in each array; codes of a gradient in blocks lie byte by byte."""
    rounded = recipe.rule.slots if recipe.precision is Precision.BFLOAT16 else ()
    sizes = [4, *(2 if slot in rounded else 4 for slot in recipe.slots), 1 if gradient == INT8 else gradient.itemsize]
    return sizes if reply is None else [*sizes, reply.itemsize]
