import json

import pytest

from sft_kernels.cli import main, recipe_arguments


@pytest.fixture
def chats(tmp_path):
    path = tmp_path / "chats.jsonl"
    turns = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Two words."}]
    path.write_text((json.dumps({"messages": turns}) + "\n") * 12)
    return path


@pytest.mark.parametrize(("argv", "status"), [([], 2), (["fly"], 2), (["--help"], 0)])
def test_usage(argv, status, capsys):
    assert main(argv) == status
    assert "usage: sft-kernels" in "".join(capsys.readouterr())


def test_inspect_shows_shifted_labels_and_shares(chats, capsys):
    assert main(["inspect", str(chats), "--row-tokens", "64", "--show", "1"]) == 0
    said = capsys.readouterr().out
    lines = [line.split() for line in said.splitlines()]
    assert ["<|im_end|>", "·"] in [line[1:] for line in lines]  # nothing is predicted past the end of a turn
    assert any(line[-1:] == ["<|im_end|>"] for line in lines)  # and the end itself is
    assert "examples        12" in said
    assert "kept" in said
    assert "padding" in said
    assert "packing saves" in said


def test_inspect_names_a_bad_line(chats, capsys):
    chats.write_text(chats.read_text() + '{"messages": [\n')
    assert main(["inspect", str(chats)]) == 1
    assert f"{chats}:13: not JSON" in capsys.readouterr().err
    assert main(["inspect", str(chats), "--skip-bad"]) == 0
    assert "skipped 1 lines" in capsys.readouterr().out


def test_train_reads_yaml_and_the_command_line_overrides_it(chats, tmp_path, capsys):
    config = tmp_path / "config.json"
    shape = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    config.write_text(json.dumps({"model_type": "llama", **shape, **heads}))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {config}\ndata: [nowhere.jsonl]\nrow_tokens: 64\nsteps: 9\nlr: 2e-3\nwarmup: 0\nskip_bad: false\n"
        "tokenizer: null\n"
    )
    out = tmp_path / "run"
    argv = ["train", f"--config={recipe}", "--data", str(chats), "--steps", "2", "--out", str(out)]
    assert main(argv) == 0
    rows = [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert rows[0]["lr"] == 2e-3  # YAML 1.1 reads 2e-3 as a string
    assert (out / "model" / "model.safetensors").is_file()
    header = next(line for line in capsys.readouterr().out.splitlines() if "grad_norm" in line)
    assert header.split() == ["step", "loss", "lr", "grad_norm", "examples", "rows", "tokens", "kept"]
    assert main(argv) == 1
    assert "holds a run already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "reason"),
    [("learning_rate: 1", "unknown option 'learning_rate'"), ("- 1", "a mapping"), ("a: [", "not YAML")],
)
def test_a_recipe_that_makes_no_sense_is_named(text, reason, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=reason):
        recipe_arguments(path, {"lr"})


def test_train_without_data_says_so(capsys):
    assert main(["train"]) == 1
    assert "data: expected at least one JSONL file" in capsys.readouterr().err
