"""The bodies of the CUDA kernels as a library for the CPU, every CUDA thread a fiber; g++ builds it once a session."""

import contextlib
import ctypes
import functools
import itertools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

from sft_kernels import _csrc
from sft_kernels.ops.adamw import cuda_impl as _adamw  # noqa: F401, whose operators it defines
from sft_kernels.ops.adamw import tables
from sft_kernels.ops.softmax_grad import cuda_impl, operators

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
COMPILER = os.environ.get("CXX") or "g++"
# No contraction: the arithmetic is what is written. Plain memory is read as vectors, and longjmp goes between stacks.
FLAGS = (
    "-std=c++20 -O2 -ffp-contract=off -fno-strict-aliasing -U_FORTIFY_SOURCE -Wall -Wno-unknown-pragmas -fPIC".split()
)
BUILT = "SFT_KERNELS_TESTS_HOST_LIBRARY"
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
SM_80, SM_90 = (False, 163 << 10), (True, 227 << 10)  # clusters, bytes of shared memory a block


def why_not():
    return None if shutil.which(COMPILER) else f"{COMPILER} is not on the path"


needs_compiler = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


@functools.cache
def library():
    folder = None
    path = os.environ.get(BUILT)  # by the process that started this one
    if path is None:
        folder = tempfile.TemporaryDirectory()
        path = os.environ[BUILT] = str(Path(folder.name, "host.so"))
        sources = map(str, sorted(HERE.glob("*.cpp")))
        subprocess.run([COMPILER, *FLAGS, "-shared", f"-I{CSRC}", f"-I{HERE}", *sources, "-o", path], check=True)
    found = ctypes.CDLL(path)
    found.folder = folder  # removed with it
    found.allocate.restype = ctypes.c_void_p
    found.release.restype = ctypes.c_bool
    return found


class Fault(AssertionError):
    """What a launch over fibers did wrong."""


_launches = itertools.count()


class Memory:
    """Tensors copied between pages that cannot be touched, their addresses the same modulo 16, and copied back.

    All of them at the end of their pages, or at their start: what reads behind, or before, is seen at one of them, what
    writes there at both. Without a choice one launch is given the one, the next the other.
    """

    def __init__(self, at_end=None):
        self.at_end = next(_launches) % 2 == 0 if at_end is None else at_end
        self.copies = {}

    def __call__(self, tensor):
        """The guarded address of ``tensor``; None, and what is empty, is 0."""
        if tensor is None or tensor.numel() == 0:
            return 0
        key = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if key not in self.copies:
            elements = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            size = elements * tensor.element_size()
            address = library().allocate(
                ctypes.c_size_t(size), ctypes.c_uint(tensor.data_ptr() % 16), ctypes.c_bool(self.at_end)
            )
            ctypes.memmove(address, tensor.data_ptr(), size)
            self.copies[key] = address, size
        return self.copies[key][0]

    def give_back(self, launched, *written):
        """Copy ``written`` back after a launch that returned ``launched``, or raise :class:`Fault`: what went wrong."""
        for tensor in written:
            if tensor is not None and tensor.numel() and launched is None:
                address, size = self.copies[tensor.data_ptr(), tensor.shape, tensor.stride()]
                ctypes.memmove(tensor.data_ptr(), address, size)
        intact = [library().release(ctypes.c_void_p(address)) for address, _ in self.copies.values()]
        if launched is not None:
            raise Fault(launched.decode())
        if not all(intact):
            raise Fault("wrote beside its memory")


def function(name):
    """A function of the library that returns what went wrong, or None."""
    found = getattr(library(), name)
    found.restype = ctypes.c_char_p
    return found


# ---- the operators, for CPU tensors


