import builtins
import json
import shutil
from pathlib import Path

import pytest

from sft_kernels.sft.model import CHAT_TEMPLATE, train_tokenizer
from sft_kernels.sft.rows import Record

REAL_DATA = Path(__file__).resolve().parents[3] / "shared" / "data"

TURNS = [
    {"role": "system", "content": "You count words."},
    {"role": "user", "content": "How many: red blue?"},
    {"role": "assistant", "content": "Let me look."},
    {"role": "tool", "content": '{"count": 2}'},
    {"role": "assistant", "content": "Two words."},
]


def record(messages=None, text=None, tools=None):
    return Record("chats.jsonl", 7, messages, text, tools)


def without_marks(template):
    return template.replace("{% generation %}", "").replace("{% endgeneration %}", "")


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level BPE whose template marks what the assistant says."""
    return train_tokenizer(["How many words are red and blue and green? Two words. Let me look."] * 4, 320)


@pytest.fixture
def tokenizer_with(tokenizer):
    """The same tokenizer under another template."""
    import copy

    def make(template):
        other = copy.deepcopy(tokenizer)
        other.chat_template = template
        return other

    return make


@pytest.fixture(scope="session")
def unmarked(tokenizer):
    import copy

    other = copy.deepcopy(tokenizer)
    other.chat_template = without_marks(CHAT_TEMPLATE)
    return other


@pytest.fixture
def write_jsonl(tmp_path):
    def write(*rows, name="chats.jsonl"):
        path = tmp_path / name
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return path

    return write


def chat(question, reply):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]}


SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}


@pytest.fixture(scope="session")
def small_model(tokenizer):
    """A random model of any architecture, attending as the trainer's do unless another attention is named."""
    import torch
    import transformers

    from sft_kernels.integrations import attention as ours

    ours.register()

    def make(kind="llama", attention="sft_kernels", **options):
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(kind, vocab_size=len(tokenizer), **{**SMALL, **options})
        return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)

    return make


@pytest.fixture(scope="session")
def whole(tokenizer, tmp_path_factory):
    """A folder with a tiny model and its tokenizer."""
    from .small import model_of

    folder = tmp_path_factory.mktemp("whole") / "model"
    model_of(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(whole, tmp_path, monkeypatch):
    """A copy of a whole folder. A question on stdin fails the test."""

    def ask(*args):
        raise AssertionError("a question was asked")

    monkeypatch.setattr(builtins, "input", ask)
    return shutil.copytree(whole, tmp_path / "model")
