"""CUDA C from the rules' Python functions: one kernel for each pass over memory. Text only; nothing here needs CUDA."""

from __future__ import annotations

from stepwire_server.engines.cuda.source.blocks import block_kernels
from stepwire_server.engines.cuda.source.dynamic_code import eight_bit_tables
from stepwire_server.engines.cuda.source.gradients import gradient_kernels
from stepwire_server.engines.cuda.source.module import COMPILE_OPTIONS, Kernel, module_source
from stepwire_server.engines.cuda.source.prelude import THREADS
from stepwire_server.engines.cuda.source.tables import gather_kernels, table_kernel
from stepwire_server.engines.cuda.source.updates import measure_kernel, update_kernel

__all__ = [
    "COMPILE_OPTIONS",
    "THREADS",
    "Kernel",
    "block_kernels",
    "eight_bit_tables",
    "gather_kernels",
    "gradient_kernels",
    "measure_kernel",
    "module_source",
    "table_kernel",
    "update_kernel",
]