class _SoftmaxGrad(ctypes.Structure):
    """``Params`` of softmax_grad.cuh."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in "logits out target scale lse keep".split()),
        *((name, ctypes.c_void_p) for name in "row_lse target_logit max_logit mean_logit sum_logit".split()),
        ("stride", ctypes.c_int64),
        ("stride_out", ctypes.c_int64),
        ("V", ctypes.c_int32),
        ("parts", ctypes.c_uint),
        *((name, ctypes.c_float) for name in "softcap smoothing uniform".split()),
    ]


def softmax_grad_out(logits, out, target, scale, lse, keep, *options, arch=SM_90, seed=None):
    """The operator ``softmax_grad_out`` over fibers, as on ``arch``."""
    classes, smoothing, softcap, logit_scale, z_loss, stats = options
    assert logit_scale is None
    assert z_loss == 0
    for t, dtype in ((target, torch.int64), (scale, torch.float32), (lse, torch.float64), (keep, torch.bool)):
        assert t is None or (t.dtype == dtype and t.is_contiguous())  # as the launcher asks
    assert logits.stride(1) == out.stride(1) == 1 or logits.shape[1] < 2
    (N, V), fields = logits.shape, operators.fields(logits, lse, smoothing, stats)
    if N == 0:
        return fields
    seed = next(_launches) if seed is None else seed
    memory = Memory()
    pointers = [memory(t) for t in (logits, logits if scale is None else out, target, scale, lse, keep, *fields)]
    arguments = _SoftmaxGrad(
        *pointers, logits.stride(0), out.stride(0), V, 0, softcap or 0.0, smoothing, smoothing / classes
    )
    clusters, shared = arch
    error = function("softmax_grad")(
        ctypes.byref(arguments), ctypes.c_int64(N), DTYPES[logits.dtype], ctypes.c_bool(softcap is not None),
        ctypes.c_bool(clusters), ctypes.c_size_t(shared), ctypes.c_uint64(seed),
    )  # fmt: skip
    memory.give_back(error, *([] if scale is None else [out]), *fields)
    return fields


class _Update(ctypes.Structure):
    """``Update`` of adamw.cuh, without its table."""

    _fields_ = [
        *(
            (name, ctypes.c_void_p)
            for name in "maps hyper sums grad_scale found_inf norm_out skipped done stats".split()
        ),
        *((name, ctypes.c_bool) for name in "has_norm clip skip shared_found round".split()),
    ]


class _Guarded:
    """A table whose addresses are those of guarded copies of what lies there; ``give_back`` copies what was written."""

    BYTES = (4, 2, 2)  # of an element, by the number of its dtype

    def __init__(self, table, first, last, param, grad, state=None, master=None):
        self.memory, self.there = Memory(), []
        self.table = rows = table.numpy().copy()
        sizes = {tables.GRAD: self.BYTES[grad]}
        if state is not None:
            sizes |= {tables.PARAM: self.BYTES[param], tables.STEP: 0}
            sizes |= dict.fromkeys((tables.EXP_AVG, tables.EXP_AVG_SQ, tables.MAX_EXP_AVG_SQ), self.BYTES[state])
            sizes[tables.MASTER] = (0, 4, 2)[master]
        for row in range(first, last):
            numel = int(rows[row, tables.NUMEL])
            for column, size in sizes.items():
                address = int(rows[row, column])
                length = 4 if column == tables.STEP else numel * size
                if address and length:
                    there = (ctypes.c_uint8 * length).from_address(address)
                    tensor = torch.frombuffer(there, dtype=torch.uint8)
                    rows[row, column] = self.memory(tensor)
                    self.there += [] if column == tables.GRAD else [tensor]

    def give_back(self, error, *written):
        self.memory.give_back(error, *self.there, *written)


def adamw_sum_of_squares(table, partials, sums, finished, first, last, grad, anew):
    """The operator ``adamw_sum_of_squares`` over fibers."""
    guarded = _Guarded(table, first, last, None, grad)
    pointers = [ctypes.c_void_p(guarded.memory(t)) for t in (partials, sums, finished)]
    error = function("adamw_sum_of_squares")(
        ctypes.c_void_p(guarded.table.ctypes.data), *pointers, *map(ctypes.c_int64, (first, last, grad)),
        ctypes.c_bool(anew), ctypes.c_uint64(next(_launches)),
    )  # fmt: skip
    guarded.give_back(error, partials, sums, finished)


def adamw_update(table, *rest):
    """The operator ``adamw_update`` over fibers."""
    tensors, (first, last, *kind), flags = rest[:9], rest[9:15], rest[15:]
    guarded = _Guarded(table, first, last, *kind)
    arguments = _Update(*map(guarded.memory, tensors), *flags)
    error = function("adamw_update")(
        ctypes.byref(arguments), ctypes.c_void_p(guarded.table.ctypes.data),
        *map(ctypes.c_int64, (first, last, *kind)), ctypes.c_uint64(next(_launches)),
    )  # fmt: skip
    guarded.give_back(error, *tensors[5:])  # norm_out, skipped, done, stats


@functools.cache
def register():
    """Implement the operators of the compiled library for the CPU."""
    library = torch.library.Library(cuda_impl.NAMESPACE, "IMPL", "CPU")
    library.impl("softmax_grad_out", softmax_grad_out)
    for name in ("softmax_grad_", "softmax_stats"):
        library.impl(name, lambda logits, *rest: softmax_grad_out(logits, logits, *rest))
    library.impl("adamw_sum_of_squares", adamw_sum_of_squares)
    library.impl("adamw_update", adamw_update)
    return library


@contextlib.contextmanager
def on_cpu():
    """Within it ``impl="cuda"`` takes CPU tensors, where g++ is: its kernels run there over fibers."""
    of_gpu = _csrc.why_not

    def why(device):
        if device is not None and device.type == "cuda":
            return of_gpu(device)
        return why_not() or (register() and None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_csrc, "why_not", why)
        yield
