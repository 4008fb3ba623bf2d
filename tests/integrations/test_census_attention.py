"""The census of the attention name: kinds of models, and whether it would tell."""

import re

import pytest
import torch

from bench import census, census_attention
from bench.census_compare import Row
from sft_kernels.integrations import attention

transformers = pytest.importorskip("transformers")

EQUAL = {
    "BertLMHeadModel": "an encoder as a decoder",
    "Cohere2ForCausalLM": "windows in three of four layers",
    "DeepseekV3ForCausalLM": "latent attention: values are narrower than keys",
    "GPT2LMHeadModel": "learned positions",
    "GPTBigCodeForCausalLM": "layers that receive no positions",
    "Gemma2ForCausalLM, both": "a softcap, windows in every second layer",
    "Gemma3ForConditionalGeneration": "a vision-language model without an image",
    "Gemma3TextModel, bidirectional": "EmbeddingGemma's kind: a window to both sides",
    "LlamaForCausalLM": "no window",
    "MistralForCausalLM": "windows everywhere",
    "ModernBertForMaskedLM": "bidirectional, windows in some layers",
    "PaliGemmaForConditionalGeneration": "blocks of image tokens, of which there are none",
    "PhimoeForCausalLM": "only the mask has the window",
    "Qwen2ForCausalLM, both": "windows in every second layer",
    "Qwen2VLForConditionalGeneration": "positions of three kinds",
    "Qwen2MoeForCausalLM": "only the mask has the window",
    "RobertaForCausalLM": "positions that begin at padding_idx + 1",
}
REFUSED = {
    "BartForCausalLM": "takes none",
    "BltForCausalLM": "joins bytes to patches",
    "BloomForCausalLM": "computes its attention itself",
    "GptOssForCausalLM": "s_aux",
    "JambaForCausalLM": "carry a state",
    "Lfm2ForCausalLM, a convolution": r"layers\.0 mixes tokens",
    "Lfm2VlForConditionalGeneration, a convolution": r"layers\.0 mixes tokens",
    "Llama4ForCausalLM, chunks": "chunked_overlay",
    "MiniMaxForCausalLM": r"layers\.1 mixes tokens",
    "MobileBertForMaskedLM": "neighbours",
    "XGLMForCausalLM": "computes its attention itself",
}


def examined(name):
    if not hasattr(transformers, name.partition(",")[0]):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    return census_attention.examine(name)


@pytest.mark.parametrize("name", EQUAL)
def test_packed_rows_equal_their_examples_alone(name):
    row = examined(name)
    assert (row.verdict, row.batch) == ("equal", "equal"), row


@pytest.mark.parametrize("name", REFUSED)
def test_the_rest_is_refused(name):
    row = examined(name)
    assert (row.verdict, row.batch) == ("refused", "refused"), row
    assert re.search(REFUSED[name], row.reason), row


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "ModernBertForMaskedLM", "PhimoeForCausalLM"])
def test_a_window_or_a_boundary_that_is_one_off_is_different(name, monkeypatch):
    function = attention.packed_attention

    def wrong(query, key, value, cu_seqlens, *args, **options):
        left, right = options["window_size"]
        if left < 0:
            cu_seqlens = cu_seqlens + torch.tensor([0, 1, *[0] * (len(cu_seqlens) - 2)])
        options["window_size"] = (left + (left >= 0), right)
        return function(query, key, value, cu_seqlens, *args, **options)

    monkeypatch.setattr(attention, "packed_attention", wrong)
    assert examined(name).verdict == "DIFFERENT"


ROWS = [
    Row("A", "equal", "", "equal", 3e-7),
    Row("B", "equal", "", "refused", 1e-7, "ValueError: boundaries | here"),
    Row("C", "refused", "", "refused", reason="ValueError: chunks"),
    Row("D", "not built", reason="ImportError: timm"),
]


def test_the_page_counts_and_lists():
    page = census_attention.page(ROWS)
    for part in (
        "3 tried, 2 equal, 1 refused, 0 stock varies, 0 failed, 0 DIFFERENT; by positions alone 1 equal.",
        "| A | equal | equal | 3e-07 |  |",
        "| B | equal | refused | 1e-07 | ValueError: boundaries \\| here |",
        "## Not tried: not built, or the stock model does not take token ids alone",
        "| D | ImportError: timm |",
    ):
        assert part in page


@pytest.mark.parametrize(
    ("last", "status"),
    [
        (Row("D", "no stock", reason="TypeError: pixels"), 0),
        (Row("D", "equal", "DIFFERENT", "DIFFERENT", 0.1), 1),
        (Row("D", "failed", reason="stopped"), 1),
    ],
)
def test_the_command_fails_where_models_differ(monkeypatch, tmp_path, last, status):
    monkeypatch.setattr(census, "rows", lambda names, examine, jobs: [*ROWS[:3], last])
    monkeypatch.setattr(census_attention, "names", lambda: ["A"])
    assert census_attention.main(["--out", str(tmp_path / "page.md"), "--only", "A"]) == status
    assert (tmp_path / "page.md").read_text() == census_attention.page([*ROWS[:3], last])
