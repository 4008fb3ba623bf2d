"""Every peer is right or named: the installed ones against plain PyTorch, the others by their recorded signatures."""

import importlib
import inspect
import sys
import types
from importlib.metadata import PackageNotFoundError

import pytest
import torch
import torch.nn.functional as F

from bench import peers, right

CPU = torch.device("cpu")
CUDA = torch.device("cuda")  # asked of adapters only for its type; the tensors stay on the CPU
FP32 = torch.float32
TABLES = {
    "linear_losses": (peers.linear_losses, right.linear_loss_error, ()),
    "losses": (peers.losses, right.loss_error, ()),
    "optimizers": (peers.optimizers, right.optimizer_error, (FP32, 1.0)),
    "attentions": (peers.attentions, right.attention_error, ()),
}
HERE = {  # what any CPU has
    "linear_losses": {"ours", "unfused", "torch.compile"},
    "losses": {"ours", "F.cross_entropy", "torch.compile"},
    "optimizers": {"ours", "torch fused", "torch foreach"},
    "attentions": {"ours", "padded SDPA", "FlexAttention"},
}


@pytest.fixture(autouse=True)
def _not_compiled(monkeypatch):
    """The adapters' own code: compiling takes longer than all of these tests, and a rehearsal does it."""
    monkeypatch.setattr(torch, "compile", lambda function=None, **options: function or (lambda decorated: decorated))


@pytest.mark.parametrize("table", TABLES)
def test_everyone_is_present_or_absent_for_a_reason(table):
    adapters = TABLES[table][0](CPU)
    present, absent = peers.load(adapters, CPU)
    assert next(iter(adapters)) == "ours"
    assert present.keys() | absent.keys() == adapters.keys()
    assert not present.keys() & absent.keys()
    assert HERE[table] <= present.keys()
    assert all(len(why) > 5 and "\n" not in why for why in absent.values())


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("dtype", [FP32, torch.bfloat16])
def test_who_runs_here_agrees_with_plain_pytorch(table, dtype):
    adapters, error_of, options = TABLES[table]
    if options:
        options = (dtype, *options[1:])
    for name, adapter in peers.load(adapters(CPU), CPU)[0].items():
        found = right.checked(error_of, adapter, CPU, dtype, *options)
        assert "absent" in found or found["error"] <= 1, (name, found)


def test_what_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", None)
    _, absent = peers.load(peers.LINEAR_LOSSES, CUDA)
    assert "liger_kernel" in absent["Liger"]


def test_what_needs_cuda_says_so_on_a_cpu(monkeypatch):
    installed(monkeypatch, "flash_attn", flash_attn_varlen_func=None)
    _, absent = peers.load(peers.ATTENTIONS, CPU)
    assert absent["flash-attn 2"] == "runs on CUDA alone"


def test_moments_that_a_peer_does_not_have_are_named():
    make = peers.OPTIMIZERS["torch fused"](CPU)
    found = right.checked(right.optimizer_error, make, CPU, torch.bfloat16, FP32, None)
    assert "its moments are torch.bfloat16" in found["absent"]


# A wrong peer is not timed as if it were right.


def test_a_wrong_loss_a_wrong_gradient_and_nan_are_off():
    def value_off(x, w, y):
        return 1.001 * F.cross_entropy(F.linear(x, w), y)

    def gradient_off(x, w, y):
        loss = F.cross_entropy(F.linear(x, w), y)
        return loss + 0.01 * (w.sum() - w.sum().detach())

    def nan(x, w, y):
        return F.cross_entropy(F.linear(x, w), y) * float("nan")

    for wrong in (value_off, gradient_off, nan):
        assert right.checked(right.linear_loss_error, wrong, CPU, FP32)["error"] > 1


def test_what_raises_is_told_from_what_cannot_run():
    def broken(x, w, y):
        raise IndexError("off the end")

    def elsewhere(x, w, y):
        raise peers.Absent("needs another machine")

    assert right.checked(right.linear_loss_error, broken, CPU, FP32) == {"raised": "IndexError: off the end"}
    assert right.checked(right.linear_loss_error, elsewhere, CPU, FP32) == {"absent": "needs another machine"}


