"""accelerate with DistributedDataParallel: one denominator over all ranks.

DDP averages gradients over ranks. Each rank therefore divides its loss by the number of labels kept
on all ranks, over the number of ranks.

Run it with ``torchrun --nproc-per-node 2 examples/accelerate_ddp.py``.
"""

# - import torch
from accelerate import Accelerator
from small import examples, model, padded
from torch.utils.data import DataLoader
from transformers import get_cosine_schedule_with_warmup

import sft_kernels.integrations  # +


def main(steps=10, batch_size=4):
    accelerator = Accelerator(cpu=True)
    network = model()
    network = sft_kernels.integrations.patch(network)  # +
    # - optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    optimizer = sft_kernels.AdamW(network.parameters(), lr=1e-2, max_grad_norm=1.0)  # +
    # Not prepared: accelerate would step a schedule once for each rank.
    schedule = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=2, num_training_steps=steps)
    loader = DataLoader(examples(96), batch_size=batch_size, collate_fn=padded)
    network, optimizer, loader = accelerator.prepare(network, optimizer, loader)
    for _, batch in zip(range(steps), loader, strict=False):
        kept = accelerator.reduce((batch["labels"][:, 1:] != -100).sum())
        loss = network(**batch, num_items_in_batch=kept / accelerator.num_processes).loss
        accelerator.backward(loss)
        # - accelerator.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        accelerator.print(f"masked loss {accelerator.reduce(loss.detach(), 'mean'):.3f}")
    return network


if __name__ == "__main__":
    main()
