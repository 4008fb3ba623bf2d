"""Lightning with automatic optimisation: the Trainer's clip moves into the optimiser's step.

Lightning hands forward, backward and ``gradient_clip_val`` to ``step`` as one closure. That option
goes: beside ``max_grad_norm`` the gradients would be clipped twice, and with
``precision="16-mixed"`` it raises. ``from_pretrained`` returns a model in evaluation mode and
Lightning leaves it there, so call ``.train()``: ``patch`` is for training.

With ``accumulate_grad_batches=k`` Lightning divides the loss of each micro-batch by k, however many
labels it kept. ``lightning_manual.py`` has one denominator instead.
``import pytorch_lightning as L`` works as well.
"""

import lightning as L

# - import torch
from small import examples, model, padded
from torch.utils.data import DataLoader
from transformers import get_cosine_schedule_with_warmup

import sft_kernels.integrations  # +


class FineTuning(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.network = model().train()
        self.network = sft_kernels.integrations.patch(self.network)  # +

    def training_step(self, batch, _):
        loss = self.network(**batch).loss
        print(f"masked loss {loss:.3f}")
        return loss

    def configure_optimizers(self):
        # - optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
        optimizer = sft_kernels.AdamW(self.parameters(), lr=1e-2, max_grad_norm=1.0)  # +
        schedule = get_cosine_schedule_with_warmup(optimizer, 2, self.trainer.max_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main(steps=10, **options):
    trainer = L.Trainer(
        # - gradient_clip_val=1.0,
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, **options,
    )  # fmt: skip
    module = FineTuning()
    trainer.fit(module, DataLoader(examples(), batch_size=4, collate_fn=padded))
    return module


if __name__ == "__main__":
    main()
