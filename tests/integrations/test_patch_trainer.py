"""A patched model in the Trainer of transformers, and under accelerate."""

import copy

import pytest
import torch

from sft_kernels.integrations import head_counts, patch, unpatch

from .models import BATCH, V, assert_alike, llama, outside, train, transformers

accelerate = pytest.importorskip("accelerate")

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers and accelerate


class Examples(torch.utils.data.Dataset):
    """Random rows of ten tokens, one to five of them masked."""

    def __len__(self):
        return 18

    def __getitem__(self, i):
        ids = torch.randint(0, V, (10,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": ids, "labels": ids.where(torch.arange(10) > i % 5, -100)}


def trained(model, folder, **options):
    """Returns the Trainer's logs of three steps, and the parameters after."""
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=3, per_device_train_batch_size=2, learning_rate=0.1, optim="sgd",
        logging_steps=1, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True, seed=0, **options,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=Examples(), eval_dataset=Examples())
    trainer.train()
    names = ("loss", "grad_norm", "eval_loss")
    logs = [{name: float(log[name]) for name in names if name in log} for log in trainer.state.log_history]
    return logs, {name: p.detach() for name, p in model.named_parameters()}


def checkpointing(reentrant):
    return {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}


TRAINERS = {
    "as it is": ({}, (3, 3, 0)),
    "accumulating gradients": ({"gradient_accumulation_steps": 3}, (9, 9, 0)),
    "autocast": ({"bf16": True}, (3, 3, 0)),
    "label smoothing": ({"label_smoothing_factor": 0.1}, None),
    "evaluating": ({"eval_strategy": "steps", "eval_steps": 1}, (3, 3, 0)),
    "checkpointing, reentrant": (checkpointing(True), (3, 3, 0)),
    "checkpointing": (checkpointing(False), (3, 3, 0)),
}


@pytest.mark.parametrize("name", TRAINERS)
def test_a_trainer(name, tmp_path):
    options, expect = TRAINERS[name]
    stock = trained(llama(), tmp_path, **options)
    model = patch(llama())
    ours = trained(model, tmp_path, **options)
    tolerance = {"rtol": 0.02, "atol": 0.002} if name == "autocast" else {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(ours, stock, **tolerance)
    counts = head_counts(model)
    assert counts == expect if expect else counts.materialised == 3


@pytest.mark.parametrize("early", [True, False])
def test_accelerate_converts_outputs_to_fp32(early):
    def prepared(patched):
        accelerate.state.AcceleratorState._reset_state(True)
        accelerator, model = accelerate.Accelerator(mixed_precision="bf16", cpu=True), llama()
        patch(model) if patched and early else None
        model = accelerator.prepare(model)
        patch(model) if patched and not early else None
        return model

    def loss(model):
        output = model(**BATCH)
        assert output.logits.dtype == torch.float32
        return output.loss + outside(model)

    try:
        model = prepared(True)
        assert_alike(train(model, loss), train(prepared(False), loss), rtol=0.05, atol=0.02)
    finally:
        accelerate.state.AcceleratorState._reset_state(True)
    assert head_counts(model) == (6, 6, 0)


@pytest.mark.parametrize("early", [True, False])
def test_hooks_of_accelerate_on_the_head(early):
    stock = llama()
    model = patch(copy.deepcopy(stock)) if early else copy.deepcopy(stock)
    for module in (model.lm_head, model):
        accelerate.hooks.add_hook_to_module(module, accelerate.hooks.AlignDevicesHook("cpu", io_same_device=True))
    patch(model)
    assert_alike(train(model), train(stock))
    assert head_counts(model) == (3, 3, 0)
    unpatch(model)
    assert type(model(**BATCH).logits) is torch.Tensor
    accelerate.hooks.remove_hook_from_module(model.lm_head)
    assert type(model(**BATCH).logits) is torch.Tensor
    patch(model)
    model(**BATCH)
    assert head_counts(model) == (1, 1, 0)
