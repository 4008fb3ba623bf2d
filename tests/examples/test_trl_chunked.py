"""SFTTrainer with ``patch_trl``: the same parameters, logs and labels in each of its modes."""

from itertools import pairwise

import pytest
import torch

from sft_kernels.integrations import attention, trl, unpatch_trl

from . import harness
from .harness import assert_small_diff, assert_trains_as_stock

pytest.importorskip("trl", reason="the example is about its SFTTrainer")

from small import conversations, model, tokenizer
from trl.trainer import utils

ASKED = [{"prompt": row["messages"][:1], "completion": row["messages"][1:]} for row in conversations()]
TEXTS = [{"text": " ".join(message["content"] for message in row["messages"])} for row in conversations()]
PACKED = {"packing": True, "packing_strategy": "bfd", "max_length": 128}


@pytest.fixture(autouse=True)
def undone(monkeypatch):
    """Undoes ``patch_trl`` after each run of an example: the next may be the stock program."""
    run = harness.run

    def run_and_undo(*args, **options):
        try:
            return run(*args, **options)
        finally:
            unpatch_trl()

    monkeypatch.setattr(harness, "run", run_and_undo)


@pytest.fixture
def calls(monkeypatch):
    """The calls of our ops behind TRL and behind the attention, by name."""
    found = []

    def count(module, name):
        op = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, **options: found.append(name) or op(*args, **options))

    count(trl, "linear_cross_entropy")
    count(attention, "packed_attention")
    return found


def trained(trainer):
    return trainer.model


def test_it_trains_as_stock(calls):
    assert_small_diff("trl_chunked")
    assert_trains_as_stock("trl_chunked", trained, assistant_only_loss=True)
    assert calls == ["linear_cross_entropy"] * 10  # of our run alone


MODES = {
    "everything": {},
    "completions": {"rows": ASKED},
    "dft": {"loss_type": "dft", "assistant_only_loss": True},
    "two micro-batches a step": {"gradient_accumulation_steps": 2, "assistant_only_loss": True},
}


@pytest.mark.parametrize("mode", MODES)
def test_it_trains_as_stock_in_each_mode(mode, calls):
    assert_trains_as_stock("trl_chunked", trained, steps=5, **MODES[mode])
    assert calls == ["linear_cross_entropy"] * 5 * (1 + (mode == "two micro-batches a step"))


def test_it_trains_as_stock_on_packed_rows(calls):
    def build():
        """Our attention in our program, else torch's with transformers' mask."""
        ours = utils._ChunkedLogProbFunction is trl.LogProbs
        return model(attn_implementation="sft_kernels" if ours else "sdpa")

    ours = assert_trains_as_stock("trl_chunked", trained, steps=5, build=build, assistant_only_loss=True, **PACKED)
    assert calls.count("linear_cross_entropy") == 5
    forwards = 2 if ours.args.gradient_checkpointing else 1
    assert calls.count("packed_attention") == 5 * forwards * ours.model.config.num_hidden_layers


def logs(ours, **options):
    """The metrics that TRL logs at each step and evaluation."""
    trainer = harness.run("trl_chunked", ours, steps=4, eval_strategy="steps", eval_steps=2, **options)
    names = ("loss", "entropy", "mean_token_accuracy", "grad_norm", "num_tokens")
    names += tuple(f"eval_{name}" for name in names)
    return [{name: log[name] for name in names if name in log} for log in trainer.state.log_history]


@pytest.mark.parametrize("mode", ["assistant", "packed"])
def test_the_logs_are_those_of_stock(mode):
    options = {"assistant_only_loss": True, **(PACKED if mode == "packed" else {})}
    ours, stock = logs(True, **options), logs(False, **options)
    torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-5)
    assert sum("mean_token_accuracy" in log and "entropy" in log for log in ours) == 4
    assert sum("eval_mean_token_accuracy" in log and "eval_entropy" in log for log in ours) == 2


LEARNT = {  # options; how the text that carries loss begins and ends, its ends of a turn
    "everything": ({}, "user\n", "<|im_end|>\n", 2),  # the first token has nothing before it
    "completions": ({"rows": ASKED}, "", "<|im_end|>\n", 1),
    "assistant": ({"assistant_only_loss": True}, "", "<|im_end|>", 1),
    "texts": ({"rows": TEXTS}, "", "<|endoftext|>", 0),
    "packed": (PACKED, "user\n", "<|im_end|>\n", 2),
}


@pytest.mark.parametrize("mode", LEARNT)
def test_the_end_of_the_turn_is_learnt(mode):
    options, begins, ends, turns = LEARNT[mode]
    trainer = harness.run("trl_chunked", steps=1, **options)
    batch = next(iter(trainer.get_train_dataloader()))
    ids, labels = batch["input_ids"], batch["labels"]
    if "cu_seq_lens_q" in batch:
        bounds = batch["cu_seq_lens_q"].tolist()
        rows = [(ids[0, i:j], labels[0, i:j]) for i, j in pairwise(bounds)]
    else:
        rows = list(zip(ids, labels, strict=True))
    assert len(rows) >= 4
    for row, of_row in rows:
        carried = of_row[1:] != -100  # the first label is never used
        text = tokenizer().decode(row[1:][carried])
        assert torch.equal(row[1:][carried], of_row[1:][carried])
        assert text.startswith(begins)
        assert text.endswith(ends)
        assert text.count("<|im_end|>") == turns
        assert "<|pad|>" not in text
