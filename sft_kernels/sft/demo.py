"""The whole job in a few minutes on two CPU cores, without a network: chats, tokenizer, base model, fine-tuning, before
and after.

Six tasks over lists of words, each checkable by its answer. The base model reads the same skills as prose, never as a
chat; fine-tuning teaches it to answer and to stop. No list of words that a held-out prompt asks about is seen in either
training.
"""

import json
import random
from dataclasses import replace

from .answers import answer, prompts_of
from .audit import audit
from .compare import compare
from .dataset import load_examples
from .evaluate import masked_loss
from .manifest import Manifest
from .masking import Encoder
from .metrics import EXACT_MATCH, score
from .model import END_OF_TURN, train_tokenizer
from .packing import PackedRows, collate, groups_of
from .page import write_page
from .progress import say
from .recipe import Recipe
from .sources import Source
from .train import train

_WORDS = """
apple bread cloud daisy eagle flute grape horse ivory jelly kite lemon maple night ocean piano queen river stone tiger
uncle violin water yacht zebra amber beach candy dream earth field glass honey island jacket ladder mirror needle onion
pepper""".split()
_COMPARED = 30  # steps
_NUMBERS = ("zero", "one", "two", "three", "four")


def _tasks(words, i):
    """Question, answer and prose of every task over one list of words; word ``i`` is asked about, and is not the
    last."""
    listed, backwards, count = " ".join(words), " ".join(reversed(words)), _NUMBERS[len(words)]
    return {
        "repeat": (f"Repeat: {listed}", listed, f"{listed} once more is {listed}."),
        "reverse": (f"Reverse: {listed}", backwards, f"{listed} in reverse is {backwards}."),
        "first": (f"First word of: {listed}", words[0], f"{listed} has as its first word {words[0]}."),
        "last": (f"Last word of: {listed}", words[-1], f"{listed} has as its last word {words[-1]}."),
        "count": (f"How many words: {listed}", count, f"{listed} is a list of {count} words."),
        "next": (
            f"Word after {words[i]} in: {listed}",
            words[i + 1],
            f"{listed} has after {words[i]} the word {words[i + 1]}.",
        ),
    }


def _lists(rng, count, taken):
    """``count`` lists of two to four different words, none of them in ``taken``, which grows by them."""
    lists = []
    while len(lists) < count:
        words = tuple(rng.sample(_WORDS, rng.randint(2, 4)))
        if words not in taken:
            taken.add(words)
            lists.append(list(words))
    return lists


def write_data(folder, seed, lists, held_out):
    """``base.jsonl`` (texts), ``chats.jsonl`` and ``held_out.jsonl`` (conversations) in ``folder``, over disjoint lists
    of words.

    ``lists`` in each of the first two, ``held_out`` in the last.
    """
    rng = random.Random(seed)
    taken = set()
    sizes = {"held_out": held_out, "chats": lists, "base": lists}
    parts = {name: _lists(rng, size, taken) for name, size in sizes.items()}
    folder.mkdir(parents=True, exist_ok=True)
    for name, asked in parts.items():
        with (folder / f"{name}.jsonl").open("x", encoding="utf-8") as file:
            for i, words in enumerate(asked):
                tasks = list(_tasks(words, rng.randrange(len(words) - 1)).values())
                if name == "base":
                    row = {"text": " ".join(prose for _, _, prose in rng.sample(tasks, len(tasks)))}
                else:
                    question, reply, _ = tasks[i % len(tasks)]
                    row = {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]}
                file.write(json.dumps(row) + "\n")
    return {name: folder / f"{name}.jsonl" for name in parts}


