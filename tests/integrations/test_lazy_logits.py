"""Lazy logits are logits: whatever is done to them has the value and the gradients that it has on real ones."""

import weakref

import pytest
import torch
import torch.nn.functional as F

import sft_kernels
from sft_kernels.integrations import head_counts, patch

B, S, D, V = 2, 7, 12, 23


class Model(torch.nn.Module):
    """Hidden states from an embedding, and a head."""

    def __init__(self, bias=False, tied=False):
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(V, D)
        self.lm_head = torch.nn.Linear(D, V, bias=bias)
        if tied:
            self.lm_head.weight = self.embed.weight

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, ids):
        return self.lm_head(self.embed(ids).tanh())


IDS = torch.randint(0, V, (B, S), generator=torch.Generator().manual_seed(1))
LABELS = IDS.roll(-1, 1).clone()
LABELS[:, :3] = LABELS[1, 5] = -100
SHIFTED = F.pad(IDS, (0, 1), value=-100)[:, 1:]
KEPT = LABELS != -100


def trained(model, function, cast=None):
    """``function`` of the model's logits, and the gradients of its sum."""
    model.zero_grad()
    logits = model(IDS)
    out = function(logits if cast is None else logits.to(cast))
    outs = out if isinstance(out, tuple) else (out,)
    parts = [o.double().sum() * (i + 1) for i, o in enumerate(outs) if o.requires_grad]
    if parts:
        sum(parts).backward()
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    return [o.detach() for o in outs], grads


