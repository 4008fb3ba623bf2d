"""Folders of models and tokenizers that are not what they should be."""

import json
import logging
import os
import pickle
import shutil
import struct
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sft_kernels.sft import files
from sft_kernels.sft.loading import check_recipe, load_config, load_model, load_tokenizer
from sft_kernels.sft.model import check_vocabulary
from sft_kernels.sft.recipe import Recipe

from .small import model_of, same_weights

ROOT = Path(__file__).resolve().parents[2]
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1234567\n"


def change(file, **values):
    settings = json.loads(file.read_text()) if file.exists() else {}
    settings |= values
    file.write_text(json.dumps({name: value for name, value in settings.items() if value is not ...}))


def refused(folder, trust=False):
    """The one line that refuses ``folder``; nothing else may be said."""

    def load():
        check_recipe(Recipe(data=["-"], model=str(folder), trust_remote_code=trust))
        load_tokenizer(str(folder), trust_remote_code=trust)
        load_model(str(folder), "cpu", trust)

    with pytest.raises((ValueError, OSError)) as caught:
        load()
    line = str(caught.value)
    assert line.isprintable()
    assert line.startswith(("model: ", "tokenizer: "))
    assert "trust_remote_code" not in line
    assert len(line) < 600
    return line


def test_a_whole_folder_is_loaded(folder, tokenizer):
    assert same_weights(load_model(folder, "cpu"), model_of(len(tokenizer)))
    assert load_tokenizer(folder).get_vocab() == tokenizer.get_vocab()
    recipe = check_recipe(Recipe(data=["-"], model=str(folder)))
    assert recipe.model == recipe.tokenizer == str(folder)


SETTINGS = ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json")
CONTENTS = {
    "a pointer": (POINTER, "git-lfs pointer"),
    "half": (b'{"a": ', "is not JSON"),
    "nothing": (b"", "empty"),
    "an array": (b"[1]", "an array"),
    "latin": (b'{"a": "\xe9"}', "not UTF-8"),
    "NaN": (b'{"a": NaN}', "NaN"),
    "a BOM": (b"\xef\xbb\xbf{}", "BOM"),
}


@pytest.mark.parametrize("name", [*SETTINGS, "tokenizer.json"])
@pytest.mark.parametrize("kind", CONTENTS)
def test_settings_that_cannot_be_read_are_named(name, kind, folder, capfd):
    content, reason = CONTENTS[kind]
    (folder / name).write_bytes(content)
    line = refused(folder)
    assert f"{folder / name} " in line
    assert reason in line
    assert not capfd.readouterr().err


def taken_away(file):
    file.unlink(missing_ok=True)
    file.mkdir()


def pipe(file):
    file.unlink(missing_ok=True)
    os.mkfifo(file)


def dangling(file):
    file.unlink(missing_ok=True)
    file.symlink_to(file.parent / "nowhere")


@pytest.mark.parametrize("name", [*SETTINGS, "tokenizer.json", "chat_template.jinja", "model.safetensors"])
@pytest.mark.parametrize("spoil", [taken_away, pipe, dangling])
def test_what_is_no_file_is_named(name, spoil, folder):
    spoil(folder / name)
    assert f"{folder / name} " in refused(folder)


def test_a_file_without_permission_is_named(folder, monkeypatch):
    real = os.open

    def opened(path, *args, **kwargs):
        if str(path).endswith("config.json"):
            raise PermissionError(13, "Permission denied", path)
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", opened)
    assert f"{folder / 'config.json'} cannot be read (Permission denied)" in refused(folder)


def test_infinity_in_a_config_is_read(folder):
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace("{", '{"time_step_limit": [0.0, Infinity],', 1))
    load_model(folder, "cpu")


WEIGHTS = {
    "a pointer": lambda whole: POINTER,
    "cut off": lambda whole: whole[:-5],
    "cut in its header": lambda whole: whole[:100],
    "too long": lambda whole: whole + b"x",
    "empty": lambda whole: b"",
    "a long header": lambda whole: struct.pack("<Q", 1 << 40) + whole[8:],
    "no header": lambda whole: struct.pack("<Q", 8) + b"no JSON!" + whole[16:],
    "a zip": lambda whole: b"PK\3\4" + bytes(100),
}


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("sharded", [False, True])
def test_weights_that_cannot_be_read_are_named(kind, sharded, folder, capfd):
    file = folder / "model.safetensors"
    if sharded:
        file = file.rename(folder / "model-00001-of-00001.safetensors")
        index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(file), file.name)}
        (folder / files.INDEX).write_text(json.dumps(index))
        load_model(folder, "cpu")
        capfd.readouterr()
    file.write_bytes(WEIGHTS[kind](file.read_bytes()))
    assert f"model: {file} " in refused(folder)
    assert not capfd.readouterr().err


