"""The text of the modules that Numba compiles: codecs + stages + loop, in one file each.

A rule's function is the only source of its formula. `numba_module` tells why the function is written out.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from stepwire_server.engines import int8_moments as dynamic_code
from stepwire_server.engines import scalar_codecs as numba_codecs
from stepwire_server.engines import stochastic_rounding as rounding
from stepwire_server.engines.compiled.rule_source import functions_of_stages
from stepwire_server.engines.cpu.numba_module import (
    BLOCKWISE,
    WHOLE,
    codec_of,
    gradient_scratch,
    gradient_value,
    gradient_view,
    lines_of,
    module_of,
    view_of,
)
from stepwire_server.engines.cpu.numba_telemetry import keep_block, kept_arrays, sums_of_element, totals_of_block
from stepwire_server.rules import ACCUMULATED, EIGHT_BIT_SLOTS, Precision, Recipe, Stage
from stepwire_server.rules.treatment import added, scaled

__all__ = [
    "accumulate_source",
    "arrays_of",
    "element_body",
    "measure_source",
    "seeds_of",
    "sum_source",
    "update_source",
]

_BLOCK_CODECS = (
    "decode_signed decode_unsigned magnitude absmax_of scale_of fill_of encode_signed encode_unsigned".split()
)

_UPDATE = """def {name}({arguments}):
    {casts}
    {views}
    for i in range(size):
        {body}
"""

# Some elements at a time, for work before or after the loop over them. A gradient in blocks is decoded into scratch
# that stays in the first-level cache. So the loop over the elements is that of float32 and vectorises like it.
#
# `numba_telemetry` has the sums of telemetry. Their order is free, because no state depends on them. `fastmath` of the
# decorator allows a reordering of the kernel's own additions; the stages are functions of their own, compiled without.
_BLOCKWISE_UPDATE = """def {name}({arguments}):
    {casts}
    {scratch}
    for low in range(0, size, 4096):
        high = min(low + 4096, size)
        {zeros}
        {views}
        {kept}
        for i in range(high - low):
            {body}
        {totals}
"""

# Two loops a block of 256: the code of an element depends on the largest of its block. The scratch stays in cache.
_BLOCK_UPDATE = """def {name}({arguments}):
    {casts}
    {scratch}
    for low in range(0, size, 256):
        high = min(low + 256, size)
        block = (start + low) // 256
        {zeros}
        {views}
        {kept}
        {scales}
        for i in range(high - low):
            {body}
        {maxima}
        for i in range(high - low):
            {codes}
        {totals}
"""

# Element i of a block goes into lane i mod 1024. Lane j of 1024 goes into lane j mod 32 in order, and the 32 are added
# in order. So any element is rounded at most 128 times, which `exact_norm` relies on, and the bits are the same on any
# processor. On a GPU each lane is a thread. `fastmath` is no faster: memory is the limit.
_SUM = """def {name}({arguments}):
    {casts}
    {lanes}
    for block_low in range(first, first + size, block):
        block_high = min(block_low + block, first + size)
        {clear}
        for low in range(block_low, block_high, 1024):
            high = min(low + 1024, block_high)
            {views}
            for i in range(high - low):
                {body}
            {additions}
        {folds}
