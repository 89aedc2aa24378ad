"""CUDA C from a recipe's Python functions: decode + stages + encode in one kernel, and what else an engine runs."""

from __future__ import annotations

from stepwire_server.engines.compiled.rule_source import functions_of_stages
from stepwire_server.engines.cuda.source.blocks import BlockPass, block_kernel, encoded
from stepwire_server.engines.cuda.source.dynamic_code import DYNAMIC_CODE, shared_tables
from stepwire_server.engines.cuda.source.memory import STORED, Array, decoder, gradient_array
from stepwire_server.engines.cuda.source.module import Kernel
from stepwire_server.engines.cuda.source.passes import (
    FlatPass,
    SummingPass,
    element_call,
    element_function,
    flat_kernel,
    places,
    store_sums,
    summing_kernel,
)
from stepwire_server.engines.cuda.source.printer import print_call
from stepwire_server.engines.numpy_reference import measured_slots
from stepwire_server.rules import ACCUMULATED, EIGHT_BIT_SLOTS, Precision, Recipe

__all__ = [
    "element_arrays",
    "element_body",
    "is_crowded",
    "measure_kernel",
    "resident_in_blocks",
    "update_kernel",
]

_TABLES = "const unsigned int *__restrict__ tables"


def update_kernel(recipe: Recipe, gradient: str, reply: str | None) -> Kernel:
    """Write the fused kernel of a recipe, a gradient's dtype and a reply's; None stands for no reply.

    The kernel's arguments are, in order:

    - pointers to the parameters, the recipe's slots, the gradient and the reply, each at the first element of the range
    - a pointer to the float64 sums of each block of threads, one row a sum, where the recipe measures
    - for 8 bits, the tables of `eight_bit_tables`
    - the size as int64
    - the head as int64; of no effect for 8 bits
    - for a gradient in blocks, the place of the first element in its block as int64
    - a seed as uint32 for each slot held as bfloat16
    - the recipe's scalars as float32

    A slot in 8 bits has two pointers, to codes and to maxima, and the range then starts at a block. The head is the
    number of elements before the first that is aligned in all arrays, at most 3, or the size without such an element.

    The pointer of a gradient in blocks ("int8") is that of the first element's code; blocks start at multiples of four
    bytes.
    """
    name = f"{recipe.name}_{gradient}_to_{reply or 'nothing'}"
    functions = tuple(functions_of_stages(recipe.stages))
    if recipe.precision is Precision.INT8:
        return _update_in_blocks(recipe, Kernel(name, "", functions), gradient, reply)
    arrays = element_arrays(recipe, gradient, reply)
    numbers = [f"unsigned int seed_{variable}" for slot, variable in recipe.slots.items() if _rounds(recipe, slot)]
    numbers += [f"float {scalar}" for scalar in recipe.scalars]
    work = FlatPass(
        arrays, element_body(recipe, gradient, reply), numbers, functions, _totals(recipe), crowded=is_crowded(recipe)
    )
    return flat_kernel(name, work)


def is_crowded(recipe: Recipe) -> bool:
    """Tell whether an update that measures nothing spilled registers: of bfloat16 moments beside two more arrays."""
    return recipe.precision is Precision.BFLOAT16 and recipe.accumulates and recipe.averages


def resident_in_blocks(recipe: Recipe, gradient: str) -> int:
    """Return the blocks of threads that the registers of an update of 8-bit moments are bounded for.

    Two groups of moments wait in registers for their maximum. With a third array beside them, or with a decoded
    gradient, 64 registers spilled somewhere from Turing to Blackwell; with everything at once 80 spilled too.
    """
    if recipe.accumulates and recipe.averages and recipe.measures:
        return 2
    return 3 if recipe.accumulates or recipe.averages or gradient == "int8" else 4


def measure_kernel(recipe: Recipe, gradient: str) -> Kernel:
    """Write the kernel that squares the parameters and a layerwise rule's direction.

    The kernel's arguments are, in order:

    - pointers to the parameters, `measured_slots` and the gradient; a slot in 8 bits has two, as in `update_kernel`
    - a pointer to the float64 sums of each `GRAIN` elements, first all those of the parameters
    - for 8 bits, the tables of `eight_bit_tables`
    - the size as int64
    - for a gradient in blocks, the place of the first element in its block as int64
    - the recipe's scalars but the last as float32
    """
    slots, body = measured_slots(recipe), [f"float p = ps[k], u, g = {decoder(gradient)}(gradients[k]);"]
    arrays, pointers = [Array("p", "float")], ["const float *__restrict__ p_all"]
    for slot in slots:
        array, maxima, value = _measured(recipe, slot)
        arrays.append(array)
        pointers += [array.pointer, *maxima]
        body.append(f"float {recipe.slots[slot]} = {value};")
    arrays.append(gradient_array(gradient))
    pointers += [arrays[-1].pointer, "double *__restrict__ partials"]
    tables = sorted({f"{_sign(slot)}_map" for slot in slots if _in_blocks(recipe, slot)})
    work = SummingPass(
        arrays,
        [*body, *map(print_call, recipe.direction_stages)],
        ("p", "u"),
        [f"float {scalar}" for scalar in recipe.scalars[:-1]],
        tuple(functions_of_stages(recipe.direction_stages)),
        [*pointers, _TABLES] if tables else pointers,
        shared_tables(tables) if tables else (),
        rows=1,
    )
    kernel = summing_kernel(f"measure_{recipe.name}_{gradient}", work)
    return kernel._replace(preludes=(*kernel.preludes, DYNAMIC_CODE)) if tables else kernel


