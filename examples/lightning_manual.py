"""Lightning with manual optimisation: micro-batches that share one denominator.

The loader's batch is that of the whole optimiser step, so the number of kept labels is known before
the first micro-batch. Each micro-batch's loss is divided by it, and every kept label weighs the same.
"""

import lightning as L
import torch
from small import examples, model, padded
from torch.utils.data import DataLoader
from transformers import get_cosine_schedule_with_warmup

import sft_kernels.integrations  # +


class FineTuning(L.LightningModule):
    def __init__(self, micro_batch):
        super().__init__()
        self.automatic_optimization = False
        self.micro_batch = micro_batch
        self.network = model().train()
        self.network = sft_kernels.integrations.patch(self.network)  # +

    def training_step(self, batch, _):
        optimizer, schedule = self.optimizers(), self.lr_schedulers()
        kept = (batch["labels"][:, 1:] != -100).sum()
        losses = []
        for rows in torch.arange(len(batch["labels"])).split(self.micro_batch):
            piece = {name: values[rows] for name, values in batch.items()}
            loss = self.network(**piece, num_items_in_batch=kept).loss
            self.manual_backward(loss)
            losses.append(loss.item())
        # - self.clip_gradients(optimizer, gradient_clip_val=1.0, gradient_clip_algorithm="norm")
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        print(f"masked loss {sum(losses):.3f}")

    def configure_optimizers(self):
        # - optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
        optimizer = sft_kernels.AdamW(self.parameters(), lr=1e-2, max_grad_norm=1.0)  # +
        return [optimizer], [get_cosine_schedule_with_warmup(optimizer, 2, self.trainer.max_steps)]


def main(steps=10, micro_batch=2):
    trainer = L.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    module = FineTuning(micro_batch)
    trainer.fit(module, DataLoader(examples(), batch_size=4, collate_fn=padded))
    return module


if __name__ == "__main__":
    main()
