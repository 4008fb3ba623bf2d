"""Activation checkpointing under packed attention: the same gradients to the bit, for less memory."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from sft_kernels import linear_cross_entropy
from sft_kernels.integrations import calls, neftune, rotary
from sft_kernels.sft import model as models
from sft_kernels.sft.masking import Example
from sft_kernels.sft.packing import collate
from sft_kernels.sft.stock import check_against_stock

V = 64
LENGTHS = (17, 9, 5)
# A window shorter than the examples, and longrope past its original length.
OPTIONS = {
    "llama": {},
    "mistral": {"sliding_window": 4},
    "gemma2": {"sliding_window": 4, "attn_logit_softcapping": 2.0},
    "gpt2": {"attn_pdrop": 0.0, "embd_pdrop": 0.1, "resid_pdrop": 0.2},
    "phi3": {
        "original_max_position_embeddings": 12,
        "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 12,
            "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
        },
    },
    "stablelm": {"hidden_dropout": 0.2},  # its layers do not hand the boundaries on
    "nemotron": {},  # nor do these
}  # fmt: skip


def example(length):
    ids = torch.randint(3, V, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    return Example(ids, [-100, *ids[1:]], "chats.jsonl:1")


BATCH = collate([[example(length) for length in LENGTHS]], 40, 0)
OTHER = collate([[example(8)]], 8, 0)


def model_of(kind):
    import transformers

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        kind, vocab_size=V, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, initializer_range=0.2, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, **OPTIONS[kind],
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=calls.NAME).train()


def step(model, device="cpu", autocast=False):
    """Gradients of a packed batch as the trainer computes them, the loss, and the bytes that backward was kept for."""
    batch, kept = BATCH.to(device), {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(1)
    with models.boundaries_given(model):
        with saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast(device, torch.bfloat16, enabled=autocast):
            hidden = models.hidden_states(model, batch)
            for weight in model.parameters():  # which are there anyway
                kept.pop(weight.untyped_storage().data_ptr(), None)
            held = sum(kept.values())
            loss = linear_cross_entropy(hidden, **models.head(model), shift=True, kept=batch.kept)
        with torch.no_grad():  # another call in between
            models.hidden_states(model, OTHER.to(device))
        loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return gradients, loss.detach(), held


def assert_same(found, expected):
    assert found[1].equal(expected[1])
    assert found[0].keys() == expected[0].keys()
    assert [name for name, gradient in expected[0].items() if not gradient.equal(found[0][name])] == []


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", OPTIONS)
def test_gradients_are_the_same_to_the_bit_and_less_is_kept(kind, autocast):
    model = model_of(kind)
    expected = step(model, autocast=autocast)
    assert all(gradient.abs().max() > 0 for name, gradient in expected[0].items() if "k_proj.bias" not in name)
    models.checkpoint_activations(model)
    found = step(model, autocast=autocast)
    assert_same(found, expected)
    assert found[2] < expected[2] / 4, (found[2], expected[2])
    assert calls.current() is None


def test_dropout_and_noise_are_the_same_under_the_same_seed():
    model = model_of("gpt2")
    neftune(model, 5.0)
    expected, runs = step(model), []
    models.checkpoint_activations(model)
    for _ in range(2):
        runs.append(step(model))
        assert_same(runs[-1], expected)
    model.eval()
    assert not step(model)[1].equal(expected[1])  # it was there


def test_longrope_is_each_examples_own():
    """The row of phi3 above has an example past the original length and others within it."""
    assert min(LENGTHS) < rotary.limit(model_of("phi3").config) == 12 < max(LENGTHS)


def test_layers_share_the_tiles_of_their_call(monkeypatch):
    """As on a GPU, where tiles are a launch: one list for the forward and for what backward computes again."""
    from sft_kernels.integrations import attention

    model, seen = model_of("llama"), []
    models.checkpoint_activations(model)
    tiles = attention._tiles
    monkeypatch.setattr(attention, "_takes_tiles", lambda device: True)
    monkeypatch.setattr(attention, "_tiles", lambda *args: seen.append(tiles(*args)) or seen[-1])
    step_without_another_call(model)
    assert len(seen) == 6
    assert all(found is seen[0] for found in seen)


def step_without_another_call(model):
    with models.boundaries_given(model):
        models.hidden_states(model, BATCH).sum().backward()


@pytest.mark.parametrize("target", ["q_proj", "embed_tokens"])
def test_adapters(target):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=[target], lora_dropout=0.3, init_lora_weights=False)
    model = peft.get_peft_model(model_of("llama"), config).train()
    expected = step(model)
    assert all("lora" in name for name in expected[0])
    models.checkpoint_activations(model)
    found = step(model)
    assert_same(found, expected)
    assert found[2] < expected[2] / 4


def test_embeddings_that_are_frozen_get_no_gradient():
    model = model_of("llama")
    model.get_input_embeddings().weight.requires_grad_(False)
    models.checkpoint_activations(model)
    assert not model.get_input_embeddings()(torch.tensor([1])).requires_grad


def test_a_class_that_cannot_is_refused():
    import transformers

    config = transformers.CTRLConfig(vocab_size=V, n_embd=16, dff=16, n_layer=1, n_head=2)
    with pytest.raises(ValueError, match=r"^activation_checkpointing: CTRLLMHeadModel does not support it"):
        models.checkpoint_activations(transformers.CTRLLMHeadModel(config))


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2", "stablelm", "nemotron"])
def test_the_check_before_the_first_step_needs_no_more_memory(kind):
    """Its backward keeps less, too; the model is left in the mode that it was in."""

    def kept_in_check(model):
        kept = []
        with saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t), models.boundaries_given(model):
            check_against_stock(model, BATCH)
        return sum(kept)

    model = model_of(kind)
    model.config.hidden_dropout = 0.0
    plain = kept_in_check(model)
    models.checkpoint_activations(model)
    first = kept_in_check(model)
    assert first < plain / 2
    assert all(module.training for module in model.modules())
    model.eval()
    assert kept_in_check(model) == first
    assert not any(module.training for module in model.modules())