def _update_in_blocks(recipe: Recipe, kernel: Kernel, gradient: str, reply: str | None) -> Kernel:
    """Write the update of 8-bit moments: decode, the arithmetic as for float32, encode."""
    plain, sums = element_arrays(recipe.in_float32, gradient, reply), _totals(recipe)
    numbers = [f"float {scalar}" for scalar in recipe.scalars]
    signs = {recipe.slots[slot]: _sign(slot) for slot in recipe.slots if _in_blocks(recipe, slot)}
    codes = {variable: Array(f"{variable}_code", "unsigned char", written=True) for variable in signs}
    group, closing, parameters = [], [], []
    for array in plain:
        if (variable := array.variable) not in signs:
            parameters.append(array.pointer)
            continue
        parameters += [codes[variable].pointer, f"float *__restrict__ {variable}_absmax"]
        group.append(f"float *{variable}s = {variable}_kept + 4 * group;")
        group.append(f"decode_group({variable}_codes, {variable}_absmax[block], {signs[variable]}_map, {variable}s);")
        kept = f"{variable}_kept"
        closing.append(f"clear_rest({kept}, count);")
        closing.append(
            encoded(signs[variable], kept, f"largest_of({kept})", f"{variable}_code_all", f"{variable}_absmax")
        )
    parameters += ["double *__restrict__ sums"] if sums else []
    parameters += [_TABLES, "long long size", "long long head", *places(plain), *numbers]
    text = element_function(kernel.name, plain, element_body(recipe.in_float32, gradient, reply), sums, numbers)
    work = BlockPass(
        [array for array in plain if array.variable not in signs],
        [f"{sign}_{kind}" for sign in signs.values() for kind in ("map", "steps")],
        [*group, *_each_of_four(kernel.name, plain, sums, numbers)],
        [f"float {variable}_kept[8];" for variable in signs],
        closing,
        list(codes.values()),
        [f"Squares {total} = {{}};" for total in sums],
        store_sums(sums),
        resident_in_blocks(recipe, gradient),
    )
    return block_kernel(kernel._replace(text=text), parameters, work)


def _each_of_four(name: str, arrays: list[Array], sums: list[str], numbers: list[str]) -> list[str]:
    """Write the loop over a group; elements past the end are computed like any other, and add to no sum."""
    call = element_call(name, arrays, [f"next_{total}" for total in sums], numbers)
    lines = [f"    Squares next_{total} = {total};" for total in sums] + [f"    {call}"]
    lines += [f"    {total} = place(4 * group + k) < count ? next_{total} : {total};" for total in sums]
    return ["#pragma unroll", "for (int k = 0; k < 4; ++k) {", *lines, "}"]


def element_arrays(recipe: Recipe, gradient: str, reply: str | None) -> list[Array]:
    """Return the arrays that an update goes through: the parameters, the slots, the gradient and the reply."""
    arrays = [Array("p", "float", written=True)]
    for slot, variable in recipe.slots.items():
        held = Array(f"{variable}_half", "unsigned short", written=True)
        arrays.append(held if _rounds(recipe, slot) else Array(variable, "float", written=True))
    arrays.append(gradient_array(gradient))
    return arrays if reply is None else [*arrays, Array("out", STORED[reply], read=False, written=True)]


def element_body(recipe: Recipe, gradient: str, reply: str | None) -> list[str]:
    """Write what the kernel does to the variables of one element, whose moments are float32 or bfloat16."""
    calls = [print_call(stage) for stage in recipe.stages]
    if "gradient" in recipe.sums:
        calls.insert(len(recipe.treatment), "const float treated = g;")
    halves = [variable for slot, variable in recipe.slots.items() if _rounds(recipe, slot)]
    body = [f"float g = {decoder(gradient)}(gradient);", *(["const float before = p;"] if recipe.measures else [])]
    body += [f"float {variable};" for variable in recipe.temporaries]
    body += [f"float {variable} = decode_bfloat16({variable}_half);" for variable in halves] + calls
    body += [f"{variable}_half = encode_bfloat16_stochastic({variable}, seed_{variable});" for variable in halves]
    body += [f"{variable} = 0.0f;" for slot, variable in recipe.slots.items() if slot == ACCUMULATED]
    body += [f"out = encode_{reply}(p);"] if reply is not None else []
    values = {"update": "(p - before)", "param": "p", "gradient": "treated"}
    return body + [f"add_square(sum_{total}, {values[total]});" for total in recipe.sums]


def _measured(recipe: Recipe, slot: str) -> tuple[Array, list[str], str]:
    """Return the array of a slot that is measured, its pointer to maxima if it has one, and its value."""
    variable = recipe.slots[slot]
    if _in_blocks(recipe, slot):
        value = f"decode_code({variable}_codes[k], {variable}_absmax[at / 256], {_sign(slot)}_map)"
        return Array(f"{variable}_code", "unsigned char"), [f"const float *__restrict__ {variable}_absmax"], value
    if _rounds(recipe, slot):
        return Array(f"{variable}_half", "unsigned short"), [], f"decode_bfloat16({variable}_halfs[k])"
    return Array(variable, "float"), [], f"{variable}s[k]"


def _totals(recipe: Recipe) -> list[str]:
    return [f"sum_{total}" for total in recipe.sums]


def _sign(slot: str) -> str:
    return "signed" if EIGHT_BIT_SLOTS[slot] else "unsigned"


def _rounds(recipe: Recipe, slot: str) -> bool:
    return recipe.precision is Precision.BFLOAT16 and slot in recipe.rule.slots


def _in_blocks(recipe: Recipe, slot: str) -> bool:
    return recipe.precision is Precision.INT8 and slot in recipe.rule.slots
