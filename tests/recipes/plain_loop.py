"""The swap in a loop of your own: three lines change, the loop stays.

Where it says ``# was:`` stands the PyTorch that the line replaces.
"""

import torch
from torch import nn

from sft_kernels import AdamW, decay_groups, linear_cross_entropy


class Model(nn.Module):
    """Anything that ends in hidden states and a head."""

    def __init__(self, vocab, width):
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.mix = nn.GRU(width, width, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab, bias=False)

    def forward(self, ids):
        return self.norm(self.mix(self.embed(ids))[0])


def main(steps=60):
    torch.manual_seed(0)
    model = Model(vocab=100, width=32)
    # was: optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    optimizer = AdamW(decay_groups(model), lr=1e-2, max_grad_norm=1.0)

    prompt = torch.randint(0, 100, (8, 12))
    ids = torch.cat([prompt, prompt.flip(1)], dim=1)
    labels = ids.clone()
    labels[:, :12] = -100  # the prompt is read, not learned

    losses = []
    for _ in range(steps):
        hidden = model(ids)
        # was: loss = F.cross_entropy(model.head(hidden)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        loss = linear_cross_entropy(hidden, model.head.weight, labels, shift=True)
        loss.backward()
        # was: torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"masked loss {losses[0]:.3f} → {losses[-1]:.3f}, last gradient norm {optimizer.last_grad_norm:.3f}")
    return losses


if __name__ == "__main__":
    main()
