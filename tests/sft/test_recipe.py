import pytest

from sft_kernels.cli import main
from sft_kernels.sft.recipe import Recipe, from_yaml


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


BOMB = "data: &a [x]\n" + "".join(f"k{i}: &b{i} [*{'a' if not i else f'b{i - 1}'}, *a]\n" for i in range(40))
MERGES = "a: &a {x: 1}\n" + "".join(f"b{i}: &a {{<<: [*a, *a]}}\n" for i in range(60))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("learning_rate: 1", "unknown option 'learning_rate'; there are accumulate"),
        ("1: 2", "unknown option 1"),
        ("- 1", "a mapping"),
        ("a: [", "not YAML: while parsing"),
        ("lr: !!python/object/apply:os.getcwd []", "not YAML: could not determine a constructor"),
        ("[" * 100_000, "nested deeper"),
        (b"out: \xff", "not UTF-8"),
        ("out: 2024", "out: expected text, got 2024; put it in quotes"),
        ("out: yes", "out: expected text, got True; put it in quotes"),
        ("out: [a]", "out: expected text, got a list$"),
        ("out: 2024-99-99", "month must be in"),
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
