"""The plan: its bytes against tensors that are really kept, its figures, and its errors."""

import gc
import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from sft_kernels import linear_cross_entropy
from sft_kernels.cli import main
from sft_kernels.ops.linear_cross_entropy.plan import make_plan
from sft_kernels.sft import activations, costs, llama3
from sft_kernels.sft import model as models
from sft_kernels.sft import plan as plans
from sft_kernels.sft.masking import Example
from sft_kernels.sft.packing import collate
from sft_kernels.sft.plan import Plan
from sft_kernels.sft.precision import dtype_of, optimizer_of
from sft_kernels.sft.recipe import Recipe

from ..ops.watches import Held

V, D, LAYERS, HEADS, HEAD = 96, 32, 2, 2, 16
SHAPE = {
    "vocab_size": V, "hidden_size": D, "intermediate_size": 64, "num_hidden_layers": LAYERS, "head_dim": HEAD,
    "num_attention_heads": HEADS, "num_key_value_heads": 1, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
OPTIONS = {
    "llama": {"tie_word_embeddings": True},
    "gemma2": {"sliding_window": 4, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    "gpt2": {"n_inner": 64, "attn_pdrop": 0.1, "resid_pdrop": 0.1},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}
EXAMPLES = {17: 1, 6: 1}
BATCH = collate([[Example([1] * length, [1] * length, "") for length in EXAMPLES]], 23, 0)


def config_of(kind):
    import transformers

    return transformers.AutoConfig.for_model(kind, **{**SHAPE, **OPTIONS[kind]})


# How parameters are kept, and whether autocast is on.
FP32, AUTOCAST, BF16 = (torch.float32, False), (torch.float32, True), (torch.bfloat16, False)
CASES = {
    "llama-fp32": ("llama", FP32),
    "llama-autocast": ("llama", AUTOCAST),
    "llama-bf16": ("llama", BF16),
    "gemma2-bf16": ("gemma2", BF16),
    "gpt2-autocast": ("gpt2", AUTOCAST),
    "mixtral-autocast": ("mixtral", AUTOCAST),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def real(request, monkeypatch):
    """``(model, counted, autocast)``, a model with numbers, attending by the Triton kernels, interpreted."""
    import transformers

    from sft_kernels.integrations import calls, register
    from sft_kernels.sft.dropout import with_dropout

    kind, (dtype, autocast) = request.param
    counted = activations.count(config_of(kind), EXAMPLES, dtype, autocast)
    monkeypatch.setenv("SFT_KERNELS_IMPL", "triton")
    register()
    config = with_dropout(config_of(kind), 0.0)[0]
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=calls.NAME)
    return model.train(), counted, autocast


class Kept(saved_tensors_hooks):
    """Holds every tensor that autograd saves."""

    def __init__(self):
        self.tensors = []
        super().__init__(lambda tensor: self.tensors.append(tensor) or tensor, lambda tensor: tensor)

    def __enter__(self):
        super().__enter__()
        return self


def sizes(tensors, *without):
    """``{address: bytes}`` of the storages of ``tensors``, those of other tensors left out."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    for tensor in without:
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    return storages


def there_anyway(model):
    return [*model.parameters(), *model.buffers()]


def copies_of_weights(tensors, model):
    """Autocast's copies among ``tensors``, recognised by their numbers."""
    weights = [p.to(torch.bfloat16).flatten() for p in model.parameters() if p.dim() == 2]

    def is_copy(tensor):
        whole = tensor.new_empty(0).set_(tensor.untyped_storage())
        return tensor.dtype == torch.bfloat16 and any(whole.equal(weight) for weight in weights)

    return [tensor for tensor in tensors if is_copy(tensor)]


def forward(model, autocast):
    with models.boundaries_given(model), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return models.hidden_states(model, BATCH)


def test_the_activations_counted_are_those_of_a_real_forward(real):
    model, counted, autocast = real
    with Kept() as kept:
        hidden = forward(model, autocast)
    copies = copies_of_weights(kept.tensors, model) if autocast else []
    assert counted.kept == sum(sizes([*kept.tensors, hidden], *there_anyway(model), *copies).values())
    assert counted.hidden == hidden.dtype
    assert counted.parameters == sum(p.numel() for p in model.parameters())
    biases = [p for name, p in model.named_parameters() if name.endswith("bias") and ".ln_" not in name]
    biases = biases if autocast else []  # copied, too, but not kept for backward
    assert counted.copies == sum(sizes(copies).values()) + 2 * sum(p.numel() for p in biases)
    assert bool(copies) == autocast


def test_the_checkpointed_activations_are_those_of_a_real_run(real):
    model, counted, autocast = real
    layers = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    inputs, calls = [], {}

    def note(layer, args, kwargs):
        calls[layer] = args, kwargs
        inputs.extend(t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor))

    for layer in layers:
        layer.register_forward_pre_hook(note, with_kwargs=True)
    models.checkpoint_activations(model)
    with Kept() as kept:
        hidden = forward(model, autocast)
    between = sizes([*kept.tensors, *inputs, hidden], *there_anyway(model))
    assert counted.between == sum(between.values())
    assert counted.between < counted.kept
    layer = layers[-1]
    layer.gradient_checkpointing = False
    args, kwargs = calls[layer]
    with models.boundaries_given(model), torch.autocast("cpu", torch.bfloat16, enabled=autocast), Kept() as kept:
        layer(*args, **kwargs)  # as backward computes it again
    copies = copies_of_weights(kept.tensors, model) if autocast else []
    assert counted.largest == sum(sizes(kept.tensors, *there_anyway(model), *inputs, *copies).values())


def test_the_copies_of_weights_live_until_a_checkpointed_forward_ends():
    import transformers

    from sft_kernels.integrations import calls, register

    register()
    config = config_of("llama")
    counted = activations.count(config, EXAMPLES, *AUTOCAST)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=calls.NAME).train()
    models.checkpoint_activations(model)
    with models.boundaries_given(model), Held(there_anyway(model)) as held:
        with torch.autocast("cpu", torch.bfloat16):
            hidden = models.hidden_states(model, BATCH)
            inside = held.left()
        assert inside - held.left() == counted.copies
    assert hidden.requires_grad