def same(function, expect, model=None, cast=None):
    """Hold ``function`` on lazy logits to itself on real ones; ``expect`` counts (fused, materialised)."""
    model = model or Model()
    stock = trained(model, function, cast)
    patch(model)
    ours = trained(model, function, cast)
    counts = head_counts(model)
    for a, b in zip(stock[0], ours[0], strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        torch.testing.assert_close(b, a, rtol=2e-5, atol=2e-6)
    for a, b in zip(stock[1], ours[1], strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(b, a, rtol=2e-4, atol=2e-6)
    if expect is not None:
        assert (counts.fused, counts.materialised) == expect
    return model


def flat(x):
    return x.reshape(-1, V)


def written_as_in_trl_entropy(x, chunk=4):
    entropies = []
    for part in x.reshape(-1, x.shape[-1]).split(chunk, dim=0):
        logps = F.log_softmax(part, dim=-1)
        entropies.append(-(torch.exp(logps) * logps).sum(-1))
    return torch.cat(entropies).reshape(x.shape[:-1])


def written_as_in_trl_logprob(x, index=IDS):
    selected = torch.gather(x, dim=-1, index=index.unsqueeze(-1))
    lse = torch.stack([torch.logsumexp(row, dim=-1) for row in x])
    return (selected - lse.unsqueeze(-1)).squeeze(-1)


def written_as_in_trl_logprob_half(x, index=IDS):
    return torch.stack(
        [F.log_softmax(row, -1).gather(-1, y.unsqueeze(-1))[:, 0] for row, y in zip(x, index, strict=True)]
    )


CLASS_WEIGHT = torch.rand(V, generator=torch.Generator().manual_seed(2))

FUSED = {
    "as transformers": (1, lambda x: F.cross_entropy(x.float().view(-1, V), LABELS.view(-1), ignore_index=-100)),
    "by our name": (1, lambda x: sft_kernels.cross_entropy(flat(x), LABELS.view(-1), z_loss=0.1)),
    "by our name, with every token's values": (
        1,
        lambda x: sft_kernels.cross_entropy(flat(x), IDS.view(-1), reduction="sum", return_stats="tokens")[1].lse,
    ),
    "sum": (1, lambda x: F.cross_entropy(flat(x), LABELS.view(-1), reduction="sum") / 5),
    "none": (1, lambda x: F.cross_entropy(flat(x), LABELS.view(-1), reduction="none")),
    "module": (1, lambda x: torch.nn.CrossEntropyLoss()(flat(x), LABELS.view(-1))),
    "shifted by a slice": (1, lambda x: F.cross_entropy(x[..., :-1, :].contiguous().view(-1, V), IDS[:, 1:].flatten())),
    "transposed": (1, lambda x: F.cross_entropy(x.transpose(1, 2), LABELS)),
    "permuted": (1, lambda x: F.cross_entropy(x.permute(0, 2, 1), LABELS, reduction="none")),
    "kept rows by a mask": (1, lambda x: F.cross_entropy(x[KEPT], LABELS[KEPT])),
    "rows by number": (1, lambda x: F.cross_entropy(x[torch.tensor([1, 0, 1]), torch.tensor([2, 2, 4])], IDS[0, :3])),
    "one row": (1, lambda x: F.cross_entropy(x[0, 3], IDS[0, 3])),
    "index_select": (1, lambda x: F.cross_entropy(x[0].index_select(0, torch.tensor([4, 1])), IDS[0, :2])),
    "smoothed": (1, lambda x: F.cross_entropy(flat(x), LABELS.view(-1), label_smoothing=0.1)),
    "class weights": (1, lambda x: F.cross_entropy(flat(x), LABELS.view(-1), CLASS_WEIGHT)),
    "other ignore_index": (1, lambda x: F.cross_entropy(flat(x), IDS.view(-1), ignore_index=int(IDS[0, 0]))),
    "softcap": (1, lambda x: F.cross_entropy(flat(torch.tanh(x / 0.5) * 0.5), LABELS.view(-1))),
    "softcap, number first": (1, lambda x: F.cross_entropy(flat(0.5 * F.tanh(x / 0.5)), LABELS.view(-1))),
    "scale, softcap, temperature": (
        1,
        lambda x: F.cross_entropy(flat(torch.tanh(x * 3 / 0.5) * 0.5 / 0.7), LABELS.view(-1)),
    ),
    "divided": (1, lambda x: F.cross_entropy(flat(x / 0.3), LABELS.view(-1))),
    "log_softmax, nll_loss": (1, lambda x: F.nll_loss(F.log_softmax(flat(x), -1), LABELS.view(-1))),
    "log_softmax in fp32, nll_loss": (
        1,
        lambda x: F.nll_loss(F.log_softmax(flat(x), -1, dtype=torch.float32), LABELS.view(-1), reduction="sum"),
    ),
    "log_softmax, gather": (1, lambda x: x.log_softmax(-1).gather(-1, IDS[..., None])[..., 0].exp()),
    "gather": (1, lambda x: x.gather(-1, IDS[..., None]).square()),
    "logsumexp": (1, lambda x: x.logsumexp(-1).square()),
    "logsumexp, kept dimension": (1, lambda x: torch.logsumexp(x, dim=(-1,), keepdim=True)),
    "two losses": (2, lambda x: (F.cross_entropy(flat(x), LABELS.view(-1)), F.cross_entropy(flat(x), IDS.view(-1)))),
    "loss and z-loss": (2, lambda x: F.cross_entropy(flat(x), LABELS.view(-1)) + 0.1 * x.logsumexp(-1).pow(2).mean()),
    "loss, then statistics": (2, lambda x: (F.cross_entropy(flat(x), LABELS.view(-1)), x.argmax(-1))),
    "TRL's entropy": (1, written_as_in_trl_entropy),
    "TRL's log-probability": (1, written_as_in_trl_logprob),
    "TRL's log-probability in half precision": (B, written_as_in_trl_logprob_half),
    "TRL's log-probability with a temperature": (1, lambda x: written_as_in_trl_logprob(x / 0.7)),
    "TRL's log-probability and entropy": (1, lambda x: (written_as_in_trl_logprob(x), written_as_in_trl_entropy(x))),
    "verl's entropy": (1, lambda x: x.logsumexp(-1) - (F.softmax(x, -1) * x).sum(-1)),
    "entropy, minus inside": (1, lambda x: torch.sum(-(x.softmax(-1) * x.log_softmax(-1)), dim=-1)),
    "argmax": (1, lambda x: x.argmax(-1)),
    "argmax of shifted, kept": (1, lambda x: x[..., :-1, :].argmax(dim=-1)[KEPT[:, 1:]]),
    "detached argmax": (1, lambda x: x.detach().argmax(dim=-1, keepdim=True)),
    "added bias": (1, lambda x: F.cross_entropy(flat(x + torch.linspace(-1, 1, V)[None]), LABELS.view(-1))),
    "times a vector": (1, lambda x: F.cross_entropy(flat(x * torch.linspace(0.5, -2, V)), LABELS.view(-1))),
    "times a tensor of one number": (1, lambda x: F.cross_entropy(flat(x * torch.tensor([-1.5])), LABELS.view(-1))),
    "divided by a tensor of one number": (
        1,
        lambda x: F.cross_entropy(flat(x / torch.full((), 0.5).view(1)), LABELS.view(-1)),
    ),
    "scaled, times a vector, plus a bias": (
        1,
        lambda x: F.cross_entropy(flat((x * 2) * torch.linspace(0.5, 2, V) + torch.arange(V) / V), LABELS.view(-1)),
    ),
    "bias, then scaled": (1, lambda x: F.cross_entropy(flat((x + torch.arange(V) / V) / 0.3), LABELS.view(-1))),
    "two biases, two logsumexps": (2, lambda x: (x.logsumexp(-1), (x + torch.arange(V) / V).logsumexp(-1))),
    "a bias of three dimensions": (
        1,
        lambda x: F.cross_entropy(flat(x + torch.linspace(0, 1, V)[None, None]), LABELS.view(-1)),
    ),
    "detached, plus a bias": (
        2,
        lambda x: F.cross_entropy(flat(x.detach() + torch.arange(V) / V), LABELS.view(-1)) + 0 * x.logsumexp(-1).sum(),
    ),
    "first classes": (1, lambda x: F.cross_entropy((x[..., :21] / 0.7)[..., :20].flatten(0, 1), IDS.view(-1) % 20)),
    "first classes, softcapped, then statistics": (
        2,
        lambda x: (x[..., :9].float().tanh()[0].logsumexp(-1), x[0].logsumexp(-1)),
    ),
    "squeezed": (1, lambda x: F.cross_entropy(x.unsqueeze(0).squeeze(0)[0:1].squeeze(0), LABELS[0])),
    "split": (2, lambda x: sum(F.cross_entropy(part.flatten(0, 1), IDS[:1].flatten()) for part in x.split(1))),
    "unbound": (B, lambda x: tuple(F.cross_entropy(row, y) for row, y in zip(x, LABELS, strict=True))),
}


@pytest.mark.parametrize("name", FUSED)
def test_a_loss_or_a_statistic_is_fused(name):
    fused, function = FUSED[name]
    same(function, (fused, 0))


@pytest.mark.parametrize("name", ["as transformers", "softcap", "TRL's log-probability", "logsumexp", "gather"])
@pytest.mark.parametrize("options", [{"bias": True}, {"tied": True}], ids=str)
def test_with_a_bias_and_with_tied_weights(name, options):
    fused, function = FUSED[name]
    same(function, (fused, 0), Model(**options))


def in_place(x):
    x.div_(0.5)
    return F.cross_entropy(flat(x), LABELS.view(-1))


def written_to(x):
    x[:, :, [1, 5]] = -5.0
    return F.cross_entropy(flat(x), LABELS.view(-1))


def written_through_a_view(x):
    view = x.view(-1, V)
    view[3] = 0.0
    x[0, 0].mul_(2)
    return F.cross_entropy(flat(x), LABELS.view(-1)) + x.softmax(-1)[0].square().sum()


def written_to_a_copy(x):
    copy = x.clone()
    copy[:, :2] = 0.0
    return F.cross_entropy(flat(x), IDS.view(-1)) + F.cross_entropy(flat(copy), IDS.view(-1))


def copied_then_written(x):
    before = x * 2
    x[:, :2] = 0.0
    return F.cross_entropy(flat(x), IDS.view(-1)) + before.square().sum()


def reshaped_copy_written(x):
    copy = x[:, :-1].reshape(-1, V)
    copy[2:] = 0.0
    return F.cross_entropy(copy, IDS[:, 1:].flatten()) + F.cross_entropy(flat(x), IDS.view(-1))


class Halved(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad / 2


def seen_under_no_grad(x):
    with torch.no_grad():
        view = x[1:]
    return F.cross_entropy(flat(view), LABELS[1]), x.sum()


def hooked(x):
    x.register_hook(lambda grad: grad * 3)
    return F.cross_entropy(flat(x), LABELS.view(-1))


def only_the_bias_learns(x):
    bias = torch.zeros(V, requires_grad=True)
    (by_bias,) = torch.autograd.grad(F.cross_entropy(flat(x.detach() + bias), LABELS.view(-1)), bias)
    return by_bias, x.sum()


def detached_leaf(x):
    leaf = x.detach().requires_grad_()
    F.cross_entropy(flat(leaf), LABELS.view(-1)).backward()
    return leaf.grad, x.sum()


def smoothed_as_in_transformers(x):
    log_probs = -F.log_softmax(x, dim=-1)
    return log_probs.gather(-1, IDS[..., None]), log_probs.sum(-1, keepdim=True, dtype=torch.float32)


def written_to_the_first_classes(x):
    first = x[..., :9]
    first[0] = 1.0
    return F.cross_entropy(flat(x), IDS.view(-1)) + F.cross_entropy(first.flatten(0, 1), IDS.view(-1) % 9)


def written_below_the_first_classes(x):
    first = x[..., :9]
    x[0] = 1.0
    return F.cross_entropy(first.flatten(0, 1), IDS.view(-1) % 9)


MATERIALISED = {
    "written to the first classes": written_to_the_first_classes,
    "written below the first classes": written_below_the_first_classes,
    "smoothed as in transformers": smoothed_as_in_transformers,
    "only the bias learns": only_the_bias_learns,
    "somebody's own backward": lambda x: F.cross_entropy(flat(Halved.apply(x)), LABELS.view(-1)),
    "seen under no_grad": seen_under_no_grad,
    "hooked": hooked,
    "plus a constant copy": lambda x: F.cross_entropy(flat(x + (x * 2).detach()), LABELS.view(-1)),
    "scale that fp32 cannot hold": lambda x: F.cross_entropy(flat(x * 1e-30 * 1e-30), LABELS.view(-1)),
    "detached leaf": detached_leaf,
    "entropy of constant probabilities": lambda x: (x.softmax(-1).detach() * x.log_softmax(-1)).sum(-1),
    "mean of constant logits": lambda x: (x.softmax(-1) * x.detach()).sum(-1),
    "log_softmax times 0": lambda x: ((x.log_softmax(-1) * 0).argmax(-1), x.mean()),
    "numpy's names": lambda x: x.sum(axis=-1, keepdims=True),
    "softmax squared": lambda x: x.softmax(-1).square(),
    "by our name, with a softcap": lambda x: sft_kernels.cross_entropy(flat(x), LABELS.view(-1), softcap=0.5),
    "by our name, probabilities": lambda x: sft_kernels.cross_entropy(flat(x), torch.full((B * S, V), 1 / V)),
    "topk": lambda x: x.topk(3, -1).values,
    "max": lambda x: x.max(-1).values,
    "mean over the rows": lambda x: x.mean(1),
    "some classes": lambda x: x[..., 3:9].sum(-1),
    "one class": lambda x: x[:, -1, 4],
    "stacked": lambda x: torch.stack([x[0], x[1]]).square().sum(),
    "masked": lambda x: F.cross_entropy(flat(x.masked_fill(torch.arange(V) > 15, -1e4)), IDS.view(-1) % 15),
    "times a vector for the rows": lambda x: F.cross_entropy(flat(x * torch.ones(S, 1)), LABELS.view(-1)),
    "times a vector behind a softcap": lambda x: F.cross_entropy(flat(x.tanh() * torch.ones(V)), LABELS.view(-1)),
    "negative scale": lambda x: F.cross_entropy(flat(x * -2.0), LABELS.view(-1)),
    "kl": lambda x: F.kl_div(F.log_softmax(x, -1), torch.full((B, S, V), 1 / V), reduction="batchmean"),
    "probabilities": lambda x: F.cross_entropy(flat(x), torch.full((B * S, V), 1 / V)),
    "smoothed class weights": lambda x: F.cross_entropy(flat(x), IDS.view(-1), CLASS_WEIGHT, label_smoothing=0.1),
    "classes summed": lambda x: x.log_softmax(-1).sum(-1),
    "several classes gathered": lambda x: x.gather(-1, torch.stack([IDS, IDS.flip(0)], -1)),
    "softmax over the rows": lambda x: x.softmax(1).square(),
    "doubled": lambda x: F.cross_entropy(flat(x.double()), LABELS.view(-1)),
    "split classes": lambda x: x[..., :22].view(B, S, 11, 2).logsumexp(-1),
    "in place": in_place,
    "written to": written_to,
    "written through a view": written_through_a_view,
    "written to a copy": written_to_a_copy,
    "copied, then written": copied_then_written,
    "reshaped copy written": reshaped_copy_written,
}


@pytest.mark.parametrize("name", MATERIALISED)
def test_anything_else_computes_real_logits_once(name):
    model = same(MATERIALISED[name], None)
    assert head_counts(model).materialised == 1


def test_a_mask_that_changes_afterwards_does_not_matter():
    def function(x):
        mask = KEPT.clone()
        kept = x.detach()[mask]
        mask.logical_not_()
        return kept.argmax(-1), x.logsumexp(-1)

    same(function, (2, 0))


@pytest.mark.parametrize(
    ("written", "use"),
    [
        (lambda model, c: c.mul_(2), lambda z, c: F.cross_entropy(flat(z), LABELS.view(-1))),
        (lambda model, c: c.mul_(2), lambda z, c: z.topk(2)),
        (
            lambda model, c: model.lm_head.weight.add_(1),
            lambda z, c: z.argmax(-1),
        ),
    ],
    ids=["bias, loss", "bias, real logits", "weight, statistics"],
)
def test_what_was_written_to_since_is_an_error(written, use):
    model, c = patch(Model()), torch.ones(V)
    logits = model(IDS) + c
    with torch.no_grad():
        written(model, c)
    with pytest.raises(RuntimeError, match=r"logits: .* written to"):
        use(logits, c)


@pytest.mark.parametrize("change", [lambda x: x.squeeze_(), lambda x: x.t_(), lambda x: x.set_(torch.ones(2))])
def test_a_change_of_shape_in_place_is_an_error(change):
    with pytest.raises(NotImplementedError, match=r"logits: \w+ changes"):
        change(patch(Model())(IDS[0]).detach())


def test_setting_data_is_an_error():
    with pytest.raises(NotImplementedError, match="copy_"):
        patch(Model())(IDS).data = torch.ones(B, S, V)


def test_a_statistic_that_is_written_to_does_not_come_back():
    def function(x):
        lse, prediction = x.detach().logsumexp(-1), x.argmax(-1)
        lse.mul_(2)
        prediction[KEPT] = -100
        return x.detach().logsumexp(-1), x.argmax(-1), x.logsumexp(-1)

    same(function, (2, 0))


def test_statistics_of_inference_mode_serve_a_later_loss():
    def function(x):
        with torch.inference_mode():
            first = (x.argmax(-1), x.logsumexp(-1))
        return *(t.clone() for t in first), F.cross_entropy(flat(x), LABELS.view(-1)), x.logsumexp(-1)

    same(function, None)


def test_a_checkpoint_around_head_and_loss():
    def function(x):
        return F.cross_entropy(flat(x), LABELS.view(-1))

    gradients = []
    for model in (Model(), patch(Model())):
        loss = torch.utils.checkpoint.checkpoint(
            lambda ids, model=model: function(model(ids)), IDS, use_reentrant=False
        )
        loss.backward()
        gradients.append(model.lm_head.weight.grad)
    torch.testing.assert_close(*gradients)


def test_other_parameters_by_functional_call():
    model = patch(Model())
    other = {"lm_head.weight": torch.randn(V, D, requires_grad=True)}
    logits = torch.func.functional_call(model, other, (IDS,))
    stock = F.linear(model.embed(IDS).tanh(), other["lm_head.weight"])
    for x, grads in ((logits, []), (stock, [])):
        grads += torch.autograd.grad(F.cross_entropy(flat(x), LABELS.view(-1)), other["lm_head.weight"])
    torch.testing.assert_close(logits.logsumexp(-1), stock.logsumexp(-1))


def test_a_patched_model_in_evaluation_is_one_graph():
    model = patch(Model()).eval()
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(IDS), model(IDS))
    exported = torch.export.export(model, (IDS,), strict=False)
    torch.testing.assert_close(exported.module()(IDS), model(IDS))


@pytest.mark.parametrize("std", [5.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_first_comparison_raises_no_false_alarm(dtype, std):
    for seed in range(20):
        torch.manual_seed(seed)
        head = patch(Model().to(dtype)).lm_head
        hidden = (torch.randn(8, D) * std / D**0.5).to(dtype).requires_grad_()
        head.weight.data.normal_()
        F.cross_entropy(head(hidden), torch.randint(0, V, (8,)))


def test_the_first_comparison_leaves_infinite_logits_to_the_loss():
    head = patch(Model()).lm_head
    hidden = torch.full((3, D), float("inf"), requires_grad=True)
    assert not F.cross_entropy(head(hidden), IDS[0, :3]).isfinite()


def test_the_first_comparison_finds_a_wrong_record(monkeypatch):
    from sft_kernels.integrations.lazy import Values

    monkeypatch.setattr(Values, "shaping", property(lambda self: (2.0, None)))
    with pytest.raises(RuntimeError, match=r"Model\.lm_head is not that of the unpatched model: losses"):
        F.cross_entropy(flat(patch(Model())(IDS)), LABELS.view(-1))


def test_hidden_states_are_freed_by_the_backward_of_real_logits():
    model = patch(Model())
    hidden = model.embed(IDS).tanh()
    loss = model.lm_head(hidden).square().mean()
    freed = weakref.ref(hidden)
    del hidden
    loss.backward()
    assert freed() is None
