"""Adapters of PEFT around a patched head: fused with it where they are a sum, right where they are not."""

import copy
import warnings

import pytest
import torch

from sft_kernels.integrations import head_counts, patch, unpatch

from .models import BATCH, assert_alike, llama, of_the_model, outside, same_training, train, transformers

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's and transformers' own


def config(**options):
    fields = {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "lm_head"], "task_type": "CAUSAL_LM", **options}
    return peft.LoraConfig(**fields)


def adapted(base=None, **options):
    """A model with an adapter whose factors are both far from zero."""
    model = peft.get_peft_model(llama() if base is None else base, config(**options))
    return drawn(model)


def drawn(model):
    torch.manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.normal_(0, 0.2)
    return model


def two_adapters():
    model = peft.get_peft_model(llama(), config())
    model.add_adapter("second", config(r=2))
    model.base_model.set_adapter(["default", "second"])
    return drawn(model)


ON_THE_HEAD = {
    "adapter": (adapted, (6, 3, 0)),
    "nothing else trained": (lambda: adapted(target_modules=["lm_head"]), (6, 3, 0)),
    "dropout": (lambda: adapted(lora_dropout=0.3), (6, 3, 0)),
    "bias of the adapter": (lambda: adapted(lora_bias=True), (6, 3, 0)),
    "rank-stabilised": (lambda: adapted(use_rslora=True), (6, 3, 0)),
    "two adapters": (two_adapters, (9, 3, 0)),
    "tied": (lambda: adapted(llama(tie_word_embeddings=True)), (6, 3, 0)),
    "DoRA": (lambda: adapted(use_dora=True), (9, 0, 9)),
    "DoRA, dropout": (lambda: adapted(use_dora=True, lora_dropout=0.2), (9, 0, 9)),
    "elsewhere": (lambda: adapted(target_modules=["q_proj"]), (3, 3, 0)),
    "a copy of the head": (lambda: adapted(target_modules=["q_proj"], modules_to_save=["lm_head"]), (3, 3, 0)),
    "a copy of the tied head": (
        lambda: adapted(
            llama(tie_word_embeddings=True),
            target_modules=["q_proj"],
            modules_to_save=["lm_head"],
            ensure_weight_tying=True,
        ),
        (3, 3, 0),
    ),
    "trainable tokens": (lambda: adapted(target_modules=["q_proj"], trainable_token_indices=[1, 2]), (3, 3, 0)),
}


@pytest.mark.parametrize("name", ON_THE_HEAD)
def test_an_adapted_model_trains_as_it_does_unpatched(name):
    make, expect = ON_THE_HEAD[name]
    same_training(make(), expect=expect)


def test_a_loss_outside_reaches_both_factors_and_not_the_frozen_head():
    model = same_training(adapted(), outside, expect=(6, 3, 0))
    layer = model.get_output_embeddings()
    outside(model).backward()
    assert layer.base_layer.weight.grad is None
    assert layer.lora_A["default"].weight.grad.abs().min() > 0
    assert layer.lora_B["default"].weight.grad.abs().min() > 0


def test_fp32_adapters_on_a_bf16_head():
    model = adapted(llama().bfloat16())
    assert model.get_output_embeddings().lora_B["default"].weight.dtype == torch.float32
    same_training(model, expect=(6, 3, 0), rtol=0.05, atol=0.02)


def test_under_autocast():
    def loss(model):
        with torch.autocast("cpu", torch.bfloat16):
            return of_the_model(model)

    same_training(adapted(), loss, expect=(6, 3, 0), rtol=0.05, atol=0.02)


def test_trainable_tokens_of_a_tied_head_multiply_themselves_and_are_named():
    model = adapted(llama(tie_word_embeddings=True), target_modules=["q_proj"], trainable_token_indices=[1, 2])
    with pytest.warns(UserWarning, match=r"token_adapter\.base_layer was not called"):
        same_training(model, expect=(0, 0, 0))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_dora": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]},
    ],
    ids=str,
)
def test_patched_before_the_adapter_and_again_after(options):
    stock = adapted(**options)
    ours = adapted(patch(llama()), **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "patch:")
        assert_alike(train(ours), train(stock))
        patch(ours)
        assert_alike(train(ours), train(stock))
    if not options:
        assert head_counts(ours).fused == 3  # since the adapter is patched, too


def test_without_the_adapter_and_merged():
    stock = adapted()
    ours = patch(copy.deepcopy(stock))
    with stock.disable_adapter(), ours.disable_adapter():
        torch.testing.assert_close(ours(**BATCH).loss, stock(**BATCH).loss)
        ours.eval(), stock.eval()
        assert torch.equal(ours(**BATCH).logits, stock(**BATCH).logits)
        ours.train(), stock.train()
    ours.base_model.merge_adapter(), stock.base_model.merge_adapter()
    torch.testing.assert_close(ours(**BATCH).loss, stock(**BATCH).loss)
    ours.base_model.unmerge_adapter(), stock.base_model.unmerge_adapter()
    ours, stock = ours.merge_and_unload(), stock.merge_and_unload()
    for model in (ours, stock):
        model.requires_grad_(True)
    assert_alike(train(ours), train(stock))
    assert head_counts(ours).materialised == 0
    assert type(unpatch(ours).lm_head) is torch.nn.Linear


def test_saved_adapters_load_into_an_unpatched_model(tmp_path):
    model = patch(adapted())
    train(model)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(llama(), tmp_path)
    assert type(loaded.get_output_embeddings().base_layer) is torch.nn.Linear
    torch.testing.assert_close(loaded.state_dict(), model.state_dict())


def test_a_merged_model_is_saved_under_its_own_names(tmp_path):
    model = patch(adapted()).merge_and_unload()
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded.state_dict(), model.state_dict())
