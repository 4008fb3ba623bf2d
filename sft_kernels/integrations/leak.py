"""Do the examples of a packed row see each other? Asked of a model as it is called."""

import warnings
from itertools import pairwise

import torch

from .calls import boundaries_of

# Of a batch's arguments, those that are made anew when examples become shorter, and tensors that stay as they are.
_CUT = ("cu_seq_lens_q", "cu_seq_lens_k", "position_ids", "seq_idx")
_KEPT = ("input_ids", "labels", "shift_labels", "num_items_in_batch", "max_length_q", "max_length_k")


@torch.no_grad()
def assert_no_leak(model, batch, *, example=None):
    """Change examples of a packed row and see that no other example's logits move, not by a bit.

    ``model`` is a causal LM, called three times in evaluation as ``model(**batch)``; it is left as it was. Once with
    the batch itself. Once with other tokens in one example: under a causal mask only later examples can see the change,
    so by default it is the first. And once with other lengths: the shortest example of two tokens or more stays, and
    all others are cut into examples of one token each.

    Cutting leaves the row's tokens and their places alone, so that each layer does the same arithmetic on the same
    shapes. The logits of the example that stays must therefore be equal to the bit, too.

    Args:
        model: anything with ``get_input_embeddings`` whose output has ``logits``.
        batch: its arguments: ``input_ids`` [1, T], and of the examples' boundaries ``cu_seq_lens_q`` [B + 1] or
            ``position_ids`` [1, T], with an example wherever these do not go on by one. For other lengths
            ``cu_seq_lens_*``, ``position_ids`` and ``seq_idx`` are made anew. Lengths are not compared, and a warning
            says so, if the batch has other tensors (except an attention_mask of ones), which may hold boundaries too.
        example: the one whose tokens are changed; None means the first that has a token.

    Raises:
        AssertionError: another example's logits moved, or those of the changed one did not.
        ValueError: a batch that is not one packed row of at least two examples.
    """
    ids = batch["input_ids"]
    if ids.dim() != 2 or ids.shape[0] != 1:
        raise ValueError(f"batch: expected input_ids of one packed row [1, T], got {tuple(ids.shape)}")
    if batch.get("cu_seq_lens_q") is not None:
        bounds = batch["cu_seq_lens_q"].tolist()
    elif batch.get("position_ids") is not None:
        bounds = boundaries_of(batch["position_ids"]).tolist()
    else:
        raise ValueError("batch: expected cu_seq_lens_q or position_ids, which say where examples begin")
    examples = [i for i in range(len(bounds) - 1) if bounds[i] < bounds[i + 1]]
    if len(examples) < 2:
        raise ValueError(f"batch: expected at least two examples with a token, got {len(examples)}")
    example = examples[0] if example is None else example
    if example not in examples:
        raise ValueError(f"example: expected one of {examples}, which have a token, got {example!r}")

    rows = slice(bounds[example], bounds[example + 1])
    tokens = ids.clone()
    tokens[0, rows] = (ids[0, rows] + 1) % model.get_input_embeddings().weight.shape[0]
    stays, shorter = _with_shorter_neighbours(batch, bounds)
    was_training = model.training
    model.eval()
    try:
        before = _logits(model, batch)
        moved = _distances(before, _logits(model, {**batch, "input_ids": tokens}))
        if not moved[rows].any():
            raise AssertionError(f"example {example} was changed, and its own logits did not move")
        for i in examples:
            if i != example and (distance := moved[bounds[i] : bounds[i + 1]].max()) > 0:
                raise AssertionError(
                    f"example {example} was changed, and the logits of example {i} moved by up to {distance:.3g}: "
                    "the examples of a packed row see each other"
                )
        if shorter is None:
            return
        moved = _distances(before, _logits(model, shorter))
        if (distance := moved[bounds[stays] : bounds[stays + 1]].max()) > 0:
            raise AssertionError(
                f"the other examples were cut into shorter ones, and the logits of example {stays} moved by up to "
                f"{distance:.3g}: what an example gets depends on the lengths of its neighbours"
            )
    finally:
        model.train(was_training)


def _logits(model, batch):
    return model(**{"use_cache": False, **batch}).logits[0]


def _distances(before, after):
    """``[T]``: by how much each token's logits moved. An infinity or NaN that stays has not moved."""
    same = (before == after) | (before.isnan() & after.isnan())
    return torch.where(same, 0.0, (after - before).abs().nan_to_num(nan=torch.inf)).amax(-1)


def _with_shorter_neighbours(batch, bounds):
    """Returns ``(example, batch)``: the example that keeps its length, and a batch in which all others have one token.

    ``(None, None)`` if there is none to shorten, and with a warning if the batch has arguments that nobody can cut.
    """
    lengths = {i: end - start for i, (start, end) in enumerate(pairwise(bounds)) if end > start + 1}
    stays = min(lengths, key=lengths.get, default=None)
    if len(lengths) < 2:
        return None, None
    unknown = [name for name, value in batch.items() if not _can_be_cut(name, value)]
    if unknown:
        warnings.warn(
            f"batch: assert_no_leak cannot make {', '.join(unknown)} anew for shorter examples, so it has changed "
            "tokens and no lengths; leave out of the batch what the model does not need",
            stacklevel=3,
        )
        return None, None
    start, end = bounds[stays], bounds[stays + 1]
    T = batch["input_ids"].shape[1]
    cut = [*range(start + 1), *range(end, bounds[-1] + 1)]
    shorter = dict(batch)
    for name in _CUT:
        given = batch.get(name)
        if given is None:
            continue
        if name == "position_ids":  # each new example begins at the position at which the old one began
            first = [bounds[i] for i in range(len(bounds) - 1) for _ in range(bounds[i], bounds[i + 1])]
            first[start:end] = range(start, end)
            shorter[name] = given[..., [*first, *range(len(first), T)]]
        elif name == "seq_idx":
            number = torch.searchsorted(torch.tensor(cut), torch.arange(T), right=True) - 1
            shorter[name] = number.expand_as(given).to(given)
        else:
            shorter[name] = torch.tensor(cut).to(given)
    return stays, shorter


def _can_be_cut(name, value):
    if name == "attention_mask" and isinstance(value, torch.Tensor):
        return value.dim() == 2 and bool((value == 1).all())
    return name in (*_CUT, *_KEPT) or value is None or isinstance(value, bool | int | float | str)
