"""The noise of ``neftune``: its bound in each document, where it is, and where it is not."""

import copy
import math

import pytest
import torch

from sft_kernels.integrations import NAME, neftune

transformers = pytest.importorskip("transformers")

ALPHA = 5.0
V, D = 37, 512  # so wide that the largest number of a token comes near its bound


class Model(torch.nn.Module):
    """Embeddings alone, all zero, so that noise is all that comes out."""

    def __init__(self, d=D, **options):
        super().__init__()
        self.embed = torch.nn.Embedding.from_pretrained(torch.zeros(V, d, **options), freeze=False)

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, attention_mask=None, position_ids=None, **kwargs):
        return self.embed(input_ids)


def lengths_in(noise, alpha=ALPHA):
    """The length that each token's largest number speaks of: |u| ≥ 0.96 but once in 10⁹ tokens; 0: no noise."""
    largest = noise.detach().float().abs().amax(-1)
    lengths = (alpha / largest).square() / noise.shape[-1]
    return torch.where(largest == 0, 0, lengths + 1e-3).floor().long()  # up to 11 the rest is less than 1


def tiny(kind, **options):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        kind, vocab_size=V, hidden_size=D, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0,
        **{"max_position_embeddings": 64, "intermediate_size": 24, **options},
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    torch.nn.init.zeros_(model.get_input_embeddings().weight)
    return model.train()


def seen_by(model, **call):
    """The embeddings that the model computes with."""
    seen = []
    hook = model.get_input_embeddings().register_forward_hook(lambda *args: seen.append(args[2]))
    model(**call)
    hook.remove()
    return seen[0]


IDS = torch.arange(1, 9)[None]
TWO = IDS.expand(2, 8)
PADDED = torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0], [1] * 8])
LEFT = PADDED.flip(1)
POSITIONS = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 0]])
FROM_MASK = (LEFT.cumsum(-1) - 1).masked_fill(LEFT == 0, 1)  # as generate makes them
PACKED = [5, 5, 5, 5, 5, 2, 2, 1]
PADS = [[5] * 5 + [0] * 3, [8] * 8]
BOUNDS = torch.tensor([0, 5, 7, 8], dtype=torch.int32)
CASES = {
    "nothing": (IDS, {}, [[8] * 8]),
    "rows": (TWO, {}, [[8] * 8] * 2),
    "one token": (IDS[:, :1], {}, [[1]]),
    "right padding": (TWO, {"attention_mask": PADDED}, PADS),
    "left padding": (TWO, {"attention_mask": LEFT}, [[0] * 3 + [5] * 5, [8] * 8]),
    "left padding and positions": (
        TWO,
        {"attention_mask": LEFT, "position_ids": FROM_MASK},
        [[0] * 3 + [5] * 5, [8] * 8],
    ),
    "a mask of bool": (TWO, {"attention_mask": PADDED.bool()}, PADS),
    "a mask of floats": (TWO, {"attention_mask": PADDED.float()}, PADS),
    "a mask of segments": (
        IDS,
        {"attention_mask": torch.tensor([[1, 1, 1, 2, 2, 2, 2, 0]])},
        [[3] * 3 + [4] * 4 + [0]],
    ),
    "a mask of four dimensions": (TWO, {"attention_mask": torch.zeros(2, 1, 8, 8)}, [[8] * 8] * 2),
    "a mask of a cache": (TWO, {"attention_mask": torch.ones(2, 11)}, [[8] * 8] * 2),
    "positions": (IDS, {"position_ids": POSITIONS}, [PACKED]),
    "positions for all rows": (TWO, {"position_ids": POSITIONS}, [PACKED] * 2),
    "positions of each row": (TWO, {"position_ids": torch.cat([POSITIONS, POSITIONS + 3])}, [PACKED] * 2),
    "positions of text and images": (TWO, {"position_ids": POSITIONS.expand(4, 2, 8)}, [PACKED] * 2),
    "positions of images": (TWO, {"position_ids": POSITIONS.expand(3, 2, 8)}, [[8] * 8] * 2),
    "positions around padding": (
        IDS,
        {"position_ids": POSITIONS, "attention_mask": torch.tensor([[1, 1, 1, 0, 0, 1, 1, 1]])},
        [[3, 3, 3, 0, 0, 2, 2, 1]],
    ),
    "boundaries": (IDS, {"cu_seq_lens_q": BOUNDS}, [PACKED]),
    "boundaries, not positions": (IDS, {"cu_seq_lens_q": BOUNDS, "position_ids": POSITIONS.flip(1)}, [PACKED]),
    "boundaries, the last before the end": (IDS, {"cu_seq_lens_q": BOUNDS[:-1].long()}, [PACKED]),
    "an empty document": (IDS, {"cu_seq_lens_q": torch.tensor([0, 5, 5, 7, 8])}, [PACKED]),
    "boundaries over rows": (TWO, {"cu_seq_lens_q": torch.tensor([0, 8, 13, 15, 16])}, [[8] * 8, PACKED]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_noise_of_a_token_is_that_of_its_document(name):
    ids, call, expected = CASES[name]
    model = Model()
    with neftune(model, ALPHA):
        assert lengths_in(model(ids, **call)).tolist() == expected


@pytest.mark.parametrize("name", CASES)
def test_the_host_never_waits(name):
    """There is nothing to read on the meta device."""
    ids, call, _ = CASES[name]
    model = Model().to("meta")
    with neftune(model, ALPHA):
        out = model(ids.to("meta"), **{name: tensor.to("meta") for name, tensor in call.items()})
    assert out.shape == (*ids.shape, D)


def test_the_noise_is_uniform_up_to_the_bound_of_its_document():
    """A packed row as the trainer calls it: the model inside, by boundaries."""
    lengths = (200, 40, 9)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    model = tiny("llama", max_position_embeddings=256)
    model.set_attn_implementation(NAME)
    neftune(model, ALPHA)
    call = {"input_ids": torch.ones_like(positions), "position_ids": positions, "cu_seq_lens_q": bounds.int()}
    seen = seen_by(model.base_model, **call, use_cache=False)
    for length, noise in zip(lengths, seen[0].split(lengths), strict=True):
        bound, n = ALPHA / math.sqrt(length * D), noise.numel()
        unit = noise.detach().double() / bound
        assert unit.abs().max() <= 1 + 2**-22  # the scale is rounded twice in fp32
        assert min(unit.max(), -unit.min()) >= 1 - 40 / n  # misses once in e²⁰
        assert abs(unit.mean()) < 5 * math.sqrt(1 / 3 / n)  # five of its standard deviations
        assert abs(unit.square().mean() - 1 / 3) < 5 * math.sqrt(4 / 45 / n)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "bert"])
