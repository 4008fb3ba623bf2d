"""What only a GPU can show of the losses: no wait for the device, and replay in a CUDA graph."""

import pytest
import torch

from sft_kernels import KeptTokens, cross_entropy, linear_cross_entropy
from sft_kernels._budget import check
from sft_kernels.verify import gradients, loss_oracle, plain_linear_cross_entropy

from .helpers import labels, same_bits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
N, D, V = 515, 256, 50257
LOOPS = {"tokens": {"chunking": "tokens", "max_logits_bytes": 60 * V * 2}, "vocab": {"chunking": "vocab"}, "auto": {}}


def leaves(dtype=torch.bfloat16):
    pair = torch.randn(N, D), torch.randn(V, D) * 2 / D**0.5
    return [t.to("cuda", dtype).requires_grad_() for t in pair]


@pytest.fixture
def never_wait():
    """Raises where the host waits for the device."""

    def on():
        torch.cuda.set_sync_debug_mode("error")

    yield on
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("loop", [*LOOPS])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_large_vocabularies_stay_within_the_budget(loop, dtype):
    pair, y = leaves(dtype), labels(N, V)
    found = gradients(lambda h, w: linear_cross_entropy(h, w, y.cuda(), **LOOPS[loop]), pair, -1.7)
    eager = gradients(lambda h, w: plain_linear_cross_entropy(h, w, None, y.cuda()), pair, -1.7)
    for name, x, ref, e in zip(
        ("loss", "dinput", "dweight"), found, loss_oracle(pair, y, upstream=-1.7), eager, strict=True
    ):
        check(name, x, ref, e)


@pytest.mark.parametrize("loop", [*LOOPS])
@pytest.mark.parametrize("capacity", [None, N])
def test_with_kept_tokens_nothing_waits(never_wait, loop, capacity):
    pair, kept = leaves(), KeptTokens.from_labels(labels(N, V), capacity=capacity).to("cuda")
    call = {**LOOPS[loop], "kept": kept, "return_stats": True}
    torch.autograd.grad(linear_cross_entropy(*pair, **call)[0], pair)  # compiles
    torch.cuda.synchronize()
    never_wait()
    torch.autograd.grad(3 * linear_cross_entropy(*pair, **call)[0], pair)


def test_over_given_logits_nothing_waits(never_wait):
    logits = torch.randn(N, V, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    y = labels(N, V).cuda()
    torch.autograd.grad(cross_entropy(logits, y), logits)
    torch.cuda.synchronize()
    never_wait()
    torch.autograd.grad(3 * cross_entropy(logits, y), logits)


@pytest.mark.parametrize("loop", [*LOOPS])
def test_a_captured_step_replays_with_the_next_batch(loop):
    pair, capacity = leaves(), N // 2
    batches = [KeptTokens.from_labels(labels(N, V, masked), capacity=capacity) for masked in (0.6, 0.9, 0.7)]
    kept = batches[0].to("cuda")

    def step():
        loss = linear_cross_entropy(*pair, kept=kept, **LOOPS[loop])
        return loss.detach(), *torch.autograd.grad(loss, pair)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for batch in batches:
        kept.rows.copy_(batch.rows)
        kept.targets.copy_(batch.targets)
        graph.replay()
        assert same_bits(out, step())


def test_same_inputs_give_the_same_bits():
    pair, y = leaves(), labels(N, V).cuda()
    first, second = (gradients(lambda h, w: linear_cross_entropy(h, w, y), pair) for _ in range(2))
    assert same_bits(first, second)


def test_a_label_outside_gives_nan_and_under_the_check_raises(monkeypatch):
    pair, y = leaves(), labels(N, V).cuda()
    y[3] = V
    assert linear_cross_entropy(*pair, y).isnan()
    monkeypatch.setenv("SFT_KERNELS_CHECK", "1")
    with pytest.raises(IndexError, match="token"):
        linear_cross_entropy(*pair, y)


# ---- values of each token


@pytest.mark.parametrize("loop", [*LOOPS])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_values_of_each_token_of_large_vocabularies_stay_within_the_budget(loop, dtype):
    pair, y, g = leaves(dtype), labels(N, V), [torch.rand(N) - 0.5 for _ in range(3)]
    call = {"return_stats": "tokens", "reduction": "none"}
    found = gradients(lambda h, w: linear_cross_entropy(h, w, y.cuda(), **LOOPS[loop], **call), pair, -1.7, g)
    eager = gradients(lambda h, w: plain_linear_cross_entropy(h, w, None, y.cuda(), **call), pair, -1.7, g)
    ref = loss_oracle(pair, y, upstream=-1.7, of_stats=g, reduction="none")
    for i, (x, r, e) in enumerate(zip(found, ref, eager, strict=True)):
        if i != 4:  # of logits in half precision another class may be the largest
            check(str(i), x, r, e)
    kept = y != -100
    ours, largest = found[4].cpu()[kept], eager[4].cpu()[kept]
    assert (ours == largest).float().mean() > 0.9
    assert (found[4].cpu()[~kept] == -1).all()


@pytest.mark.parametrize("loop", [*LOOPS])
def test_with_values_of_each_token_nothing_waits(never_wait, loop):
    pair, kept = leaves(), KeptTokens.from_labels(labels(N, V)).to("cuda")

    def step():
        value, found = linear_cross_entropy(*pair, kept=kept, return_stats="tokens", **LOOPS[loop])
        torch.autograd.grad(value + found.entropy.sum() + found.logprob.exp().sum(), pair)

    step()  # compiles
    torch.cuda.synchronize()
    never_wait()
    step()
