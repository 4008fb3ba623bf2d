import pytest

from bench import census_templates
from sft_kernels.sft.masking import IGNORE, Encoder

pytest.importorskip("trl", reason="the templates are trl's")


@pytest.fixture(scope="module")
def trained():
    return census_templates.trained()


@pytest.mark.parametrize("name", census_templates.names())
def test_no_template_teaches_what_the_assistant_does_not_say(trained, name):
    tokenizer = census_templates.tokenizer_for(name, trained)
    found = {kind: census_templates.examine(tokenizer, kind) for kind in census_templates.KINDS}
    assert not {kind: verdict for kind, verdict in found.items() if verdict.verdict == "WRONG"}


def test_reasoning_models_are_right_with_split_turns(trained):
    """The first turn loses its thinking, or its end token, once the second follows."""
    for name in ("qwen3", "glm4moe", "gemma4_v5", "gptoss", "lfm2_2_5"):
        tokenizer = census_templates.tokenizer_for(name, trained)
        assert census_templates.examine(tokenizer, "thinking in two turns").verdict == "split"


@pytest.mark.parametrize("labels", ["user", "lost"])
def test_a_wrong_label_is_found(trained, monkeypatch, labels):
    tokenizer = census_templates.tokenizer_for("llama3", trained)
    right = Encoder.examples

    def wrong(self, record):
        (example,) = right(self, record)
        changed = example.input_ids if labels == "user" else [IGNORE] * len(example.labels)
        return [example._replace(labels=list(changed))]

    monkeypatch.setattr(Encoder, "examples", wrong)
    verdict = census_templates.examine(tokenizer, "one turn")
    assert verdict.verdict == "WRONG"
    assert ("uone" if labels == "user" else "aone") in verdict.reason


def test_the_page_names_every_template_and_reason(trained, monkeypatch):
    tokenizer = census_templates.tokenizer_for("qwen3", trained)
    found = {("qwen3", kind): census_templates.examine(tokenizer, kind) for kind in census_templates.KINDS}
    page = census_templates.page(found)
    assert census_templates.summary(found) in page
    assert "| qwen3 | right | right | right | right | right | split 1 | right |" in page
    assert "\n1. `message 1: the chat template renders it as " in page