def test_experts_are_multiplied_by_the_tokens_that_are_sent_to_them():
    config = {**SHAPE, "num_local_experts": 4, "num_experts_per_tok": 2}
    import transformers

    config = transformers.AutoConfig.for_model("mixtral", **config)
    counted = activations.count(config, {16: 2}, *BF16)
    expert = 3 * D * 64
    attention = 2 * D * (HEADS + 1) * HEAD
    assert counted.products == 2 * 32 * LAYERS * (attention + D * 4 + 2 * expert)
    assert counted.layer == attention + D * 4 + 4 * expert + 2 * D


@pytest.mark.parametrize("parameters", costs.STATES)
def test_bytes_a_parameter_are_those_of_a_real_step(parameters):
    import transformers

    model = transformers.AutoModelForCausalLM.from_config(config_of("llama"), dtype=dtype_of(parameters))
    optimizer, _ = optimizer_of(model, Recipe(parameters=parameters))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    N = sum(p.numel() for p in model.parameters())
    states = [(name, t) for p in model.parameters() for name, t in optimizer.state[p].items() if t.numel() == p.numel()]
    moments = [t for name, t in states if name.startswith("exp_avg")]
    masters = [t for name, t in states if not name.startswith("exp_avg")]
    found = ([*model.parameters()], [p.grad for p in model.parameters()], moments, masters)
    assert [sum(t.numel() * t.element_size() for t in each) for each in found] == [
        N * each for each in costs.STATES[parameters]
    ]


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("Llama 3.2 1B", 1_235_814_400),
        ("Llama 3.2 3B", 3_212_749_824),
        ("Llama 3.1 8B", 8_030_261_248),
        ("Llama 3.1 70B", 70_553_706_496),
        ("Llama 3.1 405B", 405_853_388_800),
    ],
)
def test_the_shapes_of_llama_3_have_the_published_numbers_of_parameters(name, parameters):
    shape, published = llama3.nearest(parameters)
    assert shape == published
    assert (shape.name, shape.parameters) == (name, parameters)


def test_a_shape_of_llama_3_is_the_model_that_is_counted():
    shape = llama3.PUBLISHED[0]._replace(layers=2)
    counted = activations.count(shape.config(), {16: 1}, *BF16)
    assert (counted.parameters, counted.outside, counted.layer) == (shape.parameters, shape.outside, shape.of_a_layer)


