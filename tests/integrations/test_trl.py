"""``patch_trl``: the same losses, gradients and metrics as TRL's own fused head."""

import subprocess
import sys

import pytest
import torch

from sft_kernels._budget import check
from sft_kernels.integrations import patch_trl, unpatch_trl
from sft_kernels.integrations import trl as ours

from ..ops.helpers import Watch
from .models import IDS, LABELS, V, llama

pytest.importorskip("trl", reason="patch_trl patches it")

from trl.kernels import chunked_logprob
from trl.trainer import utils

STOCK = chunked_logprob.ChunkedLogProbFunction
SFT = ("log_probs", "entropy", "is_top1")  # what SFTTrainer asks for


@pytest.fixture(autouse=True)
def unpatched():
    yield
    utils._ChunkedLogProbFunction = STOCK
    ours.LogProbs.stock = None


@pytest.fixture
def calls(monkeypatch):
    """The calls of ``linear_cross_entropy`` that ``patch_trl`` makes, one entry each."""
    found, fused = [], ours.linear_cross_entropy
    monkeypatch.setattr(ours, "linear_cross_entropy", lambda *args, **kw: found.append(kw) or fused(*args, **kw))
    return found


def head(dtype=torch.float32, weight_dtype=None, bias=False, N=21, D=16, classes=V):
    """Returns ``(hidden, weight, bias)``, and targets; every other has the largest logit."""
    make = torch.Generator().manual_seed(3)
    hidden, weight, offset = (torch.randn(*shape, generator=make) for shape in ((N, D), (classes, D), (classes,)))
    weight_dtype = weight_dtype or dtype
    leaves = [hidden.to(dtype), (0.5 * weight).to(weight_dtype), offset.to(weight_dtype) if bias else None]
    targets = torch.randint(0, classes, (N,), generator=make)
    targets[::2] = (hidden @ weight.T).argmax(-1)[::2]
    return leaves, targets


def by_definition(hidden, weight, bias, targets, temperature, _, softcap=None, scale=1.0, outputs=()):
    logits = scale * torch.nn.functional.linear(hidden, weight, bias)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    log_p = (logits / temperature).log_softmax(-1)
    log_probs = log_p.gather(1, targets[:, None])[:, 0]
    return log_probs, -(log_p.exp() * log_p).sum(-1), None, None, log_p.argmax(-1) == targets


def values(apply, leaves, targets, *options, upstream):
    """Returns outputs and the gradients of a weighted sum of them, and which are predicted."""
    leaves = [None if t is None else t.clone().requires_grad_() for t in leaves]
    out = apply(*leaves, targets, *options, SFT)
    sum((g * x).sum() for g, x in zip(upstream, out, strict=False)).backward()
    return [out[0], out[1], *(t.grad for t in leaves if t is not None)], out[4]


OPTIONS = {  # temperature, softcap, logit_scale
    "plain": (1.0, None, 1.0),
    "temperature": (0.7, None, 1.0),
    "softcap": (1.0, 3.0, 1.0),
    "scale": (1.0, None, 0.25),
    "all": (1.3, 3.0, 2.0),
}
DTYPES = {  # of hidden and weight, and whether autocast is on
    "fp32": (torch.float32, torch.float32, False),
    "bf16": (torch.bfloat16, torch.bfloat16, False),
    "fp16": (torch.float16, torch.float16, False),
    "fp32 rows, bf16 head": (torch.float32, torch.bfloat16, False),
    "autocast": (torch.float32, torch.float32, True),
    "autocast, bf16 rows": (torch.bfloat16, torch.float32, True),
}


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("options", OPTIONS)
def test_values_and_gradients_are_within_the_budget_of_trls_own(options, dtypes, bias):
    temperature, softcap, scale = OPTIONS[options]
    dtype, weight_dtype, autocast = DTYPES[dtypes]
    leaves, targets = head(dtype, weight_dtype, bias)
    upstream = torch.randn(2, len(targets), generator=torch.Generator().manual_seed(4))
    arguments = (targets, temperature, 16, softcap, scale)
    patch_trl()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found, top1 = values(utils._ChunkedLogProbFunction.apply, leaves, *arguments, upstream=upstream)
        theirs, _ = values(STOCK.apply, leaves, *arguments, upstream=upstream)
    exact = [None if t is None else t.double() for t in leaves]
    oracle, oracle_top1 = values(by_definition, exact, *arguments, upstream=upstream.double())
    names = ("log_probs", "entropy", "hidden", "weight", "bias")
    for name, x, ref, eager in zip(names, found, oracle, theirs, strict=False):
        assert (x.dtype, x.shape) == (eager.dtype, eager.shape)
        check(name, x, ref, eager)
    assert torch.equal(top1, oracle_top1)
    assert 0 < top1.sum() < len(top1)


