"""transformers' Trainer: micro-batches that share one denominator, a cosine schedule with warm-up.

Trainer gives the optimiser of ``optimizer_cls_and_kwargs`` its parameters and its schedule. The learning rate and the
betas must be passed there. The decay is not passed: Trainer makes two groups, biases and norms without decay, all else
(embeddings, too) with ``TrainingArguments.weight_decay``, which is 0 by default.

``max_grad_norm=0`` switches Trainer's clip off, so that gradients are clipped once, in ``AdamW.step``. Trainer still
measures the norm and logs it as ``grad_norm``, which costs it the passes of a clip. If you do not need
``skip_nonfinite``, leaving AdamW's ``max_grad_norm`` out and Trainer's as it is does the same for less.
"""

from small import examples, model, padded
from transformers import Trainer, TrainingArguments

from sft_kernels import AdamW, integrations  # +


def main(steps=10, folder="out/trainer", resume=None, evaluation=None, **options):
    arguments = TrainingArguments(
        folder, max_steps=steps, per_device_train_batch_size=4, gradient_accumulation_steps=3,
        learning_rate=1e-2, lr_scheduler_type="cosine", warmup_steps=2, adam_beta2=0.95, weight_decay=0.1,
        logging_steps=1, report_to="none",
        # - max_grad_norm=1.0,
        max_grad_norm=0,  # +
        **options,
    )  # fmt: skip
    trainer = Trainer(
        # - model=model(),
        model=integrations.patch(model()), optimizer_cls_and_kwargs=(AdamW, {"lr": 1e-2, "max_grad_norm": 1.0}),  # +
        args=arguments, data_collator=padded, train_dataset=examples(), **evaluation or {},
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer


if __name__ == "__main__":
    main(save_strategy="no")
