"""The CUDA core at the sizes that it is for: rows in clusters, rows that are read twice, slices, any alignment.

What small rows show is in ``tests/ops/test_softmax_grad.py`` and the suites of the losses, which run over it too.
"""

import ctypes

import pytest
import torch

from sft_kernels._budget import check
from sft_kernels.ops.softmax_grad import torch_impl
from sft_kernels.ops.softmax_grad.options import LossOptions
from sft_kernels.ops.softmax_grad.rows import RowStats

from ..ops.helpers import same_bits
from .host import SM_80, SM_90, library, needs_compiler, softmax_grad_out

pytestmark = needs_compiler

EVERY = {"label_smoothing": 0.1, "softcap": 5.0}
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
N = 3


def plan(V, dtype, arch, given=False):
    out = (ctypes.c_int64 * 4)()
    clusters, shared = arch
    library().softmax_grad_plan(
        V, dtype.itemsize, ctypes.c_bool(given), ctypes.c_bool(clusters), ctypes.c_size_t(shared), out
    )
    parts, threads, shared_bytes, reads = out
    return parts, threads, shared_bytes, ("staged", "twice", "given")[reads]


def at_phase(values, phase, gap=0):
    """The same rows, the first ``phase`` elements behind sixteen bytes, with ``gap`` elements between two of them."""
    n, v = values.shape
    storage = torch.empty(n * (v + gap) + 16, dtype=values.dtype, device=values.device)
    offset = (-storage.data_ptr() % 16) // storage.element_size() + phase
    return storage[offset:][: n * (v + gap)].view(n, v + gap)[:, :v].copy_(values)


def inputs(V, dtype):
    logits = (3 * torch.randn(N, V)).to(dtype)
    target = torch.randint(0, V, (N,))
    target[0] = logits[0].argmax()
    logits[0, target[0]] = 14.0  # a sure row
    return logits, target, torch.rand(N) + 0.1


def ours(logits, target, scale, options, *, out=None, lse=None, keep=None, stats=True, arch=SM_90, seed=1):
    out = logits if out is None else out
    found = softmax_grad_out(logits, out, target, scale, lse, keep, *options, stats, arch=arch, seed=seed)
    return None if lse is not None else RowStats(*found[:4], found[4] if options.label_smoothing else None)


def judge(rows, dlogits, logits, target, scale, options, kept=slice(None)):
    exact, plain = logits.double(), logits.clone()
    ref = torch_impl.softmax_grad(exact, target, options, scale.double(), stats=True)
    eager = torch_impl.softmax_grad(plain, target, options, scale, stats=True)
    if rows is not None:
        for name in ("lse", "target_logit", "max_logit", "mean_logit", "nll", "entropy"):
            x, r, e = (getattr(each, name)[kept] for each in (rows, ref, eager))
            check(name, x, r, e, compute_dtype=torch.float32, output_dtype=torch.float32)
        check("loss", *(each.loss(options)[kept] for each in (rows, ref, eager)))
    check("dlogits", dlogits[kept], exact[kept], plain[kept])
    rest = torch.ones_like(exact).scatter(1, target[:, None], 0)  # beside the target's entry, which is so much larger
    check("the rest", (dlogits * rest)[kept].to(dlogits.dtype), (exact * rest)[kept], (plain * rest)[kept])


# ---- how a row is taken


def test_a_row_of_a_large_vocabulary_is_read_once_by_eight_blocks_and_twice_where_there_are_no_clusters():
    parts, threads, shared, reads = plan(128256, torch.bfloat16, SM_90)
    assert (parts, threads, reads) == (8, 256, "staged")
    assert (228 << 10) // (shared + 1024) >= 5  # blocks that an SM of a Hopper holds, by shared memory
    assert plan(128256, torch.bfloat16, SM_80) == (1, 1024, plan(1, torch.bfloat16, SM_80)[2], "twice")
    assert plan(128256, torch.float32, SM_90)[::3] == (8, "staged")
    assert plan(32000, torch.bfloat16, SM_80)[::3] == (1, "staged")
    assert plan(1 << 20, torch.float32, SM_90)[::3] == (1, "twice")


