import re
from pathlib import Path

import torch
import torch.nn.functional as F

from . import dft, dpo, example_weights, grpo, plain_loop


def test_the_swap_trains():
    losses = plain_loop.main()
    assert losses[-1] < 0.5 * losses[0]


def test_the_swap_computes_the_loss_it_replaces():
    torch.manual_seed(0)
    model = plain_loop.Model(100, 32)
    ids = torch.randint(0, 100, (8, 24))
    labels = ids.clone()
    labels[:, :12] = -100
    was = F.cross_entropy(model.head(model(ids))[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    ours = plain_loop.linear_cross_entropy(model(ids), model.head.weight, labels, shift=True)
    torch.testing.assert_close(ours, was)


def test_examples_weigh_the_same():
    torch.testing.assert_close(*example_weights.main())


def log_p(hidden, head):
    """Over full logits, of the labels one ahead: ``[B, S - 1, V]``."""
    return F.linear(hidden, head)[:, :-1].log_softmax(-1)


def of_labels(log_p, labels):
    """``(log-probabilities of the labels, which are kept)``, ``[B, S - 1]``."""
    y = labels[:, 1:]
    kept = y != -100
    return log_p.gather(2, y.where(kept, 0)[..., None])[..., 0] * kept, kept


def same_loss_and_gradients(ours, plain, leaves):
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(torch.autograd.grad(ours, leaves), torch.autograd.grad(plain, leaves))


def test_dpo_is_that_of_the_full_logits():
    policy, reference, labels = dpo.example()
    loss, margins = dpo.dpo_loss(policy, reference, labels)
    sums, anchors = (of_labels(log_p(*each), labels)[0].sum(1) for each in (policy, reference))
    chosen, rejected = (sums - anchors).chunk(2)
    same_loss_and_gradients(loss, -(0.1 * (chosen - rejected)).sigmoid().log().mean(), policy)
    torch.testing.assert_close(margins, 0.1 * (chosen - rejected).detach())
    assert (dpo.main() == loss).all()


def test_grpo_is_that_of_the_full_logits():
    policy, sampled, reference, labels, rewards = grpo.example()
    loss, entropy = grpo.grpo_loss(policy, sampled, reference, labels, rewards)
    every = log_p(*policy)
    logprob, kept = of_labels(every, labels)
    sampled, reference = sampled[:, :-1], reference[:, :-1]
    ratio = (logprob - sampled).exp()
    assert ((ratio < 0.8) | (ratio > 1.2)).any()  # some are clipped
    advantage = (rewards - rewards.mean())[:, None] / (rewards.std() + 1e-4)
    gain = torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    kl = (reference - logprob).exp() - (reference - logprob) - 1
    means = [((g - 0.04 * k)[m]).mean() for g, k, m in zip(gain, kl, kept, strict=True)]
    same_loss_and_gradients(loss, -torch.stack(means).mean(), policy)
    torch.testing.assert_close(entropy, torch.special.entr(every.exp()).sum(-1)[kept].mean())
    assert grpo.main() == loss


def test_dft_is_that_of_the_full_logits():
    hidden, head, labels = dft.example()
    loss = dft.dft_loss(hidden, head, labels)
    logprob, kept = of_labels(log_p(hidden, head), labels)
    plain = -(logprob.exp().detach() * logprob)[kept]
    same_loss_and_gradients(loss, plain.mean(), (hidden, head))
    torch.testing.assert_close(dft.dft_loss(hidden, head, labels, num_items=7), plain.sum() / 7)
    assert dft.main() == loss


def test_the_lines_of_the_readme_are_those_of_the_recipe():
    """The README's swap is code that runs: every line of its "ours" block stands in plain_loop.py."""
    here = Path(__file__).parent
    readme = (here.parents[1] / "README.md").read_text(encoding="utf-8")
    block = re.search(r"<!-- plain_loop\.py -->\n```python\n(.*?)```", readme, re.DOTALL).group(1)
    recipe = {line.strip() for line in (here / "plain_loop.py").read_text(encoding="utf-8").splitlines()}
    code = [line.split("  #")[0].strip() for line in block.splitlines() if line.strip()]
    assert [line for line in code if line not in recipe] == []
