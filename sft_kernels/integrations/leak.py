"""Do the examples of a packed row see each other? Asked of a model as it is called."""

import torch

from .calls import boundaries_of


@torch.no_grad()
def assert_no_leak(model, batch, *, example=None):
    """Change one example of a packed row and see that no other example's logits move, not by a bit.

    ``model`` is a causal LM, called in evaluation as ``model(**batch)``; it is left as it was. Under a causal mask only
    later examples can see the one that is changed, so by default that is the first.

    Args:
        model: anything with ``get_input_embeddings`` whose output has ``logits``.
        batch: its arguments: ``input_ids`` [1, T], and of the examples' boundaries ``cu_seq_lens_q`` [B + 1] or
            ``position_ids`` [1, T], with an example wherever these do not go on by one.
        example: which one is changed; None means the first that has a token.

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
    changed = ids.clone()
    changed[0, rows] = (ids[0, rows] + 1) % model.get_input_embeddings().weight.shape[0]
    was_training = model.training
    model.eval()
    try:
        before, after = (model(**{"use_cache": False, **batch, "input_ids": x}).logits[0] for x in (ids, changed))
    finally:
        model.train(was_training)
    moved = ~((before == after) | (before.isnan() & after.isnan())).all(-1)
    if not moved[rows].any():
        raise AssertionError(f"example {example} was changed, and its own logits did not move")
    for i in examples:
        others = slice(bounds[i], bounds[i + 1])
        if i != example and moved[others].any():
            distance = float((after[others] - before[others]).abs().max())
            raise AssertionError(
                f"example {example} was changed, and the logits of example {i} moved by up to {distance:.3g}: "
                "the examples of a packed row see each other"
            )
