"""Checkpoints that are damaged, of another run, or cannot be written; and the models that a run keeps."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from sft_kernels.sft import checkpoints, resume
from sft_kernels.sft import run as running
from sft_kernels.sft import train as training
from sft_kernels.sft.checkpoints import Checkpoints, only_run
from sft_kernels.sft.report import RunLog
from sft_kernels.sft.train import train

from .runs import files_of, recipe_of, stopped_in
from .small import loaded, recipe_in, rows_of, same_weights


@pytest.fixture
def recipe(tmp_path, whole):
    return recipe_of(tmp_path, whole)


@pytest.fixture
def stopped(recipe):
    """A run that was stopped after step 5, with checkpoints after 2, 4 and 5."""
    recipe = replace(recipe, keep=3)
    stopped_in(9, recipe)
    return replace(recipe, resume=True)


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))


@pytest.mark.parametrize(
    ("name", "damage", "reason"),
    [
        ("state-00001.safetensors", cut, r"state-00001.safetensors has \d+ bytes, \d+ were written"),
        ("model/model.safetensors", flip, "model/model.safetensors is damaged"),
        ("state.json", flip, "state.json is damaged"),
        ("state.json", Path.unlink, "state.json is missing"),
        ("files.json", Path.unlink, "files.json is missing"),
        ("files.json", cut, "files.json is damaged"),
        ("files.json", lambda path: path.write_text("[1]"), "files.json is damaged"),
        ("files.json", lambda path: path.write_text('{"a": [Infinity, ""]}'), "files.json is damaged"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_passed_over(name, damage, reason, stopped, recipe, capsys):
    whole = replace(recipe, out=recipe.out + "-whole")
    train(whole)
    folder = Path(stopped.out, "checkpoints")
    damage(folder / "step-5" / name)
    damage(folder / "step-4" / name)
    capsys.readouterr()
    train(stopped)
    said = capsys.readouterr()
    for step in (5, 4):
        assert f"warning: resume: {folder / f'step-{step}'} is passed over (" in said.err
    assert Checkpoints(stopped.out, 1).newest() == folder / "step-10"
    assert len(re.findall(reason, said.err)) == 2
    assert "resume: going on after step 2, from" in said.out
    assert rows_of(Path(stopped.out)) == rows_of(Path(whole.out))


def test_a_resume_with_another_recipe_says_which_fields_differ(stopped):
    before = files_of(stopped.out)
    with pytest.raises(ValueError, match=r"step-5 is of another recipe; steps: 11 there, 12 now; lr: 0.01 there, 0.02"):
        train(replace(stopped, lr=2e-2, steps=12, log_every=1, keep=1))
    assert files_of(stopped.out) == before


def test_a_resume_with_other_data_is_refused_and_writes_nothing(stopped):
    before = files_of(stopped.out)
    data = Path(stopped.data[0])
    data.write_text(data.read_text().replace("blue and", "blue or"))
    with pytest.raises(ValueError, match=r"resume: .*step-5 is of other data"):
        train(stopped)
    assert files_of(stopped.out) == before


def test_a_finished_run_is_not_gone_on_with(recipe):
    train(recipe)
    before = files_of(recipe.out)
    with pytest.raises(ValueError, match=r"the run in .* is finished; .* --init-from"):
        train(replace(recipe, resume=True))
    assert files_of(recipe.out) == before


def test_a_second_run_in_the_folder_of_one_that_runs_is_refused(stopped):
    half = Path(stopped.out, "checkpoints", "step-6.partial")  # which the other run is writing
    half.mkdir()
    (half / "state.json").write_text("{")
    before = files_of(stopped.out)
    with only_run(stopped.out), pytest.raises(FileExistsError, match="out: another run is writing to"):
        train(stopped)
    with pytest.raises(FileExistsError, match="holds a run already"):
        train(replace(stopped, resume=False))
    assert files_of(stopped.out) == before


def test_a_run_that_another_process_went_on_with_meanwhile_is_left_alone(stopped, monkeypatch):
    """It went on, and ended, while this one read its data."""
    real = training.rehearse

    def rehearse(*args, **kwargs):
        monkeypatch.setattr(training, "rehearse", real)
        train(stopped)
        return real(*args, **kwargs)

    monkeypatch.setattr(training, "rehearse", rehearse)
    with pytest.raises(FileExistsError, match=r"^out: another process went on with the run in"):
        train(stopped)
    assert rows_of(Path(stopped.out))[-1]["finished"]


def test_without_a_run_resume_begins_one(recipe, capsys):
    train(replace(recipe, resume=True, steps=2))
    assert "there is no run in" in capsys.readouterr().out
    assert [row["step"] for row in rows_of(Path(recipe.out)) if "loss" in row] == [1, 2]


def test_the_room_that_a_killed_run_set_aside_is_given_back(stopped):
    out = Path(stopped.out)
    for name in (".room-abc_1234", ".room-thesis", ".room-mine5678"):
        (out / name).mkdir()
        (out / name / "0").write_bytes(bytes(100))
    (out / ".room-mine5678" / "notes.txt").write_text("mine")
    train(stopped)
    assert sorted(path.name for path in out.glob(".room-*")) == [".room-mine5678", ".room-thesis"]


def test_without_a_complete_checkpoint_the_run_starts_again(stopped, recipe, capsys):
    whole = replace(recipe, out=recipe.out + "-whole")
    train(whole)
    for path in Path(stopped.out, "checkpoints").iterdir():
        cut(path / "state.json")
    train(stopped)
    assert "holds no complete checkpoint, so the run starts again" in capsys.readouterr().out
    assert rows_of(Path(stopped.out)) == rows_of(Path(whole.out))
    assert same_weights(loaded(f"{stopped.out}/model"), loaded(f"{whole.out}/model"))


def test_a_model_without_a_checkpoint_is_left_alone(recipe):
    Path(recipe.out, "model").mkdir(parents=True)
    Path(recipe.out, "train.jsonl").write_text("")
    with pytest.raises(ValueError, match="holds a model and no complete checkpoint"):
        train(replace(recipe, resume=True))


def test_a_checkpoint_of_another_version_is_refused(stopped):
    state = Path(stopped.out, "checkpoints", "step-5", "state.json")
    text = state.read_text().replace('"kind": 1', '"kind": 0')
    checkpoints = Checkpoints(stopped.out, 3)
    checkpoints.write(6, lambda folder: (folder / "state.json").write_text(text))
    with pytest.raises(ValueError, match="step-6 was written by another version"):
        train(stopped)


def _in_state(**fields):
    def damage(path):
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return damage


def _without_skipped_steps(path):
    tensors = load_file(path)
    del tensors["skipped_steps"]
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("name", "damage", "reason"),
    [
        ("state.json", lambda path: path.write_text("[1]"), "was written by another version"),
        ("state.json", lambda path: path.write_text("[" * 100_000), r"state.json cannot be read \(maximum recursion"),
        ("state.json", lambda path: path.write_bytes(b"\xff"), r"state.json cannot be read \('utf-8' codec"),
        ("state.json", Path.unlink, r"state.json cannot be read \(No such file"),
        ("state.json", _in_state(step=-1, recipe=[], best=1), r"does not hold .* \(step, recipe, best\)"),
        ("state.json", _in_state(best={"step": 1, "by": "loss"}), r"does not hold .* \(value, loss\)"),
        ("state.json", _in_state(random=None), r"step-5 does not fit this run \("),
        ("state-00001.safetensors", _without_skipped_steps, r"step-5 does not fit this run \('skipped_steps'\)"),
        ("state-00001.safetensors", lambda path: path.write_bytes(b"abc"), "step-5 does not fit this run"),
    ],
    ids=range(9),
)
def test_a_checkpoint_of_another_making_is_refused_by_name(name, damage, reason, stopped, monkeypatch):
    """It has a list of files that fits."""
    path = Path(stopped.out, "checkpoints", "step-5")
    log = Path(stopped.out, "train.jsonl").read_bytes()
    damage(path / name)
    monkeypatch.setattr(checkpoints, "check", lambda path: None)
    with pytest.raises(ValueError, match=rf"^resume: .*{reason}"):
        train(stopped)
    assert Path(stopped.out, "train.jsonl").read_bytes() == log


@pytest.mark.parametrize("line", ["[1]", "{}", "", "\udcff", "[" * 100_000, '{"step": "1"}'], ids=range(6))
def test_a_log_that_was_edited_is_named_and_stays(line, tmp_path):
    log = tmp_path / "train.jsonl"
    log.write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n{{"step": 3}}\n', errors="surrogateescape")
    before = log.read_bytes()
    with pytest.raises(ValueError, match=r"^resume: .*train\.jsonl, line 2 was not written by a run"):
        RunLog(tmp_path, 11, 1, keep=len(before) - 5)
    assert log.read_bytes() == before


def test_a_run_that_began_meanwhile_is_named(tmp_path):
    (tmp_path / "train.jsonl").touch()
    with pytest.raises(FileExistsError, match=r"^out: .* holds a run already \(train.jsonl\)"):
        RunLog(tmp_path, 11, 1)


LINKS = ["checkpoints", "best", "model", "model.replaced", "train.jsonl", "speed.jsonl", "tensorboard"]


@pytest.mark.parametrize("name", [*LINKS, *(f"checkpoints/step-{n}" for n in ("4", "9", "7.removed"))])
def test_nothing_is_written_through_a_link(name, recipe, tmp_path):
    for folder in ("checkpoints/step-4", "best", "moved"):
        Path(recipe.out, folder).mkdir(parents=True)
    Path(recipe.out, "train.jsonl").touch()
    path = Path(recipe.out, name)
    if path.exists():
        path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError, match=f"^out: .*{name} is a link"):
        train(replace(recipe, resume=True))
    assert path.is_symlink()


def test_the_best_model_before_a_stop_stays_the_best(recipe, monkeypatch):
    from sft_kernels.sft import held_out

    scores = iter([0.0, 0.9, 0.1, 0.2, 0.3])
    monkeypatch.setattr(held_out, "score", lambda *args: next(scores))
    stopped_in(9, recipe)
    before = files_of(f"{recipe.out}/best")
    _, _, log = train(replace(recipe, resume=True))
    assert (log.best["step"], log.best["value"]) == (3, 0.9)
    assert files_of(f"{recipe.out}/best") == before


def test_of_equal_scores_the_lower_loss_is_the_best(recipe, monkeypatch):
    from sft_kernels.sft import held_out

    monkeypatch.setattr(held_out, "score", lambda *args: 0.5)
    losses, real = iter([1.0, 4.0, 3.0, 3.5, 3.2]), held_out.masked_loss
    monkeypatch.setattr(held_out, "masked_loss", lambda *args: real(*args)._replace(loss=next(losses)))
    _, _, log = train(recipe)
    assert (log.best["step"], log.best["loss"]) == (6, 3.0)


def test_checkpoints_rotate_and_the_best_model_stays(recipe, monkeypatch):
    from sft_kernels.sft import held_out

    scores = iter([0.0, 0.9, 0.1, 0.9, 0.2])  # after steps 0, 3, 6, 9 and 11
    monkeypatch.setattr(held_out, "score", lambda *args: next(scores))
    losses = iter([5.0, 4.0, 3.0, 4.5, 2.0])
    real = held_out.masked_loss
    monkeypatch.setattr(held_out, "masked_loss", lambda *args: real(*args)._replace(loss=next(losses)))
    _, _, log = train(replace(recipe, keep=1, save_every=3))
    assert log.best == {"step": 3, "by": "exact_match", "value": 0.9, "loss": 4.0}
    assert [path.name for path in Path(recipe.out, "checkpoints").iterdir()] == ["step-9"]
    third = replace(recipe, out=recipe.out + "-3", steps=11)
    monkeypatch.undo()
    seen = {}
    step = running.Run.step

    def spied(self, number, batches):
        step(self, number, batches)
        if number == 3:
            seen.update({name: p.detach().clone() for name, p in self.model.named_parameters()})

    monkeypatch.setattr(running.Run, "step", spied)
    train(third)
    assert all(p.equal(seen[name]) for name, p in loaded(f"{recipe.out}/best").named_parameters())


def test_a_damaged_checkpoint_of_a_later_step_costs_no_new_one(stopped):
    """The run goes on from before it, so for some steps it is the newest by its number."""
    folder = Path(stopped.out, "checkpoints")
    for path in folder.iterdir():
        cut(path / "state.json")
    error = stopped_in(5, replace(stopped, keep=1))  # of the run that starts again
    assert error.path.parent.name == "step-3"
    assert sorted(path.name for path in folder.iterdir()) == ["step-3", "step-4", "step-5"]
    train(replace(stopped, keep=1))
    assert [path.name for path in folder.iterdir()] == ["step-10"]


def test_a_checkpoint_that_cannot_be_written_costs_a_warning_and_no_other(recipe, monkeypatch, capsys):
    from sft_kernels.sft import state

    write = state._write_tensors

    def full(folder, tensors):
        if folder.name in ("step-4.partial", "step-6.partial"):
            raise OSError(28, "No space left on device")
        write(folder, tensors)

    monkeypatch.setattr(state, "_write_tensors", full)
    train(replace(recipe, steps=7))
    said = capsys.readouterr().err
    assert "warning: no checkpoint could be saved after step 4 (No space left on device)" in said
    assert [path.name for path in Path(recipe.out, "checkpoints").iterdir()] == ["step-2"]
    assert Checkpoints(recipe.out, 1).newest().name == "step-2"


def test_init_from_starts_anew_with_the_weights_of_an_earlier_run(recipe, stopped, capsys):
    first = replace(stopped, model="", init_from=stopped.out, resume=False, out=recipe.out + "-2", steps=1, lr=0.0)
    _, _, log = train(first)
    assert [row["step"] for row in log.history if "loss" in row] == [1]
    assert f"starting anew from {stopped.out}/best" in capsys.readouterr().out
    assert same_weights(loaded(f"{first.out}/model"), loaded(f"{stopped.out}/best"))
    for place in ("checkpoints/step-5", "checkpoints/step-5/model"):
        assert resume.earlier_model(f"{stopped.out}/{place}") == f"{stopped.out}/checkpoints/step-5/model"
    assert resume.earlier_model(first.out) == f"{first.out}/best"
    Path(first.out, "best").rename(first.out + "-best")
    assert resume.earlier_model(first.out) == f"{first.out}/model"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"init_from": "nowhere", "model": ""}, "init_from: nowhere is no folder"),
        ({"init_from": ".", "model": ""}, "init_from: . holds no model"),
        ({"init_from": "nowhere"}, "init_from: it takes the place of the model"),
    ],
)
def test_a_wrong_init_from_is_refused(options, reason, tmp_path, monkeypatch, whole):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=reason):
        train(recipe_in(tmp_path, **{"model": str(whole), **options}))


def test_room_is_asked_for_what_is_not_there_yet(recipe, monkeypatch):
    """The model, the best one twice as it is replaced, and checkpoints: no more than are ever there at once."""
    real, asked = training.rehearse, []

    def rehearse(*args, copies, more):
        asked.append((copies, len(more)))
        real(*args, copies=copies, more=more)

    monkeypatch.setattr(training, "rehearse", rehearse)
    stopped_in(9, recipe)  # after step 5; the best model is there, and so are the checkpoints 4 and 5
    stopped_in(1, replace(recipe, resume=True))
    train(replace(recipe, out=recipe.out + "-2", keep=1000, save_every=5))  # two are written
    assert asked == [(1 + 2 + 3, 3), (1 + 1 + 1, 1), (1 + 2 + 2, 2)]


@pytest.mark.parametrize("call", ["sync", "rename"])
def test_a_best_model_that_cannot_be_written_leaves_the_one_before(call, recipe, monkeypatch, capsys):
    """A full disk shows when the new one is synced, another error when it gets its name."""
    from sft_kernels.sft import whole

    owner = {"sync": whole, "rename": Path}[call]
    real, before = getattr(owner, call), []

    def fail(path, *args):
        if path.name == "best.partial" and before:
            raise OSError(28, "No space left on device")
        if path.name == "best.partial":
            before.append((path / "model.safetensors").read_bytes())
        real(path, *args)

    monkeypatch.setattr(owner, call, fail)
    _, _, log = train(replace(recipe, steps=7, metric_prompts=0))
    assert "warning: the best model so far could not be saved in" in capsys.readouterr().err
    assert log.best["step"] == 3
    assert sorted(path.name for path in log.out.iterdir() if path.name.startswith("best")) == ["best"]
    assert [(log.out / "best" / "model.safetensors").read_bytes()] == before
