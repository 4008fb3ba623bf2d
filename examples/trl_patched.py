"""TRL's SFTTrainer with a loss of your own, of logits that are never in memory, and our AdamW.

TRL's own loss does not call the model's head: see ``trl_chunked.py``. A loss that you write into
``compute_loss`` does, and a patched model then computes it without the logits. This one gives every
example the same weight, however long its answer. Pass the learning rate to the optimizer.
"""

import tempfile

import torch
from datasets import Dataset
from small import conversations, model, tokenizer
from trl import SFTConfig, SFTTrainer

import sft_kernels.integrations  # +


class MeanOfExamples(SFTTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs["labels"][:, 1:]
        kept = labels != -100
        inputs = {name: value for name, value in inputs.items() if name != "labels"}
        outputs = model(**inputs, use_cache=False)
        logits = outputs.logits[:, :-1]
        nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        loss = (nll.sum(1) / kept.sum(1).clamp(min=1)).mean()
        with torch.no_grad():
            right = (logits.argmax(-1) == labels) & kept
        mode = "train" if model.training else "eval"
        self._metrics[mode]["mean_token_accuracy"].append((right.sum() / kept.sum()).item())
        if model.training:  # the trainer leaves this to a loss that takes num_items_in_batch
            loss = loss / self.current_gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss


def main(steps=10, build=model, **options):
    network = build()
    network = sft_kernels.integrations.patch(network)  # +
    # - optimizer = (torch.optim.AdamW, {"lr": 1e-2, "betas": (0.9, 0.95)})
    optimizer = (sft_kernels.AdamW, {"lr": 1e-2})  # +
    arguments = SFTConfig(
        tempfile.mkdtemp(), max_steps=steps, per_device_train_batch_size=4, weight_decay=0.1, warmup_steps=2,
        logging_steps=1, save_strategy="no", report_to="none", use_cpu=True, bf16=False, **options,
    )  # fmt: skip
    data = Dataset.from_list(conversations())
    trainer = MeanOfExamples(
        network, arguments, train_dataset=data, eval_dataset=data, processing_class=tokenizer(),
        optimizer_cls_and_kwargs=optimizer,
    )  # fmt: skip
    trainer.train()
    return trainer


if __name__ == "__main__":
    main(assistant_only_loss=True)
