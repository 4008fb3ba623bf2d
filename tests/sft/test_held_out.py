import json
import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sft_kernels.sft import held_out
from sft_kernels.sft.recipe import Recipe
from sft_kernels.sft.train import train

from .conftest import chat
from .small import loaded, model_of, recipe_in, rows_of, same_weights

NAN = float("nan")


def noisy(count, rng):
    """Questions whose second word gives the answer, but for three in ten, which have any answer."""
    answers = {"red": "Two words.", "blue": "How many?", "green": "look"}
    for _ in range(count):
        word = rng.choice([*answers])
        reply = answers[word] if rng.random() > 0.3 else rng.choice([*answers.values()])
        yield chat(f"{rng.randrange(1000)} {word} {rng.randrange(1000)}", reply)


@pytest.fixture
def noisy_recipe(tmp_path):
    for name, seed, count in (("train", 0, 60), ("held_out", 1, 24)):
        lines = (json.dumps(row) + "\n" for row in noisy(count, random.Random(seed)))
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    return Recipe(
        data=[str(tmp_path / "train.jsonl")],
        eval_data=[str(tmp_path / "held_out.jsonl")],
        out=str(tmp_path / "run"),
        row_tokens=256,
        rows=2,
        steps=96,
        lr=1e-2,
        precision="fp32",
        eval_every=8,
        max_new_tokens=6,
        log_every=96,
    )


def test_over_five_seeds_the_best_model_is_the_metrics_and_how_often_the_loss_names_another(
    noisy_recipe, tokenizer, record_property, capsys
):
    """The count is reported as found."""
    differ = 0
    for seed in range(5):
        torch.manual_seed(seed)
        model = model_of(len(tokenizer), num_hidden_layers=2, hidden_size=32, intermediate_size=64)
        recipe = replace(noisy_recipe, seed=seed, out=f"{noisy_recipe.out}-{seed}")
        _, _, log = train(recipe, model=model, tokenizer=tokenizer)
        found = {row["step"]: row["eval"] for row in rows_of(Path(recipe.out)) if "eval" in row and row["step"]}
        assert [*found] == [*range(8, 97, 8)]
        by_metric = max(found, key=lambda step: (found[step]["score"], -found[step]["loss"]))
        by_loss = min(found, key=lambda step: found[step]["loss"])
        assert log.best["step"] == by_metric
        assert log.best["value"] == found[by_metric]["score"]
        assert rows_of(Path(recipe.out))[-1] == {"step": 96, "of": 96, "finished": True, "best": log.best}
        assert found[by_metric]["score"] > 0.3
        assert found[by_metric]["score"] > found[8]["score"]
        differ += by_metric != by_loss
    record_property("seeds in which loss and metric name another best step", differ)
    with capsys.disabled():
        print(f"\nloss and metric name another best step in {differ} of 5 seeds")


def test_the_best_model_is_judged_as_it_was_when_it_was_saved(tmp_path, tokenizer, noisy_recipe):
    """Measured again, the saved model has the loss and the score that it was chosen for."""
    recipe = replace(noisy_recipe, steps=24)
    _, _, log = train(recipe, model=model_of(len(tokenizer), hidden_size=32), tokenizer=tokenizer)
    again = replace(recipe, model=f"{recipe.out}/best", out=recipe.out + "-2", steps=1, lr=0.0, eval_every=0)
    _, _, after = train(again)
    first = next(row["eval"] for row in after.history if "eval" in row)
    assert (first["score"], first["loss"]) == (log.best["value"], pytest.approx(log.best["loss"], rel=1e-6))


def test_the_score_is_logged_and_training_is_as_without_it(tmp_path, tokenizer):
    """Evaluation draws no random number and leaves the model in training mode."""
    options = {"holdout": 0.3, "eval_every": 1, "neftune_alpha": 5.0, "steps": 4, "lr": 1e-2}
    judged, alone = model_of(len(tokenizer)), model_of(len(tokenizer))
    train(recipe_in(tmp_path, **options), model=judged, tokenizer=tokenizer)
    options |= {"eval_every": 0, "metric_prompts": 0, "out": str(tmp_path / "alone")}
    train(recipe_in(tmp_path, **options), model=alone, tokenizer=tokenizer)
    assert same_weights(judged, alone)
    scored = [row["eval"] for row in rows_of(tmp_path / "run") if "eval" in row]
    assert [row["metric"] for row in scored] == ["exact_match"] * 5
    assert {"score", "stopped", "prompts", "loss", "accuracy", "entropy", "kept"} <= scored[0].keys()
    assert not any("score" in row["eval"] for row in rows_of(tmp_path / "alone") if "eval" in row)
    assert not (tmp_path / "alone" / "best").exists()


