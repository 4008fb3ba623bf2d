"""Both losses under ``torch.compile(fullgraph=True)``: traced whole, forward and backward, with eager's numbers."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from sft_kernels import KeptTokens, cross_entropy, linear_cross_entropy
from sft_kernels._backend import resolve
from sft_kernels._budget import check

from .helpers import D, N, V, labels, same_bits

LOOPS = {
    "tokens": {},
    "token chunks": {"chunking": "tokens", "max_logits_bytes": 9 * V * 4},
    "vocab": {"chunking": "vocab", "max_logits_bytes": 48 * N * 4},
}
IMPLS = pytest.mark.parametrize("impl", ["torch", "triton", "cuda"])


@pytest.fixture(autouse=True)
def _poison_unwritten_memory():
    """Off: what it wraps cannot be traced."""
    torch._dynamo.reset()


def leaves():
    return torch.randn(N, D, requires_grad=True), (torch.randn(V, D) * 2 / D**0.5).requires_grad_()


def linear(kept, **options):
    def loss(hidden, weight, rows, targets):
        return linear_cross_entropy(hidden, weight, kept=kept._replace(rows=rows, targets=targets), **options)

    return loss


def compare(loss, tensors, backend="aot_eager"):
    """Values and gradients of the compiled loss against eager's, a second backward included."""
    inputs = [t for t in tensors if t.requires_grad]
    eager = loss(*tensors)
    upstream = torch.rand_like(eager)
    reference = (eager, *torch.autograd.grad(eager, inputs, upstream))
    compiled = torch.compile(loss, fullgraph=True, backend=backend)(*tensors)
    first = [g.clone() for g in torch.autograd.grad(compiled, inputs, upstream, retain_graph=True)]
    second = torch.autograd.grad(compiled, inputs, 2 * upstream)
    for x, ref in zip((compiled, *first), reference, strict=True):
        check("compiled", x.detach(), ref.detach().double(), ref.detach())
    assert same_bits(second, [2 * g for g in first])


@IMPLS
@pytest.mark.parametrize("capacity", [None, N])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("loop", ["tokens", "vocab"])
def test_linear_cross_entropy(impl, capacity, reduction, loop):
    kept = KeptTokens.from_labels(labels(), capacity=capacity)
    compare(linear(kept, impl=impl, reduction=reduction, **LOOPS[loop]), (*leaves(), kept.rows, kept.targets))


def test_with_every_scalar_option_and_statistics():
    kept = KeptTokens.from_labels(labels())
    options = {"label_smoothing": 0.1, "softcap": 5.0, "logit_scale": 0.5, "z_loss": 0.01, "return_stats": True}
    loss = linear(kept, impl="triton", **options)
    tensors = (*leaves(), kept.rows, kept.targets)
    compare(lambda *t: loss(*t)[0], tensors)
    _, eager = loss(*tensors)
    _, compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(*tensors)
    assert same_bits(compiled, eager)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("loop", [*LOOPS])
def test_products_in_half_precision(half_products, loop, dtype):
    kept = KeptTokens.from_labels(labels())
    tensors = [t.detach().to(dtype).requires_grad_() for t in leaves()]
    loss = linear(kept, impl="triton", **LOOPS[loop])
    tensors = (*tensors, kept.rows, kept.targets)
    found, reference = (
        torch.autograd.grad(function(*tensors), tensors[:2])
        for function in (torch.compile(loss, fullgraph=True, backend="aot_eager"), loss)
    )
    assert same_bits(found, reference)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"reduction": "none"}, {"label_smoothing": 0.1, "softcap": 5.0}, {"num_items": 7}], ids=str
)
def test_cross_entropy(impl, dtype, options):
    logits, y = (2 * torch.randn(N, V)).to(dtype).requires_grad_(), labels()
    compare(lambda x, t: cross_entropy(x, t, impl=impl, **options), (logits, y))


def test_cross_entropy_of_masked_rows_that_are_not_numbers():
    logits, y = torch.randn(N, V), labels()
    logits[y == -100] = float("nan")
    compare(lambda x, t: cross_entropy(x, t), (logits.requires_grad_(), y))


@pytest.mark.parametrize("poison", [0.0, float("nan")])
def test_what_is_torchs_own_code(poison):
    logits, y, weight = torch.randn(N, V), labels(), torch.rand(V)
    logits[y == -100] = poison
    logits.requires_grad_()
    compare(lambda x, t: cross_entropy(x, t, weight, label_smoothing=0.1), (logits, y))
    compare(lambda x, t: cross_entropy(x, t), (torch.randn(N, V, requires_grad=True), torch.rand(N, V).softmax(1)))


@IMPLS
def test_inductor(impl):
    kept = KeptTokens.from_labels(labels())
    compare(linear(kept, impl=impl), (*leaves(), kept.rows, kept.targets), backend="inductor")


@IMPLS
@pytest.mark.parametrize("options", [{}, LOOPS["token chunks"], {"chunking": "vocab"}], ids=[*LOOPS])
def test_batches_with_other_numbers_of_kept_tokens_share_a_graph(impl, options):
    """One graph for the first number and one for any other, of as many chunks."""
    loss = linear(KeptTokens.from_labels(labels()), impl=impl, **options)
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, backend=graphs)
    for count in (30, 32, 27, 31, 28):  # 4 chunks of tokens each
        y = torch.full((N,), -100)
        y[:count] = torch.randint(0, V, (count,))
        kept = KeptTokens.from_labels(y)
        tensors = (*leaves(), kept.rows, kept.targets)
        found, reference = compiled(*tensors), loss(*tensors)
        assert torch.equal(found, reference)
        assert same_bits(torch.autograd.grad(found, tensors[:2]), torch.autograd.grad(reference, tensors[:2]))
    assert graphs.frame_count <= 2