def test_layers_bring_a_shape_close_to_the_parameters():
    for parameters in (5e8, 2e9, 13e9, 30e9, 70e9, 180e9, 1e12):
        shape, _ = llama3.nearest(parameters)
        assert abs(shape.parameters - parameters) <= shape.of_a_layer / 2


# ---- the figures


@pytest.fixture
def config(tmp_path):
    """The path of a small Llama's config."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "llama", **SHAPE}))
    return str(path)


@pytest.fixture(scope="module")
def small():
    return activations.count(config_of("llama"), {16: 1}, *FP32)


@pytest.fixture
def quick(small, monkeypatch):
    """Plans whose model is not counted but always the same small one."""
    monkeypatch.setattr(costs, "count", lambda *_: small)


@pytest.mark.parametrize("parameters", costs.STATES)
def test_the_moments_of_70_b_are_560_gb_and_405_b_are_5_tb(quick, parameters):
    assert "moments 560 GB; all states: fp32 1.12 TB, bf16+master 980 GB, bf16+stochastic 840 GB" in plans.text(
        Plan(params=70e9, parameters=parameters)
    )
    assert "bf16+stochastic 4.86 TB" in plans.text(Plan(params=405e9, parameters=parameters))


def table_of(plan):
    shape = costs.shape_of(plan)
    return dict(costs.memory(plan, shape, costs.loss_of(plan, shape.counted))), shape


@pytest.mark.parametrize("parameters", costs.STATES)
def test_zero_1_and_fsdp_split_what_they_say(config, parameters):
    table, shape = table_of(Plan(model=config, parameters=parameters, gpus=4))
    counted, N = shape.counted, shape.parameters
    of = costs.STATES[parameters]
    for i, name in enumerate(("parameters", "gradients", "moments", "masters")):
        assert table[name] == (of[i] * N, of[i] * N / (4 if i > 1 else 1), of[i] * N / 4)
    layer = counted.layer
    assert layer * LAYERS + counted.outside == N
    assert table["units gathered"] == (None, None, 2 * (2 * (N - LAYERS * layer) + 3 * layer))
    assert table["bf16 copies of weights"] == (counted.copies, counted.copies, None)
    for how, each in (("", counted.kept), (", checkpointed", counted.between + counted.largest)):
        assert table[f"activations{how}"] == (each,) * 3
        parts = [row for name, row in table.items() if "activations" not in name and "total" not in name]
        assert table[f"total{how}"] == tuple(sum(row[i] or 0 for row in parts) + each for i in range(3))


def test_flops_are_6_n_t_and_12_a_pair_of_tokens(config):
    plan = Plan(model=config, row_tokens=32, example_tokens=12, rows=3, accumulate=2, gpus=5)
    shape = costs.shape_of(plan)
    products, attention, again = costs.flops(plan, shape)
    steps, norms = 3 * 2 * 5, D * (2 * LAYERS + 1)
    multiplied = shape.parameters - V * D - norms
    assert products == 6 * multiplied * 32 * steps
    pairs = 2 * 12 * 13 / 2 + 8 * 9 / 2  # two examples and the padding of a row; a token sees itself
    assert attention == 12 * LAYERS * HEADS * HEAD * pairs * steps
    assert again == (products - 6 * V * D * 32 * steps + attention) / 3
    less, *_ = costs.flops(replace(plan, kept=0.25), shape)
    assert products - less == 6 * V * D * 32 * steps * 3 / 4


def test_windows_bound_the_pairs_that_attention_is_charged_for():
    seen = torch.ones(9, 9).tril()
    assert activations._pairs(9, -1, 0) == seen.sum()
    assert activations._pairs(9, 3, 0) == seen.triu(-3).sum()
    assert activations._pairs(9, 20, 0) == seen.sum()
    assert activations._pairs(9, -1, -1) == 81


@pytest.mark.parametrize(("dtype", "autocast"), [FP32, AUTOCAST, BF16], ids=["fp32", "autocast", "bf16"])
def test_plain_logits_are_what_pytorch_holds_at_most(small, dtype, autocast):
    T = 32
    plan = Plan(
        parameters="bf16+master" if dtype == torch.bfloat16 else "fp32",
        precision="fp32" if dtype == torch.float32 and not autocast else "bf16",
        row_tokens=T,
    )
    hidden, weight = (torch.randn(n, D, dtype=dtype, requires_grad=True) for n in (T, V))
    labels = torch.zeros(T, dtype=torch.long)
    with Held([hidden, weight, labels]) as held:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = F.linear(hidden, weight)
            loss = F.cross_entropy(logits.float(), labels)
        loss.backward()
    expected = costs.plain_logits(plan, small)
    rows = 4 * T * D * autocast  # hidden states in bf16 and fp32 are no logits
    assert expected <= held.peak <= expected + rows + 64


class HeldOnAGpu(Held):
    """Leaves out what the interpreter's cycles keep alive."""

    def __enter__(self):
        gc.freeze()  # so that each collection looks at new objects alone
        return super().__enter__()

    def __exit__(self, *error):
        gc.unfreeze()
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        gc.collect()
        return super().__torch_dispatch__(function, types, args, kwargs)


