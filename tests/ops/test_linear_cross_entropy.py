"""``linear_cross_entropy`` alone: shift, kept tokens, loops and their cost; the rest is in test_losses.py."""

import pytest
import torch
import torch.nn.functional as F

from bench.bench_linear_cross_entropy import peak_extra_bytes
from sft_kernels import KeptTokens, linear_cross_entropy
from sft_kernels._budget import check
from sft_kernels.ops.linear_cross_entropy import function, matmul

from .helpers import LINEAR, D, N, V, Watch, check_against_plain, labels, plain_cross_entropy, run, same_bits

LOOPS = pytest.mark.parametrize("loss", LINEAR, ids=lambda loss: loss.name)


def CHUNKING(test):
    """With both loops, in every implementation."""
    return pytest.mark.parametrize("chunking", ["tokens", "vocab"])(pytest.mark.usefixtures("impl")(test))


@pytest.fixture(params=["torch", "triton"])
def impl(request, monkeypatch):
    """What ``impl="auto"`` means."""
    monkeypatch.setenv("SFT_KERNELS_IMPL", request.param)


def tensors(dtype=torch.float32, n=N, v=V, d=D):
    return torch.randn(n, d).to(dtype), (torch.randn(v, d) * 2 / d**0.5).to(dtype)


# ---- shift and kept tokens


@LOOPS
@pytest.mark.parametrize("shape", [(N,), (3, 23), (2, 3, 7), (4, 1)], ids=str)
def test_shift_predicts_the_next_label_of_the_same_row(loss, shape):
    size = torch.Size(shape).numel()
    y = labels(size, masked=0.4).reshape(shape)
    token_weight = torch.rand(shape)
    hidden, weight = tensors(n=size)

    def by_hand(hidden, weight):
        logits = F.linear(hidden, weight).reshape(*shape, V)[..., :-1, :].reshape(-1, V)
        losses = F.cross_entropy(logits, y[..., 1:].reshape(-1), reduction="none")
        return (losses * token_weight[..., 1:].reshape(-1).to(losses.dtype)).sum() / 11

    def ours(hidden, weight):
        hidden = hidden.reshape(*shape, D)
        return loss.ours(hidden, weight, y, shift=True, token_weight=token_weight, num_items=11)

    check_against_plain(ours, by_hand, (hidden, weight))


def test_an_unreduced_shifted_loss_stands_where_the_hidden_state_is():
    y = labels(12, masked=0.3).reshape(3, 4)
    hidden, weight = tensors(n=12)
    value = linear_cross_entropy(hidden.reshape(3, 4, D), weight, y, shift=True, reduction="none")
    ref = F.cross_entropy(F.linear(hidden, weight), F.pad(y[:, 1:], (0, 1), value=-100).flatten(), reduction="none")
    check("loss", value, ref.reshape(3, 4).double(), ref.reshape(3, 4))


@LOOPS
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("ignore_index", [None, 3])
def test_kept_tokens_built_beforehand_change_no_bit(loss, shift, ignore_index):
    y = labels(3 * 23).reshape(3, 23)
    hidden, weight = tensors(n=3 * 23)
    kept = KeptTokens.from_labels(y, -100 if ignore_index is None else ignore_index, shift)
    if ignore_index is not None:
        y = y.clamp(min=0)
        kept = KeptTokens.from_labels(y, ignore_index, shift)

    def ours(**options):
        return lambda h, w: loss.ours(h.reshape(3, 23, D), w, options.pop("y", None), shift=shift, **options)

    found = run(ours(y=y, ignore_index=ignore_index), (hidden, weight))
    assert same_bits(run(ours(kept=kept), (hidden, weight)), found)
    assert same_bits(run(ours(y=y, kept=kept), (hidden, weight)), found)


def test_kept_tokens_say_which_rows_and_labels():
    kept = KeptTokens.from_labels(torch.tensor([[5, -100, 7], [-100, 8, -100]], dtype=torch.int32), shift=True)
    assert (kept.count, kept.size, kept.shift) == (2, 6, True)
    assert (kept.rows.tolist(), kept.targets.tolist()) == ([1, 3], [7, 8])
    assert kept.rows.dtype == kept.targets.dtype == torch.int64
    assert kept.to("meta").rows.device.type == kept.to("meta").targets.device.type == "meta"