def test_a_padded_batch_and_a_packed_row_of_transformers(kind):
    options = {"bert": {"is_decoder": True}, "opt": {"ffn_dim": 24, "word_embed_proj_dim": D}}.get(kind, {})
    model = tiny(kind, **options)
    with neftune(model, ALPHA):
        seen = seen_by(model, input_ids=TWO, attention_mask=PADDED)
        assert lengths_in(seen).tolist() == PADS
        seen = seen_by(model, input_ids=IDS, position_ids=POSITIONS)
        assert lengths_in(seen).tolist() == [PACKED]


def test_each_half_of_an_encoder_decoder_goes_by_its_own_mask():
    torch.manual_seed(0)
    sizes = {"d_model": D, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=V, **sizes)).train()
    torch.nn.init.zeros_(model.shared.weight)
    seen = []
    with neftune(model, ALPHA):
        for half in (model.encoder, model.decoder):
            half.embed_tokens.register_forward_hook(lambda *args: seen.append(args[2]))
        model(input_ids=TWO, attention_mask=PADDED, decoder_input_ids=TWO)
    assert [lengths_in(noise).tolist() for noise in seen] == [PADS, [[8] * 8] * 2]


@pytest.mark.parametrize("target", ["q_proj", "embed_tokens", "whole embeddings"])
def test_a_peft_model(target):
    peft = pytest.importorskip("peft")
    options = {"target_modules": [target]}
    if target == "whole embeddings":
        options = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}
    model = peft.get_peft_model(tiny("llama"), peft.LoraConfig(r=2, **options)).train()
    with neftune(model, ALPHA):
        for called in (model, model.get_base_model().base_model):  # as HF's trainers call it, and as ours does
            seen = seen_by(called, input_ids=TWO, attention_mask=PADDED)
            assert lengths_in(seen).tolist() == PADS
        loss = model(input_ids=TWO, attention_mask=PADDED, labels=TWO).loss
        loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert seen_by(model, input_ids=TWO, attention_mask=PADDED).abs().max() == 0


def test_without_training_or_gradients_there_is_none():
    model = tiny("llama")
    neftune(model, ALPHA)
    assert seen_by(model, input_ids=IDS).abs().max() > 0
    with torch.no_grad():
        assert seen_by(model, input_ids=IDS).abs().max() == 0
    model.eval()
    assert seen_by(model, input_ids=IDS).abs().max() == 0


