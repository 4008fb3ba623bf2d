"""Dropout of a model that is loaded: where it acts, what is off, and what is saved. And how its weights lie."""

import json
from dataclasses import dataclass, replace

import pytest
import torch

from sft_kernels.sft import dropout as dropouts
from sft_kernels.sft import model as models
from sft_kernels.sft.loading import check_recipe, load_model
from sft_kernels.sft.masking import Example
from sft_kernels.sft.packing import collate
from sft_kernels.sft.train import train

from .small import Recipe, recipe_in

V = 40
TEXT = {
    "vocab_size": V,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# Kinds, with the dropout that their config asks for: some by default.
ASKED = {
    "gpt2": {"attn_pdrop": 0.1, "embd_pdrop": 0.1, "resid_pdrop": 0.1},
    "phi": {"attention_dropout": 0.2, "embd_pdrop": 0.1},
    "gpt_neox": {"attention_dropout": 0.2},
    "opt": {"dropout": 0.1, "attention_dropout": 0.2, "layerdrop": 0.9},
    "fuyu": {"text_config.attention_dropout": 0.2, "text_config.hidden_dropout": 0.1},
}
OUTPUTS = {
    "gpt2": {"resid_dropout", "dropout"},
    "phi": {"resid_dropout"},
    "gpt_neox": {"post_attention_dropout", "post_mlp_dropout", "emb_dropout"},
    "fuyu": {"dropout"},
}


def config_of(kind, **options):
    import transformers

    asked = {name: share for name, share in ASKED.get(kind, {}).items() if "." not in name}
    text = {**TEXT, **asked, **options}
    if kind == "opt":
        text |= {"ffn_dim": 24, "word_embed_proj_dim": 16}
    if kind == "fuyu":
        inside = {name.removeprefix("text_config."): share for name, share in ASKED["fuyu"].items()}
        inside = {**TEXT, **inside, "model_type": "persimmon"}
        return transformers.FuyuConfig(**TEXT, text_config=inside, patch_size=2, image_size=4)
    return transformers.AutoConfig.for_model(kind, **text)


@pytest.fixture
def folder_of(tmp_path):
    """A folder with a model of a kind, as somebody else saved it."""
    import transformers

    def make(kind, **options):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config_of(kind, **options), dtype=torch.float32)
        model.save_pretrained(tmp_path / kind)
        return tmp_path / kind

    return make


