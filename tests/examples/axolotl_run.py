"""Trains with axolotl three times: ``python -m tests.examples.axolotl_run FOLDER [lora]``.

It saves the parameters in FOLDER. It is a process of its own, because axolotl changes transformers for good.
"""

import json
import os
import sys
from pathlib import Path

import torch
import yaml

from sft_kernels.integrations import head_counts

from .harness import nudged, parameters, small

LORA = {"adapter": "lora", "lora_r": 8, "lora_alpha": 16, "lora_target_modules": ["q_proj", "v_proj", "lm_head"]}


def config(folder, model, **options):
    """Returns the settings of a run on the CPU, in fp32."""
    chats = {"path": str(folder / "chats.jsonl"), "ds_type": "json", "type": "chat_template"}
    return {
        "base_model": str(folder / model), "datasets": [chats], "sequence_len": 128, "micro_batch_size": 4,
        "gradient_accumulation_steps": 1, "max_steps": 10, "num_epochs": 1, "learning_rate": 1e-2, "warmup_steps": 2,
        "lr_scheduler": "cosine", "optimizer": "adamw_torch", "adam_beta1": 0.9, "adam_beta2": 0.95,
        "max_grad_norm": 1.0, "seed": 1, "bf16": False, "fp16": False, "tf32": False, "device": "cpu",
        "gradient_checkpointing": False, "save_strategy": "no", "dataset_num_proc": 1, **options,
    }  # fmt: skip


def trained(folder, run, settings):
    """Returns the trainer after the run."""
    from axolotl.cli.args import TrainerCliArgs
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_datasets
    from axolotl.train import train

    file = folder / f"{run}.yaml"
    outputs = {"dataset_prepared_path": str(folder / "prepared"), "output_dir": str(folder / run)}
    file.write_text(yaml.safe_dump(settings | outputs))
    cfg = load_cfg(str(file))
    torch.manual_seed(0)  # of the adapters
    return train(cfg=cfg, dataset_meta=load_datasets(cfg=cfg, cli_args=TrainerCliArgs()))[-1]


def main(folder, *options):
    adapter = LORA if "lora" in options else {}
    for name, model in (("model", small.model()), ("nudged", nudged(small.model()))):
        model.save_pretrained(folder / name)
        small.tokenizer().save_pretrained(folder / name)
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in small.conversations()))
    plugins = {"plugins": ["axolotl_plugin.SFTKernelsPlugin"]}
    runs = {
        "stock": config(folder, "model", **adapter),
        "harmless": config(folder, "nudged", **adapter),
        "ours": config(folder, "model", **adapter, **plugins),
    }
    found = {}
    for run, settings in runs.items():
        trainer = trained(folder, run, settings)
        found[run] = parameters(trainer.model)
    found["counts"] = tuple(head_counts(trainer.model))
    found["optimizer"] = type(trainer.optimizer.optimizer).__module__
    found["clip"] = (trainer.optimizer.optimizer.max_grad_norm, trainer.args.max_grad_norm)
    torch.save(found, folder / "found.pt")


if __name__ == "__main__":
    os.environ.update(AXOLOTL_DO_NOT_TRACK="1", HF_HUB_OFFLINE="1")
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), *sys.argv[2:])