@pytest.mark.parametrize(("enough", "kept", "chunk"), [(64, 64, 64), (24, 64, 22), (64, 48, 48)])
def test_the_loss_takes_what_the_plan_says(small, enough, kept, chunk, monkeypatch):
    """In fp32 on a CPU, by the kernels of a GPU: with a chunk of all rows, with three, and with some rows ignored."""
    monkeypatch.setitem(make_plan.__globals__["_ROWS"], "cpu", enough)
    on_cpu = lambda *args, **options: make_plan(*args, **{**options, "device_type": "cpu"})  # noqa: E731
    monkeypatch.setattr(costs, "make_plan", on_cpu)
    loss = costs.loss_of(Plan(precision="fp32", row_tokens=64, kept=kept / 64), small)
    hidden, weight = (torch.randn(n, D, requires_grad=True) for n in (64, V))
    labels = torch.zeros(64, dtype=torch.long).index_fill(0, torch.arange(kept, 64), -100)
    with HeldOnAGpu([hidden, weight, labels]) as held:
        linear_cross_entropy(hidden, weight, labels, impl="triton")
    assert loss.chunk == chunk
    gradient, vectors = 4 * V * D, 64 * 44  # labels, places, factors and statistics of the rows
    assert loss.total <= held.peak - gradient <= loss.total + vectors


def test_the_head_is_copied_or_summed_and_has_a_gradient_beside_earlier_ones(small, monkeypatch):
    monkeypatch.setitem(make_plan.__globals__, "_ROWS_DEVICE", 24)

    def bytes_an_element(**options):
        return costs.loss_of(Plan(row_tokens=256, **options), small).head / (V * D)

    assert bytes_an_element() == 2  # a copy in bf16
    assert bytes_an_element(accumulate=2) == 2 + 4
    assert bytes_an_element(precision="fp32") == 0
    assert bytes_an_element(parameters="bf16+master") == 4  # a sum over chunks
    assert bytes_an_element(parameters="bf16+master", kept=0.125) == 0  # of which there is one
    assert bytes_an_element(parameters="bf16+master", kept=0.125, accumulate=2) == 2


# ---- the options and the screen


CHANGES = {
    "gpus": 4, "memory": 1.0, "parameters": "bf16+master", "precision": "fp32", "row_tokens": 64, "rows": 2,
    "accumulate": 2, "example_tokens": 8, "kept": 0.5, "steps": 3, "tokens": 1e6, "tflops": 400.0,
}  # fmt: skip


def test_every_option_changes_what_is_printed(config):
    plan = Plan(model=config, row_tokens=32)
    before = plans.text(plan)
    for name, value in CHANGES.items():
        assert plans.text(replace(plan, **{name: value})) != before, name
    assert {*CHANGES, "model", "params", "trust_remote_code"} == {*vars(plan)}


SCREEN = ["--steps", "100", "--tflops", "400", "--row-tokens", "8192", "--example-tokens", "300"]


@pytest.mark.parametrize("memory", ["80", "0.00001"])
def test_a_plan_needs_no_weights(tmp_path, config, memory, capsys):
    assert main(["plan", "--model", str(tmp_path), "--memory", memory, *SCREEN]) == 0
    assert_fine(capsys.readouterr().out)


@pytest.mark.parametrize("more", [[], ["--accumulate", "64", "--rows", "16", "--gpus", "16384"]], ids=["", "large"])
@pytest.mark.parametrize("params", ["70e9", "2e12"])
def test_a_plan_needs_no_model(quick, params, more, capsys):
    assert main(["plan", "--params", params, *SCREEN, *more]) == 0
    said = capsys.readouterr().out
    assert_fine(said)
    shape = "shape of Llama 3.1 70B with 79 layers in place of 80"
    assert (shape in said) == (params == "70e9")