@pytest.mark.parametrize("arch", [SM_80, SM_90], ids=["sm_80", "sm_90"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_plan_fits_its_architecture(dtype, arch):
    for V in [1, 7, 8, 9, 63, *(2**k + d for k in range(7, 22) for d in (-1, 0, 3))]:
        for given in (False, True):
            parts, threads, shared, reads = plan(V, dtype, arch, given)
            assert parts in ((1,) if not arch[0] and not given else tuple(2**k for k in range(11 if given else 4)))
            assert threads % 32 == 0
            assert 32 <= threads <= (1024 if reads == "twice" else 256)
            assert shared <= arch[1]
            if reads == "staged":  # two blocks an SM at least
                assert 2 * (shared + 1024) <= arch[1] + 1024


# ---- right


CASES = {
    "plain": {},
    "every option": EVERY,
    "smoothed": {"label_smoothing": 0.3},
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
@pytest.mark.parametrize(
    ("V", "arch"),
    [(128256, SM_90), (128256, SM_80), (50257, SM_90), (32003, SM_80), (33000, SM_90), (517, SM_90)],
    ids=["8 blocks", "twice", "odd", "odd, 1 block", "4 blocks", "short"],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics_and_gradient_stay_within_the_budget(dtype, V, arch, options):
    options = LossOptions(V, **options)
    logits, target, scale = inputs(V, dtype)
    x = logits.clone()
    rows = ours(x, target, scale, options, arch=arch)
    judge(rows, x, logits, target, scale, options)


@pytest.mark.parametrize("arch", [SM_80, SM_90], ids=["sm_80", "sm_90"])
@pytest.mark.parametrize(("phase_out", "gap"), [(0, 0), (1, 0), (5, 3), (0, 16)])
@pytest.mark.parametrize("phase", [0, 1, 7])
@pytest.mark.parametrize(("V", "dtype"), [(1031, torch.bfloat16), (33001, torch.bfloat16), (1031, torch.float32)])
def test_any_alignment_of_logits_and_gradient(V, dtype, phase, phase_out, gap, arch):
    options = LossOptions(V, **EVERY)
    logits, target, scale = inputs(V, dtype)
    target[1], target[2] = 0, V - 1  # at the edges
    x, out = at_phase(logits, phase), at_phase(torch.zeros_like(logits), phase_out, gap)
    rows = ours(x, target, scale, options, out=out, arch=arch)
    judge(rows, out, logits, target, scale, options)
    assert torch.equal(x, logits)


@pytest.mark.parametrize("V", [1, 2, 7, 8, 9, 15, 16, 17, 33])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_shorter_than_their_edges(dtype, V):
    for phase in range(16 // dtype.itemsize):
        options = LossOptions(V, **EVERY)
        logits, target, scale = inputs(V, dtype)
        x = at_phase(logits, phase)
        judge(ours(x, target, scale, options), x, logits, target, scale, options)


@pytest.mark.parametrize(("V", "dtype"), [(40961, torch.bfloat16), (700, torch.float32)])
def test_a_slice_with_the_logsumexp_given_is_read_once_by_blocks_that_share_nothing(V, dtype):
    options = LossOptions(V, **EVERY)
    logits, target, scale = inputs(V, dtype)
    lse = torch_impl.softmax_grad(logits.double(), target, options).lse
    x = logits.clone()
    assert ours(x, target, scale, options, lse=lse) is None
    judge(None, x, logits, target, scale, options)


@pytest.mark.parametrize("arch", [SM_80, SM_90], ids=["sm_80", "sm_90"])
def test_rows_that_are_not_kept_are_not_read_and_become_zero(arch):
    V, keep = 70001, torch.tensor([True, False, True])
    options = LossOptions(V, **EVERY)
    logits, target, scale = inputs(V, torch.bfloat16)
    x, target[1] = logits.clone(), 2**40
    x[1] = float("nan")
    rows = ours(x, target, scale, options, keep=keep, arch=arch)
    target[1] = 0
    judge(rows, x, logits, target, scale, options, kept=keep)
    assert (x[1] == 0).all()
    assert all(field[1] == 0 for field in rows if field is not None)


@pytest.mark.parametrize("lse", [False, True])
@pytest.mark.parametrize("arch", [SM_80, SM_90], ids=["sm_80", "sm_90"])
def test_the_order_of_threads_changes_no_bit(arch, lse):
    """Clusters of eight, of all blocks and their threads: a missing barrier would show in some order."""
    V, options = 128256, LossOptions(128256, **EVERY)
    logits, target, scale = inputs(V, torch.bfloat16)
    given = torch_impl.softmax_grad(logits.double(), target, options).lse if lse else None
    found = []
    for seed in range(8):
        x = logits.clone()
        found.append((ours(x, target, scale, options, lse=given, arch=arch, seed=seed), x))
    assert all(same_bits(each, found[0]) for each in found)


def test_a_row_does_not_depend_on_its_neighbours_nor_on_where_its_gradient_goes():
    V, options = 40000, LossOptions(40000)
    logits, target, scale = inputs(V, torch.bfloat16)
    x, out = logits.clone(), torch.empty_like(logits)
    together = ours(x, target, scale, options)
    apart = [ours(logits[i : i + 1].clone(), target[i : i + 1], scale[i : i + 1], options) for i in range(N)]
    assert same_bits(together, RowStats.cat([RowStats(*fields) for fields in apart]))
    ours(logits, target, scale, options, out=out)
    assert torch.equal(out, x)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stands_where_it_does_in_torch(value):
    V, options = 20000, LossOptions(20000)
    logits, target, scale = inputs(V, torch.float32)
    logits[1, 77] = value
    logits[2] = value
    x, plain = logits.clone(), logits.clone()
    rows = ours(x, target, scale, options)
    expected = torch_impl.softmax_grad(plain, target, options, scale, stats=True)
    assert torch.equal(x.isnan(), plain.isnan())
    assert torch.equal(rows.lse.isnan(), expected.lse.isnan())
    assert torch.equal(rows.lse.isinf(), expected.lse.isinf())