def config(vocab_size, pad_token_id):
    """A Llama of under a million parameters."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=pad_token_id,
        bos_token_id=None,
        eos_token_id=None,
    )


def judge(model, tokenizer, path, row_tokens=1024):
    """Masked loss, exact match and share of stopped answers of ``model`` on the conversations in ``path``."""
    encoder = Encoder(tokenizer)
    examples, _ = load_examples([path], encoder, row_tokens)
    batches = [
        collate(rows, row_tokens, tokenizer.pad_token_id) for rows in groups_of(4, PackedRows(examples, row_tokens))
    ]
    prompts = prompts_of(examples, most=len(examples), seed=0)
    answers = answer(model, tokenizer, prompts, encoder.end_of_turn, max_new_tokens=16)
    return {
        "masked loss": masked_loss(model, batches, model.device).loss,
        "exact match": score(EXACT_MATCH, answers),
        "answers that stop": sum(answers.stopped) / len(answers.stopped),
    }


def _write_page(path, recipe, tokenizer, model):
    sources, encoder = [Source(file) for file in recipe.data], Encoder(tokenizer)
    examples, _ = load_examples(sources, encoder, recipe.row_tokens)
    found = audit(examples, encoder, recipe.row_tokens)
    write_page(path, recipe, sources, examples, tokenizer, found, shown=3, model=model)


def run(out="out/demo", base_steps=500, steps=400, lists=6000, held_out=240, seed=0):
    """The demo; returns what was measured before and after fine-tuning.

    It also writes the page of ``inspect --html``, and compares the first steps with plain PyTorch's.

    Args:
        out: folder for data, logs, curves and models. An earlier demo in it is made anew; a folder that
            holds anything else is refused.
        base_steps: optimiser steps of the base model.
        steps: optimiser steps of fine-tuning.
        lists: of words, in each of the two training sets.
        held_out: prompts to judge by.
        seed: of everything.
    """
    numbers = {"base_steps": base_steps, "steps": steps, "lists": lists, "held_out": held_out}
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name}: expected at least 1, got {number}")
    if not 0 <= seed < 1 << 63:
        raise ValueError(f"seed: expected an integer from 0 to 2⁶³ − 1, got {seed}")
    manifest = Manifest(out, ("data", "tokenizer", "config", "base", "tuned", "page", "plain"))
    manifest.begin()
    with manifest.phase("data") as folder:
        data = write_data(folder, seed, lists, held_out)
    texts = [line for name in ("base", "chats") for line in data[name].read_text().splitlines()]
    tokenizer = train_tokenizer((r for line in texts for r in _strings(json.loads(line))), vocab_size=480)
    with manifest.phase("tokenizer") as tokens:
        tokenizer.save_pretrained(tokens)
    with manifest.phase("config") as shape:
        config(len(tokenizer), tokenizer.pad_token_id).save_pretrained(shape)

    shared = {"row_tokens": 1024, "rows": 2, "log_every": 50, "seed": seed, "tokenizer": str(tokens)}
    say(f"1. a base model: {base_steps} steps on unformatted text")
    with manifest.phase("base") as base:
        recipe = Recipe(
            data=[str(data["base"])],
            model=str(shape),
            mask="all",
            lr=3e-3,
            steps=base_steps,
            out=str(base),
            **shared,
        )
        model, _, _ = train(recipe)
    before = judge(model, tokenizer, data["held_out"])
    say(f"2. fine-tuning: {steps} steps on chats, the loss on the answers and {END_OF_TURN}")
    with manifest.phase("tuned") as tuned:
        recipe = Recipe(
            data=[str(data["chats"])],
            eval_data=[str(data["held_out"])],
            model=str(base / "model"),
            lr=2e-3,
            steps=steps,
            eval_every=100,
            metric_prompts=held_out,
            max_new_tokens=16,
            out=str(tuned),
            **shared,
        )
        model, _, _ = train(recipe)
    after = judge(model, tokenizer, data["held_out"])
    with manifest.phase("page") as folder:
        folder.mkdir()
        _write_page(folder / "page.html", recipe, tokenizer, model)
        say(f"\n3. a page to look at, examples with their loss under each mask: {folder / 'page.html'}")
    say(f"\n4. the first {_COMPARED} steps again, beside plain PyTorch; examples so short and so alike gain no speed")
    with manifest.phase("plain") as folder:
        compare(replace(recipe, steps=_COMPARED, eval_every=0, log_every=10, precision="fp32", out=str(folder)))
    say(f"\n{'held-out prompts':<20}{'before':>10}{'after':>10}")
    for name in before:
        say(f"{name:<20}{before[name]:>10.3f}{after[name]:>10.3f}")
    say(f"\nlogs, curves and models are in {out}")
    return before, after


def _strings(row):
    return [row["text"]] if "text" in row else [m["content"] for m in row["messages"]]
