"""Dropout, noise and activation checkpointing as options of a run; each piece has tests of its own."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from sft_kernels.sft import model as models
from sft_kernels.sft.train import train

from .small import loaded, model_of, recipe_in, rows_of, same_weights


def losses(out):
    return [row["loss"] for row in rows_of(Path(out)) if "loss" in row]


def test_neftune_noise_is_there_in_training_and_gone_after(tmp_path, tokenizer):
    recipe = recipe_in(tmp_path, lr=1e-2, holdout=0.3)
    model = model_of(len(tokenizer))
    train(replace(recipe, neftune_alpha=10.0), model=model, tokenizer=tokenizer)
    train(replace(recipe, out=recipe.out + "-without"), model=model_of(len(tokenizer)), tokenizer=tokenizer)
    noisy, plain = losses(recipe.out), losses(recipe.out + "-without")
    assert all(a != b for a, b in zip(noisy, plain, strict=True))
    before = [
        next(row["eval"] for row in rows_of(Path(out)) if "eval" in row)
        for out in (recipe.out, recipe.out + "-without")
    ]
    assert before[0] == before[1]  # evaluation has none
    assert not model.get_input_embeddings()._forward_hooks
    assert not [hook for hook in model.model._forward_pre_hooks.values() if "Noise" in repr(hook)]


def test_the_noise_is_gone_after_an_error(tmp_path, tokenizer, monkeypatch):
    model = model_of(len(tokenizer))
    monkeypatch.setattr(models, "head", lambda model: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(recipe_in(tmp_path, neftune_alpha=10.0), model=model, tokenizer=tokenizer)
    assert not model.get_input_embeddings()._forward_hooks


def test_the_noise_is_that_of_each_example_whatever_shares_its_row(tmp_path, tokenizer, monkeypatch):
    """In a packed row each example's embeddings move by up to alpha / √(L · d) of its own L."""
    model, seen = model_of(len(tokenizer)), []
    embed, forward = model.get_input_embeddings(), models.hidden_states

    def spied(model, batch):
        if model.training and torch.is_grad_enabled():
            seen.append([batch, None])
        return forward(model, batch)

    monkeypatch.setattr(models, "hidden_states", spied)

    def look(layer, args):
        if seen and seen[-1][1] is None:
            seen[-1][1] = args[0].detach().clone()

    model.model.layers[0].register_forward_pre_hook(look)
    recipe = recipe_in(tmp_path, neftune_alpha=10.0, lr=0.0, weight_decay=0.0, steps=2)
    train(recipe, model=model, tokenizer=tokenizer)
    assert len(seen) == 2
    for batch, noisy in seen:
        noise = noisy - embed.weight[batch.input_ids]
        bounds = batch.cu_seqlens.tolist()
        assert len(bounds) > 3
        for start, end in pairwise(bounds):
            most = 10.0 / ((end - start) * embed.weight.shape[1]) ** 0.5
            assert 0.9 * most < float(noise[0, start:end].detach().abs().max()) <= most * (1 + 1e-5)


def test_activation_checkpointing_changes_no_bit(tmp_path, whole):
    recipe = recipe_in(tmp_path, model=str(whole), lr=1e-2, neftune_alpha=5.0)
    kept, _, _ = train(recipe)
    recomputed, _, _ = train(replace(recipe, out=recipe.out + "-kept", activation_checkpointing=True))
    assert (kept.is_gradient_checkpointing, recomputed.is_gradient_checkpointing) == (False, True)
    assert losses(recipe.out) == losses(recipe.out + "-kept")
    assert same_weights(loaded(f"{recipe.out}/model"), loaded(f"{recipe.out}-kept/model"))


def test_dropout_that_a_config_does_not_offer_is_refused_before_the_data_are_read(tmp_path, whole):
    recipe = recipe_in(tmp_path, model=str(whole), dropout=0.1)
    Path(recipe.data[0]).write_text("no JSON")
    with pytest.raises(ValueError, match="dropout: LlamaConfig offers none on the outputs of attention and FFN"):
        train(recipe)