"""

_FOLD = """for term in range(1, 32):
            for lane in range(32):
                lanes_{k}[lane] += lanes_{k}[term * 32 + lane]
        total = lanes_{k}[0]
        for lane in range(1, 32):
            total += lanes_{k}[lane]
        partials[{k}, block_low // block] = total"""


class _Squares(NamedTuple):
    """The work of a kernel that sums the squares of some float32 arrays.

    Attributes:
        arrays: the names of the arrays of the state.
        gradient: the name of the gradient's wire dtype.
        scalars: the names of the numbers that the body needs.
        body: the statements for element i.
        squared: the numbers of element i whose squares are summed.
        costly: the body is slow with the few elements at a time that float64 allows, so that a loop of its own pays;
            else one loop does all, for memory is idle while a second one adds.
    """

    arrays: Sequence[str]
    gradient: str
    scalars: Sequence[str]
    body: Sequence[str]
    squared: Sequence[str]
    costly: bool


def update_source(recipe: Recipe, name: str, gradient: str, reply: str | None) -> str:
    """Write the module with the fused kernel `name`; `NumbaKernels.update` has its arguments."""
    arrays = arrays_of(recipe)
    numbers = [*seeds_of(recipe), *recipe.scalars]
    arguments = [*arrays, "gradient", "out", "start", "begin", "first", "size"]
    arguments += ["sums", *numbers] if recipe.measures else numbers
    blockwise = recipe.measures or gradient == "int8"
    text, indent, at = (_BLOCKWISE_UPDATE, 12, BLOCKWISE) if blockwise else (_UPDATE, 8, WHOLE)
    if in_blocks := [recipe.slots[slot] for slot in recipe.rule.slots if recipe.precision is Precision.INT8]:
        text, indent, at = _BLOCK_UPDATE, 12, BLOCKWISE
    views = [view_of(array, "start", at) for array in arrays if not array.endswith("_absmax")]
    views += [gradient_view(gradient, at), *([view_of("out", "first", at)] if reply is not None else [])]
    count = 256 if in_blocks else 4096
    scratch = [f"{variable}_new = empty(256, float32)" for variable in in_blocks] + kept_arrays(recipe, count)
    treated = [f"g = {gradient_value(gradient)}", *map(_call, recipe.treatment)]
    kernel = text.format(
        name=name,
        arguments=", ".join(arguments),
        casts=lines_of([f"{seed} = uint32({seed})" for seed in seeds_of(recipe)] + _casts(recipe.scalars), 4),
        scratch=lines_of(scratch + gradient_scratch(gradient, count), 4),
        scales=lines_of([_opened(variable) for variable in in_blocks], 8),
        maxima=lines_of([_closed(recipe, slot) for slot in recipe.rule.slots if in_blocks], 8),
        codes=lines_of([_coded(recipe, slot) for slot in recipe.rule.slots if in_blocks], 12),
        zeros=lines_of([f"sum_{total} = float32(0.0)" for total in recipe.sums], 8),
        views=lines_of(views, indent - 4),
        kept=lines_of(keep_block(recipe), 8),
        body=lines_of(element_body(recipe, gradient, reply) + sums_of_element(recipe), indent),
        totals=lines_of(totals_of_block(recipe, treated), 8),
    )
    codecs = [codec_of("decode", gradient), *([codec_of("encode", reply)] if reply is not None else [])]
    functions: list[Callable[..., Any]] = [*codecs, *_slot_codecs(recipe), *functions_of_stages(recipe.stages)]
    return module_of(name, functions, kernel, "measuring_kernel" if recipe.measures else "kernel")


def sum_source(name: str, gradient: str, accumulated: bool) -> str:
    """Write the module with the kernel `name`; `NumbaKernels.sum_of_squares` has its arguments."""
    value = f"scaled({gradient_value(gradient)}, factor)"
    value = f"added({value}, accumulated_now[i])" if accumulated else value
    costly = gradient not in {"float32", "bfloat16"}
    functions: list[Callable[..., Any]] = [codec_of("decode", gradient), scaled, added]
    arrays = ["accumulated_all"] if accumulated else []
    return _summing(name, _Squares(arrays, gradient, ("factor",), [f"value = {value}"], ["value"], costly), functions)


def measure_source(recipe: Recipe, name: str, gradient: str) -> str:
    """Write the module with the kernel `name`; `NumbaKernels.measure` has its arguments."""
    stages = recipe.direction_stages
    loads = _loads(recipe, gradient, "{}_absmax[(start + low + i) // 256]")
    body = [*loads, *(_call(stage) for stage in stages)]
    functions: list[Callable[..., Any]] = [
        codec_of("decode", gradient),
        *_slot_codecs(recipe),
        *functions_of_stages(stages),
    ]
    work = _Squares(arrays_of(recipe), gradient, recipe.scalars[:-1], body, ["p_now[i]", "u"], costly=True)
    return _summing(name, work, functions)


def accumulate_source(name: str, gradient: str) -> str:
    """Write the module with the kernel `name`; `NumbaKernels.accumulate` has its arguments."""
    text, indent, at = (_BLOCKWISE_UPDATE, 8, BLOCKWISE) if gradient == "int8" else (_UPDATE, 4, WHOLE)
    kernel = text.format(
        name=name,
        arguments="accumulated_all, gradient, start, begin, size, factor",
        casts=lines_of(_casts(["factor"]), 4),
        scratch=lines_of(gradient_scratch(gradient, 4096), 4),
        zeros="",
        views=lines_of([view_of("accumulated_all", "start", at), gradient_view(gradient, at)], indent),
        kept="",
        body=f"accumulated_now[i] = added(scaled({gradient_value(gradient)}, factor), accumulated_now[i])",
        totals="",
    )
    functions: list[Callable[..., Any]] = [codec_of("decode", gradient), scaled, added]
    return module_of(name, functions, kernel)


def seeds_of(recipe: Recipe) -> list[str]:
    """Name the seeds of stochastic rounding: one for each of the rule's slots."""
    return [f"seed_{recipe.slots[slot]}" for slot in recipe.rule.slots if _rounds(recipe, slot)]


def _summing(name: str, work: _Squares, functions: Iterable[Callable[..., Any]]) -> str:
    """Write a module with a kernel that sums the squares of some float32 arrays, in a fixed order."""
    arrays, gradient, scalars, body, squared, costly = work
    windowed = [array for array in arrays if array.endswith("_all")]
    views = [*(view_of(array, "start", BLOCKWISE) for array in windowed), gradient_view(gradient, BLOCKWISE)]
    scratch = gradient_scratch(gradient, 1024)
    if costly:
        scratch += [f"values_{k} = empty(1024, float32)" for k in range(len(squared))]
        body = [*body, *(f"values_{k}[i] = {value}" for k, value in enumerate(squared))]
        squared = [f"values_{k}[i]" for k in range(len(squared))]
    additions = [f"lanes_{k}[i] += float64({value}) * float64({value})" for k, value in enumerate(squared)]
    if not costly:
        body, additions = [*body, *additions], []
    kernel = _SUM.format(
        name=name,
        arguments=", ".join([*arrays, "gradient", "start", "begin", "first", "size", "block", "partials", *scalars]),
        casts=lines_of(_casts(scalars), 4),
        lanes=lines_of([*scratch, *(f"lanes_{k} = zeros(1024)" for k in range(len(squared)))], 4),
        clear=lines_of([f"lanes_{k}[:] = 0.0" for k in range(len(squared))], 8),
        views=lines_of(views, 12),
        body=lines_of(body, 16),
        additions=lines_of([f"for i in range(high - low):\n                {each}" for each in additions], 12),
        folds=lines_of([_FOLD.format(k=k) for k in range(len(squared))], 8),
    )
    return module_of(name, functions, kernel)


def arrays_of(recipe: Recipe) -> list[str]:
    """Name the arrays of the state that an update has as its first arguments."""
    arrays = ["p_all"]
    for slot, variable in recipe.slots.items():
        arrays += [f"{variable}_all", *([f"{variable}_absmax"] if _in_blocks(recipe, slot) else [])]
    return arrays


def _opened(variable: str) -> str:
    return f"{variable}_scale, {variable}_largest = {variable}_absmax[block], uint32(0)"


def _closed(recipe: Recipe, slot: str) -> str:
    name, most = recipe.slots[slot], dynamic_code.most_of(EIGHT_BIT_SLOTS[slot])
    return f"""{name}_scale = absmax_of({name}_largest, uint32({most:#x}))
        {name}_absmax[block] = {name}_scale
        {name}_scale, {name}_fill = scale_of({name}_scale), fill_of({name}_largest)"""


def _coded(recipe: Recipe, slot: str) -> str:
    name = recipe.slots[slot]
    return f"{name}_now[i] = encode_{_sign(slot)}({name}_new[i], {name}_scale, {name}_fill)"


def _sign(slot: str) -> str:
    return "signed" if EIGHT_BIT_SLOTS[slot] else "unsigned"


def element_body(recipe: Recipe, gradient: str, reply: str | None) -> list[str]:
    """Write the statements of an update for element i of the views: loads, stages, stores, the reply.

    A recipe that measures leaves the parameter as it was in `before`, and the clipped gradient in `treated`.
    """
    calls = [_call(stage) for stage in recipe.stages]
    if recipe.measures:
        calls.insert(len(recipe.treatment), "treated = g")
    body = [*_loads(recipe, gradient), *(["before = p"] if recipe.measures else []), *calls, *_stores(recipe)]
    return body + ([f"out_now[i] = encode_{reply}(p)"] if reply is not None else [])


def _loads(recipe: Recipe, gradient: str, scale: str = "{}_scale") -> list[str]:
    loads = ["p = p_now[i]", f"g = {gradient_value(gradient)}"]
    for slot, variable in recipe.slots.items():
        value = f"{variable}_now[i]"
        if _rounds(recipe, slot):
            value = f"decode_bfloat16({value})"
        elif _in_blocks(recipe, slot):
            value = f"decode_{_sign(slot)}({value}, {scale.format(variable)})"
        loads.append(f"{variable} = {value}")
    return loads


def _stores(recipe: Recipe) -> list[str]:
    stores = ["p_now[i] = p"]
    for slot, variable in recipe.slots.items():
        value = "float32(0.0)" if slot == ACCUMULATED else variable
        if _rounds(recipe, slot):
            value = f"encode_bfloat16_stochastic({variable}, seed_{variable})"
        if _in_blocks(recipe, slot):
            stores.append(f"{variable}_new[i] = {variable}")
            stores.append(f"{variable}_largest = max({variable}_largest, magnitude({variable}))")
        else:
            stores.append(f"{variable}_now[i] = {value}")
    return stores


def _rounds(recipe: Recipe, slot: str) -> bool:
    return recipe.precision is Precision.BFLOAT16 and slot in recipe.rule.slots


def _in_blocks(recipe: Recipe, slot: str) -> bool:
    return recipe.precision is Precision.INT8 and slot in recipe.rule.slots


def _slot_codecs(recipe: Recipe) -> list[Callable[..., Any]]:
    if recipe.precision is Precision.BFLOAT16:
        return [numba_codecs.decode_bfloat16, rounding.encode_bfloat16_stochastic]
    if recipe.precision is Precision.INT8:
        return [getattr(dynamic_code, name) for name in _BLOCK_CODECS]
    return []


def _casts(scalars: Iterable[str]) -> list[str]:
    return [f"{scalar} = float32({scalar})" for scalar in scalars]


def _call(stage: Stage) -> str:
    results = ", ".join(stage.results)
    if inspect.signature(stage.function).return_annotation.startswith("tuple[") and len(stage.results) == 1:
        results += ","
    return f"{results} = {stage.function.__name__}({', '.join(stage.arguments)})"
