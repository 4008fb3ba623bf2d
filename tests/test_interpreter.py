"""Triton's interpreter, corrected, against torch over all patterns of bf16; and what it still cannot do raises."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
if not triton.knobs.runtime.interpret:
    pytest.skip("Triton does not interpret here", allow_module_level=True)

import triton.language as tl  # noqa: E402
from triton.runtime import interpreter  # noqa: E402
from triton.runtime.errors import InterpreterError  # noqa: E402

from sft_kernels import _interpreter  # noqa: E402

_interpreter.correct()

ROOT = Path(__file__).parents[1]
HIGH = torch.arange(1 << 16, dtype=torch.int32)  # every bf16, as its bits
EVERY = HIGH.to(torch.int16).view(torch.bfloat16)
# From each to its neighbour: at it, just above, just below halfway, halfway, just above, just below the neighbour.
LOW = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)
BETWEEN = (HIGH << 16 | LOW[:, None]).view(torch.float32)


@triton.jit
def cast_kernel(x, out, EXPLICIT: tl.constexpr, N: tl.constexpr):
    o = tl.program_id(0) * N + tl.arange(0, N)
    b_x = tl.load(x + o)
    if EXPLICIT:
        b_x = b_x.to(out.dtype.element_ty)
    tl.store(out + o, b_x)


def cast(x, dtype, explicit=True):
    out = torch.empty(x.shape, dtype=dtype)
    cast_kernel[(x.numel() // x.shape[-1],)](x, out, explicit, x.shape[-1])
    return out


def same(x, y):
    """Equal as bits, so that -0 is not 0, except that one NaN is as good as another."""
    assert x.dtype == y.dtype
    assert torch.equal(x.isnan(), y.isnan())
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    assert torch.equal(x[~x.isnan()].view(bits), y[~y.isnan()].view(bits))


def test_bf16_to_fp32():
    same(cast(EVERY, torch.float32), EVERY.float())


@pytest.mark.parametrize("explicit", [True, False], ids=["to", "store"])
def test_fp32_to_bf16(explicit):
    out = cast(BETWEEN, torch.bfloat16, explicit)
    same(out, BETWEEN.bfloat16())
    assert out[0, 0x7F80] == float("inf")
    assert out[1:, 0x7F80].isnan().all()  # their payload is in the bits that go
    assert out[3:, 0x7F7F].isinf().all()
    assert out[4, 0] == EVERY[1] > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int32], ids=str)
def test_bf16_to_others(dtype):
    x = EVERY if dtype.is_floating_point else torch.where(EVERY.abs() < 2**31, EVERY, 0)
    same(cast(x, dtype), x.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int32, torch.int64, torch.bool], ids=str)
def test_others_to_bf16(dtype):
    if dtype.is_floating_point:
        x = BETWEEN[3].to(dtype)
    else:
        x = torch.arange(-(1 << 15), 1 << 15).to(dtype) * (257 if dtype != torch.bool else True)
    same(cast(x, torch.bfloat16), x.bfloat16())


@triton.jit
def move_kernel(x, out, N: tl.constexpr):
    o = tl.arange(0, N)
    b_x = tl.load(x + o, mask=o < N // 2, other=1 / 3)
    b_x = tl.where(o == 0, 0.0, b_x)
    b_x = tl.trans(tl.trans(b_x.reshape((2, N // 2)))).reshape((N,))
    tl.store(out + o, b_x.to(tl.int16, bitcast=True).to(tl.bfloat16, bitcast=True), mask=o < N - 1)


def test_moving_keeps_bits():
    out = torch.full_like(EVERY, 7.0)
    move_kernel[(1,)](EVERY, out, EVERY.numel())
    half = EVERY.numel() // 2
    assert torch.equal(out[1:half].view(torch.int16), EVERY[1:half].view(torch.int16))
    assert torch.equal(out[half:-1], torch.full_like(out[half:-1], 1 / 3))
    assert (out[0], out[-1]) == (0, 7)


@triton.jit
def dot_kernel(a, b, c, out, ACC: tl.constexpr, L: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :], tl.arange(0, K)
    if L:
        l = tl.arange(0, L)[:, None, None]
        b_a = tl.load(a + l * M * K + (m * K + k[None, :])[None, :, :])  # [L, M, K]
        b_b = tl.load(b + l * K * N + (k[:, None] * N + n)[None, :, :])  # [L, K, N]
        o = l * M * N + (m * N + n)[None, :, :]
    else:
        b_a = tl.load(a + m * K + k[None, :])  # [M, K]
        b_b = tl.load(b + k[:, None] * N + n)  # [K, N]
        o = m * N + n
    if ACC:
        b_out = tl.dot(b_a, b_b, acc=tl.load(c + o))
    else:
        b_out = tl.dot(b_a, b_b)
    tl.store(out + o, b_out)


@pytest.mark.parametrize("shape", [(16, 32, 64), (2, 16, 16, 32)], ids=["2d", "3d"])
@pytest.mark.parametrize("acc", [False, True], ids=["plain", "acc"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dot(dtype, acc, shape):
    *l, m, n, k = shape
    a, b, c = torch.randn(*l, m, k).to(dtype), torch.randn(*l, k, n).to(dtype), torch.randn(*l, m, n)
    out = torch.empty_like(c)
    dot_kernel[(1,)](a, b, c, out, acc, l[0] if l else 0, m, n, k)
    a, b, c = a.double(), b.double(), c.double() * acc
    # The products are exact in fp32, so only the k additions round.
    bound = k * torch.finfo(torch.float32).eps * (a.abs() @ b.abs() + c.abs())
    assert ((out - (a @ b + c)).abs() <= bound).all()


def test_dot_is_rounded_once():
    a, b, c = torch.randn(32, 128), torch.randn(128, 32), torch.randn(32, 32)
    out = torch.empty_like(c)
    dot_kernel[(1,)](a, b, c, out, True, 0, 32, 32, 128)
    same(out, (a.double() @ b.double() + c.double()).float())


@triton.jit
def fma_kernel(x, y, z, out, N: tl.constexpr):
    o = tl.arange(0, N)
    tl.store(out + o, tl.fma(tl.load(x + o), tl.load(y + o), tl.load(z + o)))


def test_fma_is_rounded_once():
    x, y = torch.randn(256), torch.randn(256)
    out = torch.empty(256)
    fma_kernel[(1,)](x, y, -x * y, out, 256)
    same(out, (x.double() * y.double() - (x * y).double()).float())
    assert out.count_nonzero() > 100


_BITS_OF_A_DOT = """
import torch
from tests.test_interpreter import dot_kernel

