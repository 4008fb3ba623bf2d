"""TRL's SFTTrainer with its head and loss by our fused op, and our AdamW.

TRL multiplies by the head's weight itself, so ``patch(model)`` has nothing to do here. Pass the
learning rate to the optimizer: the trainer does not hand its own to an optimizer class. The trainer
goes on clipping: it computes the norm for its log even with ``max_grad_norm=0``, so AdamW's own
clipping would save nothing.
"""

import tempfile

# - import torch
from datasets import Dataset
from small import conversations, model, tokenizer
from trl import SFTConfig, SFTTrainer

import sft_kernels.integrations  # +


def main(steps=10, build=model, rows=None, **options):
    sft_kernels.integrations.patch_trl()  # +
    # - optimizer = (torch.optim.AdamW, {"lr": 1e-2, "betas": (0.9, 0.95)})
    optimizer = (sft_kernels.AdamW, {"lr": 1e-2})  # +
    arguments = SFTConfig(
        tempfile.mkdtemp(), max_steps=steps, per_device_train_batch_size=4, weight_decay=0.1, warmup_steps=2,
        logging_steps=1, save_strategy="no", report_to="none", use_cpu=True, bf16=False, **options,
    )  # fmt: skip
    data = Dataset.from_list(rows or conversations())
    trainer = SFTTrainer(
        build(), arguments, train_dataset=data, eval_dataset=data, processing_class=tokenizer(),
        optimizer_cls_and_kwargs=optimizer,
    )  # fmt: skip
    trainer.train()
    return trainer


if __name__ == "__main__":
    main(assistant_only_loss=True)
