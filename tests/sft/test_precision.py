from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sft_kernels.sft.guards import Guard
from sft_kernels.sft.precision import optimizer_of, rounded_away
from sft_kernels.sft.recipe import Recipe
from sft_kernels.sft.train import train

from .small import loaded, model_of, recipe_in, rows_of

BF16 = ("bf16+master", "bf16+stochastic")


def steps_of(out):
    return [row for row in rows_of(Path(out)) if "loss" in row]


@pytest.fixture
def folder_recipe(tmp_path, whole):
    return recipe_in(tmp_path, model=str(whole), steps=6, lr=2e-5, precision="auto")


@pytest.mark.parametrize("parameters", BF16)
def test_parameters_in_bf16_have_fp32_moments(parameters, tokenizer):
    model = model_of(len(tokenizer)).to(torch.bfloat16)
    optimizer, names = optimizer_of(model, Recipe(parameters=parameters, seed=2**32 + 5))
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    states = [optimizer.state[p] for p in model.parameters()]
    assert {state["exp_avg"].dtype for state in states} == {torch.float32}
    assert all(("remainder" in state) == (parameters == "bf16+master") for state in states)
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert optimizer.stochastic_rounding == (parameters == "bf16+stochastic")
    if parameters == "bf16+stochastic":
        assert {group["seed"] for group in optimizer.param_groups} == {5}


@pytest.mark.parametrize("parameters", BF16)
def test_a_run_in_bf16_saves_bf16_and_stays_close_to_fp32(parameters, folder_recipe):
    """At a learning rate whose updates bf16 alone would lose, the weights go as far in the same direction."""
    recipe = replace(folder_recipe, steps=20)
    train(replace(recipe, out=recipe.out + "-fp32"))
    train(replace(recipe, parameters=parameters))
    held, full = loaded(f"{recipe.out}/model"), loaded(f"{recipe.out}-fp32/model")
    assert {p.dtype for p in held.parameters()} == {torch.bfloat16}
    base = dict(loaded(recipe.model).named_parameters())
    moved = [
        (p.float() - base[n], q - base[n]) for (n, p), q in zip(held.named_parameters(), full.parameters(), strict=True)
    ]
    ours, theirs = (torch.cat([pair[i].flatten() for pair in moved]) for i in (0, 1))
    assert 0.8 < float(ours @ theirs / (theirs @ theirs)) < 1.2
    assert steps_of(recipe.out)[-1]["loss"] == pytest.approx(steps_of(recipe.out + "-fp32")[-1]["loss"], rel=0.02)


def test_the_share_that_is_rounded_away_is_logged_and_reported(folder_recipe, capsys):
    """None with masters; with stochastic rounding single updates are, and the mean is right."""
    shares = {}
    for parameters in BF16:
        recipe = replace(folder_recipe, parameters=parameters, out=folder_recipe.out + parameters)
        train(recipe)
        rows = steps_of(recipe.out)
        shares[parameters] = [row["rounded_away"] for row in rows]
        mean = sum(shares[parameters]) / len(rows)
        assert f"{mean:.2%} of the updates" in capsys.readouterr().out
    assert max(shares["bf16+master"]) < 0.01
    assert min(shares["bf16+stochastic"]) > 0.1
    train(folder_recipe)
    assert not any("rounded_away" in row for row in steps_of(folder_recipe.out))
    assert "rounded away" not in capsys.readouterr().out


def test_what_decays_is_told(folder_recipe, capsys):
    """Seven matrices a layer; two norms a layer, the last norm and the embedding do not decay."""
    train(replace(folder_recipe, steps=1))
    assert "weight decay 0.1 on 8 matrices, none on 4 biases, norms and embeddings" in capsys.readouterr().out


def test_a_skipped_step_has_no_share(tmp_path, tokenizer, monkeypatch, capsys):
    """It made no update, and the mean is over the steps that did."""
    step = Guard.step

    def spoilt(self, number):
        if number in (1, 3):
            self.optimizer.param_groups[0]["params"][0].grad.fill_(float("nan"))
        step(self, number)

    monkeypatch.setattr(Guard, "step", spoilt)
    recipe = recipe_in(tmp_path, lr=1e-5, steps=4, log_every=4)
    train(recipe, model=model_of(len(tokenizer)).to(torch.bfloat16), tokenizer=tokenizer)
    rows = steps_of(recipe.out)
    assert [row["step"] for row in rows if "rounded_away" in row] == [2, 4]
    mean = sum(row.get("rounded_away", 0) for row in rows) / 2
    assert f"{mean:.2%} of the updates" in capsys.readouterr().out


def test_a_model_that_is_handed_in_in_bf16_is_measured_too(tmp_path, tokenizer, monkeypatch):
    """The share is that of the elements that should have moved and did not."""
    model, step, lost = model_of(len(tokenizer)).to(torch.bfloat16), Guard.step, []

    def spied(self, number):
        before = [(p.detach().clone(), p.grad.clone()) for p in model.parameters()]
        step(self, number)
        decays = {id(p) for p in self.optimizer.param_groups[0]["params"]}
        count = 0
        for p, (old, gradient) in zip(model.parameters(), before, strict=True):
            moves = (gradient != 0) | ((old != 0) & (id(p) in decays))
            count += int((moves & (p == old)).sum())
        lost.append(count / sum(p.numel() for p in model.parameters()))

    monkeypatch.setattr(Guard, "step", spied)
    train(recipe_in(tmp_path, lr=1e-5, steps=1), model=model, tokenizer=tokenizer)
    (row,) = steps_of(tmp_path / "run")
    assert 0.1 < row["rounded_away"] == pytest.approx(lost[0], rel=1e-6)


def test_the_share_is_over_all_elements(tokenizer):
    """Two groups of unlike size: one moves, the other does not."""
    model = torch.nn.Sequential(torch.nn.Linear(8, 8, bias=True, dtype=torch.bfloat16))
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[0].bias.fill_(0.0)
    optimizer, _ = optimizer_of(model, Recipe(lr=1e-5, weight_decay=0.0))
    assert rounded_away(optimizer) is None
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert float(rounded_away(optimizer)) == pytest.approx(64 / 72)


def test_bf16_parameters_of_a_model_in_fp32_that_is_handed_in_are_refused(tmp_path, tokenizer):
    recipe = recipe_in(tmp_path, parameters="bf16+master", precision="auto")
    with pytest.raises(ValueError, match=r"^parameters: bf16\+master is for a model in bf16"):
        train(recipe, model=model_of(len(tokenizer)), tokenizer=tokenizer)
    assert not (tmp_path / "run").exists()