def test_generation_in_training_mode_gets_none():
    model = tiny("llama", initializer_range=1.0)
    torch.nn.init.normal_(model.get_input_embeddings().weight)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "output_logits": True}
    options["return_dict_in_generate"] = True
    expected = model.generate(IDS, **options)
    neftune(model, 1e3)
    state = torch.get_rng_state()
    found = model.generate(IDS, **options)
    assert model.training
    assert found.sequences.equal(expected.sequences)
    assert all(a.equal(b) for a, b in zip(found.logits, expected.logits, strict=True))
    assert torch.get_rng_state().equal(state)


def test_removal_ends_it_and_leaves_no_hook():
    model = tiny("llama")
    handle = neftune(model, ALPHA)
    handle.remove()
    handle.remove()
    with pytest.raises(RuntimeError, match="stop"), neftune(model, ALPHA):
        raise RuntimeError("stop")
    assert seen_by(model, input_ids=IDS).abs().max() == 0
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_second_one_is_refused():
    model = Model()
    handle = neftune(model, ALPHA)
    with pytest.raises(ValueError, match=r"^model: it has noise already"):
        neftune(model, ALPHA)
    handle.remove()
    neftune(model, ALPHA)


@pytest.mark.parametrize("alpha", [0, -1.0, math.inf, math.nan, True, "5", None], ids=repr)
def test_alpha_is_a_positive_finite_number(alpha):
    with pytest.raises(ValueError, match=r"^alpha: expected a positive finite number"):
        neftune(Model(), alpha)


def test_a_model_needs_one_layer_of_embeddings():
    with pytest.raises(ValueError, match=r"^model: Linear has no single layer of input embeddings"):
        neftune(torch.nn.Linear(2, 2), ALPHA)
    model = Model()
    model.embed = torch.nn.ModuleList([model.embed])
    with pytest.raises(ValueError, match=r"^model: Model has no single layer"):
        neftune(model, ALPHA)


def test_the_seed_alone_decides():
    model, runs = Model(), []
    neftune(model, ALPHA)
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs += [model(IDS), model(IDS)]
    assert runs[0].equal(runs[2])
    assert runs[1].equal(runs[3])
    assert not runs[0].equal(runs[1])
    assert not runs[0].equal(runs[4])


def test_every_dtype_gets_the_same_noise():
    runs = []
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        model = Model(dtype=dtype)
        neftune(model, ALPHA)
        torch.manual_seed(1)
        runs.append(model(IDS))
        assert runs[-1].dtype == dtype
    assert runs[1].equal(runs[0].bfloat16())
    assert runs[2].equal(runs[0].double())


def test_the_gradient_is_that_of_a_constant():
    gradients, weigh = [], torch.randn(1, 8, D)
    for alpha in (None, ALPHA):
        model = Model()
        if alpha:
            neftune(model, alpha)
        (model(IDS) * weigh).sum().backward()
        gradients.append(model.embed.weight.grad)
    assert gradients[0].equal(gradients[1])


def test_under_activation_checkpointing_the_noise_is_drawn_once():
    """Under the same seed the same gradients, though layers are computed twice."""
    gradients = []
    for kwargs in (None, {"use_reentrant": False}, {"use_reentrant": True}):
        model = tiny("llama")
        if kwargs is not None:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)(kwargs)
        neftune(model, ALPHA)
        torch.manual_seed(1)
        model(input_ids=IDS, position_ids=POSITIONS, labels=IDS, use_cache=False).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for others in gradients[1:]:
        assert all(a.equal(b) for a, b in zip(gradients[0], others, strict=True))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_call_that_was_broken_off_is_forgotten(error):
    class Broken(Model):
        broken = True

        def forward(self, input_ids, attention_mask=None, **kwargs):
            if self.broken:
                raise error
            return super().forward(input_ids)

    model = Broken()
    neftune(model, ALPHA)
    with pytest.raises(error):
        model(TWO, attention_mask=PADDED)
    model.broken = False
    if error is RuntimeError:  # torch calls no hooks after Ctrl-C, so there the next call of the model forgets
        assert lengths_in(model.embed(TWO)).tolist() == [[8] * 8] * 2
    assert lengths_in(model(TWO)).tolist() == [[8] * 8] * 2
    assert lengths_in(model.embed(TWO)).tolist() == [[8] * 8] * 2


def test_a_copy_has_noise_of_its_own():
    model = Model()
    handle = neftune(model, ALPHA)
    other = copy.deepcopy(model)
    handle.remove()
    assert model(IDS).abs().max() == 0
    assert lengths_in(other(IDS, position_ids=POSITIONS)).tolist() == [PACKED]


def test_embeddings_of_a_flat_row():
    model = Model()
    neftune(model, ALPHA)
    noise = model(IDS[0], cu_seq_lens_q=BOUNDS)
    assert noise.shape == (8, D)
    assert lengths_in(noise).tolist() == PACKED