def test_steps_that_do_not_clip_or_leak_across_examples_are_off():
    def unclipped(params, state_dtype, max_grad_norm):
        return torch.optim.AdamW(params, peers.LR, **peers.ADAMW).step

    assert right.checked(right.optimizer_error, unclipped, CPU, FP32, FP32, 1.0)["error"] > 1

    def leaking(cu_seqlens, max_seqlen):
        whole = torch.tensor([0, int(cu_seqlens[-1])])
        return peers.Attention(lambda q, k, v: right.plain_attention(q, k, v, whole))

    assert right.checked(right.attention_error, leaking, CPU, FP32)["error"] > 1


# Peers that are not here, by the signatures they publish: each stand-in takes what the peer takes and is plain inside.


def installed(monkeypatch, name, **contents):
    for end in [i for i, letter in enumerate(name) if letter == "."]:
        monkeypatch.setitem(sys.modules, name[:end], types.ModuleType(name[:end]))
    module = types.ModuleType(name)
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, name, module)


class LigerLinear(torch.nn.Module):
    def forward(self, lin_weight, _input, target, bias=None):
        return F.cross_entropy(F.linear(_input, lin_weight, bias), target)


class Liger(torch.nn.Module):
    def forward(self, _input, target):
        assert not (_input.is_leaf and _input.requires_grad)  # it writes its gradient there
        return F.cross_entropy(_input, target)


def cut(e, c, targets, ignore_index=-100, softcap=None, reduction="mean", shift=False, filter_eps="high"):
    return F.cross_entropy(e @ c.T, targets)


def quack_linear(
    x, weight, target, chunk_size=4096, ignore_index=-100, reduction="mean", tuned=True, use_scaled_exp=None
):  # by default what QuACK finds fastest: on an H100, in bf16 and with V in multiples of 128, its scaled-exp kernels
    return F.cross_entropy(F.linear(x, weight), target)


def quack(x, target, lse_partial=None, weight=None, ignore_index=-100, reduction="mean", inplace_backward=False):
    losses = F.cross_entropy(x, target, reduction="none")
    return losses.sum() if reduction == "sum" else losses.sum() / (target != ignore_index).sum()  # 0.6.5


class Trl:
    @staticmethod
    def apply(hidden, weight, bias, targets, temperature, chunk_size, softcap=None, logit_scale=1.0, outputs=()):
        assert (bias, temperature, softcap, logit_scale) == (None, 1.0, None, 1.0)
        logprobs = F.linear(hidden, weight).log_softmax(-1).gather(1, targets[:, None])[:, 0]
        return logprobs, None, None, None, None


def apex(params, lr=1e-3, bias_correction=True, betas=None, eps=1e-8, adam_w_mode=True, weight_decay=0.0):
    assert bias_correction
    assert adam_w_mode
    return torch.optim.AdamW(params, lr, betas, eps, weight_decay)


def adamw(params, lr=1e-3, betas=None, eps=1e-8, weight_decay=1e-2, amsgrad=False):
    return torch.optim.AdamW(params, lr, betas, eps, weight_decay)


def flash(q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, causal=False, **more):
    assert causal
    assert not more.keys() - {"deterministic"}
    assert int(cu_seqlens_k.diff().max()) == max_seqlen_q == max_seqlen_k
    return right.plain_attention(q, k, v, cu_seqlens_q)


def flash_with_lse(*args, **kwargs):
    return flash(*args, **kwargs), None


@pytest.mark.parametrize(
    ("table", "name", "module", "contents"),
    [
        ("linear_losses", "Liger", "liger_kernel.transformers", {"LigerFusedLinearCrossEntropyLoss": LigerLinear}),
        ("linear_losses", "cut-cross-entropy exact", "cut_cross_entropy", {"linear_cross_entropy": cut}),
        ("linear_losses", "cut-cross-entropy filtered", "cut_cross_entropy", {"linear_cross_entropy": cut}),
        ("linear_losses", "QuACK", "quack.linear_cross_entropy", {"chunked_linear_cross_entropy": quack_linear}),
        ("linear_losses", "TRL chunked logprob", "trl.kernels", {"ChunkedLogProbFunction": Trl}),
        ("losses", "Liger", "liger_kernel.transformers", {"LigerCrossEntropyLoss": Liger}),
        ("losses", "QuACK", "quack.cross_entropy", {"cross_entropy": quack}),
        ("optimizers", "apex", "apex.optimizers", {"FusedAdam": apex}),
        ("optimizers", "bitsandbytes", "bitsandbytes.optim", {"AdamW32bit": adamw}),
        ("optimizers", "torchao", "torchao.optim", {"_AdamW": adamw}),
        ("attentions", "flash-attn 4", "flash_attn.cute", {"flash_attn_varlen_func": flash_with_lse}),
        ("attentions", "flash-attn 3", "flash_attn_interface", {"flash_attn_varlen_func": flash}),
        ("attentions", "flash-attn 2", "flash_attn", {"flash_attn_varlen_func": flash}),
        ("attentions", "flash-attn 2 deterministic", "flash_attn", {"flash_attn_varlen_func": flash}),
    ],
)
def test_adapters_call_what_the_peers_publish(monkeypatch, table, name, module, contents):
    adapters, error_of, options = TABLES[table]
    if name.startswith("TRL"):
        installed(monkeypatch, "trl.trainer.utils")
    installed(monkeypatch, module, **contents)
    found = right.checked(error_of, adapters(CPU)[name](CUDA), CPU, FP32, *options)
    assert found.get("error", 2) <= 1, found


