"""A run that goes on is the run that nothing ended, to the bit."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sft_kernels.sft.train import train

from .runs import assert_same, killed, recipe_of, stopped_in
from .small import loaded, model_of, rows_of, same_weights


@pytest.fixture
def recipe(tmp_path, whole):
    return recipe_of(tmp_path, whole)


def test_a_run_killed_three_times_is_the_run_that_nobody_killed(recipe, capsys):
    """In the step after an epoch's end, while a checkpoint is written, and while the best model is replaced."""
    unkilled = replace(recipe, out=recipe.out + "-unkilled")
    train(unkilled)
    steps = [row for row in rows_of(Path(unkilled.out)) if "loss" in row]
    assert sum(row["examples"] for row in steps[:3]) == 12  # an epoch
    killed("in_micro_batch:8", recipe)  # of step 4, the first of the second epoch; step 2 is complete
    assert [path.name for path in Path(recipe.out, "checkpoints").iterdir()] == ["step-2"]
    recipe = replace(recipe, resume=True)
    killed("in_checkpoint:6", recipe)
    assert Path(recipe.out, "checkpoints", "step-6.partial").is_dir()
    killed("between_best_models:1", recipe)
    assert not Path(recipe.out, "best").exists()
    capsys.readouterr()
    train(recipe)
    assert "resume: going on after step" in capsys.readouterr().out
    assert_same(unkilled.out, recipe.out)


@pytest.mark.parametrize("number", [1, 5, 6, 13, 20])
def test_a_run_that_a_signal_ended_goes_on(number, recipe):
    """In the first step, before and at an epoch's end, later, in the last step but one."""
    whole = replace(recipe, out=recipe.out + "-whole")
    train(whole)
    stopped = stopped_in(number, recipe)
    assert stopped.path.parent.name == f"step-{(number + 1) // 2}"
    train(replace(recipe, resume=True))
    assert rows_of(Path(recipe.out)) == rows_of(Path(whole.out))
    assert same_weights(loaded(f"{recipe.out}/model"), loaded(f"{whole.out}/model"))
    assert same_weights(loaded(f"{recipe.out}/best"), loaded(f"{whole.out}/best"))


def test_a_run_killed_before_its_last_line_ends_as_if_it_had_not_been(recipe):
    """When a checkpoint is whole and the oldest not gone, then when the model is saved and not yet judged."""
    unkilled = replace(recipe, out=recipe.out + "-unkilled")
    train(unkilled)
    killed("before_rotation:10", recipe)  # the last one
    assert sorted(path.name for path in Path(recipe.out, "checkpoints").iterdir()) == ["step-10", "step-6", "step-8"]
    recipe = replace(recipe, resume=True)
    killed("at_the_end:1", recipe)
    assert Path(recipe.out, "model").is_dir()
    train(recipe)
    assert_same(unkilled.out, recipe.out)


@pytest.mark.parametrize(
    "options",
    [
        {"parameters": "bf16+master", "precision": "auto"},
        {"parameters": "bf16+stochastic", "precision": "bf16"},
        {"spike": 2.0, "activation_checkpointing": True},
        {"weigh": "examples", "precision": "bf16"},
    ],
    ids=lambda options: " ".join(f"{name}={value}" for name, value in options.items()),
)
def test_moments_masters_and_the_guard_go_on(options, recipe):
    recipe = replace(recipe, eval_every=0, **options)
    whole = replace(recipe, out=recipe.out + "-whole")
    train(whole)
    stopped_in(9, recipe)
    train(replace(recipe, resume=True))
    steps = [f"checkpoints/step-{step}" for step in (8, 10)]
    assert sorted(path.name for path in Path(recipe.out, "checkpoints").iterdir()) == ["step-10", "step-8"]
    for step in steps:
        assert_same(f"{whole.out}/{step}", f"{recipe.out}/{step}")
    assert rows_of(Path(recipe.out)) == rows_of(Path(whole.out))


def test_dropout_goes_on(recipe, tokenizer, tmp_path):
    """GPT-2's config asks for dropout of attention weights and embeddings, too, which is off."""
    import transformers

    torch.manual_seed(0)
    shape = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 80}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=len(tokenizer), **shape))
    model.save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    recipe = replace(recipe, model=str(tmp_path / "gpt2"), dropout=0.2, eval_every=0)
    train(replace(recipe, out=recipe.out + "-whole"))
    train(replace(recipe, out=recipe.out + "-without", dropout=0.0))
    stopped_in(9, recipe)
    train(replace(recipe, resume=True))
    assert rows_of(Path(recipe.out)) == rows_of(Path(recipe.out + "-whole"))
    assert rows_of(Path(recipe.out)) != rows_of(Path(recipe.out + "-without"))
    asked = json.loads(Path(recipe.out, "model", "config.json").read_text())
    assert (asked["resid_pdrop"], asked["attn_pdrop"]) == (0.1, 0.1)


def test_a_recipe_of_paths_and_tuples_goes_on(recipe, capsys):
    recipe = replace(recipe, out=Path(recipe.out), model=Path(recipe.model), data=(Path(recipe.data[0]),), steps=4)
    stopped_in(5, recipe)
    train(replace(recipe, resume=True, out=str(recipe.out), data=[str(recipe.data[0])]))
    assert [row["step"] for row in rows_of(Path(recipe.out)) if "loss" in row] == [1, 2, 3, 4]
    assert "no checkpoint could be saved" not in capsys.readouterr().err


def test_a_model_that_was_handed_in_goes_on_with_its_adapters(recipe, tokenizer):
    import peft

    def adapted():
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.2)
        return peft.get_peft_model(model_of(len(tokenizer)), config)

    recipe = replace(recipe, model="", init_from=None)
    whole, went_on = adapted(), adapted()
    train(replace(recipe, out=recipe.out + "-whole"), model=whole, tokenizer=tokenizer)
    stopped_in(9, recipe, model=adapted(), tokenizer=tokenizer)
    train(replace(recipe, resume=True), model=went_on, tokenizer=tokenizer)
    assert same_weights(whole, went_on)
    assert rows_of(Path(recipe.out)) == rows_of(Path(recipe.out + "-whole"))


def test_the_tokenizer_that_a_bare_config_got_is_kept(recipe, tmp_path):
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model_type": "llama", "vocab_size": 300, "max_position_embeddings": 64, **shape}))
    recipe = replace(recipe, model=str(config))
    train(replace(recipe, out=recipe.out + "-whole"))
    stopped_in(9, recipe)
    train(replace(recipe, resume=True))
    assert rows_of(Path(recipe.out)) == rows_of(Path(recipe.out + "-whole"))
    assert_same(f"{recipe.out}/model", f"{recipe.out}-whole/model")
