"""Events for TensorBoard: the numbers of the logs, and nothing of the training changed."""

import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from sft_kernels import cli
from sft_kernels.sft.recipe import Recipe, check
from sft_kernels.sft.report import RunLog
from sft_kernels.sft.tensorboard import Board
from sft_kernels.sft.train import train

from .runs import assert_same, recipe_of, stopped_in
from .small import rows_of
from .test_report import step

MESSAGE = (
    'tensorboard: the module tensorboard is missing; the extra "tensorboard" brings it: '
    "pip install --no-build-isolation '.[tensorboard]' in a clone"
)


def scalars(out):
    """``{tag: [(step, value), ...]}``, as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(Path(out, "tensorboard")), size_guidance={"scalars": 0})
    found.Reload()
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def approx(pairs):
    return [(step, pytest.approx(value, rel=1e-6)) for step, value in pairs]  # events hold fp32


def test_without_the_module_an_error_names_the_extra_before_anything_is_read(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard")
    out = tmp_path / "run"
    recipe = Recipe(data=["nowhere.jsonl"], model="nowhere", out=str(out), tensorboard=True)
    with pytest.raises(ImportError, match="the extra") as e:
        train(recipe)
    assert (str(e.value), e.value.name) == (MESSAGE, "tensorboard")
    options = ["--data", "nowhere.jsonl", "--model", "nowhere", "--out", str(out), "--tensorboard"]
    assert cli.main(["train", *options]) == 1
    assert capsys.readouterr().err == f"sft-kernels: {MESSAGE}\n"
    assert not out.exists()
    check(replace(recipe, tensorboard=False))


def test_a_run_that_goes_on_has_each_number_once_and_is_the_same_run(tmp_path, whole):
    """To the bit that of a run without TensorBoard. Numbers of steps that are done again are hidden."""
    pytest.importorskip("tensorboard")
    recipe = replace(recipe_of(tmp_path, whole), log_every=2)
    train(replace(recipe, out=recipe.out + "-without"))
    recipe = replace(recipe, tensorboard=True)
    stopped_in(5, replace(recipe, save_every=0))  # in step 3, after which the checkpoint is
    Board(Path(recipe.out, "tensorboard")).evaluation(
        4, {"loss": 99.0, "accuracy": 0.0}
    )  # of a process that was killed
    train(replace(recipe, resume=True))
    found, rows = scalars(recipe.out), rows_of(Path(recipe.out))
    steps, measured = [row for row in rows if "loss" in row], [row for row in rows if "eval" in row]
    assert rows == rows_of(Path(recipe.out + "-without"))
    assert_same(f"{recipe.out}/model", f"{recipe.out}-without/model")
    for name in ("loss", "lr", "grad_norm"):
        assert found[f"train/{name}"] == approx((row["step"], row[name]) for row in steps)
    for name in ("kept", "padding"):
        assert found[f"train/{name}_share"] == approx((row["step"], row[name] / row["tokens"]) for row in steps)
    for name in ("loss", "accuracy"):
        assert found[f"eval/{name}"] == approx((row["step"], row["eval"][name]) for row in measured)
    assert found["eval/exact_match"] == approx((row["step"], row["eval"]["score"]) for row in measured)
    assert [at for at, _ in found["train/tokens_per_second"]] == [2, 3, 4, 6, 8, 9, 10, 11]
    assert all(rate > 0 for _, rate in found["train/kept_tokens_per_second"])


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")  # a traceback without pytest
def test_a_disk_that_fails_costs_one_warning(tmp_path, capfd):
    pytest.importorskip("tensorboard")
    hook = threading.excepthook
    log = RunLog(tmp_path, 9, 1, tensorboard=True)
    writer = log.board._writer.file_writer.event_writer._async_writer._writer

    def full(data):
        raise OSError(28, "No space left on device")

    writer.write = full
    for number in (1, 2, 3):
        step(log, number)
        log.position()  # waits for the thread that writes
    log.close()
    log.finish()
    said = capfd.readouterr().err
    assert said == "warning: tensorboard: no more events are written (No space left on device)\n"
    assert threading.excepthook is hook
    assert len(rows_of(tmp_path)) == 3


def test_a_folder_that_cannot_be_made_costs_one_warning(tmp_path, capfd):
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorboard").write_text("a file")
    log = RunLog(tmp_path, 1, 1, tensorboard=True)
    step(log, 1)
    log.close()
    log.finish()
    assert capfd.readouterr().err.startswith("warning: tensorboard: no more events are written (")
    assert (tmp_path / "tensorboard").read_text() == "a file"