@pytest.mark.parametrize(
    ("kept", "match"),
    [
        (
            KeptTokens.from_labels(torch.zeros(N, dtype=torch.int64), shift=True),
            "shift=1, the call says shift=0",
        ),
        (KeptTokens.from_labels(torch.zeros(N + 1, dtype=torch.int64)), f"kept.* {N} .*got {N + 1}"),
        (KeptTokens.from_labels(torch.zeros(N, dtype=torch.int64)).to("meta"), "kept.*device"),
        (KeptTokens.from_labels(torch.full((N,), V)), "target"),
    ],
    ids=["shift", "size", "device", "label"],
)
def test_kept_tokens_of_other_labels_raise(kept, match):
    with pytest.raises((ValueError, IndexError), match=match):
        linear_cross_entropy(*tensors(), kept=kept)


@pytest.mark.parametrize("y", [torch.zeros(3), torch.zeros(3, dtype=torch.bool)], ids=["float", "bool"])
def test_kept_tokens_of_what_are_no_labels_raise(y):
    with pytest.raises(TypeError, match="labels"):
        KeptTokens.from_labels(y)


# ---- shapes, dtypes, errors


@LOOPS
def test_any_number_of_leading_dimensions(loss):
    hidden, weight = tensors(n=24)
    y = labels(24)
    flat = run(lambda h, w: loss.ours(h, w, y), (hidden, weight))
    nested = run(lambda h, w: loss.ours(h, w, y.reshape(2, 3, 4)), (hidden.reshape(2, 3, 4, D), weight))
    assert same_bits([nested[0], nested[1].reshape(24, D), nested[2]], flat)
    one = loss.ours(hidden[0], weight, y[0], reduction="none")
    ref, eager = (F.cross_entropy(weight.to(t) @ hidden[0].to(t), y[0]) for t in (torch.float64, torch.float32))
    check("one token", one, ref, eager)


@LOOPS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_on_a_cpu_costs_no_more_than_the_rounding_of_the_result(loss, dtype):
    y, (hidden, weight) = labels(), tensors(dtype)
    ours = run(lambda h, w: loss.ours(h, w, y), (hidden, weight))
    plain = [run(lambda h, w: plain_cross_entropy(F.linear(h, w), y), (hidden.to(t), weight.to(t)))
             for t in (torch.float64, torch.float32)]  # fmt: skip
    assert ours[0].dtype == torch.float32
    for name, x, ref, fp32 in zip(("loss", "dhidden", "dweight"), ours, *plain, strict=True):
        check(name, x, ref, fp32)


@LOOPS
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)], ids=str)
@pytest.mark.parametrize("backward_inside", [False, True])
def test_autocast(loss, dtypes, backward_inside):
    """Loss fp32, each gradient in its input's dtype, and no worse than plain PyTorch under the same autocast."""
    y = labels()
    hidden, weight = (t.to(dtype) for t, dtype in zip(tensors(), dtypes, strict=True))

    def under_autocast(function):
        def gradients(h, w):
            h, w = h.detach().requires_grad_(), w.detach().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16):
                value = function(h, w, y)
                if backward_inside:
                    return value, *torch.autograd.grad(value, (h, w))
            return value, *torch.autograd.grad(value, (h, w))

        return gradients(hidden, weight)

    ours, eager = under_autocast(loss.ours), under_autocast(loss.plain)
    reference = run(lambda h, w: loss.plain(h, w, y), (hidden.double(), weight.double()))
    assert [t.dtype for t in ours] == [torch.float32, *dtypes]
    for name, x, ref, e in zip(("loss", "dhidden", "dweight"), ours, reference, eager, strict=True):
        check(name, x.detach(), ref, e)