METRICS = """
seen = []

def length(prompts, answers, references):
    seen.append((prompts, answers, references))
    return -sum(map(len, answers))

def fails_later(prompts, answers, references):
    seen.append(1)
    if len(seen) > 1:
        raise KeyError("gone")
    return 1

def fails(prompts, answers, references):
    return "good"
"""


@pytest.fixture
def own_metrics(tmp_path, monkeypatch):
    (tmp_path / "own_metrics.py").write_text(METRICS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "own_metrics", raising=False)
    yield
    sys.modules.pop("own_metrics", None)


@pytest.mark.usefixtures("own_metrics")
def test_a_function_by_dotted_name_is_the_metric(tmp_path, tokenizer):
    recipe = recipe_in(tmp_path, holdout=0.3, eval_every=1, metric="own_metrics.length", metric_prompts=3)
    _, _, log = train(recipe, model=model_of(len(tokenizer)), tokenizer=tokenizer)
    seen = sys.modules["own_metrics"].seen
    prompts, answers, references = seen[0]
    assert len(seen) == 4
    assert len(prompts) == len(answers) == len(references) == 3
    assert all("<|im_start|>assistant\n" in prompt and "How many" in prompt for prompt in prompts)
    assert references == ["Two words."] * 3
    assert log.best["by"] == "own_metrics.length"


@pytest.mark.usefixtures("own_metrics")
def test_a_metric_that_fails_later_costs_a_warning_and_no_run(tmp_path, tokenizer, capsys):
    recipe = recipe_in(tmp_path, holdout=0.3, eval_every=1, metric="own_metrics.fails_later")
    _, _, log = train(recipe, model=model_of(len(tokenizer)), tokenizer=tokenizer)
    assert capsys.readouterr().err.count("warning: metric: own_metrics.fails_later raised KeyError: 'gone'") == 3
    assert [row["eval"]["score"] for row in log.history if "eval" in row] == [1, None, None, None]
    assert log.best is None
    assert not (tmp_path / "run" / "best").exists()


@pytest.mark.usefixtures("own_metrics")
def test_a_metric_that_fails_at_once_ends_the_run_before_its_first_step(tmp_path, tokenizer):
    recipe = recipe_in(tmp_path, holdout=0.3, metric="own_metrics.fails")
    with pytest.raises(ValueError, match=r"metric: own_metrics\.fails returned"):
        train(recipe, model=model_of(len(tokenizer)), tokenizer=tokenizer)
    assert not any("loss" in row for row in rows_of(tmp_path / "run"))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"metric": "nowhere.f", "holdout": 0.3}, "metric: there is no module nowhere"),
        ({"metric": "own_metrics.length"}, "metric: nothing is held out to measure on"),
        ({"metric": "own_metrics.length", "metric_prompts": 0, "holdout": 0.3}, "metric: metric_prompts is 0"),
        ({"eval_every": 5}, "eval_every: nothing is held out to measure on"),
    ],
)
@pytest.mark.usefixtures("own_metrics")
def test_what_cannot_be_measured_is_refused_before_the_data_are_read(options, reason, tmp_path, tokenizer):
    recipe = replace(recipe_in(tmp_path, **options), data=["nowhere.jsonl"])
    with pytest.raises(ValueError, match=reason):
        train(recipe, model=model_of(len(tokenizer)), tokenizer=tokenizer)


def test_texts_have_no_prompt_so_the_loss_chooses(tmp_path, tokenizer, write_jsonl, capsys):
    texts = write_jsonl(*({"text": "red and blue and green " * (1 + i % 3)} for i in range(12)))
    options = {"mask": "all", "row_tokens": 64, "steps": 4, "lr": 1e-2, "holdout": 0.3, "eval_every": 1}
    recipe = Recipe(data=[str(texts)], out=str(tmp_path / "run"), **options)
    _, _, log = train(recipe, model=model_of(len(tokenizer)), tokenizer=tokenizer)
    assert capsys.readouterr().out.count("metric: no held-out example has a prompt") == 1
    losses = {row["step"]: row["eval"]["loss"] for row in log.history if "eval" in row and row["step"]}
    assert log.best["by"] == "masked loss"
    assert log.best["step"] == min(losses, key=losses.get)


