"""A model and a recipe that train in a fraction of a second."""

import json
import sys

import torch

from sft_kernels.sft.recipe import Recipe

from .conftest import chat

SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def model_of(vocab_size, **options):
    from transformers import LlamaConfig, LlamaForCausalLM

    from sft_kernels.integrations import attention

    attention.register()
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=vocab_size, max_position_embeddings=64, **{**SHAPE, **options})
    config._attn_implementation = attention.NAME
    return LlamaForCausalLM(config)


def recipe_in(folder, **options):
    data = folder / "chats.jsonl"
    data.write_text("".join(json.dumps(chat(f"How many {i}?", "Two words.")) + "\n" for i in range(12)))
    defaults = {
        "out": str(folder / "run"),
        "row_tokens": 64,
        "steps": 3,
        "precision": "fp32",
        "log_every": 1,
        "max_new_tokens": 4,
    }
    return Recipe(data=[str(data)], **{**defaults, **options})


def rows_of(out):
    return [strict(line) for line in (out / "train.jsonl").read_text().splitlines()]


def strict(line):
    """Reads JSON as other programs do: NaN and Infinity are not in it."""

    def refuse(word):
        raise ValueError(f"{word} is no JSON")

    return json.loads(line, parse_constant=refuse)


def loaded(path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoTokenizer.from_pretrained(path)
    return AutoModelForCausalLM.from_pretrained(path)


def same_weights(a, b):
    return all(x.equal(y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


CLI = [sys.executable, "-m", "sft_kernels.cli", "train"]