@pytest.mark.parametrize(
    ("hidden", "weight", "error", "match"),
    [
        (torch.randn(N, D), torch.randn(V, D + 1), ValueError, rf"linear_weight.*\[V, {D}\]"),
        (torch.randn(N, D), torch.randn(V), ValueError, "linear_weight"),
        (torch.randn(N, D), torch.randn(0, D), ValueError, "linear_weight"),
        (torch.randn(N, D), torch.randn(V, D).double(), TypeError, "linear_weight"),
        (torch.randn(N, D), torch.randn(V, D, device="meta"), ValueError, "linear_weight.*device"),
        (torch.tensor(1.0), torch.randn(V, D), ValueError, "input"),
        ([[1.0] * D] * N, torch.randn(V, D), TypeError, "input: expected a tensor, got list"),
    ],
    ids=["columns", "vector", "no vocabulary", "dtype", "device", "0-d", "list"],
)
def test_a_bad_tensor_is_named(hidden, weight, error, match):
    with pytest.raises(error, match=match):
        linear_cross_entropy(hidden, weight, labels())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"chunking": "rows"}, "chunking"),
        ({"chunking": "tokens", "max_logits_bytes": 4 * V - 1}, "max_logits_bytes.*row"),
        ({"chunking": "vocab", "max_logits_bytes": 4 * N - 1}, "max_logits_bytes.*column"),
        ({"max_logits_bytes": 3}, "max_logits_bytes"),
        ({"max_logits_bytes": -1}, "max_logits_bytes"),
        ({"target": None}, "target"),
    ],
    ids=str,
)
def test_a_bad_option_of_this_loss_is_named(options, match):
    with pytest.raises(ValueError, match=match):
        linear_cross_entropy(*tensors(), **{"target": labels(masked=0), **options})


@CHUNKING
def test_without_a_bound_any_shape_runs(chunking):
    """Many tokens over few classes: one column of logits is then longer than a thousand rows."""
    y, (hidden, weight) = labels(5000, 3, masked=0), tensors(n=5000, v=3, d=2)
    check_against_plain(
        lambda h, w: linear_cross_entropy(h, w, y, chunking=chunking),
        lambda h, w: plain_cross_entropy(F.linear(h, w), y),
        (hidden, weight),
    )


# ---- what it costs


