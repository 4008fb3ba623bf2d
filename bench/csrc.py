"""The CUDA kernels of ``csrc/``, read off the built library, and what each may cost.

What a launch chooses, threads and shared memory, is what the launchers choose for a vocabulary of 128,256 and for any
tensors of AdamW; a test compares. The occupancy that the design counts on is the ``warps`` of a budget.
"""

import re
import subprocess
from pathlib import Path

import sft_kernels

from . import binary
from .binary import Need

ARCHS = {"sm_80": 80, "sm_90a": 90}
_DTYPES = {"float": "float32", "sft::bf16": "bfloat16", "sft::fp16": "float16"}
_READS = ("staged", "twice", "given")
_MASTERS = ("no master", "fp32 master", "split master")

# Of softmax_grad.cuh, for V = 128256: threads of a block, and its shared memory by (architecture, bytes of an element).
# Without clusters such a row is read twice; what is staged there is at most 80 KB.
_SHARED = 784
SOFTMAX_GRAD = {
    "staged": (256, {(90, 2): _SHARED + 32064, (90, 4): _SHARED + 64128, (80, 2): 81 << 10, (80, 4): 81 << 10}),
    "twice": (1024, _SHARED),
    "given": (256, _SHARED),
}
# A block of half precision has 32 KB of its row: five fit an SM, so that some load while others wait or store. Of fp32
# it has 63 KB, and three fit. Read twice, one block of 32 warps is all the registers.
_SOFTMAX_GRAD = {
    ("staged", 2): Need(narrow=None, registers=48, warps={80: 16, 90: 40}),
    ("staged", 4): Need(narrow=None, registers=56, warps={80: 16, 90: 24}),
    ("twice", 2): Need(narrow=None, registers=64, warps=32),
    ("twice", 4): Need(narrow=None, registers=64, warps=32),
    ("given", 2): Need(narrow=None, registers=64, warps=32),
    ("given", 4): Need(narrow=None, registers=64, warps=32),
}
ADAMW = {"update_kernel": (128, 168), "sum_of_squares_kernel": (128, 264)}
# Twenty warps ask for 96 bytes a thread and more at a time: 60 KB, where a Hopper has 20 KB under way. The one loop of
# vectors also has the loads of a gradient that is not aligned, each element on its own: 8, or 4 of fp32 throughout.
_ADAMW = {
    "update_kernel": Need(narrow=None, mixed=(8,), registers=96, warps=20, in_flight=30 << 10),
    "sum_of_squares_kernel": Need(narrow=None, mixed=(0,), registers=40, warps=48, stores=False),
}


def library():
    """The built library, in the package; None where it is not built."""
    return next(Path(sft_kernels.__file__).parent.glob("_C*.so"), None)


def report():
    """Yield ``(op, case, kernel, facts, what is broken)`` for every kernel of the library on each architecture."""
    for name, arch in ARCHS.items():
        found = binary.kernels(library(), name)
        if not found:
            raise RuntimeError(f"{library().name} has no code for {name}: TORCH_CUDA_ARCH_LIST")
        for mangled, demangled in zip(found, _demangled(found), strict=True):
            op, kernel, case, threads, shared, need = _case(demangled, arch)
            facts = binary.facts_of(*found[mangled], arch, threads // 32, shared)
            yield op, case, kernel, facts, binary.broken(facts, need)


def _case(demangled, arch):
    """What is known of a kernel by its name: op, kernel, case, threads, bytes of shared memory, :class:`Need`."""
    op, kernel, arguments = re.search(r"sft::(\w+)::(\w+)<(.*)>\(", demangled).groups()
    types = [_DTYPES[each] for each in re.findall(r"float|sft::bf16|sft::fp16", arguments)]
    if op == "softmax_grad":
        reads, capped = re.search(r"Reads\)(\d), (true|false)", arguments).groups()
        reads, size = _READS[int(reads)], 4 if types[0] == "float32" else 2
        threads, shared = SOFTMAX_GRAD[reads]
        shared = shared[arch, size] if isinstance(shared, dict) else shared
        case = f"{types[0]}, {reads}{', capped' if capped == 'true' else ''}"
        return op, kernel, case, threads, shared, _SOFTMAX_GRAD[reads, size]
    master = re.search(r"Master\)(\d)", arguments)
    case = ", ".join(each.replace("float", "fp").replace("bfp", "bf") for each in types)
    case += f", {_MASTERS[int(master[1])]}" if master else ""
    need = _ADAMW[kernel]
    if kernel == "update_kernel" and set(types) == {"float32"}:
        need = need._replace(mixed=(4,))
    return op, kernel, case, *ADAMW[kernel], need


def _demangled(names):
    return subprocess.run(["c++filt", *names], check=True, capture_output=True, text=True).stdout.splitlines()