@pytest.mark.parametrize(
    ("index", "reason"),
    [
        (b"[1]", "holds an array"),
        (POINTER, "git-lfs pointer"),
        (b'{"weight_map": {}}', "metadata"),
        (b'{"metadata": {}, "weight_map": {"a": 1}}', "no mapping"),
        (b'{"metadata": {}, "weight_map": {"a": "../whole/model.safetensors"}}', "no .safetensors file of the folder"),
        (b'{"metadata": {}, "weight_map": {"a": "/etc/passwd"}}', "no .safetensors file of the folder"),
        (b'{"metadata": {}, "weight_map": {"a": "x.py"}}', "no .safetensors file of the folder"),
        (b'{"metadata": {}, "weight_map": {"a": "b.safetensors"}}', r"b.safetensors is not there"),
    ],
)
def test_an_index_that_leads_nowhere_is_refused(index, reason, folder):
    (folder / "model.safetensors").unlink()
    (folder / files.INDEX).write_bytes(index)
    line = refused(folder)
    assert reason in line
    assert files.INDEX in line


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.complex64], ids=str)
def test_weights_of_other_types_are_refused(dtype, folder):
    file = folder / "model.safetensors"
    save_file({name: weight.to(dtype) for name, weight in load_file(file).items()}, file)
    assert "give weights in F32, F16 or BF16" in refused(folder)


class Runs:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("as_zip", [True, False])
def test_a_pickle_does_not_run(as_zip, folder, tmp_path):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    file = folder / "pytorch_model.bin"
    torch.save(weights, file, _use_new_zipfile_serialization=as_zip)
    load_model(folder, "cpu")  # plain tensors are read
    torch.save(weights | {"x": Runs(tmp_path / "it_ran")}, file, _use_new_zipfile_serialization=as_zip)
    assert f"{file} cannot be read as weights (it asks for posix.mkdir" in refused(folder)
    assert not (tmp_path / "it_ran").exists()


def test_a_pickle_of_another_version_is_one_line(folder, tmp_path, recwarn):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"x": Runs(tmp_path / "it_ran")}, protocol=4))
    assert "pytorch_model.bin cannot be read as weights" in refused(folder)
    assert not list(recwarn)
    assert not (tmp_path / "it_ran").exists()


@pytest.mark.parametrize("kind", ["zip", "pointer", "garbage", "cut", "nested"])
def test_a_pickle_that_is_no_checkpoint_is_named(kind, folder):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    file = folder / "pytorch_model.bin"
    torch.save({"state_dict": weights} if kind == "nested" else weights, file)
    if kind == "zip":
        with zipfile.ZipFile(file, "w") as made:
            made.writestr("a/b.txt", "x")
    elif kind != "nested":
        file.write_bytes({"pointer": POINTER, "garbage": b"hello", "cut": file.read_bytes()[:3000]}[kind])
    assert f"{file} " in refused(folder)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"model_type": "nope"}, "has no model_type 'nope'"),
        ({"model_type": ...}, "has no model_type"),
        ({"model_type": "vit"}, "vit is no causal LM"),
        ({"model_type": "bert"}, "bert is an encoder"),
        ({"model_type": "bart"}, "an encoder beside its decoder"),
        ({"hidden_size": 0}, "a weight without a number"),
        ({"hidden_size": -2}, "negative"),
        ({"hidden_size": "16"}, "expected int"),
        ({"hidden_size": 10**9}, "of memory"),
        ({"hidden_size": 10**25}, "Overflow"),
        ({"vocab_size": 10**12}, "of memory"),
        ({"num_hidden_layers": 10**9}, "more than any model has"),
        ({"num_hidden_layers": 0}, "at least 1"),
        ({"num_labels": 10**9}, "more than any model has"),
        ({"num_attention_heads": 3}, "not a multiple"),
        ({"num_attention_heads": 0}, "0"),
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, "no multiple"),
        ({"hidden_act": "nope"}, "nope"),
        ({"dtype": "float99"}, "float99"),
        ({"rope_parameters": {"rope_type": "nope", "rope_theta": 1e4}}, "nope"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantized weights are not supported"),
        ({"attn_implementation": "owner/kernel"}, "code from the hub (owner/kernel)"),
        ({"_attn_implementation": {"": "owner/kernel"}}, "code from the hub (owner/kernel)"),
        ({"experts_implementation": "owner/kernel"}, "code from the hub (owner/kernel)"),
        ({"transformers_weights": "../x"}, "transformers_weights"),
    ],
    ids=str,
)
def test_a_config_that_makes_no_model_is_named(values, reason, folder, capfd):
    change(folder / "config.json", **values)
    line = refused(folder)
    assert str(folder / "config.json") in line
    assert reason in line
    assert not capfd.readouterr().err