@CHUNKING
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True), (False, False)], ids=str)
@pytest.mark.parametrize("chunks", [1, 9])
def test_products_are_those_of_the_cost_model_and_masked_rows_are_free(chunking, reduction, needs, chunks):
    y, leaves = labels(), tensors()
    kept = int((y != -100).sum())
    for leaf, need in zip(leaves, needs, strict=True):
        leaf.requires_grad_(need)
    bound = 4 * V * (kept // chunks)
    with Watch() as watch:
        out = linear_cross_entropy(*leaves, y, chunking=chunking, reduction=reduction, max_logits_bytes=bound)
        if any(needs):
            out.sum().backward()
    recomputed = any(needs) and (chunking == "vocab" or reduction == "none")
    assert watch.flops == 2 * kept * D * V * (1 + sum(needs) + recomputed)
    assert [leaf.grad is not None for leaf in leaves] == list(needs)


@CHUNKING
def test_without_gradients_nothing_but_the_logits_is_computed(chunking):
    y, leaves = labels(), [t.requires_grad_() for t in tensors()]
    with Watch() as watch, torch.no_grad():
        linear_cross_entropy(*leaves, y, chunking=chunking)
    assert watch.flops == 2 * int((y != -100).sum()) * D * V


@CHUNKING
@pytest.mark.parametrize("asked", [0, 1, 2])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_one_gradient_alone_is_that_of_all_together(chunking, asked, reduction):
    y, leaves = labels(), [*tensors(), torch.randn(V)]

    def loss(hidden, weight, bias):
        options = {"linear_bias": bias, "chunking": chunking, "reduction": reduction}
        return linear_cross_entropy(hidden, weight, y, **options)

    together = run(loss, leaves)
    for i, leaf in enumerate(leaves):
        leaf.requires_grad_(i == asked)
    with Watch() as watch:
        loss(*leaves).sum().backward()
    assert torch.equal(leaves[asked].grad, together[1 + asked])
    recomputed = chunking == "vocab" or reduction == "none"
    assert watch.flops == 2 * int((y != -100).sum()) * D * V * (1 + (asked < 2) + recomputed)


@pytest.mark.parametrize("chunking", ["tokens", "vocab", "auto"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_tensor_exceeds_the_bound_on_logits(chunking, reduction):
    n, d, v = 211, 8, 503  # all logits take 424 kB, the inputs 16 kB at most
    bound = 40_000
    y, leaves = labels(n, v, masked=0.1), [t.requires_grad_() for t in tensors(n=n, v=v, d=d)]
    with Watch() as watch:
        linear_cross_entropy(
            *leaves, y, chunking=chunking, reduction=reduction, max_logits_bytes=bound
        ).sum().backward()
    assert bound / 2 < watch.largest <= bound


def test_peak_memory_at_three_quarters_masked_is_at_most_a_third_of_plain_pytorch():
    assert peak_extra_bytes("ours", 0.75) <= peak_extra_bytes("unfused", 0.75) / 3


# ---- half precision products, as on a GPU


@CHUNKING
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bound", [None, 2 * (V + 3)])  # a (padded) token at a time, a column at a time
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_half_precision_products_stay_within_the_budget(half_products, chunking, dtype, bound, reduction):
    loss = next(loss for loss in LINEAR if loss.name == f"linear-{chunking}-chunked")  # which has a bias
    y, options = labels(), {"reduction": reduction}
    check_against_plain(
        lambda *t: loss.ours(*t, y, max_logits_bytes=bound, impl="auto", **options),
        lambda *t: loss.plain(*t, y, **options),
        loss.tensors(dtype),
        1 if reduction == "mean" else torch.rand(N),
    )


@CHUNKING
@pytest.mark.parametrize("bound", [None, 5000])  # with room for the cast head, without it
def test_a_weight_of_another_dtype_is_cast_as_a_whole_or_in_slices(monkeypatch, half_products, chunking, bound):
    """An fp32 head that holds bf16 numbers, under bf16 products: within the budget of plain bf16."""
    y, (hidden, weight) = labels(), tensors(torch.bfloat16)
    plain = [run(lambda h, w: plain_cross_entropy(F.linear(h, w), y), (hidden.to(t), weight.to(t)))
             for t in (torch.float64, torch.bfloat16)]  # fmt: skip
    monkeypatch.setattr(matmul, "_SLICE", 7)
    options = {"chunking": chunking, "max_logits_bytes": bound}
    with torch.autocast("cpu", torch.bfloat16):  # which alone admits two dtypes
        ours = run(lambda h, w: linear_cross_entropy(h, w, y, **options), (hidden, weight.float()))
    for name, x, ref, eager in zip(("loss", "dhidden", "dweight"), ours, *plain, strict=True):
        check(name, x, ref, eager, output_dtype=torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_half_precision_weight_under_fp32_products_in_small_slices(monkeypatch, dtype):
    monkeypatch.setattr(matmul, "_SLICE", 7)
    y = labels()
    for loss in LINEAR:
        loss.check(loss.tensors(dtype), y)


@CHUNKING
@pytest.mark.parametrize("spread", [64, 1 / 64])
def test_fp16_gradients_do_not_underflow_under_a_large_divisor(half_products, monkeypatch, chunking, spread):
    """One of the two gradients stays in fp16's range; it must be as good as plain fp16 code whose divisor is 1."""
    num_items = 1_000_000
    y, (hidden, weight) = labels(masked=0), tensors(torch.float16)
    leaves = hidden * spread, weight / spread
    index = 2 if spread > 1 else 1  # dweight grows with hidden, dhidden with weight

    def ours():
        return run(lambda h, w: linear_cross_entropy(h, w, y, chunking=chunking, num_items=num_items), leaves)[index]

    ref, eager = (
        run(lambda h, w: F.cross_entropy(F.linear(h, w), y, reduction="sum"), [t.to(dtype) for t in leaves])[
            index
        ].double()
        / num_items
        for dtype in (torch.float64, torch.float16)
    )
    check("gradient", ours(), ref, eager)
    monkeypatch.setattr(function, "hold_back", lambda factors, *_: (None, factors))
    with pytest.raises(AssertionError, match="error"):
        check("gradient", ours(), ref, eager)


@CHUNKING
@pytest.mark.parametrize("products", ["fp32", "fp16"])
def test_loss_scaling_reaches_fp16_gradients_before_they_are_rounded(request, chunking, products):
    """What GradScaler is for: the loss times 2¹⁵ brings gradients of 1e-7 back into fp16's range."""
    if products == "fp16":
        request.getfixturevalue("half_products")
    y = labels(masked=0)
    check_against_plain(
        lambda h, w: linear_cross_entropy(h, w, y, chunking=chunking, num_items=10_000_000),
        lambda h, w: plain_cross_entropy(F.linear(h, w), y, reduction="sum") * 1e-7,
        tensors(torch.float16),
        2.0**15,
    )


@CHUNKING
def test_holding_back_does_not_push_the_weight_gradient_over_fp16s_range(half_products, chunking):
    """Thousands of tokens with the same label and large hidden states: the mean is small, the sum would pass 65504."""
    n = 8192
    y = torch.zeros(n, dtype=torch.int64)
    check_against_plain(
        lambda h, w: linear_cross_entropy(h, w, y, chunking=chunking, max_logits_bytes=1 << 20),
        lambda h, w: plain_cross_entropy(F.linear(h, w), y),
        (torch.full((n, 2), 16.0).half(), torch.zeros(3, 2).half()),
    )


@CHUNKING
@pytest.mark.parametrize("products", ["fp32", "fp16"])
def test_a_steep_z_loss_does_not_push_the_weight_gradient_over_fp16s_range(request, chunking, products):
    """|dlogits| reaches 2 ζ lse, here 2048: sums of them fit fp16 only with the divisor. The logits are exact."""
    if products == "fp16":
        request.getfixturevalue("half_products")
    y = labels(n=8, masked=0)
    check_against_plain(
        lambda h, w: linear_cross_entropy(h, w, y, chunking=chunking, z_loss=1.0, num_items=1000),
        lambda h, w: plain_cross_entropy(F.linear(h, w), y, z_loss=1.0, num_items=1000),
        (256 * torch.eye(8, 16).half(), torch.randint(-4, 5, (V, 16)).half()),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_gradient_kept_in_fp32_is_not_rounded_to_half_precision(dtype):
    """The first chunk of dW begins its accumulator."""
    dlogits, x = torch.randn(300, 500).to(dtype), torch.randn(300, D).to(dtype)
    exact, out = dlogits.double().T @ x.double(), torch.empty(500, D)
    matmul.grad_weight(dlogits, x, out)
    assert (out - exact).abs().max() <= 4 * torch.finfo(torch.float32).eps * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_gradient_of_the_input_is_summed_in_fp32_even_where_the_product_is_split(dtype, monkeypatch):
    """A product whose parts are added in half precision, as cuBLAS may where there are few rows and a long sum."""

    def split(a, b, out):
        parts = zip(a.chunk(7, 1), b.chunk(7), strict=True)
        return out.copy_(sum((x.float() @ y.float()).to(out.dtype) for x, y in parts))

    monkeypatch.setattr(torch, "mm", split)
    dlogits, weight = torch.randn(5, 700).to(dtype), torch.randn(700, D).to(dtype)
    exact, out = dlogits.double() @ weight.double(), torch.empty(5, D, dtype=dtype)
    matmul.grad_input(dlogits, weight, out)
    summed = 4 * torch.finfo(torch.float32).eps * exact.abs().max()
    assert ((out - exact).abs() <= 0.5 * torch.finfo(dtype).eps * exact.abs() + summed).all()


@CHUNKING
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("products", ["fp32", "own"])
@pytest.mark.parametrize("offset", [0, 64])
def test_the_gradient_of_a_token_that_the_model_is_sure_of_keeps_its_digits(request, chunking, dtype, products, offset):
    """p_y is 1 - 1e-3 to 1 - 3e-5, which bf16 rounds to 1. The head is the identity: dhidden shows p_y - 1."""
    if products == "own":
        request.getfixturevalue("half_products")
    v = 8
    sure = torch.linspace(9, 12.5, v)  # these and the sums with the offset are exact in bf16
    hidden = torch.cat([sure.diag(), torch.full((v, 1), float(offset))], 1)
    weight = torch.cat([torch.eye(v), torch.ones(v, 1)], 1)
    _, dhidden, _ = run(
        lambda h, w: linear_cross_entropy(h, w, torch.arange(v), chunking=chunking, reduction="sum"),
        (hidden.to(dtype), weight.to(dtype)),
    )
    ref = -1 / (1 + sure.double().exp() / (v - 1))
    error = (dhidden.double().diagonal() - ref).abs()
    # p_y is a number near 1, summed in fp32: four eps, as in the budget. Then p_y - 1 is rounded once.
    assert (error <= 4 * torch.finfo(torch.float32).eps + torch.finfo(dtype).eps / 2 * ref.abs()).all()


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("shape", [(0,), (2, 0)])
@pytest.mark.parametrize("shift", [False, True])
def test_an_empty_batch_has_nothing_kept_whatever_the_capacity(impl, shape, shift):
    kept = KeptTokens.from_labels(torch.zeros(shape, dtype=torch.int64), shift=shift, capacity=4)
    hidden, weight = torch.zeros(*shape, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    for options in ({}, {"token_weight": torch.ones(shape)}, {"reduction": "none"}):
        loss = linear_cross_entropy(hidden, weight, kept=kept, shift=shift, impl=impl, **options)
        assert loss.sum() == 0
        assert not any(g.any() for g in torch.autograd.grad(loss.sum(), (hidden, weight)))


@pytest.mark.parametrize("loop", ["tokens", "vocab"])
@pytest.mark.parametrize(("hidden", "head"), [(torch.float32, torch.float64), (torch.float64, torch.bfloat16)])
def test_float64_beside_another_dtype_under_autocast(hidden, head, loop):
    x, w = torch.randn(20, D, dtype=hidden, requires_grad=True), torch.randn(V, D).to(head).requires_grad_()
    y = labels(20, V)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(x, w, y, chunking=loop, max_logits_bytes=24 * 104 * 8 // 4)
    grads = torch.autograd.grad(loss, (x, w))
    plain = [t.detach().double().requires_grad_() for t in (x, w)]
    wanted = torch.autograd.grad(torch.nn.functional.cross_entropy(plain[0] @ plain[1].T, y), plain)
    assert [g.dtype for g in grads] == [hidden, head]
    for found, ref in zip(grads, wanted, strict=True):
        torch.testing.assert_close(found.double(), ref, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("value", ["x", 2.5, torch.tensor(3), [1, 2]], ids=str)
def test_an_ignore_index_that_is_no_integer_is_refused(value):
    y = torch.tensor([1, 3, 4])
    with pytest.raises(TypeError, match="ignore_index: expected an integer"):
        linear_cross_entropy(torch.randn(3, D), torch.randn(V, D), y, ignore_index=value)
    with pytest.raises(TypeError, match="ignore_index: expected an integer"):
        KeptTokens.from_labels(y, value)


def test_labels_that_are_none_are_refused():
    for bad in ([1, 2], torch.tensor([1j])):
        with pytest.raises(TypeError, match="labels: expected"):
            KeptTokens.from_labels(bad)


@pytest.mark.parametrize(("value", "error"), [(torch.tensor([0.1, 0.2]), TypeError), ("x", TypeError), (2, ValueError)])
def test_label_smoothing_is_refused_by_name_beside_class_weights_too(value, error):
    tensors = torch.randn(3, D), torch.randn(V, D), torch.tensor([1, 3, 4])
    with pytest.raises(error, match="label_smoothing: expected"):
        linear_cross_entropy(*tensors, label_smoothing=value, weight=torch.ones(V))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_float64_sum_of_half_precision_products_takes_them_in_fp32(dtype):
    """Sums of fp16 gradients up to 2¹⁵ would overflow in half precision."""
    acc, a, b = torch.zeros(5, 3).double(), torch.full((5, 700), 2.0**15).to(dtype), torch.ones(700, 3).to(dtype)
    for _ in range(2):
        matmul.accumulate(acc, a, b)
    assert (acc == 2 * 700 * 2.0**15).all()


def test_a_sum_in_fp32_of_half_precision_products_keeps_what_its_schema_says():
    a, b = torch.randn(5, 7).bfloat16(), torch.randn(7, 3).bfloat16()
    torch.library.opcheck(torch.ops.sft_kernels.addmm_.default, (torch.randn(5, 3), a, b, 1))
    acc = torch.full((5, 3), float("nan"))
    matmul.accumulate(acc, a, b, beta=0)  # which does not read it
    assert torch.equal(acc, a.float() @ b.float())
