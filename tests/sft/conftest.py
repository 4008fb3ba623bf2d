import json
from pathlib import Path

import pytest

from sft_kernels.sft.data import Record
from sft_kernels.sft.model import CHAT_TEMPLATE, train_tokenizer

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
