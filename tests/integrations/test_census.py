"""The census of transformers' models: odd ones of it, and whether it would tell."""

import os
import time

import pytest
import torch
import torch.nn.functional as F

from bench import census, census_compare, census_models
from bench.census_compare import Row
from sft_kernels.integrations import head_counts, patch

transformers = pytest.importorskip("transformers")

ODD = {
    "BambaForCausalLM": "a state-space hybrid with a z-loss of its own",
    "BartForConditionalGeneration": "an encoder-decoder that adds a buffer to its logits",
    "BertLMHeadModel": "a tied head with a bias, deep inside",
    "BigBirdForCausalLM": "its first forward replaces modules",
    "Blip2ForConditionalGeneration": "a wrapper around logits of the model inside, sliced by the labels' length",
    "CohereForCausalLM": "logits times a scale, tied",
    "DoryForCausalLM": "a head that is a class of its own and learns a scale for each class",
    "FalconH1ForCausalLM": "a scale on the same line as the head",
    "GPT2LMHeadModel": "tied",
    "Gemma2ForCausalLM": "a softcap",
    "Gemma3ForConditionalGeneration": "a vision-language model",
    "GitForCausalLM": "rows of image tokens cut off",
    "GraniteMoeForCausalLM": "logits divided by a scale, mixture of experts",
    "GraniteSpeechForConditionalGeneration": "rows chosen by a boolean mask",
    "IdeficsForVisionText2Text": "a head that is a class of its own and multiplies by itself",
    "InklingForCausalLM": "a padded vocabulary, cut off behind the head",
    "MambaForCausalLM": "a state-space model that casts its logits",
    "MoshiForConditionalGeneration": "two models with a loss each",
    "MuseGlimmerForConditionalGeneration": "a scale, then a softcap",
    "ProphetNetForCausalLM": "two tokens predicted ahead, log_softmax and nll_loss",
    "T5ForConditionalGeneration": "an encoder-decoder",
    "XLMWithLMHeadModel": "the loss is inside the head's module",
}


@pytest.mark.parametrize("name", ODD)
def test_a_patched_model_is_fused_and_equal(name):
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    row = census_compare.examine(name)
    assert (row.verdict, row.agrees) == ("fused", "equal"), row


def test_logits_of_small_models_are_large_enough_to_show_a_softcap():
    model = census_models.build("Gemma2ForCausalLM")
    _, inputs = next(census_models.batches(model))
    assert model(**inputs).logits.abs().max() > 3


class Planted(torch.nn.Module):
    """A causal LM; ``change`` is done to its logits."""

    def __init__(self, change=lambda logits: logits, *, head=True, called=True):
        super().__init__()
        self.embed = torch.nn.Embedding(23, 12)
        self.lm_head = torch.nn.Linear(12, 23)
        self.change, self.head, self.called = change, head, called

    def get_output_embeddings(self):
        return self.lm_head if self.head else None

    def forward(self, ids, labels=None):
        hidden = self.embed(ids).tanh()
        logits = self.lm_head(hidden) if self.called else hidden @ self.lm_head.weight.T
        logits = self.change(logits)
        loss = None if labels is None else F.cross_entropy(logits.view(-1, 23), labels.view(-1))
        return transformers.modeling_outputs.CausalLMOutput(loss=loss, logits=logits)


IDS = torch.arange(14).view(2, 7)
BATCHES = [("ids", {"ids": IDS, "labels": IDS + 1})]


def planted(change=lambda logits: logits, **options):
    return census_compare.compare("Planted", Planted(change, **options), BATCHES)


def test_a_planted_model_is_fused():
    row = planted()
    assert row[:4] == ("Planted", "fused", "equal", "ids")
    assert row.error < 1e-5


def test_an_operation_that_needs_the_logits_is_named_with_its_line():
    row = planted(lambda logits: logits.sort().values)
    assert row[1:3] == ("materialised", "equal")
    assert "aten.sort" in row.reason
    assert "test_census.py:" in row.reason


def test_logits_that_change_only_when_patched_are_different():
    def change(logits):
        return logits if type(logits) is torch.Tensor else logits * 1.001

    row = planted(change)
    assert row[1:3] == ("fused", "DIFFERENT")
    assert "largest difference" in row.reason


def test_a_gradient_that_only_one_side_has_is_different():
    stock = census_compare.step(Planted(), BATCHES[0][1])
    other = stock._replace(gradients={name: g for name, g in stock.gradients.items() if name != "lm_head.bias"})
    assert census_compare.difference(stock, other) == (float("inf"), "lm_head.bias")


