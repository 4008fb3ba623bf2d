"""Models that look positions up in a table: lines beyond it are refused before anything is trained."""

import os
from dataclasses import replace

import pytest
import torch
import transformers

from sft_kernels.integrations import attention
from sft_kernels.sft.data import DataError
from sft_kernels.sft.model import hidden_states
from sft_kernels.sft.packing import collate
from sft_kernels.sft.positions import most_positions, without_longer
from sft_kernels.sft.recipe import Recipe
from sft_kernels.sft.stock import NotStock, packed_hidden_states
from sft_kernels.sft.train import train

from .conftest import chat
from .test_stock import DYNAMIC, PHI3, of_length

SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
MODELS = {
    "gpt2": ({"n_positions": 40, "attn_pdrop": 0.0}, 40),
    "opt": ({"max_position_embeddings": 40, "ffn_dim": 64, "word_embed_proj_dim": 32, "attention_dropout": 0.0}, 40),
    "biogpt": ({"max_position_embeddings": 40, "attention_probs_dropout_prob": 0.0}, 40),
    "gptj": ({"n_positions": 40, "rotary_dim": 4}, 40),
    "codegen": ({"n_positions": 40, "rotary_dim": 4}, 40),
    "gpt_bigcode": ({"n_positions": 40, "attn_pdrop": 0.0}, 40),
    "bert": ({"max_position_embeddings": 40, "is_decoder": True, "attention_probs_dropout_prob": 0.0}, 40),
    "llama": ({"max_position_embeddings": 40}, None),
    "gpt_neox": ({"max_position_embeddings": 40}, None),
    "mixtral": ({"max_position_embeddings": 40, "num_local_experts": 4}, None),
    "phi3": (PHI3, None),
}


def build(kind, attn_implementation="sft_kernels", **options):
    attention.register()
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**SIZES, **options})
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation)


@pytest.mark.parametrize("kind", MODELS)
def test_the_table_is_found_in_the_model(kind):
    options, most = MODELS[kind]
    model = build(kind, **options).train()
    assert most_positions(model, packed_hidden_states) == most
    assert model.training
    if most is not None:  # it is the last length that the model computes
        hidden_states(model, collate([[of_length(most)]], most, 0))
        with pytest.raises((IndexError, RuntimeError), match=r"out of range|out of bounds"):
            hidden_states(model, collate([[of_length(most + 1)]], most + 1, 0))


def test_rotary_embeddings_past_the_first_length_have_no_end():
    assert most_positions(build("llama", **DYNAMIC), packed_hidden_states) is None


@pytest.mark.parametrize(("rows", "most"), [(None, None), (77, 70)])
def test_a_table_has_the_same_length_for_every_row(rows, most):
    """Old rotary modules index what they have just computed for the row at hand."""
    model = build("llama")

    def look_up(module, args, output):
        positions = torch.arange(output.shape[1])
        return output + torch.zeros(rows or len(positions) + 7, 32)[positions + 7]

    model.get_input_embeddings().register_forward_hook(look_up)
    assert most_positions(model, packed_hidden_states) == most


def test_a_model_that_takes_no_boundaries_is_refused_as_by_the_check():
    model = build("llama")
    model.model.forward = lambda input_ids: None
    with pytest.raises(NotStock, match="does not take packed rows"):
        most_positions(model, packed_hidden_states)


def test_padding_is_cut_into_segments_no_longer_than_the_longest_example():
    """Its positions stay within a table's, and its attention costs no more than an example's."""
    batch = collate([[of_length(5), of_length(3)], [of_length(2)]], 14, pad_id=0)
    assert batch.position_ids[0].tolist() == [
        *range(5), *range(3), *range(5), 0, *range(2), *range(5), *range(5), 0, 1,
    ]  # fmt: skip
    assert batch.cu_seqlens.tolist() == [0, 5, 8, 13, 14, 16, 21, 26, 28]


# ---- in a run


@pytest.fixture
def recipe(write_jsonl, tmp_path):
    """Two lines, the second and the last, are longer than 40 tokens."""
    rows = [chat("Go.", "no " * (12 if i in (1, 5) else 1)) for i in range(6)]
    return Recipe(data=[str(write_jsonl(*rows))], out=str(tmp_path / "run"), row_tokens=100, steps=1, precision="fp32")


@pytest.fixture
def gpt2():
    return build("gpt2", n_positions=40, attn_pdrop=0.0)


def test_a_line_beyond_the_table_is_refused_before_anything_is_written(recipe, gpt2, tokenizer):
    with pytest.raises(DataError, match=r"chats\.jsonl:2: \d+ tokens, longer than the 40 positions that the model has"):
        train(recipe, model=gpt2, tokenizer=tokenizer)
    assert not os.path.exists(recipe.out)


def test_such_lines_are_skipped_on_request_and_padding_may_be_longer_than_the_table(recipe, gpt2, tokenizer, capsys):
    _, _, log = train(replace(recipe, skip_bad=True), model=gpt2, tokenizer=tokenizer)
    assert log.history[0]["examples"] < 6
    assert log.history[0]["tokens"] == 100
    out = capsys.readouterr().out
    assert "chats.jsonl:2: " in out
    assert "chats.jsonl:6: " in out
    assert "skipped 2 lines that are longer than the model's positions" in out


def test_held_out_lines_count_too(recipe, gpt2, tokenizer, write_jsonl):
    held_out = recipe.data
    recipe = replace(recipe, data=[str(write_jsonl(chat("Go.", "no"), name="short.jsonl"))], eval_data=held_out)
    with pytest.raises(DataError, match=r"chats\.jsonl:2: .* longer than the 40 positions"):
        train(recipe, model=gpt2, tokenizer=tokenizer)
    _, _, log = train(replace(recipe, skip_bad=True), model=gpt2, tokenizer=tokenizer)
    assert [row["step"] for row in log.history if "eval" in row] == [0, 1]


def test_if_none_is_left_the_first_reason_is_given():
    with pytest.raises(DataError, match="b:7: 9 tokens"):
        without_longer([of_length(9)._replace(source="a:b:7"), of_length(8)], 7, skip_bad=True)
    assert without_longer(examples := [of_length(9)], None) is examples
