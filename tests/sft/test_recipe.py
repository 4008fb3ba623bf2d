import json
import os
import threading
from dataclasses import asdict

import pytest

from sft_kernels.cli import main
from sft_kernels.sft.recipe import Recipe, check
from sft_kernels.sft.recipe_file import from_yaml


@pytest.fixture
def written(tmp_path):
    def write(text):
        path = tmp_path / "recipe.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def test_values_have_the_types_of_their_options(written):
    path = written(
        "lr: 2e-3\nsteps: 9\nepochs: 2\nskip_bad: yes\nmask: all\ntokenizer: null\n"
        "data: [a.jsonl, --out]\neval_data: b.jsonl\n"
    )
    expected = Recipe(lr=2e-3, steps=9, epochs=2.0, skip_bad=True, mask="all")
    expected.data, expected.eval_data = ["a.jsonl", "--out"], ["b.jsonl"]
    assert from_yaml(path) == expected  # YAML 1.1 reads 2e-3 as a string
    assert from_yaml(written("")) == Recipe()
    assert from_yaml(written(b"\xef\xbb\xbfsteps: 10.0")).steps == 10
    assert from_yaml(written("steps: 010\nlr: .5\nout: 2024-01-31\nmodel: 1:30")) == Recipe(
        steps=10, lr=0.5, out="2024-01-31", model="1:30"
    )


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("dropout", "0.1", "a number, got '0.1'"),
        ("neftune_alpha", True, "a number, got True"),
        ("lr", None, "a number, got None"),
        ("eval_every", 1.5, "an integer, got 1.5"),
        ("max_skips", "3", "an integer, got '3'"),
        ("steps", True, "an integer, got True"),
        ("keep", None, "an integer, got None"),
        ("activation_checkpointing", "no", "true or false, got 'no'"),
        ("resume", 1, "true or false, got 1"),
        ("eval_data", "held_out.jsonl", "a list of files, got 'held_out.jsonl'"),
        ("data", [3], r"a list of files, got \[3\]"),
        ("init_from", 3, "text, got 3"),
        ("metric", len, "text, got <built-in"),
        ("precision", None, "one of auto, fp32, bf16, got None"),
    ],
    ids=str,
)
def test_in_python_a_value_of_another_type_is_refused_by_name(name, value, expected):
    with pytest.raises(ValueError, match=f"^{name}: expected {expected}"):
        check(Recipe(**{"data": ["chats.jsonl"], "model": "m", name: value}))


def test_paths_and_tuples_are_kept_as_a_checkpoint_has_them(tmp_path):
    recipe = Recipe(data=(tmp_path / "a", "b"), model=tmp_path, out=tmp_path / "run", lr=1, steps=3)
    check(recipe)
    assert recipe == Recipe(data=[f"{tmp_path}/a", "b"], model=str(tmp_path), out=f"{tmp_path}/run", lr=1, steps=3)
    assert json.loads(json.dumps(asdict(recipe))) == asdict(recipe)


@pytest.mark.parametrize("name", ["steps", "row_tokens", "accumulate", "eval_every", "log_every"])
def test_an_integer_beyond_64_bits_is_refused(name, capsys):
    assert main(["train", "--model", "m", "--data", "d", f"--{name.replace('_', '-')}", "1" + "0" * 400]) == 1
    assert capsys.readouterr().err == f"sft-kernels: {name}: expected at most 2⁶³ − 1\n"


@pytest.mark.parametrize("command", [["train", "--model", "m", "--data"], ["inspect"]])
def test_a_row_that_no_memory_holds_is_refused(command, capsys):
    for number in (0, 1_000_000_000):
        assert main([*command, "chats.jsonl", "--row-tokens", str(number)]) == 1
        assert capsys.readouterr().err == f"sft-kernels: row_tokens: expected from 1 to 16777216, got {number}\n"


