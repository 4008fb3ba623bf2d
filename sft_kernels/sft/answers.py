"""Answers of a model to held-out prompts: greedy, with a cache, prompts of like length at once."""

import random
from contextlib import contextmanager
from itertools import groupby
from typing import NamedTuple

import torch

from ..integrations.rotary import forget_lengths
from .model import causal_lm, stock_attention
from .positions import most_positions
from .progress import bar, screen
from .rows import IGNORE


class Prompt(NamedTuple):
    """The part of a held-out :class:`~.masking.Example` that a model sees, and the right answer."""

    ids: list[int]
    reference: list[int]  # with the token that ends the turn, if the example has a label for it
    source: str  # file:line


class Answers(NamedTuple):
    """Texts with an entry for each prompt, in the order of the prompts.

    An answer is what the model says before the token that ends its turn, and a reference is cut in
    the same way. An answer that is not ``stopped`` by that token ran into the limit.
    """

    prompts: list[str]
    texts: list[str]
    references: list[str]
    stopped: list[bool]


def prompts_of(examples, most, seed):
    """Returns the :class:`Prompt` s of at most ``most`` examples, in the order of the examples.

    The last run of labels in an example is the reference. Everything before it is the prompt, just
    as training renders it. An example with labels from its first token on has no prompt: a plain
    text, or a conversation under mask ``"all"``. The choice depends on ``seed`` and the examples.
    """
    order = list(range(len(examples)))
    random.Random(f"{seed}/prompts").shuffle(order)
    chosen = {}
    for i in order:
        if len(chosen) == most:
            break
        prompt = _prompt(examples[i])
        if prompt:
            chosen[i] = prompt
    return [chosen[i] for i in sorted(chosen)]


def _prompt(example):
    ids, labels, source = example
    stop = len(labels)
    while stop and labels[stop - 1] == IGNORE:
        stop -= 1
    start = stop
    while start and labels[start - 1] != IGNORE:
        start -= 1
    # The first token never has a label, so a run from the second one on is a whole text.
    return Prompt(ids[:start], labels[start:stop], source) if start > 1 else None


@torch.no_grad()
def answer(model, tokenizer, prompts, end_of_turn, max_new_tokens, tokens_at_once=32768, each=iter):
    """Returns the :class:`Answers` of ``model``, whose every token is its most likely one.

    Nothing in the model's generation config changes that. The model answers in evaluation mode and
    with transformers' own attention. It is left as it was, and so are the random number generators.

    Args:
        model: a causal LM, or a PEFT model with adapters in its layers.
        tokenizer: of the texts; it needs no padding token.
        prompts: a list of :class:`Prompt` s.
        end_of_turn: id of the token that ends an answer. None stands for those of the model's
            generation config, or the tokenizer's end of text if it has none.
        max_new_tokens: of an answer. A model with a table of positions has room for fewer behind a
            long prompt; without any room the answer is empty and not stopped.
        tokens_at_once: tokens of prompts, padding and answers that a batch may have. A prompt that
            needs more is a batch of its own.
        each: yields the batches it is given, and may raise to end the work early.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: expected at least 1, got {max_new_tokens}")
    ends = _ends(model, tokenizer, end_of_turn)
    pad = _first(tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    said = [[] for _ in prompts]
    with stock_attention(model), _greedy(model) as generate:
        most = most_positions(model, _forward)
        lengths = [len(prompt.ids) for prompt in prompts]
        batches = list(_batches(lengths, most, max_new_tokens, tokens_at_once))
        with _counted(len(batches)) as count:
            for places, room in each(batches):
                rows = [prompts[i].ids for i in places]
                for i, ids in zip(places, generate(rows, room, ends, pad), strict=True):
                    said[i] = ids
                count()
    cut = [_cut(ids, ends) for ids in said]

    def texts(rows):
        keep = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        return [tokenizer.decode(ids, **keep) for ids in rows]

    return Answers(
        texts(prompt.ids for prompt in prompts),
        texts(ids for ids, _ in cut),
        texts(_cut(prompt.reference, ends)[0] for prompt in prompts),
        [stopped for _, stopped in cut],
    )


def _forward(model, batch):
    return causal_lm(model)(input_ids=batch.input_ids, use_cache=False)


def _ends(model, tokenizer, end_of_turn):
    """Returns the ids of the tokens that end an answer, an empty list if there is none."""
    own = getattr(causal_lm(model).generation_config, "eos_token_id", None)  # a model may have no such config
    ends = _first(end_of_turn, own, tokenizer.eos_token_id)
    ends = ends.tolist() if isinstance(ends, torch.Tensor) else ends
    return [] if ends is None else list(ends) if isinstance(ends, (list, tuple)) else [ends]


def _cut(ids, ends):
    """Returns ``(ids, stopped)``: those before the first of ``ends``, and whether it is there."""
    at = next((i for i, token in enumerate(ids) if token in ends), None)
    return ids[:at], at is not None


def _batches(lengths, most, max_new_tokens, tokens_at_once):
    """Yields ``(places, room)``: which prompts, and how many tokens their answers may have.

    The longest come first, so that memory runs out at once or not at all. All of a batch have the
    same room, so that no prompt shortens the answer to another. Prompts without room are left out.
    """

    def room_of(i):
        return max_new_tokens if most is None else min(max_new_tokens, most - lengths[i])

    longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for room, group in groupby((i for i in longest_first if room_of(i) > 0), room_of):
        places = list(group)
        while places:
            rows = max(1, tokens_at_once // (lengths[places[0]] + room))
            yield places[:rows], room
            places = places[rows:]


@contextmanager
def _greedy(model):
    """Yields ``generate(rows, room, ends, pad)``, which returns the new tokens of each row.

    ``generate`` of transformers fills what a generation config leaves open with values of the
    model's own, and most switches have no value that says off. So the model has an empty one as
    long as the block runs.
    """
    from transformers import GenerationConfig
    from transformers.utils import logging

    model = causal_lm(model)
    own, verbosity = model.generation_config, logging.get_verbosity()

    def generate(rows, room, ends, pad):
        width = max(map(len, rows))
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        forget_lengths(model)  # of the batch before
        out = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=GenerationConfig(
                max_new_tokens=room, do_sample=False, eos_token_id=ends or None, pad_token_id=pad
            ),
        )
        return out[:, width:].tolist()

    try:
        model.generation_config = GenerationConfig()
        logging.set_verbosity_error()  # it warns of lengths that rotary embeddings are computed for
        yield generate
    finally:
        logging.set_verbosity(verbosity)
        model.generation_config = own
        forget_lengths(model)


@contextmanager
def _counted(total):
    """Yields a function that counts one batch on a bar."""
    shown = bar(total, "answering", "batches", leave=False)

    def count():
        with screen():
            shown.update()

    try:
        yield count
    finally:
        with screen():
            shown.close()


def _first(*values):
    return next((value for value in values if value is not None), None)