def test_the_model_before_the_first_step_is_no_candidate(tmp_path, tokenizer):
    recipe = recipe_in(tmp_path, holdout=0.3, eval_every=2, lr=0.0)  # every measurement is equal
    _, _, log = train(recipe, model=model_of(len(tokenizer)), tokenizer=tokenizer)
    assert log.best["step"] == 2


def test_a_best_model_that_cannot_be_saved_costs_a_warning_and_the_one_before_stays(
    tmp_path, tokenizer, monkeypatch, capsys
):
    """The part that was written makes room."""
    losses, loss = iter([5.0, 4.0, 3.0, 2.0]), held_out.masked_loss
    monkeypatch.setattr(held_out, "masked_loss", lambda *args: loss(*args)._replace(loss=next(losses)))
    fill, best = held_out.models.save_model, []

    def full(model, folder):
        fill(model, folder)
        if Path(folder).name == "best.partial":
            best.append(folder)
            if len(best) > 1:
                raise OSError(28, "No space left on device")

    monkeypatch.setattr(held_out.models, "save_model", full)
    recipe = recipe_in(tmp_path, holdout=0.3, eval_every=1, metric_prompts=0)
    _, _, log = train(recipe, model=model_of(len(tokenizer)), tokenizer=tokenizer)
    assert capsys.readouterr().err.count("the best model so far could not be saved") == 2
    assert log.best["step"] == 1
    names = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert names == ["best", "curves.png", "model", "speed.jsonl", "train.jsonl"]
    assert loaded(tmp_path / "run" / "best")
    assert loaded(tmp_path / "run" / "model")


@pytest.mark.parametrize("prompts", [0, 3], ids=["by loss", "by score"])
def test_a_model_whose_loss_is_no_number_is_never_the_best(prompts, tmp_path, tokenizer, monkeypatch):
    """Its weights may overflow though no gradient did."""
    losses, loss = iter([5.0, NAN, 4.0, NAN, float("inf")]), held_out.masked_loss
    monkeypatch.setattr(held_out, "masked_loss", lambda *args: loss(*args)._replace(loss=next(losses)))
    recipe = recipe_in(tmp_path, steps=4, holdout=0.3, eval_every=1, metric_prompts=prompts)
    _, _, log = train(recipe, model=model_of(len(tokenizer)), tokenizer=tokenizer)
    assert (log.best["step"], log.best["loss"]) == (2, 4.0)
    assert [row["eval"]["loss"] for row in rows_of(tmp_path / "run") if "eval" in row] == [5.0, None, 4.0, None, None]


def test_tokens_with_labels_are_answered_with_and_without_a_chat_template(
    tmp_path, tokenizer, tokenizer_with, write_jsonl
):
    """Their answers end where the template ends a turn; without one, where the model's do."""
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    data = write_jsonl(*({"input_ids": [9, 8, 7 + i, end], "labels": [-100, -100, 7 + i, end]} for i in range(12)))
    for name, other in (("with", tokenizer), ("without", tokenizer_with(None))):
        recipe = Recipe(
            data=[str(data)], out=str(tmp_path / name), row_tokens=64, steps=2, holdout=0.3, max_new_tokens=3
        )
        _, _, log = train(recipe, model=model_of(len(tokenizer)), tokenizer=other)
        assert [row["eval"]["prompts"] for row in log.history if "eval" in row] == [4, 4]


def test_plain_texts_need_no_chat_template(tmp_path, tokenizer, tokenizer_with, write_jsonl):
    texts = write_jsonl(*({"text": "red and blue and green"} for _ in range(12)))
    recipe = Recipe(data=[str(texts)], out=str(tmp_path / "run"), mask="all", row_tokens=64, steps=2, holdout=0.3)
    train(recipe, model=model_of(len(tokenizer)), tokenizer=tokenizer_with(None))