def test_of_two_equal_logits_the_first_is_the_prediction():
    (hidden, weight, _), _ = head()
    weight = (3 * weight).round()  # whole numbers: no product is rounded, whatever the tile
    weight[V - 1] = weight[0]
    hidden[:] = weight[0]
    targets = torch.tensor([0, V - 1] * (len(hidden) // 2) + [0])
    arguments = (hidden, weight, None, targets, 1.0, 16, None, 1.0, SFT)
    patch_trl()
    top1 = utils._ChunkedLogProbFunction.apply(*arguments)[4]
    assert torch.equal(top1, STOCK.apply(*arguments)[4])
    assert top1.tolist() == (targets == 0).tolist()


def test_the_logits_are_never_there_as_a_whole(calls):
    leaves, targets = head(N=4096, classes=500, D=8)
    patch_trl()
    with Watch() as watch:
        upstream = torch.ones(2, len(targets))
        values(utils._ChunkedLogProbFunction.apply, leaves, targets, 1.0, 16, None, 1.0, upstream=upstream)
    assert len(calls) == 1
    assert watch.largest <= 4096 * 500 * 4 // 3  # a third of the logits


def model_output(model, kwargs, enabled=True):
    """A fused forward, and the gradients of a loss of its outputs."""
    model.zero_grad()
    with torch.set_grad_enabled(enabled):
        out = model(input_ids=IDS, fused_lm_head=True, **kwargs)
    if enabled:
        (out.loss + 0.1 * out.entropy.sum() - out.log_probs.square().sum()).backward()
    return out, {name: p.grad for name, p in model.named_parameters()}


def assert_same_forward(model, kwargs, enabled=True):
    """The model's outputs and gradients are those of TRL's own function; returns our output."""
    stock, stock_grads = model_output(model, kwargs, enabled)
    stock_grads = {name: None if g is None else g.clone() for name, g in stock_grads.items()}
    patch_trl()
    out, grads = model_output(model, kwargs, enabled)
    unpatch_trl()
    assert out.keys() == stock.keys()
    for name in ("loss", *SFT, "label_mask"):
        mine, theirs = out[name], stock[name]
        assert mine.requires_grad == theirs.requires_grad, name
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)  # the dtype and the device, too
    torch.testing.assert_close(grads, stock_grads, rtol=1e-4, atol=1e-5)
    return out


def fused_llama(bias=False, **options):
    model = llama()
    if bias:
        model.lm_head = torch.nn.Linear(model.config.hidden_size, V)
    for name, value in options.items():
        setattr(model.config, name, value)
    utils.add_fused_lm_head(model, outputs=SFT)
    return model


MASKED = torch.full_like(LABELS, -100)
BATCHES = {
    "labels": {"labels": LABELS},
    "shift_labels": {"shift_labels": LABELS},
    "all masked": {"labels": MASKED},
    "all masked, num_items": {"shift_labels": MASKED, "num_items_in_batch": 5},
    "num_items, int": {"labels": LABELS, "num_items_in_batch": 7},
    "num_items, tensor": {"labels": LABELS, "num_items_in_batch": torch.tensor(7)},
}
MODELS = {
    "": {},
    "bias": {"bias": True},
    "Cohere's scale": {"logit_scale": 0.25},
    "Granite's scale": {"logits_scaling": 4.0},
    "Gemma's cap": {"final_logit_softcapping": 2.0},
}


@pytest.mark.parametrize("compact", [False, True], ids=["all rows", "kept rows"])  # kept rows: as on a GPU
@pytest.mark.parametrize("batch", BATCHES)
def test_a_forward_is_that_of_trl(batch, compact, calls, monkeypatch):
    monkeypatch.setattr(utils, "_use_triton", lambda device: compact)
    model = fused_llama()
    out = assert_same_forward(model, BATCHES[batch])
    assert len(calls) == 1
    if "all masked" in batch:
        assert out.loss == 0
        assert all(g is None or not g.any() for g in model_output(model, BATCHES[batch])[1].values())


@pytest.mark.parametrize("enabled", [True, False], ids=["", "no_grad"])
@pytest.mark.parametrize("model", MODELS)
def test_a_models_options_reach_us(model, enabled, calls):
    assert_same_forward(fused_llama(**MODELS[model]), {"labels": LABELS}, enabled)
    assert len(calls) == 1


def test_a_frozen_head_has_no_gradient():
    model = fused_llama()
    model.lm_head.weight.requires_grad_(False)
    assert_same_forward(model, {"labels": LABELS})
    assert model.lm_head.weight.grad is None


def test_a_head_among_modules_to_save_is_trained(calls):
    peft = pytest.importorskip("peft", reason="it makes the copy of the head")
    base = llama()
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, config)
    utils.add_fused_lm_head(model.get_base_model(), outputs=SFT)
    assert_same_forward(model, {"labels": LABELS})
    assert len(calls) == 1
    assert base.lm_head.weight.grad.any()
    assert base.lm_head.original_module.weight.grad is None


