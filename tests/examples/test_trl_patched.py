import pytest
import torch

from sft_kernels.integrations import head_counts

from .harness import assert_small_diff, assert_trains_as_stock, run

pytest.importorskip("trl", reason="the example is about its SFTTrainer")

from small import model


def trained(trainer):
    return trainer.model


def test_it_trains_as_stock():
    assert_small_diff("trl_patched")
    ours = assert_trains_as_stock("trl_patched", trained, assistant_only_loss=True)
    assert tuple(head_counts(ours.model)) == (10, 20, 0)  # the loss and the accuracy


def test_an_adapter_on_the_head_is_trained():
    """TRL refuses PEFT models with one, which its own loss would leave out; it does not see this."""
    peft = pytest.importorskip("peft", reason="it makes the adapter")

    def build():
        config = peft.LoraConfig(target_modules=["q_proj", "lm_head"], r=4)
        return peft.inject_adapter_in_model(config, model())

    ours = assert_trains_as_stock("trl_patched", trained, build=build, assistant_only_loss=True)
    assert ours.model.lm_head.lora_B.default.weight.any()  # it began as zeros
    assert head_counts(ours.model).materialised == 0


def test_the_logs_are_those_of_stock():
    def logs(ours):
        options = {"steps": 4, "eval_strategy": "steps", "eval_steps": 2, "assistant_only_loss": True}
        trainer = run("trl_patched", ours, gradient_accumulation_steps=2, **options)
        names = ("loss", "mean_token_accuracy", "grad_norm", "eval_loss", "eval_mean_token_accuracy")
        return [{name: log[name] for name in names if name in log} for log in trainer.state.log_history]

    ours = logs(True)
    torch.testing.assert_close(ours, logs(False), rtol=1e-4, atol=1e-5)
    assert sum("eval_mean_token_accuracy" in log for log in ours) == 2
