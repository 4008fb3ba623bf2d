"""The batch of the check before the first step, and what only shows between examples of other lengths."""

import json
import random
from dataclasses import replace

import pytest
import torch

from sft_kernels.integrations import attention, rotary
from sft_kernels.sft import model as models
from sft_kernels.sft import stock
from sft_kernels.sft.dataset import load_examples
from sft_kernels.sft.masking import IGNORE, Encoder, Example
from sft_kernels.sft.recipe import Recipe
from sft_kernels.sft.stock import NotStock, batch_to_check, check_against_stock
from sft_kernels.sft.train import train

from .conftest import chat

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "original_max_position_embeddings": 40,
    "short_factor": [1.0] * 4,
    "long_factor": [8.0] * 4,
}
PHI3 = {
    "rope_parameters": LONGROPE,
    "original_max_position_embeddings": 40,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DYNAMIC = {
    "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 8.0},
    "max_position_embeddings": 40,
}


def of_length(n, kept=None):
    ids = [3 + 7 * i % 90 for i in range(n)]
    start = 1 if kept is None else n - kept
    return Example(ids, [IGNORE] * start + ids[start:], f"{n}")


def lengths(batch):
    return batch.cu_seqlens.diff().tolist()


# ---- the batch


@pytest.mark.parametrize("seed", range(3))
def test_the_row_does_not_depend_on_the_order_of_the_data(seed, small_model):
    examples = [of_length(n) for n in (5, 9, 20, 33, 34, 60, 61, 100)]
    random.Random(seed).shuffle(examples)
    batch = batch_to_check(small_model(), examples, 256, pad_id=2)
    assert lengths(batch) == [5, 100, 33, 9, 60, 256 - 207]
    assert batch.input_ids[0, -49:].eq(2).all()
    assert batch.max_seqlen == 100


@pytest.mark.parametrize(
    ("given", "row_tokens", "expected"),
    [
        ([50], 256, [50, 50, 50]),  # an example is its own neighbour
        ([256], 256, [64, 256, 64]),  # and is cut if it fills the row
        ([2000] * 9, 2000, [250, 2000, 250]),
        ([2000, 10], 2000, [10, 2000, 10]),
        ([1900, 10, 120], 2000, [10, 1900, 120]),
        ([90, 80, 10], 100, [10, 90, 64]),
        ([2], 8, [2, 2, 2]),
    ],
)
def test_there_is_always_a_neighbour_before_and_behind_the_longest(given, row_tokens, expected, small_model):
    batch = batch_to_check(small_model(), [of_length(n) for n in given], row_tokens, pad_id=0)
    assert lengths(batch)[: len(expected)] == expected
    padding = lengths(batch)[len(expected) :]
    assert padding
    assert max(padding) <= max(expected)
    assert batch.tokens <= max(1.25 * row_tokens + 16, row_tokens + 145)
    assert batch.kept.count > 0


def test_labels_are_thinned(small_model, monkeypatch):
    batch = batch_to_check(small_model(), [of_length(1000), of_length(20, kept=1)], 4000, pad_id=0)
    kept = torch.bincount(torch.searchsorted(batch.cu_seqlens, batch.kept.rows.int(), right=True) - 1)
    assert kept[0] == 1
    assert 200 < kept[1] <= 256
    monkeypatch.setattr(stock, "_EAGER", 100)
    model = small_model("gemma2", attn_logit_softcapping=5.0, head_dim=8)
    batch = batch_to_check(model, [of_length(n) for n in (150, 140, 300, 120)], 400, pad_id=0)
    assert lengths(batch)[:3] == [64, 300, 64]  # eager attention: short ones with labels, the long one without
    kept = torch.bincount(torch.searchsorted(batch.cu_seqlens, batch.kept.rows.int(), right=True) - 1)
    assert (kept[0], kept[1], kept[2]) == (63, 0, 63)
    check_against_stock(model, batch)


# ---- what it finds, whatever comes first


@pytest.fixture
def recipe(write_jsonl, tmp_path, tokenizer):
    """Rows of which some hold one long example, others several short ones."""
    rows = [chat("Go.", f"word{i} " * 6) for i in range(8)] + [chat("Go.", f"no {i}") for i in range(12)]
    path = write_jsonl(*rows)
    examples, _ = load_examples([path], Encoder(tokenizer), 4096)
    longest = max(len(e.input_ids) for e in examples)
    assert longest < 2 * min(len(e.input_ids) for e in examples) + longest / 2
    return Recipe(data=[str(path)], out=str(tmp_path / "run"), row_tokens=longest, steps=2, precision="fp32")


def lines_of(recipe):
    with open(recipe.data[0]) as file:
        return file.readlines()


@pytest.mark.parametrize("seed", range(3))
def test_examples_that_see_each_other_are_found_out(seed, recipe, small_model, tokenizer, monkeypatch):
    real = attention.packed_attention

    def leaky(query, key, value, cu_seqlens, max_seqlen, **options):
        return real(query, key, value, cu_seqlens[[0, -1]], None, **options)

    monkeypatch.setattr(attention, "packed_attention", leaky)
    with pytest.raises(NotStock, match="examples see each other"):
        train(replace(recipe, seed=seed), model=small_model(), tokenizer=tokenizer)


@pytest.mark.parametrize("config", [("phi3", PHI3), ("llama", DYNAMIC)], ids=["longrope", "dynamic"])
@pytest.mark.parametrize("held_out", [False, True])
def test_a_length_that_changes_the_others_is_found_out(config, held_out, recipe, small_model, tokenizer, monkeypatch):
    kind, options = config
    examples, _ = load_examples(recipe.data, Encoder(tokenizer), 4096)
    assert min(len(e.input_ids) for e in examples) < 40 < recipe.row_tokens
    if held_out:  # the long ones
        lines = lines_of(recipe)
        for name, part in (("train", lines[8:]), ("eval", lines[:8])):
            with open(f"{recipe.out}.{name}.jsonl", "w") as file:
                file.writelines(part)
        recipe = replace(recipe, data=[f"{recipe.out}.train.jsonl"], eval_data=[f"{recipe.out}.eval.jsonl"])
    train(recipe, model=small_model(kind, **options), tokenizer=tokenizer)
    monkeypatch.setattr(rotary, "by_example", lambda *_: None)
    recipe = replace(recipe, out=recipe.out + "2")
    with pytest.raises(NotStock, match="something depends on the lengths"):
        train(recipe, model=small_model(kind, **options), tokenizer=tokenizer)


@pytest.mark.parametrize("config", [("phi3", PHI3), ("llama", DYNAMIC)], ids=["longrope", "dynamic"])
def test_an_attention_that_cannot_do_it_is_refused_with_the_one_that_can(config, recipe, small_model, tokenizer):
    kind, options = config
    model = small_model(kind, "sdpa", **options)
    with pytest.raises(NotStock, match="its attention is 'sdpa', use attn_implementation='sft_kernels'"):
        train(recipe, model=model, tokenizer=tokenizer)
    assert model.config._attn_implementation == "sdpa"


def test_transformers_own_attention_trains_as_ours_where_it_keeps_examples_apart(recipe, small_model, tokenizer):
    """Its masks follow positions that restart. BLOOM's and MPT's do not."""
    losses = []
    for name in ("sft_kernels", "sdpa", "eager"):
        model = small_model("llama", name)
        _, _, log = train(replace(recipe, out=recipe.out + name), model=model, tokenizer=tokenizer)
        losses.append([row["loss"] for row in log.history if "loss" in row])
        assert model.config._attn_implementation == name
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)
    for kind in ("bloom", "mpt"):
        with pytest.raises(NotStock, match=r"see each other.*its attention is 'eager', use attn_impl"):
            train(recipe, model=small_model(kind, "eager"), tokenizer=tokenizer)


