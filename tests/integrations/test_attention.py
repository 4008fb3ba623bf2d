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
        ({"softcap": 30.0}, "softcap"),
        ({"s_aux": torch.zeros(4)}, "s_aux"),
    ],
    ids=["boundaries", "padding", "softcap", "sinks"],
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