def test_a_model_that_varies_by_itself_is_not_called_different():
    times = iter(range(1, 10))
    row = planted(lambda logits: logits * next(times))
    assert row.agrees == "stock varies"


def test_an_error_that_only_the_patched_model_has_is_different():
    def change(logits):
        if type(logits) is not torch.Tensor:
            raise NotImplementedError("no lazy logits, please")
        return logits

    assert planted(change)[1:3] == ("failed", "DIFFERENT")


def test_heads_that_are_refused_or_not_called():
    assert planted(head=False)[1:3] == ("refused", "")
    row = planted(called=False)
    assert row[1:3] == ("unused", "equal")
    assert "was not called" in row.reason


def test_a_batch_that_the_stock_model_does_not_take_gives_way_to_the_next():
    refused = ("labels only", {"labels": IDS})
    assert census_compare.compare("Planted", Planted(), [refused, *BATCHES]).batch == "ids"
    row = census_compare.compare("Planted", Planted(), [refused])
    assert row.verdict == "no loss"
    assert row.reason.startswith("TypeError: ")
    assert census_compare.compare("Planted", Planted(), [("ids", {"ids": IDS})]).verdict == "no loss"


def test_a_patched_model_is_left_to_the_caller_as_it_was():
    model = Planted()
    census_compare.compare("Planted", model, BATCHES)
    assert type(model.lm_head) is torch.nn.Linear
    assert head_counts(patch(model)) == (0, 0, 0)


def _acts(name):
    """Does what its name says, in a process of its own."""
    if name == "aborts":
        os.abort()
    if name == "hangs":
        time.sleep(600)
    if name == "raises":
        raise ValueError("planted")
    return Row(name, "fused", "equal", "text", 1e-7)


def test_a_crash_and_a_hang_are_rows():
    started = time.monotonic()
    found = {row.name: row for row in census.rows(["aborts", "raises", "is fine"], _acts)}  # the first start is slow
    assert found["is fine"][1:3] == ("fused", "equal")
    assert found["raises"] == Row("raises", "failed", "DIFFERENT", reason="ValueError: planted")
    assert found["aborts"].reason == "the process ended with status -6"
    hung = list(census.rows(["hangs"], _acts, time_limit=0.2))
    assert [(row.verdict, row.reason) for row in hung] == [("failed", "stopped after 0.2 s")]
    assert time.monotonic() - started < 60


ROWS = [
    Row("A", "fused", "equal", "text", 3e-7),
    Row("B", "materialised", "equal", "text", 0.0, "aten.sort | here"),
    Row("C", "refused", "", "text", reason="TypeError: no head"),
    Row("D", "fused", "DIFFERENT", "text", 0.5, "the largest difference is in the loss"),
    Row("E", "no loss", reason="ValueError: no pixels"),
    Row("F", "not built", reason="ImportError: timm"),
]


def test_the_page_counts_and_lists():
    page = census.page(ROWS)
    for part in (
        "6 classes, 5 built, 4 with a stock loss, 2 fused (50.0% of the stock losses), 1 materialised, 0 unused",
        "1 refused, 2 equal, 0 stock varies, 1 DIFFERENT",
        "The largest error among the equal ones is 3.0e-07.",
        "| A | text | fused | equal | 3e-07 |  |",
        "| B | text | materialised | equal | 0e+00 | aten.sort \\| here |",
        "## Built, but the stock loss does not run\n\n| class | reason |\n|---|---|\n| E | ValueError: no pixels |",
        "## Not built\n\n| class | reason |\n|---|---|\n| F | ImportError: timm |",
    ):
        assert part in page


@pytest.mark.parametrize(("rows", "status"), [(ROWS[:3], 0), (ROWS[:4], 1)])
def test_the_command_writes_the_page_and_fails_where_models_differ(monkeypatch, tmp_path, rows, status):
    monkeypatch.setattr(census, "rows", lambda names, examine, jobs: rows)
    monkeypatch.setattr(census_models, "names", lambda: ["A"])
    assert census.main(["--out", str(tmp_path / "page.md"), "--only", "A"]) == status
    assert (tmp_path / "page.md").read_text() == census.page(rows)


def test_the_command_refuses_a_class_that_is_not_there(monkeypatch):
    monkeypatch.setattr(census_models, "names", lambda: ["A"])
    with pytest.raises(SystemExit) as refused:
        census.main(["--only", "B"])
    assert refused.value.code == 2


def test_every_causal_lm_of_transformers_is_in_the_census():
    names = census_models.names()
    mapped = set(census_models.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    assert mapped <= set(names)
    assert len(names) > 250
