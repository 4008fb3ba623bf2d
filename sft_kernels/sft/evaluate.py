"""What a tuned model is judged by: masked loss, exact match, and whether its answers stop."""

from typing import NamedTuple

import torch
from tqdm import tqdm

from .. import linear_cross_entropy
from .model import head, hidden_states, stock_attention


class Loss(NamedTuple):
    """Means over the kept tokens of all batches."""

    loss: float  # nats a token
    accuracy: float
    entropy: float  # nats a token
    kept: int


@torch.no_grad()
def masked_loss(model, batches, device):
    """The :class:`Loss` of ``model`` over packed batches, one denominator for all of them."""
    was_training = model.training
    model.eval()
    totals, kept = None, 0
    for batch in batches:
        kept += batch.kept.count
        moved = batch.to(device)
        hidden = hidden_states(model, moved)
        _, stats = linear_cross_entropy(hidden, **head(model), shift=True, kept=moved.kept, return_stats=True)
        sums = torch.stack([stats.nll_sum.double(), stats.correct.double(), stats.entropy_sum.double()])
        totals = sums if totals is None else totals + sums
    model.train(was_training)
    if not kept:
        raise ValueError("batches: no kept token to evaluate on")
    return Loss(*(totals / kept).tolist(), kept)


class Answers(NamedTuple):
    """Greedy answers, in the order of the prompts."""

    texts: list[str]
    stopped: list[bool]  # by the end-of-turn token, within the limit


@torch.no_grad()
def answer(model, tokenizer, conversations, end_of_turn, max_new_tokens=32, batch_size=64):
    """Answer conversations (lists of messages) greedily until ``end_of_turn``."""
    texts, stopped = [], []
    with stock_attention(model):
        for i in tqdm(range(0, len(conversations), batch_size), desc="answering", unit="batch", leave=False):
            prompts = [
                tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True)
                for c in conversations[i : i + batch_size]
            ]
            inputs = tokenizer(
                prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False
            )
            out = model.generate(
                input_ids=inputs["input_ids"].to(model.device),
                attention_mask=inputs["attention_mask"].to(model.device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                use_cache=True,
                eos_token_id=end_of_turn,
                pad_token_id=tokenizer.pad_token_id,
            )
            for ids in out[:, inputs["input_ids"].shape[1] :].tolist():
                stop = end_of_turn in ids
                stopped.append(stop)
                ids = ids[: ids.index(end_of_turn)] if stop else ids
                texts.append(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
    return Answers(texts, stopped)


def exact_match(answers, references):
    """Share of answers that stopped and equal their reference, but for white space around."""
    hits = sum(
        stopped and text.strip() == reference.strip()
        for text, stopped, reference in zip(*answers, references, strict=True)
    )
    return hits / len(references)
