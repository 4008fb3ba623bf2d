"""Each example weighs the same, however long its answer: ``token_weight`` over one divisor.

The mean over tokens lets an answer of 900 tokens count ninety times as much as one of ten. Where that is not wanted,
weigh every kept token by one over its example's kept tokens and divide by the number of examples.
"""

import torch

from sft_kernels import linear_cross_entropy


def example_weights(labels, ignore_index=-100):
    """``token_weight`` for ``labels`` [B, S], an example a row: 1 / kept tokens of the row."""
    kept = (labels[:, 1:] != ignore_index).sum(1).clamp(min=1)  # the first label of a row is never predicted
    return (1 / kept)[:, None].expand(labels.shape).float()


def main():
    torch.manual_seed(0)
    hidden, weight = torch.randn(3, 16, 8), torch.randn(50, 8)
    labels = torch.randint(0, 50, (3, 16))
    labels[0, :15] = labels[1, :4] = labels[2, :10] = -100

    loss = linear_cross_entropy(
        hidden, weight, labels, shift=True, token_weight=example_weights(labels), num_items=len(labels)
    )
    each = [linear_cross_entropy(h, weight, y, shift=True) for h, y in zip(hidden, labels, strict=True)]
    print("each example:", *(f"{float(e):.3f}" for e in each), "| equally weighted:", f"{float(loss):.3f}")
    return loss, torch.stack(each).mean()


if __name__ == "__main__":
    main()