def assert_fine(said):
    assert max(map(len, said.splitlines())) <= 100
    assert len(said.splitlines()) <= 33
    for name in ("parameters", "gradients", "moments", "masters", "activations", "activations, checkpointed", "total"):
        assert f"\n{name} " in said


def test_a_total_fits_up_to_the_memory(config):
    plan = Plan(model=config, row_tokens=32)
    total = table_of(plan)[0]["total, checkpointed"][2]
    for memory, fits in ((total / 1e9, "yes"), (math.nextafter(total / 1e9, 0) * 0.999, "no")):
        lines = plans.text(replace(plan, memory=memory)).splitlines()
        assert [line.split()[-1] for line in lines if "fits in" in line][-1] == fits


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "params: expected exactly one of --model and --params"),
        (["--params", "1e9", "--model", "."], "params: expected exactly one"),
        (["--params", "0"], "params: expected more than 0"),
        (["--params", "-1"], "params: expected more than 0"),
        (["--params", "nan"], "params: expected more than 0 and at most 2e+12, got nan"),
        (["--params", "inf"], "params: expected more than 0 and at most 2e+12, got inf"),
        (["--params", "1e6"], "params: expected at least 3.23e+08"),
        (["--params", "1e9", "--trust-remote-code"], "trust_remote_code:"),
        (["--params", "1e9", "--gpus", "0"], "gpus: expected at least 1, got 0"),
        (["--params", "1e9", "--memory", "0"], "memory: expected a finite number above 0, got 0.0"),
        (["--params", "1e9", "--memory", "nan"], "memory: expected a finite number above 0, got nan"),
        (["--params", "1e9", "--row-tokens", "0"], "row_tokens: expected from 1"),
        (["--params", "1e9", "--rows", "0"], "rows: expected at least 1, got 0"),
        (["--params", "1e9", "--rows", "9999999"], "rows: expected fewer than 2³¹ tokens"),
        (["--params", "1e9", "--accumulate", "0"], "accumulate: expected at least 1, got 0"),
        (["--params", "1e9", "--example-tokens", "2049"], "example_tokens: expected from 1 to row_tokens 2048"),
        (["--params", "1e9", "--kept", "0"], "kept: expected a share"),
        (["--params", "1e9", "--steps", "0"], "steps: expected at least 1, got 0"),
        (["--params", "1e9", "--tokens", "0"], "tokens: expected a finite number above 0"),
        (["--params", "1e9", "--steps", "1", "--tokens", "1"], "tokens: expected at most one of --steps and --tokens"),
        (["--params", "1e9", "--tflops", "inf"], "tflops: expected a finite number above 0"),
        (
            ["--params", "1e9", "--parameters", "bf16+master", "--precision", "fp32"],
            "precision: parameters bf16+master",
        ),
        (["--model", "hf:owner/name"], "model: expected a folder or a config; a plan fetches nothing from the hub"),
        (["--model", "nowhere"], "model: no such folder: nowhere"),
        (["--model", "EMPTY"], "holds no config.json"),
    ],
)
def test_refusals_name_the_option(options, message, tmp_path, capsys):
    options = [str(tmp_path) if each == "EMPTY" else each for each in options]
    assert main(["plan", *options]) == 1
    said = capsys.readouterr().err
    assert said.startswith("sft-kernels: ")
    assert message in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("kind", ["mamba", "t5"])
def test_a_model_that_the_trainer_refuses_is_refused(kind, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    assert main(["plan", "--model", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("sft-kernels: model: ")


def test_rotary_embeddings_that_depend_on_the_length_are_counted():
    import transformers

    rope = {
        "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 12,
        "short_factor": [1.0] * 8, "long_factor": [2.0] * 8,
    }  # fmt: skip
    shape = {**SHAPE, "original_max_position_embeddings": 12}
    del shape["head_dim"]
    plain, long = (
        transformers.AutoConfig.for_model("phi3", **shape, **options) for options in ({}, {"rope_parameters": rope})
    )
    assert activations.count(long, {16: 1}, *BF16) == activations.count(plain, {16: 1}, *BF16)
