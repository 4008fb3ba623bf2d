"""A model, data and a trainer for the command line, and the command as a process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sft_kernels import cli
from sft_kernels.sft import train as training

ROOT = Path(__file__).parents[2]
MAIN = "import sys; from sft_kernels.cli import main; sys.exit(main())"
CLOSING = ["bash", "-c", 'exec "$@" <&- >&- 2>&-', "-"]
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def process(*argv, before="", **options):
    options = {"capture_output": True, "text": True, "cwd": ROOT, "env": ENV, **options}
    code = f"{before}\n{MAIN}"
    return subprocess.run([sys.executable, "-c", code, *map(str, argv)], **options)


def conversation(question, reply):
    turns = {"role": "user", "content": question}, {"role": "assistant", "content": reply}
    return json.dumps({"messages": turns}) + "\n"


@pytest.fixture
def chats(tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text(conversation("How many?", "Two … words.") * 12)
    return path


@pytest.fixture
def train(chats, tmp_path):
    """The arguments of a run on a model that a config describes."""
    config = tmp_path / "config.json"
    shape = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    config.write_text(json.dumps({"model_type": "llama", **shape, **heads}))
    options = ["--row-tokens", "64", "--steps", "1", "--holdout", "0.2"]
    return ["train", "--model", config, "--data", chats, *options, "--out", tmp_path / "模型"]


class Trainer:
    """Stands for the trainer: makes the model's folder, prints, and then raises."""

    def __init__(self, monkeypatch, tmp_path):
        self.out, self.error, self.saves = tmp_path / "run", None, True
        monkeypatch.setattr(training, "train", self)

    def __call__(self, recipe):
        print("step")
        if self.saves:
            (self.out / "model").mkdir(parents=True)
        if self.error:
            raise self.error
        return None, None, type("Log", (), {"curves": True})

    def run(self):
        return cli.main(["train", "--out", str(self.out)])


@pytest.fixture
def trainer(monkeypatch, tmp_path):
    return Trainer(monkeypatch, tmp_path)
