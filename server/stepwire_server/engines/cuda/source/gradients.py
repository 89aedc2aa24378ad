"""The kernels that no recipe changes: sums of gradients, accumulation, and conversions between wire dtypes."""

from __future__ import annotations

from stepwire_server.engines.compiled.rule_source import functions_of_stages
from stepwire_server.engines.cuda.source.memory import GRADIENTS, STORED, Array, decoder, gradient_array
from stepwire_server.engines.cuda.source.module import Kernel
from stepwire_server.engines.cuda.source.passes import FlatPass, SummingPass, flat_kernel, summing_kernel
from stepwire_server.engines.cuda.source.printer import print_call
from stepwire_server.rules import Stage
from stepwire_server.rules.treatment import added, scaled

__all__ = ["gradient_kernels"]

_SCALED = Stage(scaled, ("g",), ("g", "factor"))


def gradient_kernels() -> list[Kernel]:
    """Write the kernels of gradients.

    `sum_<dtype>(gradient, partials, size, factor)` leaves the sum of the squares of each `GRAIN` elements, the last
    perhaps fewer, in float64. `sum_accumulated_<dtype>` has the accumulated gradient as a first argument.
    `accumulate_<dtype>(accumulated, gradient, size, head, factor)` adds up; see `update_kernel` for the head.
    `convert_<dtype>_to_<dtype>(source, target, size)` rounds to nearest even. Only gradients are int8, which has no
    conversion. For int8 the place of the first element in its block precedes the factor. Sizes and places are int64.
    """
    kernels = []
    for gradient in GRADIENTS:
        kernels += [_sum(gradient, accumulated=False), _sum(gradient, accumulated=True), _accumulate(gradient)]
    return kernels + [_convert(source, target) for source in STORED for target in STORED if target != source]


def _sum(gradient: str, accumulated: bool) -> Kernel:
    stages, arrays = [_SCALED], [gradient_array(gradient)]
    body = [f"float g = {decoder(gradient)}(gradients[k]);"]
    if accumulated:
        stages.append(Stage(added, ("g",), ("g", "accumulated")))
        arrays.insert(0, Array("accumulated", "float"))
        body.append("const float accumulated = accumulateds[k];")
    name = f"sum_accumulated_{gradient}" if accumulated else f"sum_{gradient}"
    body += map(print_call, stages)
    work = SummingPass(arrays, body, ("g",), ("float factor",), tuple(functions_of_stages(stages)))
    return summing_kernel(name, work)


def _accumulate(gradient: str) -> Kernel:
    stages = [_SCALED, Stage(added, ("accumulated",), ("g", "accumulated"))]
    arrays = [Array("accumulated", "float", written=True), gradient_array(gradient)]
    body = [f"float g = {decoder(gradient)}(gradient);", *map(print_call, stages)]
    functions = tuple(functions_of_stages(stages))
    return flat_kernel(f"accumulate_{gradient}", FlatPass(arrays, body, ("float factor",), functions))


def _convert(source: str, target: str) -> Kernel:
    arrays = [Array("source", STORED[source]), Array("target", STORED[target], read=False, written=True)]
    body = [f"target = encode_{target}(decode_{source}(source));"]
    return flat_kernel(f"convert_{source}_to_{target}", FlatPass(arrays, body, finds_head=True))