OTHERS = {  # what TRL's other trainers ask for
    "a reference model": ("log_probs",),
    "GRPO, RLOO": ("log_probs", "entropy"),
    "DPO": ("log_probs", "entropy", "mean_logits", "is_top1"),
    "DPO, weighted": ("log_probs", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs"),
    "KTO": ("log_probs", "entropy", "mean_logits"),
}


@pytest.mark.parametrize("trainer", OTHERS)
def test_other_trainers_go_on_as_before(trainer, calls):
    leaves, targets = head(bias=True)
    arguments = (*leaves, targets, 0.7, 16, 3.0, 2.0, OTHERS[trainer])
    patch_trl()
    found, theirs = utils._ChunkedLogProbFunction.apply(*arguments), STOCK.apply(*arguments)
    for mine, other in zip(found, theirs, strict=True):
        assert (mine is None and other is None) or torch.equal(mine, other)
    assert not calls


def test_a_label_outside_the_vocabulary_is_an_error():
    leaves, targets = head()
    targets[4] = V
    patch_trl()
    with pytest.raises(IndexError, match=f"label {V} of token 4 is outside"):
        utils._ChunkedLogProbFunction.apply(*leaves, targets, 1.0, 16, None, 1.0, SFT)


def test_zero3_is_refused(monkeypatch):
    from transformers.integrations import deepspeed

    leaves, targets = head()
    patch_trl()
    monkeypatch.setattr(deepspeed, "is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(NotImplementedError, match="ZeRO-3 is not supported"):
        utils._ChunkedLogProbFunction.apply(*leaves, targets, 1.0, 16, None, 1.0, SFT)


def test_it_may_be_called_twice_and_undone():
    for _ in range(2):
        patch_trl()
        assert utils._ChunkedLogProbFunction is ours.LogProbs
    for _ in range(2):
        unpatch_trl()
        assert utils._ChunkedLogProbFunction is STOCK


class Another(STOCK):
    """Somebody else's function."""


def test_somebody_elses_function_stays():
    utils._ChunkedLogProbFunction = Another
    with pytest.raises(RuntimeError, match=r"was replaced by .*Another.* already"):
        patch_trl()
    assert utils._ChunkedLogProbFunction is Another
    unpatch_trl()  # nothing of ours to undo
    utils._ChunkedLogProbFunction = STOCK
    patch_trl()
    utils._ChunkedLogProbFunction = Another
    with pytest.raises(RuntimeError, match=r"was replaced by .*Another.* after"):
        unpatch_trl()
    assert utils._ChunkedLogProbFunction is Another


def other_parameters(ctx, hidden, weight, bias, targets, temperature, chunk_size, outputs=()):
    raise AssertionError("must not be called")


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (lambda m: m.setattr(STOCK, "forward", staticmethod(other_parameters)), RuntimeError, "has changed in trl"),
        (lambda m: m.setattr(chunked_logprob, "OPTIONAL_OUTPUTS", ("entropy",)), RuntimeError, "has changed in trl"),
        (lambda m: m.delattr(chunked_logprob, "OPTIONAL_OUTPUTS"), RuntimeError, "has no trl.kernels.chunked_logprob"),
        (lambda m: m.delattr(utils, "_ChunkedLogProbFunction"), ImportError, "has no trl.trainer.utils"),
        (lambda m: m.setattr(ours.importlib.util, "find_spec", lambda name: None), ImportError, "is not installed"),
    ],
    ids=["parameters", "outputs", "moved", "missing", "not installed"],
)
def test_another_trl_is_refused(change, error, text):
    with pytest.MonkeyPatch.context() as monkeypatch:
        change(monkeypatch)
        with pytest.raises(error, match=text) as raised:
            patch_trl()
    assert "1.15 and 1.16" in str(raised.value)
    assert utils._ChunkedLogProbFunction is STOCK


def test_importing_us_does_not_import_trl():
    code = "import sft_kernels.integrations, sys; sys.exit('trl' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
