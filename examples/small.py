"""Stand-ins for your own model, tokenizer and data, so that every example runs on a CPU in seconds.

The conversations ask for words to be repeated or reversed. No network is needed.
"""

import functools
import random

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sft_kernels.sft.model import train_tokenizer

WORDS = "apple bread cloud daisy eagle flute grape horse ivory jelly kite lemon".split()


def conversations(count=48, seed=0):
    """Returns ``count`` rows ``{"messages": [user, assistant]}`` of different lengths."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        words = rng.sample(WORDS, rng.randint(2, 6))
        task, answer = rng.choice([("Repeat", words), ("Reverse", words[::-1])])
        question = {"role": "user", "content": f"{task}: {' '.join(words)}"}
        rows.append({"messages": [question, {"role": "assistant", "content": " ".join(answer)}]})
    return rows


@functools.cache
def tokenizer():
    """Returns a byte-level BPE tokenizer of 320 tokens; its chat template marks what the assistant says."""
    texts = [message["content"] for row in conversations() for message in row["messages"]]
    return train_tokenizer(texts, vocab_size=320)


def examples(count=48, seed=0):
    """Returns ``count`` rows ``{"input_ids", "labels"}``; everything but the answer is labelled -100."""
    return [encode(row["messages"]) for row in conversations(count, seed)]


def encode(messages):
    """Returns the token ids of ``messages``, and labels that are -100 except on the last message and its end."""
    render = functools.partial(tokenizer().apply_chat_template, tokenize=True, return_dict=False)
    prompt = render(messages[:-1], add_generation_prompt=True)
    ids = render(messages)
    return {"input_ids": ids, "labels": [-100] * len(prompt) + ids[len(prompt) :]}


def padded(rows):
    """Collates rows into ``input_ids``, ``attention_mask`` and ``labels`` [B, S], padded on the right."""
    length = max(len(row["input_ids"]) for row in rows)

    def fill(values, padding):
        return values + [padding] * (length - len(values))

    batch = {
        "input_ids": [fill(row["input_ids"], tokenizer().pad_token_id) for row in rows],
        "attention_mask": [fill([1] * len(row["input_ids"]), 0) for row in rows],
        "labels": [fill(row["labels"], -100) for row in rows],
    }
    return {name: torch.tensor(values) for name, values in batch.items()}


def model(**options):
    """Returns a random Llama of 2 layers in fp32; ``options`` go to its configuration, for example
    ``attn_implementation``."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer()), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=False,
        pad_token_id=tokenizer().pad_token_id, bos_token_id=None, eos_token_id=tokenizer().eos_token_id, **options,
    )  # fmt: skip
    return LlamaForCausalLM(config)