def test_a_bare_config_is_refused_alike_and_leaves_the_seed(folder, tmp_path):
    bare = tmp_path / "bare.json"
    shutil.copy(folder / "config.json", bare)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    load_config(bare)
    assert torch.rand(2).equal(expected)
    change(bare, hidden_size=10**9)
    with pytest.raises(ValueError, match=rf"^model: {bare} asks for .* GiB of weights"):
        check_recipe(Recipe(data=["-"], model=str(bare)))


def test_weights_of_another_shape_name_file_and_weight(folder, capfd):
    change(folder / "config.json", intermediate_size=48)
    line = refused(folder)
    assert str(folder / "model.safetensors") in line
    assert "do not fit config.json: model.layers.0.mlp." in line
    assert not capfd.readouterr().err


def test_what_transformers_says_comes_only_of_a_folder_that_is_loaded(folder):
    said, logger = [], logging.getLogger("transformers")
    listener = logging.Handler()
    listener.emit = lambda record: said.append(record.getMessage())
    logger.addHandler(listener)
    try:
        weights = load_file(folder / "model.safetensors")
        save_file(weights | {"model.more.weight": torch.ones(2)}, folder / "model.safetensors", {"format": "pt"})
        change(folder / "config.json", intermediate_size=48)
        refused(folder)
        assert not said
        change(folder / "config.json", intermediate_size=32)
        load_model(folder, "cpu")
        assert any("model.more.weight" in text for text in said)
    finally:
        logger.removeHandler(listener)


@pytest.mark.parametrize(
    ("file", "values"),
    [
        ("generation_config.json", {"max_new_tokens": "x"}),
        ("generation_config.json", {"watermarking_config": {"a": 1}}),
        ("tokenizer_config.json", {"eos_token": 5}),
        ("tokenizer_config.json", {"tokenizer_class": 5}),
        ("tokenizer_config.json", {"auto_map": 5}),
        ("tokenizer_config.json", {"chat_template": 5}),
        ("tokenizer_config.json", {"chat_template": [{"name": "default", "template": 5}]}),
        ("tokenizer.json", {"model": {"type": "Nope"}}),
        ("tokenizer.json", {"model": ...}),
        ("config.json", {"auto_map": 5}),
    ],
    ids=str,
)
def test_values_that_a_library_refuses_name_their_file(file, values, folder):
    change(folder / file, **values)
    assert str(folder / file) in refused(folder)


def test_a_folder_that_lacks_something_says_so(folder):
    shutil.copy(folder / "tokenizer.json", folder.parent)
    (folder / "tokenizer.json").unlink()
    assert "holds no tokenizer files" in refused(folder)
    shutil.copy(folder.parent / "tokenizer.json", folder)
    (folder / "model.safetensors").unlink()
    assert "holds no weights" in refused(folder)
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/base"}')
    assert "holds an adapter (adapter_config.json)" in refused(folder)
    (folder / "config.json").unlink()
    assert "holds an adapter (adapter_config.json)" in refused(folder)


# Code


