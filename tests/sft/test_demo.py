import hashlib
import json
import re

import pytest

from sft_kernels.sft import demo
from sft_kernels.sft.manifest import Manifest


def questions(path):
    return [json.loads(line)["messages"][0]["content"] for line in path.read_text().splitlines()]


def test_no_held_out_list_of_words_is_seen_in_training(tmp_path):
    data = demo.write_data(tmp_path, seed=0, lists=300, held_out=60)
    asked = {q.split(": ")[1] for q in questions(data["held_out"])}
    seen = {q.split(": ")[1] for q in questions(data["chats"])}
    prose = [json.loads(line)["text"] for line in data["base"].read_text().splitlines()]
    assert len(asked) == 60
    assert not asked & seen
    assert not any(re.search(rf"(^|\. ){words} once more", text) for words in asked for text in prose)


def test_every_answer_is_right_for_its_question():
    tasks = demo._tasks(["red", "blue", "tan"], 1)
    assert {name: reply for name, (_, reply, _) in tasks.items()} == {
        "repeat": "red blue tan",
        "reverse": "tan blue red",
        "first": "red",
        "last": "tan",
        "count": "three",
        "next": "tan",
    }
    assert tasks["next"][0] == "Word after blue in: red blue tan"


def test_the_demo_runs_from_nothing_and_again(tmp_path):
    for _ in range(2):
        before, after = demo.run(str(tmp_path / "demo"), base_steps=2, steps=2, lists=60, held_out=12)
        assert before.keys() == after.keys() == {"masked loss", "exact match", "answers that stop"}
        assert after["masked loss"] < before["masked loss"]
    assert (tmp_path / "demo" / "tuned" / "curves.png").is_file()


PHASES = ("data", "base")


def a_demo(folder, killed=False):
    """A demo's folder without the training; ``killed`` in its last phase."""
    manifest = Manifest(folder, PHASES)
    manifest.begin()
    with manifest.phase("data") as data:
        data.mkdir()
        (data / "base.jsonl").write_text("{}")
    phase = manifest.phase("base")
    base = phase.__enter__()
    (base / "model.partial").mkdir(parents=True)
    (base / "model.partial" / "model.safetensors").write_text("half")
    (base / "train.jsonl").write_text("{}")
    if killed:  # by a signal, after a checkpoint and in the next
        for name in ("step-2", "step-4.partial"):
            model = base / "checkpoints" / name / "model"
            model.mkdir(parents=True)
            for file in ("../state.json", "../state-00001.safetensors", "../files.json", "model.safetensors"):
                (model / file).write_text("{}")
        (base / "best.replaced").mkdir()
    if not killed:
        (base / "model.partial").rename(base / "model")
        (base / "model" / "of a later version").write_text("")
        phase.__exit__(None, None, None)


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("killed", [False, True])
def test_a_demo_removes_what_a_demo_wrote(killed, tmp_path):
    a_demo(tmp_path / "demo", killed)
    if killed:
        (tmp_path / "demo" / "demo.json.new").write_text("half")
    Manifest(tmp_path / "demo", PHASES).begin()
    assert [path.name for path in (tmp_path / "demo").iterdir()] == ["demo.json"]


def a_file(demo):
    (demo / "thesis.tex").write_text("mine")


def a_file_deep_inside(demo):
    (demo / "base" / "model").mkdir(exist_ok=True)
    (demo / "base" / "model" / "thesis.tex").write_text("mine")


def an_empty_folder(demo):
    (demo / "thesis.tex").mkdir()


def a_known_name_elsewhere(demo):
    (demo / "data" / "model.safetensors").write_text("mine")


def a_changed_file(demo):
    (demo / "data" / "base.jsonl").write_text("mine")


def a_link_for_a_file(demo):
    (demo.parent / "mine").write_text("{}")
    (demo / "data" / "base.jsonl").unlink()
    (demo / "data" / "base.jsonl").symlink_to(demo.parent / "mine")


def a_link_for_a_folder(demo):
    (demo / "data").rename(demo.parent / "mine")
    (demo / "data").symlink_to(demo.parent / "mine")


def no_list(demo):
    (demo / "demo.json").unlink()


def a_link_for_the_list(demo):
    (demo / "demo.json").rename(demo.parent / "mine")
    (demo / "demo.json").symlink_to(demo.parent / "mine")


def another_list(demo):
    (demo / "demo.json").write_text('{"files": {}, "writing": null}')


def half_a_list(demo):
    (demo / "demo.json").write_text("{")


def a_list_that_leads_out(demo):
    a_file(demo)
    listed = json.loads((demo / "demo.json").read_text())
    listed["files"]["thesis.tex"] = hashlib.sha256(b"mine").hexdigest()
    (demo / "demo.json").write_text(json.dumps(listed))


@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.parametrize(
    ("change", "named"),
    [(a_file, "thesis.tex"), (a_file_deep_inside, "thesis.tex"), (an_empty_folder, "thesis.tex"),
     (a_known_name_elsewhere, "model.safetensors"), (a_changed_file, "base.jsonl was changed"),
     (a_link_for_a_file, "base.jsonl is a link"), (a_link_for_a_folder, "data is a link"),
     (no_list, "no demo.json"), (a_link_for_the_list, "demo.json"), (another_list, "demo.json"),
     (half_a_list, "demo.json"), (a_list_that_leads_out, "thesis.tex")],
)  # fmt: skip
def test_a_folder_with_anything_else_is_refused_and_left_alone(change, named, killed, tmp_path):
    a_demo(tmp_path / "demo", killed)
    change(tmp_path / "demo")
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match=f"^out: .*{named}"):
        demo.run(str(tmp_path / "demo"), base_steps=1, steps=1, lists=12, held_out=6)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["base_steps", "steps", "lists", "held_out", "seed"])
def test_a_number_that_makes_no_sense_is_refused_before_anything_is_written(name, tmp_path):
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        demo.run(str(tmp_path / "demo"), **{name: -1})
    assert not (tmp_path / "demo").exists()


def test_a_folder_that_no_demo_made_is_refused(tmp_path):
    (tmp_path / "project" / "data").mkdir(parents=True)
    (tmp_path / "project" / "data" / "base.jsonl").write_text("mine")
    with pytest.raises(FileExistsError, match=r"^out: .*project is no earlier demo: it holds data"):
        demo.run(str(tmp_path / "project"))
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(NotADirectoryError, match=r"^out: .*link is a link to nothing"):
        demo.run(str(tmp_path / "link"))
    (tmp_path / "real").mkdir()
    with pytest.raises(FileExistsError, match=r"^out: .*link is a link"):
        demo.run(str(tmp_path / "link"))
    for spot, reason in {"": "expected a folder", "a\0b": "no path"}.items():
        with pytest.raises(ValueError, match=f"^out: .*{reason}"):
            demo.run(spot)
    with pytest.raises(NotADirectoryError, match=r"^out: .*base\.jsonl is not a folder"):
        demo.run(str(tmp_path / "project" / "data" / "base.jsonl" / "demo"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "project", "real"]
    Manifest(tmp_path / "real", PHASES).begin()  # an empty folder is fine