def test_a_recipe_is_one_file(written, capsys):
    path = str(written("steps: 1"))
    for argv, reason in (
        (["--config", path, f"--config={path}"], "expected one file, got two"),
        (["--config="], "expected a file"),
        (["--config"], "expected a file"),
    ):
        assert main(["train", *argv]) == 1
        assert capsys.readouterr().err == f"sft-kernels: --config: {reason}\n"


def test_a_pipe_that_nobody_writes_to_is_an_empty_recipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert from_yaml(tmp_path / "pipe") == Recipe()
    read, write = os.pipe()
    with open(write, "w") as file:
        threading.Timer(0.2, lambda: (file.write("steps: 7"), file.close())).start()
        assert from_yaml(f"/dev/fd/{read}").steps == 7
    os.close(read)


BOMB = "data: &a [x]\n" + "".join(f"k{i}: &b{i} [*{'a' if not i else f'b{i - 1}'}, *a]\n" for i in range(40))
MERGES = "a: &a {x: 1}\n" + "".join(f"b{i}: &a {{<<: [*a, *a]}}\n" for i in range(60))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("learning_rate: 1", "unknown option 'learning_rate'; there are accumulate"),
        ("1: 2", "unknown option 1"),
        ("- 1", "a mapping"),
        ("a: [", "not YAML: while parsing"),
        ("lr: !!python/object/apply:os.getcwd []", r"tags \(.*os.getcwd\) are not supported"),
        ("skip_bad: !!bool x", "tags .*bool. are not supported"),
        ("lr: !!timestamp x", "tags"),
        ("steps: 1:30", "steps: expected an integer, got '1:30'"),
        ("lr: 1:30", "lr: expected a number, got '1:30'"),
        ("steps: 0x10", "steps: expected an integer, got '0x10'"),
        ("steps: 0x" + "f" * 5000, "steps: expected an integer, got '0xf"),
        ("steps: 1e400", "steps: expected an integer, got inf"),
        ("[" * 100_000, "nested deeper"),
        (b"out: \xff", "not UTF-8"),
        ("out: 2024", "out: expected text, got 2024; put it in quotes"),
        ("out: yes", "out: expected text, got True; put it in quotes"),
        ("out: [a]", "out: expected text, got a list$"),
        ("seed: 1.5", "seed: expected an integer, got 1.5"),
        ("seed: true", "seed: expected an integer, got True"),
        ("seed: .inf", "seed: expected an integer, got inf"),
        ("lr: fast", "lr: expected a number, got 'fast'"),
        ("skip_bad: 1", "skip_bad: expected true or false, got 1"),
        ("mask: none", "mask: expected one of all, completion, completion.eot, got 'none'"),
        ("mask: [all]", "mask: expected one of"),
        ("data: [[a]]", "data: expected text, got a list"),
        ("lr: 1\nlr: 2", "'lr' stands there twice"),
        (BOMB, "aliases"),
        (MERGES, "aliases"),
        ("lr: 1\n" + "#" * (1 << 18), "longer than 256 KiB"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_named(text, reason, written):
    path = written(text)
    with pytest.raises(ValueError, match=reason) as error:
        from_yaml(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


def test_a_recipe_that_is_not_there_is_named(tmp_path):
    for path in (tmp_path / "nowhere.yaml", tmp_path):
        with pytest.raises(ValueError, match=f"{path}: cannot be read"):
            from_yaml(path)


def test_values_are_never_options(written, tmp_path, capsys):
    path = written(
        f'model: m\nout: "{tmp_path / "asked_for"}"\ndata: ["nowhere.jsonl", "--out", "{tmp_path / "elsewhere"}"]\n'
    )
    assert main(["train", "--config", str(path)]) == 1
    assert capsys.readouterr().err == "sft-kernels: nowhere.jsonl: no such file\n"
    assert [entry.name for entry in tmp_path.iterdir()] == ["recipe.yaml"]
    path = written('model: "--lr"\ndata: ["--config"]\n')
    assert main(["train", "--config", str(path)]) == 1
    assert capsys.readouterr().err == "sft-kernels: --config: no such file\n"
