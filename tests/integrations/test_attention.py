import pytest
import torch
import transformers

from sft_kernels.integrations import attention


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
        ({"cu_seq_lens_q": None}, "cu_seq_lens_q"),
        ({"attention_mask": torch.tensor([[0] + [1] * 14])}, "attention_mask"),
        ({"s_aux": torch.zeros(4)}, "s_aux"),
    ],
    ids=["boundaries", "padding", "sinks"],
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
