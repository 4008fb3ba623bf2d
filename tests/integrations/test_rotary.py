"""Rotary embeddings that change with a row's longest position: packed against each example alone."""

import copy

import pytest
import torch

from sft_kernels.integrations import NAME, calls, rotary

transformers = pytest.importorskip("transformers")

LIMIT = 10
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "original_max_position_embeddings": LIMIT,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
SIZES = {
    "vocab_size": 90,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}
BY_LAYER = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
MODELS = {
    "Phi-3": (
        "phi3",
        {"rope_parameters": LONGROPE, "max_position_embeddings": 40, "original_max_position_embeddings": LIMIT},
    ),
    "Phi-MoE": (
        "phimoe",
        {
            "rope_parameters": {**LONGROPE, "short_mscale": 1.0, "long_mscale": 1.5},
            "max_position_embeddings": 40,
            "num_local_experts": 2,
            "original_max_position_embeddings": LIMIT,
        },
    ),
    "Llama": ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": LIMIT}),
    "Cohere": ("cohere", {"rope_parameters": DYNAMIC, "max_position_embeddings": LIMIT}),
    "Gemma 3": (
        "gemma3_text",
        {
            "rope_parameters": {
                "full_attention": DYNAMIC,
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
            "max_position_embeddings": LIMIT,
            **BY_LAYER,
        },
    ),
    "Gemma 3, two kinds": (
        "gemma3_text",
        {
            "rope_parameters": {"full_attention": DYNAMIC, "sliding_attention": LONGROPE},
            "max_position_embeddings": LIMIT,
            **BY_LAYER,
        },
    ),
}
LENGTHS = (16, 7, 24, LIMIT, 11, 16, 1)
IDS = torch.randint(3, 90, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(0))
POSITIONS = torch.cat([torch.arange(length) for length in LENGTHS])[None]
BOUNDS = torch.tensor([0, *LENGTHS], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def build(name, attention=NAME):
    torch.manual_seed(0)
    kind, options = MODELS[name]
    config = transformers.AutoConfig.for_model(kind, **copy.deepcopy({**SIZES, **options}))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    try:
        with torch.no_grad():
            tried = copy.deepcopy(model)  # in which the length may stay
            for _ in range(2):
                tried(torch.full((1, 3 * LIMIT), 3), use_cache=False)
    except UnboundLocalError:
        pytest.skip(f"transformers {transformers.__version__} cannot compute longrope in one kind of layer twice")
    return model


def alone(name):
    """Returns each example's logits by a fresh stock model of its own, and the sum of the gradients."""
    logits, gradients = [], {}
    for part in IDS.split(LENGTHS, 1):
        stock = build(name, "eager")
        logits.append(stock(part, use_cache=False).logits[0])
        logits[-1].square().sum().backward()
        for parameter, p in stock.named_parameters():
            if p.grad is not None:
                gradients[parameter] = gradients.get(parameter, 0) + p.grad
    return torch.cat(logits).detach(), gradients


def backward(model, **options):
    logits = model(IDS, use_cache=False, **options).logits[0]
    logits.square().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return logits.detach(), gradients


@pytest.mark.parametrize("name", MODELS)
def test_each_example_gets_the_embeddings_that_it_has_alone(name):
    logits, gradients = alone(name)
    model = build(name)
    assert rotary.limit(model.config) == LIMIT
    model(torch.full((1, 60), 3))  # one long example, whose length must not stay
    ways = {
        "boundaries": {"position_ids": POSITIONS, "cu_seq_lens_q": BOUNDS},
        "boundaries alone": {"cu_seq_lens_q": BOUNDS},
        "positions": {"position_ids": POSITIONS},
    }
    for way, options in ways.items():
        found, by_parameter = backward(model, **options)
        torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-4, msg=lambda m, way=way: f"{way}: {m}")
        assert by_parameter.keys() == gradients.keys()
        for parameter, expected in gradients.items():
            distance = (by_parameter[parameter] - expected).norm()
            assert distance <= 1e-4 * expected.norm().clamp(min=1e-2), f"{way}: {parameter}"
    calls_after = torch.arange(LIMIT)[None]
    expected = build(name, "eager")(IDS[:, :LIMIT], position_ids=calls_after, use_cache=False).logits
    torch.testing.assert_close(model(IDS[:, :LIMIT], use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["Phi-3", "Llama"])
def test_the_trainers_calls_and_a_copy_of_the_model_do_the_same(name):
    model = build(name)
    expected, _ = backward(model, cu_seq_lens_q=BOUNDS, position_ids=POSITIONS)
    model.set_attn_implementation(calls.GIVEN)
    for other in (model, copy.deepcopy(model)):
        found, _ = backward(other, cu_seq_lens_q=BOUNDS, position_ids=POSITIONS)
        assert found.equal(expected)


def test_rows_within_the_limit_cost_nothing_more(monkeypatch):
    model = build("Phi-3")
    backward(model, cu_seq_lens_q=BOUNDS)
    monkeypatch.setattr(rotary, "by_example", None)
    model(IDS[:, :14], position_ids=torch.arange(7).repeat(2)[None])


def test_a_rotary_module_called_while_a_layer_is_recomputed_goes_by_the_positions():
    model = build("Llama")
    backward(model, cu_seq_lens_q=BOUNDS)
    module, x = model.model.rotary_emb, torch.zeros(1)
    recomputed = module(x, position_ids=POSITIONS)
    calls._running.calls.append((model, calls.Call(model, IDS.shape[1], BOUNDS, own_rotary=True)))
    try:
        expected = module(x, POSITIONS)
    finally:
        calls._running.calls.pop()
    assert all(a.equal(b) for a, b in zip(recomputed, expected, strict=True))
    assert module.max_seq_len_cached == LIMIT


class Own(torch.nn.Module):
    """A rotary module of somebody's own."""

    def __init__(self, module):
        super().__init__()
        self.module = [module]

    def forward(self, x, position_ids):
        return self.module[0](x, position_ids)


def test_rotary_modules_that_nobody_knows_are_refused():
    model = build("Llama")
    model.model.rotary_emb = Own(model.model.rotary_emb)
    with pytest.raises(ValueError, match=f"an example of more than {LIMIT} tokens"):
        model(IDS, position_ids=POSITIONS)
    model(IDS, position_ids=torch.arange(IDS.shape[1])[None])  # one example
    model(IDS[:, :20], position_ids=torch.arange(LIMIT).repeat(2)[None])


def test_a_compiled_graph_refuses_long_examples():
    """Traced, a rotary module can look at no length; it may only stop."""
    module, x = build("Phi-3").model.rotary_emb, torch.zeros(1)
    with pytest.raises(RuntimeError, match=f"an example of more than {LIMIT} tokens"):
        rotary.assert_short(module, (x,), {"position_ids": POSITIONS})
    rotary.assert_short(module, (x, torch.arange(60)[None]), {})  # one example
    rotary.assert_short(module, (x, torch.arange(LIMIT).repeat(2)[None]), {})