def example(length, seed):
    ids = torch.randint(3, V, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Example(ids, [-100, *ids[1:]], "chats.jsonl:1")


BATCH = collate([[example(9, 0), example(6, 1)]], 18, 0)


def forward(model):
    """The packed forward as the trainer computes it."""
    with models.boundaries_given(model):
        return models.hidden_states(model, BATCH).detach()


def listed_in(printed):
    """The shares in the one line that is printed."""
    (line,) = printed.splitlines()
    start, _, listed = line.partition(" is off: ")
    assert start == "model: dropout that its config asks for"
    return {name: float(share) for name, _, share in (part.partition("=") for part in listed.split(", "))}


@pytest.mark.parametrize("kind", ASKED)
def test_by_default_all_dropout_is_off_and_a_line_says_so(kind, folder_of, capsys):
    model = load_model(folder_of(kind), "cpu").train()
    assert forward(model).equal(forward(model))
    assert all(module.p == 0 for module in model.modules() if isinstance(module, torch.nn.Dropout))
    assert listed_in(capsys.readouterr().out) == ASKED[kind]


@pytest.mark.parametrize("kind", ASKED)
def test_it_acts_on_the_outputs_alone_and_in_training_alone(kind, folder_of, capsys):
    model = load_model(folder_of(kind), "cpu", dropout=0.3).train()
    assert not forward(model).equal(forward(model))
    found = {name.rpartition(".")[2] for name, m in model.named_modules() if getattr(m, "p", 0) == 0.3}
    assert found == OUTPUTS.get(kind, set())  # OPT's is no module
    assert all(m.p in (0, 0.3) for m in model.modules() if isinstance(m, torch.nn.Dropout))
    model.eval()
    assert forward(model).equal(forward(model))
    set_now = dropouts.outputs_of(config_of(kind))
    expected = {name: share for name, share in ASKED[kind].items() if name.rpartition(".")[2] not in set_now}
    assert listed_in(capsys.readouterr().out) == expected


def test_a_model_without_dropout_is_loaded_without_a_line(folder_of, capsys):
    load_model(folder_of("llama"), "cpu")
    assert "dropout" not in capsys.readouterr().out


def test_weights_of_attention_of_a_model_without_other_dropout(folder_of, capsys):
    model = load_model(folder_of("llama", attention_dropout=0.2), "cpu").train()
    assert "is off: attention_dropout=0.2" in capsys.readouterr().out
    assert forward(model).equal(forward(model))


@dataclass
class WithDropout(Recipe):
    dropout: float = 0.0


REFUSED = r"^dropout: LlamaConfig offers none on the outputs of attention and FFN"


def test_a_model_that_offers_none_is_refused_before_data_are_read(folder_of, tmp_path):
    folder = folder_of("llama")
    with pytest.raises(ValueError, match=REFUSED):
        load_model(folder, "cpu", dropout=0.1)
    data = tmp_path / "bad.jsonl"
    data.write_text("no JSON")
    recipe = WithDropout(data=[str(data)], model=str(folder), tokenizer=None, dropout=0.1)
    with pytest.raises(ValueError, match=REFUSED):
        check_recipe(recipe, tokenizer_given=True)
    check_recipe(replace(recipe, dropout=0.0), tokenizer_given=True)
    check_recipe(replace(recipe, model=str(folder_of("gpt2"))), tokenizer_given=True)
    with pytest.raises(ValueError, match=r"^dropout: is for a model that is loaded"):
        check_recipe(recipe, model_given=True, tokenizer_given=True)


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_a_share_is_from_0_to_1(share, folder_of):
    with pytest.raises(ValueError, match=r"^dropout: expected a share from 0 to 1"):
        load_model(folder_of("gpt2"), "cpu", dropout=share)


NAMES = {
    "gpt2": ["resid_pdrop"], "phi3": ["resid_pdrop"], "gpt_neo": ["resid_dropout"], "stablelm": ["hidden_dropout"],
    "opt": ["dropout"], "bert": ["hidden_dropout_prob"], "seed_oss": ["residual_dropout"], "fuyu": ["hidden_dropout"],
    "llama": [], "gemma2": [], "mllama": [], "modernbert-decoder": [], "gemma3": [],
}  # fmt: skip


@pytest.mark.parametrize("kind", NAMES)
def test_names_of_dropout_on_outputs(kind):
    import transformers

    assert dropouts.outputs_of(transformers.AutoConfig.for_model(kind)) == NAMES[kind]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kind", ASKED)
def test_the_saved_config_asks_for_what_the_folders_did(kind, dropout, folder_of, tmp_path):
    folder = folder_of(kind)
    model = load_model(folder, "cpu", dropout=dropout)
    before = model.config.to_dict()
    models.save_model(model, tmp_path / "saved")
    assert model.config.to_dict() == before
    texts = [(path / "config.json").read_text() for path in (folder, tmp_path / "saved")]
    assert json.loads(texts[1]) == json.loads(texts[0])
    assert all(f'"{name.rpartition(".")[2]}": {share}' in texts[1] for name, share in ASKED[kind].items())


def test_a_model_that_was_not_loaded_is_saved_as_it_is(tmp_path):
    import transformers

    model = transformers.AutoModelForCausalLM.from_config(config_of("gpt2", resid_pdrop=0.4))
    models.save_model(model, tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["resid_pdrop"] == 0.4


def test_a_run_on_gpt2_leaves_its_config(tokenizer, tmp_path):
    """Its attention has dropout of its weights, which packed attention does not compute."""
    file = tmp_path / "gpt2.json"
    file.write_text(config_of("gpt2", vocab_size=len(tokenizer)).to_json_string(use_diff=False))
    recipe = replace(recipe_in(tmp_path), model=str(file), steps=2)
    model, *_ = train(recipe, tokenizer=tokenizer)
    saved = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert {name: saved[name] for name in ASKED["gpt2"]} == ASKED["gpt2"]
    assert model.config.attn_pdrop == 0


# ---- memory and dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_weights_lie_in_aligned_memory_of_their_own(kind, tied, dtype, folder_of, tmp_path):
    import transformers

    folder = folder_of(kind, tie_word_embeddings=tied)
    model = load_model(folder, "cpu", dtype=dtype)
    tensors = [*model.parameters(), *model.buffers()]
    for tensor in tensors:
        assert tensor.data_ptr() % 64 == 0
        assert tensor.storage_offset() == 0
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    assert len({tensor.data_ptr() for tensor in tensors}) == len(tensors)
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    stock = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    for found, expected in zip(tensors, [*stock.parameters(), *stock.buffers()], strict=True):
        assert found.dtype == expected.dtype
        assert found.equal(expected)
    for name, buffer in model.named_buffers():
        if "inv_freq" in name:
            assert buffer.dtype == torch.float32


def test_a_config_gives_weights_of_the_dtype_asked_for(tmp_path):
    file = tmp_path / "llama.json"
    file.write_text(config_of("llama").to_json_string())
    model = load_model(file, "cpu", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_the_memory_asked_for_is_that_of_the_dtype(folder_of, monkeypatch):
    from sft_kernels.sft import files

    folder = folder_of("llama")
    numbers = sum(p.numel() for p in load_model(folder, "cpu").parameters())
    monkeypatch.setattr(files, "memory", lambda: 3 * numbers)
    load_model(folder, "cpu", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"GiB of weights in torch\.float32; this machine has"):
        load_model(folder, "cpu")