def test_long_examples_beside_short_ones_train_as_they_do_alone(write_jsonl, recipe, small_model, tokenizer):
    """The loss of the first step over all examples, against the stock model on each of them."""
    rows = [json.loads(line) for line in lines_of(recipe)]
    recipe = replace(recipe, data=[str(write_jsonl(*rows, name="all.jsonl"))], row_tokens=400, rows=9, steps=1)
    for number, (kind, options) in enumerate((("phi3", PHI3), ("llama", DYNAMIC))):
        total = kept = 0
        for e in load_examples(recipe.data, Encoder(tokenizer), 400)[0]:
            model, ids, labels = small_model(kind, "sdpa", **options), torch.tensor([e.input_ids]), e.labels
            with torch.no_grad():
                logits = model(ids).logits[0, :-1]
            total += torch.nn.functional.cross_entropy(logits, torch.tensor(labels[1:]), reduction="sum")
            kept += e.kept
        run = replace(recipe, out=f"{recipe.out}{number}")
        _, _, log = train(run, model=small_model(kind, **options), tokenizer=tokenizer)
        assert log.history[0]["loss"] == pytest.approx(float(total) / kept, rel=1e-5)


def test_the_stock_models_own_memory_of_a_longer_example_does_not_count(small_model):
    """Dynamic rotary embeddings keep the longest length that they have met; an example alone has met none."""
    model = small_model(**DYNAMIC)
    model(torch.zeros(1, 200, dtype=torch.long))
    check_against_stock(model, batch_to_check(model, [of_length(n) for n in (50, 60, 100)], 300, pad_id=0))


