import math
import re
import warnings

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="the example trains with transformers' Trainer")
pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")

from transformers import Trainer, TrainingArguments

from sft_kernels import AdamW
from sft_kernels.integrations import head_counts

from .harness import assert_small_diff, assert_trains_as_stock, parameters, run

STEPS, ACCUMULATED = 10, 3
QUIET = {"save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
NAME = "trainer"


def model_of(trainer):
    return trainer.model


def logged(trainer, name):
    return torch.tensor([float(entry[name]) for entry in trainer.state.log_history if name in entry])


def reverse(indices):
    return indices[::-1]


def assert_logs_as_stock(name, ours, stock, reordered):
    """Values logged in the course of a run differ from stock's by at most 3 times what reordered batches do."""
    ours, stock, reordered = (logged(trainer, name) for trainer in (ours, stock, reordered))
    assert len(ours) == len(stock) > 1
    permutation = float((reordered - stock).norm())
    assert 0 < permutation < 1e-3 * float(stock.norm())
    assert float((ours - stock).norm()) <= 3 * permutation


@pytest.fixture(scope="module", autouse=True)
def _elsewhere(tmp_path_factory):
    """Trainer makes its folder also if it saves nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("trainer"))
        yield


@pytest.fixture(scope="module")
def trained():
    """The example's Trainer after its steps."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*clipped to")
        assert_small_diff(NAME)
        return assert_trains_as_stock(NAME, model_of, **QUIET)


def test_it_trains_as_stock(trained):
    assert isinstance(trained.optimizer.optimizer, AdamW)
    assert tuple(head_counts(trained.model)) == (STEPS * ACCUMULATED,) * 2 + (0,)


def test_one_denominator(monkeypatch):
    """A mean of the micro-batches' means would be noticed: their tokens differ in number."""
    stock = parameters(model_of(run(NAME, ours=False, **QUIET)))
    permuted = parameters(model_of(run(NAME, ours=False, reorder=reverse, **QUIET)))
    init = Trainer.__init__

    def means(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.model_accepts_loss_kwargs = False

    monkeypatch.setattr(Trainer, "__init__", means)
    of_means = parameters(model_of(run(NAME, **QUIET)))
    assert (of_means - stock).norm() > 100 * (permuted - stock).norm()


def test_the_schedule_moves_our_rate(trained):
    schedule = [0, 0.5] + [0.5 * (1 + math.cos(math.pi * i / 8)) for i in range(8)]
    expected = 1e-2 * torch.tensor(schedule)
    torch.testing.assert_close(logged(trained, "learning_rate"), expected, rtol=1e-5, atol=0)
    groups = trained.optimizer.param_groups
    assert [group["lr"] for group in groups] == [0, 0]  # of the step that does not come
    assert [group["betas"] for group in groups] == [(0.9, 0.95)] * 2


def test_trainers_decay_groups(trained):
    names = {id(p): name for name, p in trained.model.named_parameters()}
    decayed, rest = trained.optimizer.param_groups
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    assert all("norm" in names[id(p)] for p in rest["params"])
    assert not any("norm" in names[id(p)] for p in decayed["params"])
    assert "model.embed_tokens.weight" in {names[id(p)] for p in decayed["params"]}
    assert sum(len(group["params"]) for group in (decayed, rest)) == len(names)


def test_the_norm_that_trainer_logs_is_the_one_before_our_clip(trained):
    norms = logged(trained, "grad_norm")
    assert (norms > 1.5).all()
    assert norms[-1] == pytest.approx(trained.optimizer.optimizer.last_grad_norm.item(), rel=1e-6)


# ---- evaluation, checkpoints, label smoothing, autocast


def predictions(logits, labels):
    """Predicted tokens, so that logits are not gathered."""
    return logits.argmax(-1)


def accuracy(result):
    predicted, labels = result.predictions[:, :-1], result.label_ids[:, 1:]
    kept = labels != -100
    return {"accuracy": float(np.mean((predicted == labels)[kept]))}


def test_evaluation_with_metrics():
    def trainer(**options):
        from small import examples

        rows = examples(count=12, seed=1)
        metrics = {"compute_metrics": accuracy, "preprocess_logits_for_metrics": predictions, "eval_dataset": rows}
        return run(NAME, evaluation=metrics, eval_strategy="steps", eval_steps=2, **QUIET, **options)

    ours, stock, reordered = trainer(), trainer(ours=False), trainer(ours=False, reorder=reverse)
    assert_logs_as_stock("eval_loss", ours, stock, reordered)
    assert len(logged(ours, "eval_accuracy")) == 5
    assert torch.equal(logged(ours, "eval_accuracy"), logged(stock, "eval_accuracy"))
    assert logged(ours, "eval_accuracy").max() > 0
    assert tuple(head_counts(ours.model)) == (STEPS * ACCUMULATED,) * 2 + (0,)


def test_resuming_from_a_checkpoint_goes_on_as_if_nothing_had_been(tmp_path):
    options = {**QUIET, "save_strategy": "steps", "save_steps": 4, "folder": str(tmp_path)}
    whole = run(NAME, **options)
    checkpoint = tmp_path / "checkpoint-4"
    before = torch.load(checkpoint / "optimizer.pt")["state"]
    assert {float(state["step"]) for state in before.values()} == {4}
    resumed = run(NAME, resume=str(checkpoint), **options)
    assert len(logged(resumed, "loss")) == STEPS  # those of the checkpoint, and its own
    assert tuple(head_counts(resumed.model)) == ((STEPS - 4) * ACCUMULATED,) * 2 + (0,)
    assert torch.equal(parameters(resumed.model), parameters(whole.model))
    ours, theirs = (trainer.optimizer.optimizer.state_dict()["state"] for trainer in (resumed, whole))
    assert ours.keys() == theirs.keys() == before.keys()
    for state, other in zip(ours.values(), theirs.values(), strict=True):
        assert state["step"] == STEPS
        assert all(torch.equal(state[name], other[name]) for name in other)


def test_label_smoothing_is_right_and_computes_the_logits():
    """Trainer computes this loss itself, from all the log-probabilities: nothing is saved."""
    trainer = assert_trains_as_stock(NAME, model_of, label_smoothing_factor=0.1, **QUIET)
    assert tuple(head_counts(trainer.model)) == (STEPS * ACCUMULATED, 0, STEPS * ACCUMULATED)


def test_under_autocast():
    options = {**QUIET, "bf16": True, "steps": 4}
    ours, stock = (run(NAME, ours=ours, **options) for ours in (True, False))
    torch.testing.assert_close(logged(ours, "loss"), logged(stock, "loss"), rtol=2**-8, atol=0)
    assert tuple(head_counts(ours.model)) == (4 * ACCUMULATED,) * 2 + (0,)


# ---- both clip


def test_a_clip_of_trainers_beside_ours_is_named(tmp_path):
    from small import examples, model, padded

    arguments = TrainingArguments(
        str(tmp_path), max_steps=6, learning_rate=1e-2, report_to="none", gradient_accumulation_steps=2, **QUIET
    )
    optimizer = (AdamW, {"lr": 1e-2, "max_grad_norm": 1.0})
    trainer = Trainer(
        model(), arguments, data_collator=padded, train_dataset=examples(), optimizer_cls_and_kwargs=optimizer
    )
    with pytest.warns(UserWarning, match=re.escape("clipped to 1.0 already")) as caught:
        trainer.train()
    assert len([w for w in caught if "clipped to" in str(w.message)]) == 1
