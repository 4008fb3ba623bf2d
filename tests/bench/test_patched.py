import pytest
import torch

from bench import patched
from sft_kernels.integrations import head_counts

pytest.importorskip("transformers")


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(patched, "CONFIG", {**patched.CONFIG, "vocab_size": 97, "hidden_size": 32})
    monkeypatch.setattr(patched, "TOKENS", 16)


def test_both_ways_compute_the_same_gradients(tiny):
    gradients = []
    for is_patched in (False, True):
        rival = patched.head_and_loss(is_patched)
        hidden = rival.prepare()
        rival.run(hidden)
        gradients.append(hidden.grad)
    torch.testing.assert_close(*gradients)
    assert gradients[0].abs().max() > 0


def test_the_trainers_step_is_fused(tiny):
    pytest.importorskip("accelerate")
    prepare, run = patched.trainer_step(True)
    trainer = prepare()
    run(trainer)
    assert head_counts(trainer.model)[1:] == (1, 0)


def test_the_host_time_of_both_is_found():
    lazy, direct = patched.overhead(rounds=5)
    assert lazy > 0
    assert direct > 0
