# SPDX-License-Identifier: Apache-2.0
"""An interpreter of PTX, which nvcc emits, on numpy arrays: what is compiled for GPUs runs without one.

It is written from the PTX ISA manual, independently of csrc/gpu/emulator, so that the two check each other.

    module = ptx.Module(ptx.compile_ptx("kernel.cu", include=["csrc"]))
    gpu = ptx.Machine(module)
    a = gpu.buffer(array, "a")
    out = gpu.buffer(result, "out", writable=True)
    gpu.launch("add", grid=4, block=128, params=gpu.pack("add", a, out, 100))
    gpu.counters.instructions, gpu.counters.buffers["a"].read_sectors

parser.py reads the text, program.py decodes it, block.py runs it; the other files are instructions by family.
"""

# these register their instructions
from . import arithmetic, barriers, convert, copies, data, integers, matrix, snippets, warp  # noqa: F401
from .counters import Banks, Counters, Traffic
from .machine import Machine
from .mutations import MUTATIONS, Mutation, check_mutations
from .nvcc import compile_ptx, find_nvcc
from .parser import Module
from .syntax import PtxError

__all__ = [
    "MUTATIONS",
    "Banks",
    "Counters",
    "Machine",
    "Module",
    "Mutation",
    "PtxError",
    "Traffic",
    "check_mutations",
    "compile_ptx",
    "find_nvcc",
]
