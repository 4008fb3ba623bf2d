import json
import os
import re

import pytest

from sft_kernels.cli import main


@pytest.fixture
def chats(tmp_path):
    path = tmp_path / "chats.jsonl"
    turns = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Two words."}]
    path.write_text((json.dumps({"messages": turns}) + "\n") * 12)
    return path


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.json"
    shape = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    path.write_text(json.dumps({"model_type": "llama", **shape, **heads}))
    return path


@pytest.fixture
def piped():
    """The path of a pipe that holds a text."""
    ends = []

    def make(text):
        read, write = os.pipe()
        os.write(write, text.encode())
        os.close(write)
        ends.append(read)
        return f"/dev/fd/{read}"

    yield make
    for end in ends:
        os.close(end)


@pytest.mark.parametrize(("argv", "status"), [([], 2), (["fly"], 2), (["--help"], 0)])
def test_usage(argv, status, capsys):
    assert main(argv) == status
    assert "usage: sft-kernels" in "".join(capsys.readouterr())


def test_inspect_shows_shifted_labels_and_shares(chats, capsys):
    assert main(["inspect", str(chats), "--row-tokens", "64", "--show", "1"]) == 0
    said = capsys.readouterr().out
    lines = [line.split() for line in said.splitlines()]
    assert ["<|im_end|>", r"\n", "·"] in [line[1:] for line in lines]  # nothing is predicted past the end of a turn
    assert any(line[-2:] == ["<|im_end|>", "<|im_end|>"] for line in lines)  # and the end itself is
    assert "examples        12" in said
    assert "kept" in said
    assert "padding" in said
    assert "packing needs" in said  # more than one short batch
    assert "end of turn     trained in 12 of 12 turns" in said
    assert "ok      one shift: " in said


def test_inspect_names_a_bad_line(chats, capsys):
    chats.write_text(chats.read_text() + '{"messages": [\n')
    assert main(["inspect", str(chats)]) == 1
    assert f"{chats}:13: not JSON" in capsys.readouterr().err
    assert main(["inspect", str(chats), "--skip-bad"]) == 0
    assert "skipped 1 lines" in capsys.readouterr().out


def test_train_reads_yaml_and_the_command_line_overrides_it(chats, config, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {config}\ndata: [nowhere.jsonl]\nrow_tokens: 64\nsteps: 9\nlr: 2e-3\nwarmup: 0\nskip_bad: false\n"
        "tokenizer: null\n"
    )
    out = tmp_path / "run"
    argv = ["train", f"--config={recipe}", "--data", str(chats), "--steps", "2", "--out", str(out)]
    assert main(argv) == 0
    rows = [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2]
    assert rows[0]["lr"] == 2e-3  # YAML 1.1 reads 2e-3 as a string
    assert (out / "model" / "model.safetensors").is_file()
    header = next(line for line in capsys.readouterr().out.splitlines() if "grad_norm" in line)
    counts = ["examples", "rows", "tokens", "padding", "kept"]
    assert header.split() == ["step", "loss", "lr", "grad_norm", *counts, "kept/s", "left"]
    assert main(argv) == 1
    assert "holds a run already" in capsys.readouterr().err


def test_train_without_data_says_so(capsys):
    assert main(["train"]) == 1
    assert "data: expected at least one JSONL file" in capsys.readouterr().err


def test_a_pipe_feeds_the_tokenizer_and_the_run(chats, config, piped, tmp_path, capsys):
    path = piped(chats.read_text())
    assert main(["inspect", path]) == 0
    assert "examples        12" in capsys.readouterr().out
    options = ["--model", str(config), "--row-tokens", "64", "--steps", "1", "--skip-bad"]
    path, eval_path = piped("{\n" + chats.read_text()), piped(chats.read_text())
    argv = ["train", *options, "--eval-data", eval_path, "--data", path]
    assert main([*argv, "--out", str(tmp_path / "a")]) == 0
    assert f"skipped {path}:1: not JSON" in capsys.readouterr().out
    assert main([*argv[:-1], eval_path, "--out", str(tmp_path / "b")]) == 1
    assert "a pipe can be read only once" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_standard_input_is_read(chats, piped, capfd):
    kept = os.dup(0)
    try:
        for name in ("-", "/dev/stdin"):
            end = os.open(piped(chats.read_text() + "[\n"), os.O_RDONLY)
            os.dup2(end, 0)
            os.close(end)
            assert main(["inspect", name, "--skip-bad"]) == 0
            said = capfd.readouterr().out
            assert "examples        12" in said
            assert "skipped /dev/stdin:13: not JSON" in said
    finally:
        os.dup2(kept, 0)
        os.close(kept)


TOO_LONG = {"role": "user", "content": "word " * 300}
ANSWER = {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ([{"turns": ["a"]}] * 3, ":1: expected an object"),
        ([{"messages": [TOO_LONG, ANSWER]}] * 3, r":1: \d+ tokens, longer than the row of 64"),
        ([{"text": "prose"}] * 3, ":1: .*no assistant turn"),
        (["{", {"text": "prose"}, "{"], ":1: not JSON"),
    ],
    ids=["bad lines", "too long", "refused by the encoder", "both"],
)
def test_the_first_reason_is_told_if_nothing_is_left(lines, reason, chats, config, tmp_path, capsys):
    path = tmp_path / "bad.jsonl"
    path.write_text("".join(f"{x if isinstance(x, str) else json.dumps(x)}\n" for x in lines))
    options, out = ["--row-tokens", "64", "--skip-bad"], str(tmp_path / "run")
    runs = [["inspect", str(path), *options]]
    train = ["train", "--model", str(config), *options, "--steps", "1", "--out", out]
    runs += [[*train, "--data", str(path)]]
    runs += [[*train, "--data", str(chats), "--eval-data", str(path)]]
    for argv in runs:
        assert main(argv) == 1
        (said,) = capsys.readouterr().err.splitlines()
        assert re.search(rf"refused 3 lines, the first: {re.escape(str(path))}{reason}", said), said
        assert main([option for option in argv if option != "--skip-bad"]) == 1
        (said,) = capsys.readouterr().err.splitlines()
        assert re.match(rf"sft-kernels: {re.escape(str(path))}{reason}", said), said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["nowhere.jsonl", "", "a\0b"])
def test_data_that_cannot_be_opened_are_named(name, config, tmp_path, capsys):
    argv = ["train", "--model", str(config), "--data", name, "--out", str(tmp_path / "run")]
    assert main(argv) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("columns", ["1", "5", "0", "x", None])
def test_help_in_a_narrow_terminal(columns, monkeypatch, capsys):
    if columns is None:
        monkeypatch.delenv("COLUMNS", raising=False)
        monkeypatch.setattr(os, "get_terminal_size", lambda *_: os.terminal_size((3, 3)))
    else:
        monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(SystemExit):
        main(["demo", "--help"])
    assert "--held-out" in capsys.readouterr().out
    assert os.environ.get("COLUMNS") == columns
