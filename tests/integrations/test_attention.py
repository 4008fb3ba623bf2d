import subprocess
import sys

import pytest
import torch
import transformers

from sft_kernels.integrations import assert_no_leak, attention, calls


def model(implementation=attention.NAME, **options):
    attention.register()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, **options,
    )  # fmt: skip
    return transformers.LlamaForCausalLM._from_config(config, attn_implementation=implementation)


LENGTHS = (5, 1, 9)
CU_SEQLENS = torch.tensor([0, 5, 6, 15], dtype=torch.int32)


def packed(ids):
    positions = torch.cat([torch.arange(l) for l in LENGTHS])[None]
    return {
        "input_ids": ids,
        "position_ids": positions,
        "cu_seq_lens_q": CU_SEQLENS,
        "max_length_q": 9,
        "use_cache": False,
    }


def test_a_packed_row_gives_each_example_what_it_gets_alone():
    ids = torch.randint(0, 64, (1, 15))
    with torch.no_grad():
        together = model()(**packed(ids)).logits[0]
        alone = [model("eager")(part).logits[0] for part in ids.split(LENGTHS, dim=1)]
    torch.testing.assert_close(together, torch.cat(alone))


def gemma2(implementation=attention.NAME):
    """Layers with a window of four and layers without, scores capped where a random model's already are bent."""
    attention.register()
    torch.manual_seed(0)
    config = transformers.Gemma2Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=4, attn_logit_softcapping=0.01, query_pre_attn_scalar=1,
    )  # fmt: skip
    return transformers.Gemma2ForCausalLM._from_config(config, attn_implementation=implementation)


def test_a_models_softcap_scale_and_windows_reach_the_op():
    ids = torch.randint(0, 64, (1, 15))
    with torch.no_grad():
        together = gemma2()(**packed(ids)).logits[0]
        alone = torch.cat([gemma2("eager")(part).logits[0] for part in ids.split(LENGTHS, dim=1)])
        uncapped = gemma2()
        for layer in uncapped.model.layers:
            layer.self_attn.attn_logit_softcapping = None
        without = uncapped(**packed(ids)).logits[0]
    torch.testing.assert_close(together, alone)
    assert not torch.allclose(without, alone, atol=1e-4)


def test_no_example_sees_another():
    ids = torch.randint(0, 64, (1, 15))
    changed = ids.clone()
    changed[0, :5] = (ids[0, :5] + 1) % 64
    with torch.no_grad():
        a, b = (model()(**packed(row)).logits[0] for row in (ids, changed))
    assert not a[:5].equal(b[:5])
    assert a[5:].equal(b[5:])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"attention_mask": torch.tensor([[0] + [1] * 14])}, "without padding"),
        ({"s_aux": torch.zeros(4)}, "s_aux"),
        ({"position_bias": torch.zeros(4)}, "position_bias"),
        ({"output_attentions": True}, "output_attentions"),
        ({"attention_mask": torch.tensor([[1] * 5 + [2] + [3] * 9])}, "segment numbers"),
    ],
    ids=["padding", "sinks", "bias", "weights", "segment numbers"],
)
def test_what_is_not_computed_is_refused(change, reason):
    with pytest.raises(ValueError, match=reason):
        model()(**{**packed(torch.zeros(1, 15, dtype=torch.long)), **change})


def test_dropout_is_refused_in_training():
    dropping = model(attention_dropout=0.1).train()
    with pytest.raises(ValueError, match="dropout"):
        dropping(**packed(torch.zeros(1, 15, dtype=torch.long)))


def test_two_rows_are_refused():
    batch = packed(torch.zeros(1, 15, dtype=torch.long))
    with pytest.raises(ValueError, match="one packed row"):
        model()(**{**batch, "input_ids": batch["input_ids"].expand(2, -1)})


# ---- boundaries and tiles, once a forward


@pytest.fixture
def layers(monkeypatch):
    """What each layer's packed attention is given: boundaries and tiles."""
    seen, function = [], attention.packed_attention

    def spy(query, key, value, cu_seqlens, max_seqlen, *, tiles, **options):
        seen.append((cu_seqlens, tiles))
        return function(query, key, value, cu_seqlens, max_seqlen, tiles=tiles, **options)

    monkeypatch.setattr(attention, "packed_attention", spy)
    return seen


def by_positions(ids):
    return {name: value for name, value in packed(ids).items() if name not in ("cu_seq_lens_q", "max_length_q")}


def test_without_boundaries_they_are_found_in_the_positions_once_a_forward(layers):
    ids, llama = torch.randint(0, 64, (1, 15)), model()
    with torch.no_grad():
        given, derived = llama(**packed(ids)).logits, llama(**by_positions(ids)).logits
    assert torch.equal(derived, given)
    _, _, (first, _), (second, _) = layers
    assert first is second
    assert first.tolist() == CU_SEQLENS.tolist()
    assert first.dtype == torch.int32


@pytest.mark.parametrize(
    ("positions", "bounds"),
    [
        ([0, 1, 2, 3], [0, 4]),
        ([7, 8, 0, 1], [0, 2, 4]),
        ([0, 1, 0, 0], [0, 2, 3, 4]),
        ([0, 0, 5, 6], [0, 1, 2, 4]),
        ([3], [0, 1]),
    ],
    ids=str,
)
def test_an_example_begins_where_positions_do_not_go_on(positions, bounds):
    assert calls.boundaries_of(torch.tensor([positions])).tolist() == bounds