def with_code(folder, argument):
    """``folder`` with Python that leaves a mark; returns the mark."""
    mark = folder.parent / "it_ran"
    file = folder / f"inside_{argument}.py"
    if argument == "tokenizer":
        file.write_text(
            f"open({str(mark)!r}, 'w').close()\nfrom transformers import PreTrainedTokenizerFast\n"
            "class InsideTokenizer(PreTrainedTokenizerFast): pass\n"
        )
        names = {"AutoTokenizer": [None, f"{file.stem}.InsideTokenizer"]}
        change(folder / "tokenizer_config.json", tokenizer_class="InsideTokenizer", auto_map=names)
    else:
        file.write_text(
            f"open({str(mark)!r}, 'w').close()\nfrom transformers import LlamaConfig, LlamaForCausalLM\n"
            "class InsideConfig(LlamaConfig): model_type = 'inside'\n"
            "class InsideForCausalLM(LlamaForCausalLM): config_class = InsideConfig\n"
        )
        names = {"AutoConfig": f"{file.stem}.InsideConfig", "AutoModelForCausalLM": f"{file.stem}.InsideForCausalLM"}
        change(folder / "config.json", model_type="inside", auto_map=names)
    return mark


@pytest.mark.parametrize("argument", ["tokenizer", "model"])
def test_code_runs_only_if_it_is_trusted(argument, folder, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", sys.path[:])
    mark = with_code(folder, argument)
    line = refused(folder)
    assert f"{argument}: {folder} " in line
    assert f"({folder / f'inside_{argument}.py'})" in line
    assert "--trust-remote-code" in line
    assert not mark.exists()
    if argument == "tokenizer":
        assert type(load_tokenizer(folder, trust_remote_code=True)).__name__ == "InsideTokenizer"
    else:
        loaded = load_model(folder, "cpu", trust_remote_code=True)
        assert type(loaded).__name__ == "InsideForCausalLM"
        assert same_weights(loaded, model_of(len(tokenizer)))
    assert mark.exists()


def test_code_is_passed_over_where_transformers_has_a_class(folder, capsys):
    mark = with_code(folder, "model")
    change(folder / "config.json", model_type="llama")
    load_model(folder, "cpu")
    assert "inside_model.py does not run; transformers' LlamaForCausalLM takes its place" in capsys.readouterr().out
    assert not mark.exists()


@pytest.mark.parametrize("trust", [False, True])
def test_code_on_the_hub_or_nowhere_is_refused(trust, folder):
    change(folder / "config.json", model_type="inside", auto_map={"AutoConfig": "owner/code--inside.InsideConfig"})
    assert "owner/code--inside" in refused(folder, trust)
    change(folder / "config.json", model_type="inside", auto_map={"AutoConfig": "inside.InsideConfig"})
    assert f"{folder / 'inside.py'}" in refused(folder, trust)


def test_code_for_generation_is_refused(folder):
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text("def generate(*a, **k): pass")
    line = refused(folder)
    assert str(folder / "custom_generate" / "generate.py") in line
    assert "--trust-remote-code" in line


# Chat templates


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "No such file"), ("folder", "Is a directory"), (b"\xe9", "not UTF-8"), (b" \n", "is empty"),
     (POINTER, "git-lfs pointer"), (b"x" * (1 << 20) + b"x", "longer than 1 MiB"), ("pipe", "is empty")],
    ids=["none", "folder", "latin", "empty", "pointer", "long", "pipe"],
)  # fmt: skip
def test_a_chat_template_that_cannot_be_read_is_named(content, reason, folder, tmp_path):
    path = tmp_path / "template.jinja"
    if content == "folder":
        path.mkdir()
    elif content == "pipe":
        os.mkfifo(path)  # nobody writes to it
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^chat_template: {path} .*{reason}"):
        load_tokenizer(folder, chat_template=path)
    if content == "pipe":  # which could be read only once
        return
    with pytest.raises(ValueError, match=r"^chat_template: "):
        check_recipe(Recipe(data=["-"], model=str(folder), chat_template=str(path)))


def test_a_token_beyond_the_embeddings_is_named(folder):
    tokens = json.loads((folder / "tokenizer.json").read_text())
    tokens["model"]["vocab"]["~"] = 99_999
    (folder / "tokenizer.json").write_text(json.dumps(tokens))
    with pytest.raises(ValueError, match=r"^tokenizer: '~' has the number 99999, the model embeds \d+ tokens"):
        check_vocabulary(load_model(folder, "cpu"), load_tokenizer(folder))
