"""A loop of your own over a Hugging Face model: padded batches, clipping, a schedule."""

# - import torch
from small import examples, model, padded
from torch.utils.data import DataLoader
from transformers import get_cosine_schedule_with_warmup

import sft_kernels.integrations  # +


def main(steps=10):
    network = model()
    network = sft_kernels.integrations.patch(network)  # +
    # - optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    optimizer = sft_kernels.AdamW(network.parameters(), lr=1e-2, max_grad_norm=1.0)  # +
    schedule = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=2, num_training_steps=steps)
    loader = DataLoader(examples(), batch_size=4, collate_fn=padded)
    for _, batch in zip(range(steps), loader, strict=False):
        loss = network(**batch).loss
        loss.backward()
        # - torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        print(f"masked loss {loss:.3f}")
    return network


if __name__ == "__main__":
    main()