def test_boundaries_are_those_of_the_call_even_if_the_positions_are_written_to_afterwards():
    ids, llama = torch.randint(0, 64, (1, 15)), model()
    batch = by_positions(ids)
    whole = llama(**{**batch, "position_ids": batch["position_ids"].clone()}).logits
    buffer = batch["position_ids"].numpy()  # whose writes torch does not count
    first = llama(**batch).logits
    buffer[:] = torch.arange(15)
    second = llama(**batch).logits
    torch.testing.assert_close(first, whole)
    torch.testing.assert_close(second, llama(ids).logits)


def test_layers_share_one_list_of_tiles(layers, monkeypatch):
    """As on a GPU: here Triton is interpreted."""
    if torch.cuda.is_available():
        pytest.skip("Triton is interpreted only where there is no GPU")
    ids, llama = torch.randint(0, 64, (1, 15)), model()
    with torch.no_grad():
        expected = llama(**packed(ids)).logits
        monkeypatch.setenv("SFT_KERNELS_IMPL", "triton")
        for batch in (packed(ids), by_positions(ids)):
            layers.clear()
            torch.testing.assert_close(llama(**batch).logits, expected)
            (_, first), (_, second) = layers
            assert first is second
            assert first.total_tokens == 15


def test_a_graph_needs_the_boundaries(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("Triton is interpreted only where there is no GPU")
    monkeypatch.setenv("SFT_KERNELS_IMPL", "triton")
    torch._dynamo.reset()
    ids, llama = torch.randint(0, 64, (1, 15)), model()
    batch = packed(ids)
    with torch.no_grad():
        expected = llama(**batch).logits
        compiled = torch.compile(llama, backend="aot_eager", fullgraph=True)
        for given in (batch, by_positions(ids), ones(by_positions(ids))):  # looked at before the graph
            torch.testing.assert_close(compiled(**given).logits, expected)
        step = torch.compile(lambda **given: llama(**given).logits, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(step(**batch), expected)
        for given in (by_positions(ids), ones(by_positions(ids))):
            with pytest.raises(Exception, match=r"cu_seq_lens_q.*torch\.compile"):
                step(**given)


# ---- one import


def test_one_import_makes_the_name_known():
    code = """
import torch, transformers, sft_kernels.integrations
config = transformers.LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
    num_attention_heads=1, attn_implementation="sft_kernels")
model = transformers.AutoModelForCausalLM.from_config(config)
print(model(torch.zeros(1, 3, dtype=torch.long), use_cache=False).logits.shape)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "[1, 3, 8]" in done.stdout, done.stderr


# ---- the leak test


def ones(batch):
    return {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}


@pytest.mark.parametrize("prepare", [packed, by_positions, lambda ids: ones(by_positions(ids))])
@pytest.mark.parametrize("example", [None, 1, 2])
def test_nothing_leaks_here(prepare, example):
    assert_no_leak(model(), prepare(torch.randint(0, 64, (1, 15))), example=example)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_mask_of_ones_leaks_in_transformers_own(implementation):
    """A two-dimensional mask that allows all turns off what would have kept the examples apart."""
    batch = by_positions(torch.randint(0, 64, (1, 15)))
    assert_no_leak(model(implementation), batch)
    with pytest.raises(AssertionError, match=r"example 0 was changed, and the logits of example 1 moved by up to 0\.0"):
        assert_no_leak(model(implementation), ones(batch))


def test_boundaries_one_off_leak(monkeypatch):
    """A boundary that an implementation puts a token too late."""
    function = attention.packed_attention

    def late(query, key, value, cu_seqlens, *args, **options):
        return function(query, key, value, cu_seqlens + torch.tensor([0, 1, 1, 0]), *args, **options)

    monkeypatch.setattr(attention, "packed_attention", late)
    with pytest.raises(AssertionError, match="example 1 moved"):
        assert_no_leak(model(), packed(torch.randint(0, 64, (1, 15))))


def test_a_model_that_does_not_read_its_input_does_not_pass():
    llama = model()
    torch.nn.init.zeros_(llama.lm_head.weight)
    with pytest.raises(AssertionError, match="its own logits did not move"):
        assert_no_leak(llama, packed(torch.randint(0, 64, (1, 15))))


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(training):
    llama = model().train(training)
    batch = packed(torch.randint(0, 64, (1, 15)))
    ids = batch["input_ids"].clone()
    assert_no_leak(llama, batch)
    assert llama.training is training
    assert all(p.grad is None for p in llama.parameters())
    assert torch.equal(batch["input_ids"], ids)


@pytest.mark.parametrize(
    ("change", "options", "match"),
    [
        ({"input_ids": torch.zeros(2, 15, dtype=torch.long)}, {}, "batch: expected input_ids of one packed row"),
        ({"cu_seq_lens_q": torch.tensor([0, 0, 15])}, {}, "at least two examples"),
        ({"cu_seq_lens_q": None, "position_ids": None}, {}, "cu_seq_lens_q or position_ids"),
        ({}, {"example": 3}, "example"),
    ],
    ids=["rows", "one example", "no boundaries", "example"],
)
def test_a_batch_that_shows_nothing_is_refused(change, options, match):
    batch = {**packed(torch.zeros(1, 15, dtype=torch.long)), **change}
    with pytest.raises(ValueError, match=match):
        assert_no_leak(model(), batch, **options)
