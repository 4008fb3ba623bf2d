"""The core over rows of every length, stride and alignment: several tiles, ragged edges, targets at each border."""

import mmap

import numpy as np
import pytest
import torch

from sft_kernels._backend import resolve
from sft_kernels._budget import check
from sft_kernels.ops.softmax_grad import reference
from sft_kernels.ops.softmax_grad.options import LossOptions
from sft_kernels.ops.softmax_grad.triton_impl import CONFIGS, Config

from .helpers import same_bits

TILE = 8 * CONFIGS["twice", 2].groups  # columns that Triton's kernel takes at a time
EVERY = {"label_smoothing": 0.1, "softcap": 6.0, "logit_scale": 0.7, "z_loss": 0.01}
HALF = [torch.bfloat16, torch.float16]


@pytest.fixture(params=["torch", "triton", "cuda"])
def core(request):
    if request.param == "cuda" and request.node.callspec.params.get("options"):
        pytest.skip("the CUDA kernels do not carry every option")
    return resolve("softmax_grad", request.param)


def laid_out(values, stride, offset):
    """``values`` [N, V] with ``stride`` elements between rows, ``offset`` elements behind the start of a storage."""
    N, V = values.shape
    storage = torch.full((offset + N * stride + V,), float("nan"), dtype=values.dtype)
    x = storage[offset:].as_strided((N, V), (stride, 1), offset)
    return x.copy_(values)


def rising(n, v, dtype):
    """Logits whose running maximum moves on with every tile, up to about 12, in an order of their own a row."""
    x = torch.randn(n, v) + torch.linspace(0, 8, v)
    x[1::2] = x[1::2].flip(1)
    return x.to(dtype)