@IMPLS
def test_without_kept_tokens_the_graph_breaks_and_the_numbers_hold(impl):
    y, tensors = labels(), leaves()
    loss = torch.compile(lambda *t: linear_cross_entropy(*t, impl=impl), backend="aot_eager")
    found, reference = loss(*tensors, y), linear_cross_entropy(*tensors, y, impl=impl)
    assert same_bits(torch.autograd.grad(found, tensors), torch.autograd.grad(reference, tensors))


@pytest.mark.parametrize("impl", ["triton", "cuda"])
@pytest.mark.parametrize("name", ["softmax_stats", "softmax_grad_", "softmax_grad_out"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_operators_keep_what_their_schemas_and_fakes_say(name, smoothing, impl):
    resolve("softmax_grad", impl)  # which defines them
    operators = torch.ops.sft_kernels if impl == "triton" else torch.ops.sft_kernels_cuda
    logit_scale = 0.5 if impl == "triton" else None
    x, y, scale, keep = torch.randn(9, V), torch.randint(0, V, (9,)), torch.rand(9), torch.rand(9) < 0.5
    out = [torch.randn(9, V)] if name == "softmax_grad_out" else []
    rest = (None if name == "softmax_stats" else scale, None, keep, V, smoothing, None, logit_scale, 0.0, True)
    more = (None, True) if impl == "triton" else ()  # no coefficients, predictions
    torch.library.opcheck(getattr(operators, name).default, (x, *out, y, *rest, *more))


@pytest.mark.parametrize("out", [False, True])
def test_gradients_by_coefficients_keep_what_the_schemas_and_fakes_say(out):
    resolve("softmax_grad", "triton")
    operator = torch.ops.sft_kernels.softmax_grad_out if out else torch.ops.sft_kernels.softmax_grad_
    x, y, lse = torch.randn(9, V), torch.randint(0, V, (9,)), torch.full((9,), 5.0, dtype=torch.float64)
    rest = (None, lse, None, V, 0.0, None, 0.5, 0.0, False, torch.randn(9, 4), False)
    torch.library.opcheck(operator.default, (x, *([torch.randn(9, V)] if out else []), y, *rest))


def test_the_scaling_operator_keeps_what_its_schema_says():
    from sft_kernels.ops.softmax_grad import triton_impl  # noqa: F401

    torch.library.opcheck(torch.ops.sft_kernels.scale_.default, (torch.randn(5, 7), torch.tensor(2.0)))


# ---- values of each token


def compare_token_stats(loss, tensors, backend="aot_eager"):
    """Values and gradients of the compiled loss against eager's, through each of them alone and through all."""
    inputs = [t for t in tensors if t.requires_grad]
    value, stats = loss(*tensors)
    upstream = [torch.rand_like(t) for t in (value, *stats[:3])]
    compiled_value, compiled_stats = torch.compile(loss, fullgraph=True, backend=backend)(*tensors)
    eager, compiled = (value, *stats), (compiled_value, *compiled_stats)
    for x, ref in zip(compiled[:4], eager, strict=False):
        check("compiled", x.detach(), ref.detach().double(), ref.detach())
    assert torch.equal(compiled[4], eager[4])
    for asked in ([0, 1, 2, 3], [0], [3], [1]):
        found, expected = (
            torch.autograd.grad([t[i] for i in asked], inputs, [upstream[i] for i in asked], retain_graph=True)
            for t in (compiled, eager)
        )
        for x, ref in zip(found, expected, strict=True):
            check(f"gradient through {asked}", x, ref.double(), ref)


@pytest.mark.parametrize(
    ("impl", "loop", "options"),
    [
        ("torch", "tokens", {"reduction": "none"}),
        ("torch", "vocab", {}),
        ("triton", "tokens", {}),
        ("triton", "token chunks", {"max_logits_bytes": 40 * V * 4}),
    ],
    ids=str,
)
def test_values_of_each_token(impl, loop, options):
    kept = KeptTokens.from_labels(labels(), capacity=None if options.get("reduction") else N)
    loss = linear(kept, impl=impl, return_stats="tokens", **{**LOOPS[loop], **options})
    compare_token_stats(loss, (*leaves(), kept.rows, kept.targets))


@pytest.mark.parametrize(
    ("impl", "options"), [("torch", {}), ("triton", {"reduction": "none", "softcap": 5.0, "z_loss": 0.01})], ids=str
)
def test_values_of_each_token_over_given_logits(impl, options):
    logits, y = (2 * torch.randn(N, V)).requires_grad_(), labels()
    compare_token_stats(lambda x, t: cross_entropy(x, t, impl=impl, return_stats="tokens", **options), (logits, y))


def test_values_of_each_token_that_are_torchs_own_code():
    logits, y, weight = torch.randn(N, V).requires_grad_(), labels(), torch.rand(V)
    compare_token_stats(
        lambda x, t: cross_entropy(x, t, weight, label_smoothing=0.1, return_stats="tokens"), (logits, y)
    )
