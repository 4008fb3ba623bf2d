"""Direct preference optimisation (Rafailov et al., arXiv:2305.18290) without the logits of policy or reference.

The rows of a batch are B preferred answers, then the B that were rejected in their place. Of each answer the loss needs
one number, its log-probability; of the reference, which does not learn, without a gradient.
"""

import torch
import torch.nn.functional as F

from sft_kernels import linear_cross_entropy


def log_probability(hidden, head, labels):
    """log π of each answer ``[2 B]``; ``hidden`` [2 B, S, D], ``head`` [V, D], ``labels`` [2 B, S], prompts masked."""
    _, tokens = linear_cross_entropy(hidden, head, labels, shift=True, reduction="none", return_stats="tokens")
    return tokens.logprob.sum(1)


def dpo_loss(policy, reference, labels, beta=0.1):
    """``policy`` and ``reference`` are ``(hidden, head)`` each; returns ``(loss, reward margins [B])``."""
    with torch.no_grad():
        anchor = log_probability(*reference, labels)
    reward = beta * (log_probability(*policy, labels) - anchor)
    chosen, rejected = reward.chunk(2)
    return -F.logsigmoid(chosen - rejected).mean(), (chosen - rejected).detach()


def example():
    """``(policy, reference, labels)`` of three pairs of answers, random."""
    torch.manual_seed(0)
    policy, reference = [(torch.randn(6, 12, 8), torch.randn(50, 8)) for _ in range(2)]
    labels = torch.randint(0, 50, (6, 12))
    labels[:, :4] = -100  # the prompt
    labels[1, 9:] = labels[5, 7:] = -100  # padding
    return [t.requires_grad_() for t in policy], reference, labels


def main():
    policy, reference, labels = example()
    loss, margins = dpo_loss(policy, reference, labels)
    loss.backward()
    print(f"loss {loss:.4f}, margins", *(f"{float(m):.3f}" for m in margins))
    return loss


if __name__ == "__main__":
    main()