def varlen_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
    return flash(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, causal=window_size == (-1, 0))


def varlen_of_equal_heads(query, key, *rest, scale=None, window_size=(-1, -1)):
    assert query.shape[1] == key.shape[1]
    return varlen_2_11(query, key, *rest, window_size=window_size)


def varlen_2_12(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
):
    assert query.shape[1] == key.shape[1] or enable_gqa
    return flash(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, causal=window_size == (-1, 0))


@pytest.mark.parametrize(
    ("varlen", "right_one"),
    [
        (varlen_2_11, peers.VARLEN),
        (varlen_2_12, peers.VARLEN),
        (varlen_of_equal_heads, peers.VARLEN_REPEATED),
    ],
)
def test_varlen_is_given_fewer_key_heads_and_repeated_ones_only_where_that_is_not_right(monkeypatch, varlen, right_one):
    installed(monkeypatch, "torch.nn.attention.varlen", varlen_attn=varlen)
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "torch.nn", torch.nn)
    monkeypatch.setattr(peers, "_needs_cuda", lambda device: None)  # so that it judges on this device
    peers._is_right.cache_clear()
    both = {name: peers.ATTENTIONS[name] for name in (peers.VARLEN, peers.VARLEN_REPEATED)}
    present, absent = peers.load(both, CPU)
    found = {name: right.checked(right.attention_error, make, CPU, FP32) for name, make in present.items()}
    assert {name for name, row in found.items() if row.get("error", 2) <= 1} == {right_one}, found
    assert absent == ({peers.VARLEN_REPEATED: f"not needed: {peers.VARLEN} is right"} if len(found) == 1 else {})
    peers._is_right.cache_clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_varlen_needs_a_gpu():
    assert peers.load({"both": peers.ATTENTIONS[peers.VARLEN_REPEATED]}, CPU)[1] == {"both": "runs on CUDA alone"}


def test_a_peer_that_raises_when_it_is_loaded_is_absent_and_ours_is_not_hidden():
    def broken(device):
        raise RuntimeError("driver mismatch\nand more")

    present, absent = peers.load({"theirs": broken, "ours": lambda device: 1}, torch.device("cpu"))
    assert (present, absent) == ({"ours": 1}, {"theirs": "RuntimeError: driver mismatch"})
    with pytest.raises(RuntimeError, match="driver mismatch"):
        peers.load({"ours": broken}, torch.device("cpu"))


# Peers that are here: what is recorded above against the real code, as far as a machine without a GPU can call it.


@pytest.mark.parametrize(
    ("module", "name", "record"),
    [
        ("liger_kernel.transformers", "LigerFusedLinearCrossEntropyLoss.forward", LigerLinear.forward),
        ("liger_kernel.transformers", "LigerCrossEntropyLoss.forward", Liger.forward),
        ("cut_cross_entropy", "linear_cross_entropy", cut),
        ("quack.linear_cross_entropy", "chunked_linear_cross_entropy", quack_linear),
        ("quack.cross_entropy", "cross_entropy", quack),
        ("apex.optimizers", "FusedAdam", apex),
        ("bitsandbytes.optim", "AdamW32bit", adamw),
        ("torchao.optim", "_AdamW", adamw),
        ("flash_attn_interface", "flash_attn_varlen_func", flash),
        ("flash_attn.cute", "flash_attn_varlen_func", flash),
    ],
)
def test_the_stand_ins_have_the_signatures_of_what_is_installed(module, name, record):
    function = pytest.importorskip(module, exc_type=ImportError)
    for part in name.split("."):
        function = getattr(function, part)
    real = inspect.signature(function).parameters
    recorded = [p for p in inspect.signature(record).parameters.values() if p.kind is not p.VAR_KEYWORD]
    if record is flash:  # all are passed by name but the first three
        assert list(real)[:3] == ["q", "k", "v"]
        assert {p.name for p in recorded} <= real.keys()
        return
    assert list(real)[: len(recorded)] == [p.name for p in recorded]
    if record in (apex, adamw):  # the adapters pass every value
        return
    assert [real[p.name].default for p in recorded] == [p.default for p in recorded]