random = torch.Generator().manual_seed(0)
a, b, out = torch.randn(128, 128, generator=random), torch.randn(128, 128, generator=random), torch.empty(128, 128)
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    dot_kernel[(1,)](a.to(dtype), b.to(dtype), None, out, False, 0, 128, 128, 128)
    print(out.view(torch.int32).sum().item(), out.view(torch.int32).long().square().sum().item())
"""


def test_dot_has_the_same_bits_on_every_cpu():
    """``OPENBLAS_CORETYPE=Prescott`` makes NumPy's products those of an old CPU."""
    found = []
    for choice in ({}, {"OPENBLAS_CORETYPE": "Prescott"}):
        done = subprocess.run(
            [sys.executable, "-c", _BITS_OF_A_DOT],
            cwd=ROOT, env={**os.environ, **choice}, capture_output=True, text=True, check=True,
        )  # fmt: skip
        found.append(done.stdout.split())
    assert found[0] == found[1]
    assert len(found[0]) == 6


@triton.jit
def max_kernel(x, out, N: tl.constexpr):
    tl.store(out, tl.max(tl.load(x + tl.arange(0, N)), 0))


def test_max_goes_through_fp32():
    x = -torch.rand(64, dtype=torch.bfloat16)
    out = torch.empty(1, dtype=torch.bfloat16)
    max_kernel[(1,)](x, out, 64)
    assert out == x.max()


@triton.jit
def arithmetic_kernel(x, out, OP: tl.constexpr, N: tl.constexpr):
    o = tl.arange(0, N)
    b_x = tl.load(x + o)
    if OP == "add":
        tl.store(out + o, b_x + b_x)
    elif OP == "scale":
        tl.store(out + o, 0.0 * b_x)
    elif OP == "negate":
        tl.store(out + o, -b_x)
    elif OP == "compare":
        tl.store(out + o, (b_x < b_x).to(tl.bfloat16))
    elif OP == "abs":
        tl.store(out + o, tl.abs(b_x))
    elif OP == "fma":
        tl.store(out + o, tl.fma(b_x, b_x, b_x))
    elif OP == "sum":
        tl.store(out, tl.sum(b_x, 0))
    elif OP == "cumsum":
        tl.store(out + o, tl.associative_scan(b_x, 0, tl.standard._sum_combine))
    elif OP == "atomic_add":
        tl.atomic_add(out + o, b_x)
    elif OP == "towards_zero":
        tl.store(out + o, tl.load(out + o).to(tl.float32).to(tl.bfloat16, fp_downcast_rounding="rtz"))


@pytest.mark.parametrize("op", "add scale negate compare abs fma sum cumsum atomic_add towards_zero".split())
def test_arithmetic_in_bf16_raises(op):
    x = torch.ones(16, dtype=torch.bfloat16)
    with pytest.raises(InterpreterError, match=r"of bf16: arithmetic is done after \.to"):
        arithmetic_kernel[(1,)](x, x.clone(), op, 16)


def test_once_is_enough():
    before = dict(vars(interpreter.InterpreterBuilder))
    _interpreter.correct()
    assert dict(vars(interpreter.InterpreterBuilder)) == before


@pytest.mark.parametrize("name", ["cast_impl", "create_dot"])
def test_an_unknown_interpreter_raises(name, monkeypatch):
    monkeypatch.delattr(interpreter.InterpreterBuilder, name)
    with pytest.raises(RuntimeError, match=rf"triton {triton.__version__}.*{name}"):
        _interpreter.correct.__wrapped__()


def test_a_correction_without_effect_raises(monkeypatch):
    monkeypatch.setattr(_interpreter, "_replace", lambda *_: None)
    monkeypatch.setattr(_interpreter, "_rounded", lambda values: (values.view("u4") >> 16).astype("u2"))  # truncates
    with pytest.raises(RuntimeError, match=r"1 \+ 3/256 became"):
        _interpreter.correct.__wrapped__()