def test_hidden_states_that_no_label_hangs_on_are_compared(small_model):
    model = small_model()
    batch = batch_to_check(model, [of_length(20, kept=2), of_length(30, kept=2)], 80, pad_id=0)
    check_against_stock(model, batch)

    def seep(module, args, kwargs, output):
        starts = kwargs["cu_seq_lens_q"][1:-1].long() if "cu_seq_lens_q" in kwargs else []
        hidden = output.last_hidden_state.clone()
        hidden[:, starts] += 0.1 * hidden[:, [start - 1 for start in starts]]
        output.last_hidden_state = hidden
        return output

    model.base_model.register_forward_hook(seep, with_kwargs=True)
    with pytest.raises(NotStock, match=r"^model: LlamaForCausalLM computes other hidden states for an example of"):
        check_against_stock(model, batch)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_of_low_precision_is_compared_in_fp32_and_left_as_it_was(dtype, small_model):
    model = small_model().to(dtype)
    before = {name: t.clone() for name, t in [*model.named_parameters(), *model.named_buffers()]}
    pointers = [id(p) for p in model.parameters()]
    check_against_stock(model, batch_to_check(model, [of_length(20), of_length(30)], 80, pad_id=0))
    assert pointers == [id(p) for p in model.parameters()]
    for name, t in [*model.named_parameters(), *model.named_buffers()]:
        assert t.dtype == before[name].dtype, name
        assert t.equal(before[name]), name
    assert all(p.grad is None for p in model.parameters())


def test_weights_that_are_not_finite_are_named(small_model):
    model = small_model()
    model.model.norm.weight.data[0] = float("nan")
    with pytest.raises(NotStock, match=r"loss .* is not finite; its weight model\.norm\.weight holds NaN"):
        check_against_stock(model, batch_to_check(model, [of_length(20)], 80, pad_id=0))


def test_a_failed_check_leaves_the_model_as_it_was(small_model, monkeypatch):
    model = small_model().to(torch.bfloat16)
    monkeypatch.setattr(stock, "head", lambda model: models.head(model) | {"logit_scale": 2.0})
    with pytest.raises(NotStock):
        check_against_stock(model.train(), batch_to_check(model, [of_length(20)], 80, pad_id=0))
    assert model.training
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(p.grad is None for p in model.parameters())
    assert model.config._attn_implementation == "sft_kernels"


def test_a_weak_leak_is_found_though_its_parameters_are_frozen(small_model):
    """A layer that passes a five-thousandth of a token's hidden states on to the next example."""
    model = small_model()
    layer = model.model.layers[0]
    forward = layer.forward

    def leaking(hidden_states, *args, **options):
        out = forward(hidden_states, *args, **options)
        return out + 2e-4 * out.roll(1, dims=1)

    layer.forward = leaking
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("q_proj" in name)
    batch = batch_to_check(model, [of_length(n) for n in (12, 300, 40)], 400, pad_id=0)
    with pytest.raises(NotStock, match="other hidden states"):
        check_against_stock(model, batch)