def test_the_defaults_of_ligers_losses():
    liger = pytest.importorskip("liger_kernel.transformers", exc_type=ImportError)
    for loss in (liger.LigerFusedLinearCrossEntropyLoss(), liger.LigerCrossEntropyLoss()):
        assert (loss.ignore_index, loss.reduction, loss.softcap, loss.label_smoothing) == (-100, "mean", None, 0.0)
        assert not loss.return_z_loss
        assert getattr(loss, "accum_dtype", None) is None  # dW is summed in the weight's dtype


@pytest.mark.parametrize("dtype", [FP32, torch.bfloat16])
def test_trl_is_right_on_the_cpu(dtype):
    pytest.importorskip("trl.trainer.utils", exc_type=ImportError)
    found = right.checked(right.linear_loss_error, peers.LINEAR_LOSSES["TRL chunked logprob"](CPU), CPU, dtype)
    assert found.get("error", 2) <= 1, found


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the suites themselves judge")
@pytest.mark.parametrize(
    ("table", "name"),
    [
        ("losses", "Liger"),
        ("linear_losses", "Liger"),
        ("linear_losses", "cut-cross-entropy exact"),
        ("linear_losses", "cut-cross-entropy filtered"),
    ],
)
def test_peers_in_triton_are_right_in_its_interpreter(monkeypatch, table, name):
    """In fp16: cut-cross-entropy refuses fp32, and the interpreter multiplies the bits of bf16 numbers."""
    pytest.importorskip("cut_cross_entropy" if name.startswith("cut") else "liger_kernel.transformers")
    tl = pytest.importorskip("triton.language")
    if not interprets(tl):
        pytest.skip("Triton's interpreter is off, or this one does not run here")
    monkeypatch.setattr(peers, "_needs_cuda", lambda device: None)
    if name.startswith("cut"):
        cce = importlib.import_module("cut_cross_entropy.cce")
        monkeypatch.setattr(cce, "sort_logit_avg", lambda logits: torch.argsort(logits).to(torch.int32))
        log1p = types.SimpleNamespace(log1p=lambda x: tl.log(1.0 + x))  # the interpreter has no libdevice
        monkeypatch.setattr(importlib.import_module("cut_cross_entropy.tl_utils"), "tl_libdevice", log1p)
    adapters, error_of, _ = TABLES[table]
    sizes = {"N": 16, "V": 200} if table == "losses" else {"N": 32, "D": 64, "V": 512}
    assert error_of(adapters(CPU)[name](CPU), CPU, torch.float16, **sizes) <= 1


def interprets(tl):
    import triton

    @triton.jit
    def first_of_range(out, n):
        for i in range(tl.load(n)):
            tl.store(out + i, 1)

    try:
        out = torch.zeros(2)
        first_of_range[(1,)](out, torch.tensor([2]))
        return bool(out.all())
    except Exception:
        return False


# What a row says beside its time.


def test_a_row_says_its_version(monkeypatch):
    def of(distribution):
        if distribution == "torch":
            return "2.11.0+cu130"
        if distribution == "liger-kernel":
            return "0.8.5"
        raise PackageNotFoundError(distribution)

    monkeypatch.setattr(peers.importlib.metadata, "version", of)
    assert peers.version("Liger") == "liger-kernel 0.8.5"
    assert peers.version(peers.VARLEN) == peers.version("torch fused") == peers.version("unfused") == "torch 2.11.0"
    assert peers.version("apex") is peers.version("ours") is peers.version("ours (triton)") is None
    theirs = [*peers.LINEAR_LOSSES, *peers.LOSSES, *peers.OPTIMIZERS, *peers.ATTENTIONS]
    torchs = {name for name in theirs if name not in peers.DISTRIBUTIONS}
    assert torchs == {
        "unfused", "torch chunked", "torch.compile", "F.cross_entropy", "torch fused", "torch foreach", "padded SDPA",
        peers.VARLEN, peers.VARLEN_REPEATED, "FlexAttention",
    }  # fmt: skip
