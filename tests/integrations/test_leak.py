"""assert_no_leak cuts the neighbours of an example: what it gets must not depend on their lengths."""

import warnings

import pytest
import torch

from sft_kernels.integrations import NAME, assert_no_leak, rotary

from .test_rotary import BOUNDS, IDS, LENGTHS, MODELS, POSITIONS, build

PACKED = {"input_ids": IDS, "position_ids": POSITIONS, "cu_seq_lens_q": BOUNDS, "cu_seq_lens_k": BOUNDS}
GIVEN = {
    "everything": {**PACKED, "max_length_q": 24, "max_length_k": 24},
    "boundaries": {"input_ids": IDS, "cu_seq_lens_q": BOUNDS},
    "positions": {"input_ids": IDS, "position_ids": POSITIONS},
    "a mask of ones": {**PACKED, "attention_mask": torch.ones_like(IDS), "labels": IDS},
}


@pytest.fixture(autouse=True)
def no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("name", MODELS)
def test_embeddings_of_each_example_pass(name, given):
    assert_no_leak(build(name), GIVEN[given])


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("name", ["Phi-3", "Phi-MoE", "Llama"])
def test_embeddings_that_change_with_the_longest_example_are_found_out(name, given, monkeypatch):
    model = build(name)
    monkeypatch.setattr(rotary, "by_example", lambda *_: None)
    with pytest.raises(AssertionError, match=r"the logits of example 1 moved by up to \d.*lengths of its neighbours"):
        assert_no_leak(model, GIVEN[given])


@pytest.mark.parametrize("attention", [NAME, "sdpa"])
def test_a_model_that_only_sees_how_many_examples_there_are_is_found_out(attention):
    model = build("Cohere", attention)

    def louder(module, args, kwargs, output):
        output.last_hidden_state = output.last_hidden_state * (kwargs["position_ids"] == 0).sum()
        return output

    batch = {"input_ids": IDS[:, :9], "position_ids": torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 0]])}
    assert_no_leak(model, batch)
    model.base_model.register_forward_hook(louder, with_kwargs=True)
    with pytest.raises(AssertionError, match="the logits of example 1 moved"):
        assert_no_leak(model, batch)


def test_what_cannot_be_cut_is_named():
    model = build("Cohere")
    model.forward = lambda token_type_ids, **options: type(model).forward(model, **options)
    batch = {**PACKED, "token_type_ids": torch.zeros_like(IDS)}
    with pytest.warns(UserWarning, match="cannot make token_type_ids anew .* changed tokens and no lengths"):
        assert_no_leak(model, batch)


def test_other_descriptions_of_the_row_are_cut_too():
    """A batch with all of them, as the model sees it in the third call."""
    seen, model = [], build("Cohere")
    given = {**PACKED, "seq_idx": torch.arange(7).repeat_interleave(torch.tensor(LENGTHS))[None].int()}

    def forward(seq_idx, **options):
        seen.append({**options, "seq_idx": seq_idx})
        return type(model).forward(model, **options)

    model.forward = forward
    assert_no_leak(model, given)
    assert len(seen) == 3
    cut = seen[2]
    lengths = [1] * 16 + [7] + [1] * (sum(LENGTHS) - 23)  # the second example stays
    assert cut["cu_seq_lens_q"].diff().tolist() == cut["cu_seq_lens_k"].diff().tolist() == lengths
    assert cut["cu_seq_lens_q"].dtype == torch.int32
    assert cut["position_ids"].tolist() == [[0] * 16 + list(range(7)) + [0] * (sum(LENGTHS) - 23)]
    assert cut["seq_idx"][0].bincount().tolist() == lengths
    assert cut["input_ids"].equal(IDS)
    assert given["position_ids"].equal(POSITIONS)