def borders(v, n):
    """Targets at both ends, beside the first whole group and beside the border of two tiles."""
    places = [0, v - 1, 1, v // 2, 7, 8, v - 8, v - 9, TILE - 1, TILE, TILE + 1, 2 * TILE]
    return torch.tensor([p for p in places if 0 <= p < v] * n)[:n]


def eager(logits, target, scale, options):
    leaf = logits.clone().requires_grad_()
    u = leaf * (options.logit_scale or 1.0) if options.logit_scale else leaf
    u = u if options.softcap is None else options.softcap * torch.tanh(u / options.softcap)
    losses = torch.nn.functional.cross_entropy(u, target, reduction="none", label_smoothing=options.label_smoothing)
    losses = losses + options.z_loss * u.logsumexp(1).square() if options.z_loss else losses
    (gradient,) = torch.autograd.grad(losses, leaf, scale.to(losses.dtype))
    return losses.detach(), gradient


def hold(core, logits, target, options, keep=None, x=None, out=None):
    """Run ``core`` over ``x``, or a copy of ``logits``, and hold losses and gradients to the oracle; off the target by
    themselves, beside which they are small."""
    n = len(logits)
    scale = torch.rand(n) + 0.5
    scale[0] = -scale[0]
    x = logits.clone() if x is None else x
    rows = core(x, target, options, scale, stats=True, keep=keep, out=out)
    dlogits = x if out is None else out
    kept = torch.ones(n, dtype=torch.bool) if keep is None else keep
    scalars = {name: getattr(options, name) for name in EVERY}
    ref = reference.softmax_grad(
        logits[kept].double().numpy(), target[kept].numpy(), scale[kept].double().numpy(), **scalars
    )
    losses, gradient = eager(logits[kept], target[kept], scale[kept], options)
    u = options.shape(logits[kept])
    log_p = u.log_softmax(1)
    check("loss", rows.loss(options)[kept], ref.loss, losses, output_dtype=torch.float32)
    check("entropy", rows.entropy[kept], ref.entropy, -(log_p.exp() * log_p.clamp(min=-1e4)).sum(1))
    assert np.array_equal(rows.correct[kept].numpy(), ref.correct)
    off = torch.ones_like(logits[kept], dtype=torch.float64).scatter(1, target[kept][:, None], 0)
    check("dlogits", dlogits[kept], ref.dlogits, gradient)
    check("off target", (dlogits[kept] * off).to(x.dtype), ref.dlogits * off.numpy(), gradient * off)
    assert not dlogits[~kept].any()
    assert not rows.loss(options)[~kept].any()


@pytest.mark.parametrize("options", [{}, EVERY], ids=["plain", "every option"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("v", [2 * TILE, 2 * TILE + 8, 3 * TILE + 3])
def test_rows_of_several_tiles(core, v, dtype, options):
    n = 7
    hold(core, rising(n, v, dtype), borders(v, n), LossOptions(v, **options))


@pytest.mark.parametrize("options", [{}, EVERY], ids=["plain", "every option"])
@pytest.mark.parametrize("config", [Config(8, 1), Config(64, 2), Config(2048, 32, 64)], ids=str)
def test_any_configuration_is_right(monkeypatch, config, options):
    for key in CONFIGS:
        monkeypatch.setitem(CONFIGS, key, config)
    v, n = 8 * config.groups + 8 * 5 + 3, 5
    for length in (v, 2 * v, 61):
        hold(resolve("softmax_grad", "triton"), rising(n, length, torch.bfloat16), borders(length, n),
             LossOptions(length, **options))  # fmt: skip


@pytest.mark.parametrize("v", [1, 2, 7, 8, 9, 15, 16, 17, 63, 64, 65, 200, TILE - 1, TILE, TILE + 1, TILE + 8])
def test_rows_about_the_edge_of_a_group_or_tile(core, v):
    n = 6
    hold(core, rising(n, v, torch.bfloat16), borders(v, n), LossOptions(v))


@pytest.mark.parametrize("offset", [0, 1, 3, 8])
@pytest.mark.parametrize("padding", [0, 1, 5, 8])
@pytest.mark.parametrize("v", [64, 61, TILE + 13])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_stride_from_any_address(core, dtype, v, padding, offset):
    n = 5
    logits = rising(n, v, dtype)
    hold(core, logits, borders(v, n), LossOptions(v), x=laid_out(logits, v + padding, offset))


@pytest.mark.parametrize(("stride", "stride_out"), [(64, 72), (61, 61), (61, 64), (69, 61), (61, 77)])
def test_gradients_go_to_rows_of_another_stride(core, stride, stride_out):
    n, v = 9, 61
    logits = rising(n, v, torch.bfloat16)
    x, out = laid_out(logits, stride, 0), laid_out(torch.zeros_like(logits), stride_out, 0)
    keep = torch.rand(n) < 0.7
    x[~keep] = float("nan")
    hold(core, logits, borders(v, n), LossOptions(v), keep=keep, x=x, out=out)
    assert same_bits(x[keep], logits[keep])


@pytest.mark.parametrize("v", [61, 2 * TILE + 5])
def test_nothing_beside_the_rows_is_written(core, v):
    n = 5
    storage = torch.full((n, v + 11), 7.0)
    x = storage[:, 3 : 3 + v]
    x.copy_(rising(n, v, torch.float32))
    core(x, borders(v, n), LossOptions(v), torch.ones(n))
    assert (storage[:, :3] == 7).all()
    assert (storage[:, 3 + v :] == 7).all()


def test_columns_that_are_not_adjacent(core):
    n, v = 6, 70
    logits = rising(n, v, torch.float32)
    hold(core, logits, borders(v, n), LossOptions(v), x=logits.T.contiguous().T)


@pytest.mark.parametrize("v", [40, 2 * TILE + 5])
@pytest.mark.parametrize("at", [0, 3, -1])
def test_ruled_out_classes_and_rows_of_one_candidate(core, v, at):
    logits = rising(3, v, torch.float32)
    target = torch.full((3,), at % v)
    logits[0] = float("-inf")
    logits[0, at] = -5.0
    logits[1, : v // 2] = float("-inf")
    logits[1, at] = 1.0
    rows = core(x := logits.clone(), target, LossOptions(v), torch.ones(3), stats=True)
    ref = reference.softmax_grad(logits.double().numpy(), target.numpy(), np.ones(3))
    losses, gradient = eager(logits, target, torch.ones(3), LossOptions(v))
    assert rows.nll[0] == 0
    assert rows.entropy[0] == 0
    assert not x[0].any()
    check("nll", rows.nll, ref.nll, losses)
    check("entropy", rows.entropy, ref.entropy, torch.as_tensor(ref.entropy))
    check("dlogits", x, ref.dlogits, gradient)


@pytest.mark.parametrize("v", [40, 2 * TILE + 5])
def test_classes_masked_by_the_lowest_number(core, v):
    """Among them whole groups, whose maximum it is: its product with log₂ e would be infinite."""
    logits = rising(4, v, torch.float32)
    logits[:, v // 3 :] = torch.finfo(torch.float32).min
    target, scale = torch.arange(4), torch.ones(4)
    rows = core(x := logits.clone(), target, LossOptions(v), scale, stats=True)
    ref = reference.softmax_grad(logits.double().numpy(), target.numpy(), np.ones(4))
    losses, gradient = eager(logits, target, scale, LossOptions(v))
    check("nll", rows.nll, ref.nll, losses)
    check("entropy", rows.entropy, ref.entropy, torch.as_tensor(ref.entropy))
    check("dlogits", x, ref.dlogits, gradient)
    assert not x[:, v // 3 :].any()


@pytest.mark.parametrize("v", [40, TILE + 5])
@pytest.mark.parametrize("margin", [12.0, 16.0, 20.0])
def test_a_sure_token_keeps_the_digits_of_its_gradient(core, margin, v):
    """p − 1 taken from a p near 1 would have none left at a margin of 20."""
    logits = torch.randn(3, v)
    target = torch.tensor([0, v // 2, v - 1])
    logits.scatter_(1, target[:, None], margin)
    core(x := logits.clone(), target, LossOptions(v), torch.ones(3))
    ref = torch.as_tensor(reference.softmax_grad(logits.double().numpy(), target.numpy(), np.ones(3)).dlogits)
    # exp(−x) as a power of 2 costs x · eps, 2e-6 here; a p near 1 is 6e-8 / (1 − p) off, 1e-4 and more.
    torch.testing.assert_close(x.gather(1, target[:, None]).double(), ref.gather(1, target[:, None]), rtol=5e-6, atol=0)


@pytest.mark.parametrize("v", [40, 101, TILE + 907])
@pytest.mark.parametrize("at", [0, 7, -1])
@pytest.mark.parametrize("far", [-1e4, -3e4, -1e9, 1e4])
def test_one_class_far_from_all_others_leaves_the_mean_its_digits(core, far, at, v):
    """As where a model rules a padding token out; with smoothed labels the mean of all logits is in the loss."""
    logits = torch.randn(6, v)
    logits[:, at] = far
    target, options = torch.randint(1, v - 1, (6,)), LossOptions(v, label_smoothing=0.1)
    rows = core(logits, target, options)
    ref = reference.softmax_grad(logits.double().numpy(), target.numpy(), np.ones(6), label_smoothing=0.1)
    losses, _ = eager(logits, target, torch.ones(6), options)
    check("loss", rows.loss(options), ref.loss, losses)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_logit_makes_its_own_row_nan(core, bad):
    logits = rising(4, TILE + 3, torch.float32)
    logits[2, TILE - 5] = bad
    rows = core(x := logits.clone(), borders(TILE + 3, 4), LossOptions(TILE + 3), torch.ones(4))
    assert rows.nll.isnan().tolist() == [False, False, True, False]
    assert x.isnan().any(1).tolist() == [False, False, True, False]


def test_a_row_does_not_depend_on_its_neighbours(core):
    v = 200
    logits, target = rising(23, v, torch.bfloat16), borders(v, 23)
    whole = core(x := logits.clone(), target, LossOptions(v), torch.ones(23), stats=True)
    for i in (0, 5, 22):
        s = slice(i, i + 1)
        row = core(y := logits[s].clone(), target[s], LossOptions(v), torch.ones(1), stats=True)
        assert same_bits(([f[s] for f in whole if f is not None], x[s]), ([f for f in row if f is not None], y))


def test_rows_further_apart_than_32_bits_reach():
    """Address space alone: three rows, of which the last begins past 2³¹ elements."""
    v, stride = 61, (1 << 30) + 9
    with mmap.mmap(-1, 2 * (2 * stride + v)) as memory:
        x = torch.frombuffer(memory, dtype=torch.bfloat16).as_strided((3, v), (stride, 1))
        logits = rising(3, v, torch.bfloat16)
        hold(resolve("softmax_grad", "triton"), logits, borders(v, 3), LossOptions(v), x=x.copy_(logits))
        del x  # before the memory it looks at
