"""Dynamic fine-tuning (Wu et al., arXiv:2508.05629): the loss of a token times its own probability, held constant.

Plain fine-tuning weighs a token by one over its probability, as a policy gradient with that reward would. The factor
takes this back: what the model finds all but impossible no longer dominates.
"""

import torch

from sft_kernels import linear_cross_entropy


def dft_loss(hidden, head, labels, num_items=None):
    """−Σ p log p over the kept tokens, the first factor without a gradient; ``num_items`` replaces their number.

    ``hidden`` [B, S, D], ``head`` [V, D], ``labels`` [B, S] with prompts masked.
    """
    losses, tokens = linear_cross_entropy(hidden, head, labels, shift=True, reduction="none", return_stats="tokens")
    if num_items is None:
        num_items = (tokens.prediction >= 0).sum().clamp(min=1)
    return (tokens.logprob.detach().exp() * losses).sum() / num_items


def example():
    """``(hidden, head, labels)`` of three sequences, random."""
    torch.manual_seed(0)
    hidden, head = torch.randn(3, 12, 8), torch.randn(50, 8)
    labels = torch.randint(0, 50, (3, 12))
    labels[:, :4] = labels[1, 9:] = -100
    return hidden.requires_grad_(), head.requires_grad_(), labels


def main():
    hidden, head, labels = example()
    loss = dft_loss(hidden, head, labels)
    loss.backward()
    plain = linear_cross_entropy(hidden.detach(), head.detach(), labels, shift=True)
    print(f"loss {loss:.4f}, without the factor {plain:.4f}")
    return loss


if __name__ == "__main__":
    main()
