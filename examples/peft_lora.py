"""PEFT: LoRA on the attention and on the head, in a loop of your own.

``patch`` comes after PEFT has put its adapters there. The frozen head and its adapter are then one
fused product. With ``main(target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"])`` the
head itself is trained, in a copy.
"""

# - import torch
from peft import LoraConfig, get_peft_model
from small import examples, model, padded
from torch.utils.data import DataLoader
from transformers import get_cosine_schedule_with_warmup

import sft_kernels.integrations  # +


def main(steps=10, target_modules=("q_proj", "v_proj", "lm_head"), modules_to_save=None):
    config = LoraConfig(
        r=8, lora_alpha=16, target_modules=list(target_modules), modules_to_save=modules_to_save, task_type="CAUSAL_LM"
    )  # fmt: skip
    network = get_peft_model(model(), config)
    network = sft_kernels.integrations.patch(network)  # +
    trainable = [p for p in network.parameters() if p.requires_grad]
    # - optimizer = torch.optim.AdamW(trainable, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    optimizer = sft_kernels.AdamW(trainable, lr=1e-2, max_grad_norm=1.0)  # +
    schedule = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=2, num_training_steps=steps)
    loader = DataLoader(examples(), batch_size=4, collate_fn=padded)
    for _, batch in zip(range(steps), loader, strict=False):
        loss = network(**batch).loss
        loss.backward()
        # - torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        print(f"masked loss {loss:.3f}")
    return network


if __name__ == "__main__":
    main()
