"""PEFT models in the trainer: adapters train and load again, or one sentence says why not."""

import os

import pytest
import torch

from sft_kernels.sft import model as models
from sft_kernels.sft.recipe import Recipe
from sft_kernels.sft.stock import NotStock, batch_to_check, check_against_stock
from sft_kernels.sft.train import train

from .conftest import chat
from .test_stock import PHI3, of_length

peft = pytest.importorskip("peft")


def lora(**options):
    return peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", **options})


@pytest.fixture
def recipe(write_jsonl, tmp_path):
    rows = [chat("How many? " + "red " * (i % 7), "word " * (1 + i % 11)) for i in range(20)]
    return Recipe(
        data=[str(write_jsonl(*rows))],
        out=str(tmp_path / "run"),
        row_tokens=128,
        lr=1e-2,
        steps=2,
        precision="fp32",
        holdout=0.2,
    )


TRAINS = {
    "LoRA": lora(),
    "LoRA with dropout": lora(lora_dropout=0.1),
    "without a task": lora(task_type=None),
    "DoRA": lora(use_dora=True),
    "on embeddings": lora(target_modules=["q_proj", "embed_tokens"]),
    "a head of its own": lora(modules_to_save=["lm_head"]),
    "IA3": peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("name", TRAINS)
def test_adapters_train_and_load_again(name, recipe, small_model, tokenizer):
    model = peft.get_peft_model(small_model(), TRAINS[name])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    _, _, log = train(recipe, model=model, tokenizer=tokenizer)
    assert [row["step"] for row in log.history if "eval" in row] == [0, 2]
    for parameter, p in model.named_parameters():
        assert p.requires_grad or p.equal(before[parameter]), parameter
    changed = [parameter for parameter, p in model.named_parameters() if not p.equal(before[parameter])]
    assert {parameter for parameter, p in model.named_parameters() if p.requires_grad} == set(changed)
    folder = f"{recipe.out}/model"
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= set(os.listdir(folder))
    loaded = peft.PeftModel.from_pretrained(small_model(), folder)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        expected, found = (m.eval()(input_ids=ids, use_cache=False).logits for m in (model, loaded))
    assert found.equal(expected)
    assert model.config._attn_implementation == "sft_kernels"
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end in type(model.generation_config).from_pretrained(folder).eos_token_id


def test_the_first_loss_and_the_gradients_are_those_of_the_merged_model(small_model):
    model = peft.get_peft_model(small_model("phi3", **PHI3), lora(target_modules=["qkv_proj", "down_proj"]))
    for name, p in model.named_parameters():
        if "lora_B" in name:  # they start at zero
            torch.nn.init.normal_(p, std=0.1)
    batch = batch_to_check(model, [of_length(n) for n in (10, 30, 90)], 200, pad_id=0)
    check_against_stock(model, batch)
    with torch.no_grad():
        hidden = models.hidden_states(model, batch)
        merged = models.hidden_states(model.merge_and_unload(), batch)
    torch.testing.assert_close(hidden, merged, rtol=1e-4, atol=1e-4)


REFUSED = {
    "head": (lora(target_modules=["q_proj", "lm_head"]), "an adapter on the head is not supported.*modules_to_save"),
    "prompt tuning": (
        peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
        "PROMPT_TUNING puts tokens of its own before a row",
    ),
    "prefix tuning": (
        peft.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
        "PREFIX_TUNING puts tokens of its own before a row",
    ),
    "activated LoRA": (lora(alora_invocation_tokens=[5, 6]), "aLoRA looks at the whole row"),
    "nothing to train": (lora(inference_mode=True), "no parameter requires a gradient"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_adapters_are_refused_in_a_sentence_before_data_is_read(name, recipe, small_model, tokenizer):
    config, message = REFUSED[name]
    recipe.data = ["nowhere.jsonl"]
    with pytest.raises(ValueError, match=message):
        train(recipe, model=peft.get_peft_model(small_model(), config), tokenizer=tokenizer)


def test_adapters_of_several_kinds_and_tied_tokens_are_refused(recipe, small_model, tokenizer):
    with pytest.raises(ValueError, match="PeftMixedModel cannot be saved"):
        train(recipe, model=peft.get_peft_model(small_model(), lora(), mixed=True), tokenizer=tokenizer)
    model = peft.get_peft_model(small_model(tie_word_embeddings=True), lora(trainable_token_indices=[3, 4]))
    with pytest.raises(ValueError, match="an adapter on the head"):
        train(recipe, model=model, tokenizer=tokenizer)
    assert not os.path.exists(recipe.out)


def test_whatever_peft_adds_around_the_layers_is_found_out(recipe, small_model, tokenizer):
    model = peft.get_peft_model(small_model(), lora())
    inner = model.base_model.forward

    def louder(*args, **options):
        output = inner(*args, **options)
        output.logits = output.logits * 1.01
        return output

    model.base_model.forward = louder
    with pytest.raises(NotStock, match="does something else to its logits"):
        train(recipe, model=model, tokenizer=tokenizer)


def test_adapters_of_a_model_without_generation_config_are_saved(recipe, tokenizer, small_model):
    model = small_model()
    model.generation_config = None
    train(recipe, model=peft.get_peft_model(model, lora()), tokenizer=tokenizer)
    assert os.path.isfile(os.path.join(recipe.out, "model", "adapter_model.safetensors"))


def test_a_head_of_its_own_is_left_out_where_peft_leaves_it_out(small_model):
    model = peft.get_peft_model(small_model(), lora(modules_to_save=["lm_head"]))
    layer = model.get_base_model().lm_head
    assert models.head(model)["linear_weight"] is layer.modules_to_save["default"].weight
    with model.disable_adapter():
        assert models.head(model)["linear_weight"] is layer.original_module.weight
    assert models.head(model)["linear_weight"] is layer.modules_to_save["default"].weight
