"""Group relative policy optimisation (Shao et al., arXiv:2402.03300) without the logits of any policy.

A group of G answers to one prompt; an answer's advantage is its reward among the group's. The ratio to the policy that
sampled them is clipped, and the distance to a reference is held small by the estimator exp(d) − d − 1 of the
KL divergence, d = log π_ref − log π. The entropy comes from the same pass.
"""

import torch

from sft_kernels import linear_cross_entropy


def of_tokens(hidden, head, labels):
    """:class:`TokenStats` ``[G, S]``; ``hidden`` [G, S, D], ``head`` [V, D], ``labels`` [G, S] with prompts masked."""
    return linear_cross_entropy(hidden, head, labels, shift=True, reduction="none", return_stats="tokens")[1]


def grpo_loss(policy, sampled, reference, labels, rewards, clip=0.2, beta=0.04):
    """``policy`` is ``(hidden, head)``; ``sampled`` and ``reference`` are log-probabilities ``[G, S]`` of the policies
    that sampled and that hold it back. Returns ``(loss, mean entropy)``."""
    tokens = of_tokens(*policy, labels)
    kept = tokens.prediction >= 0  # -1 where a token carries no loss
    advantage = ((rewards - rewards.mean()) / (rewards.std() + 1e-4))[:, None]
    ratio = (tokens.logprob - sampled).exp()
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    d = reference - tokens.logprob
    each = (gain - beta * (d.exp() - d - 1)) * kept
    loss = -(each.sum(1) / kept.sum(1).clamp(min=1)).mean()
    return loss, tokens.entropy.detach().sum() / kept.sum()


def example():
    """``(policy, sampled, reference, labels, rewards)`` of a group of four answers, random."""
    torch.manual_seed(0)
    hidden, head = torch.randn(4, 12, 8), torch.randn(50, 8)
    labels = torch.randint(0, 50, (4, 12))
    labels[:, :4] = -100  # the prompt
    labels[1, 9:] = labels[3, 7:] = -100  # padding
    with torch.no_grad():
        sampled = of_tokens(hidden + 0.05 * torch.randn_like(hidden), head, labels).logprob
        reference = of_tokens(hidden + 0.2 * torch.randn_like(hidden), head, labels).logprob
    return [t.requires_grad_() for t in (hidden, head)], sampled, reference, labels, torch.tensor([1.0, 0.0, 0.0, 1.0])


def main():
    loss, entropy = grpo_loss(*example())
    loss.backward()
    print(f"loss {loss:.4f}, entropy {entropy:.3f}")
    return loss


if __name__ == "__main__":
    main()
