import json
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
from safetensors import SafetensorError

from sft_kernels import cli
from sft_kernels.sft import finish, held_out, state
from sft_kernels.sft import run as running
from sft_kernels.sft import train as training
from sft_kernels.sft.finish import Stop, Stopped
from sft_kernels.sft.out import SPEED
from sft_kernels.sft.report import RunLog
from sft_kernels.sft.saving import NotSaved
from sft_kernels.sft.train import train

from .small import CLI, SHAPE, loaded, model_of, recipe_in, rows_of, same_weights

INTERRUPT, TERMINATE = signal.SIGINT, signal.SIGTERM


@pytest.fixture
def run(tmp_path, tokenizer, monkeypatch):
    """Trains a small model, and calls ``at`` within a step."""

    class Run:
        out = tmp_path / "run"
        model = model_of(len(tokenizer))

        def __call__(self, at=None, number=2, **options):
            loss, calls = running.linear_cross_entropy, []

            def called(*args, **kwargs):
                calls.append(None)
                if at is not None and len(calls) == number:
                    at()
                return loss(*args, **kwargs)

            monkeypatch.setattr(running, "linear_cross_entropy", called)
            try:
                return train(recipe_in(tmp_path, **options), model=self.model, tokenizer=tokenizer)
            finally:
                monkeypatch.setattr(running, "linear_cross_entropy", loss)

        def names(self):
            """All that is in ``out``, but for the clock's readings, which are there once a step was."""
            return sorted({path.name for path in self.out.iterdir()} - {SPEED})

    return Run()


@pytest.mark.parametrize(("number", "status"), [(INTERRUPT, 130), (TERMINATE, 143)])
def test_a_signal_finishes_the_step_and_saves_a_checkpoint(number, status, run, capfd):
    before = [signal.getsignal(n) for n in (INTERRUPT, TERMINATE)]
    checkpoint = run.out / "checkpoints" / "step-2"
    with pytest.raises(Stopped, match=f"after step 2 of 3; --resume goes on from {checkpoint}, whose model/") as e:
        run(lambda: signal.raise_signal(number), log_every=10)
    assert isinstance(e.value, KeyboardInterrupt)
    assert (e.value.status, e.value.path) == (status, checkpoint / "model")
    assert [signal.getsignal(n) for n in (INTERRUPT, TERMINATE)] == before
    model, _, log = e.value.result
    assert model is run.model
    assert same_weights(loaded(e.value.path), run.model)
    *steps, last = rows_of(run.out)
    assert [row["step"] for row in steps] == [1, 2]
    assert last == {"step": 2, "of": 3, "stopped": number.name}
    assert log.stopped == number.name
    assert run.names() == ["checkpoints", "curves.png", "train.jsonl"]
    assert "a second signal ends at once" in capfd.readouterr().err


def test_the_step_that_a_signal_comes_in_is_the_whole_step(run, tmp_path, tokenizer):
    """The weights are those of a run that nothing stopped, after the same step."""
    with pytest.raises(Stopped):
        run(lambda: signal.raise_signal(INTERRUPT), warmup=0.9)
    other = model_of(len(tokenizer))
    seen = {}

    class Log(RunLog):
        def step(self, **values):
            super().step(**values)
            if values["step"] == 2:
                seen.update({name: p.detach().clone() for name, p in other.named_parameters()})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "RunLog", Log)
        recipe = recipe_in(tmp_path, warmup=0.9, out=str(tmp_path / "whole"))
        train(recipe, model=other, tokenizer=tokenizer)
    assert all(p.equal(seen[name]) for name, p in run.model.named_parameters())


def test_a_second_signal_ends_at_once(run):
    def twice():
        signal.raise_signal(TERMINATE)
        signal.raise_signal(INTERRUPT)

    with pytest.raises(KeyboardInterrupt) as e:
        run(twice)
    assert not isinstance(e.value, Stopped)
    assert run.names() == ["train.jsonl"]
    assert rows_of(run.out)[-1]["stopped"] == "KeyboardInterrupt"


def test_a_second_signal_ends_the_saving_at_once(run, monkeypatch):
    monkeypatch.setattr(state, "write", lambda *args, **kwargs: signal.raise_signal(INTERRUPT))
    with pytest.raises(KeyboardInterrupt) as e:
        run(lambda: signal.raise_signal(INTERRUPT))
    assert not isinstance(e.value, Stopped)
    assert run.names() == ["train.jsonl"]


def test_a_signal_while_the_finished_model_is_saved_saves_it(run, monkeypatch):
    real = finish.save

    def save(*args):
        signal.raise_signal(INTERRUPT)
        return real(*args)

    monkeypatch.setattr(finish, "save", save)
    with pytest.raises(Stopped, match="after step 3 of 3; the finished model is in"):
        run()
    assert same_weights(loaded(run.out / "model"), run.model)
    assert rows_of(run.out)[-1]["step"] == 3
    assert not {"stopped", "finished"} & rows_of(run.out)[-1].keys()
    assert run.names() == ["curves.png", "model", "train.jsonl"]


def test_a_signal_ends_an_evaluation(run, monkeypatch):
    real = Stop.batches

    def batches(self, items):
        for i, item in enumerate(real(self, items)):
            if self._previous and i == 0:  # not before the first step
                signal.raise_signal(TERMINATE)
            yield item

    monkeypatch.setattr(Stop, "batches", batches)
    with pytest.raises(Stopped, match="after step 1 of 3"):
        run(holdout=0.5, eval_every=1, rows=1, row_tokens=40)
    assert [("eval" in row, row["step"]) for row in rows_of(run.out)] == [(True, 0), (False, 1), (False, 1)]
    assert same_weights(loaded(run.out / "checkpoints" / "step-1" / "model"), run.model)


def test_before_the_first_step_a_signal_does_as_usual(run, monkeypatch):
    monkeypatch.setattr(Stop, "batches", lambda self, items: signal.raise_signal(INTERRUPT))
    with pytest.raises(KeyboardInterrupt) as e:
        run(holdout=0.5)
    assert not isinstance(e.value, Stopped)
    assert run.names() == ["train.jsonl"]


def test_a_signal_that_is_ignored_stays_ignored(run):
    before = signal.signal(TERMINATE, signal.SIG_IGN)
    try:
        run(lambda: signal.raise_signal(TERMINATE))
        assert signal.getsignal(TERMINATE) == signal.SIG_IGN
    finally:
        signal.signal(TERMINATE, before)


def test_another_thread_than_the_main_one_sets_no_handlers(run):
    seen = []
    thread = threading.Thread(target=lambda: run(lambda: seen.append(signal.getsignal(INTERRUPT))))
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(INTERRUPT)]
    assert run.names() == ["curves.png", "model", "train.jsonl"]


def test_an_error_between_keeps_log_and_unfinished_model_and_is_raised(run, capsys):
    def fail():
        raise RuntimeError("out of\nmemory")

    with pytest.raises(RuntimeError, match="out of\nmemory"):
        run(fail, number=3, log_every=10)
    *steps, last = rows_of(run.out)
    assert [row["step"] for row in steps] == [1, 2]
    assert last == {"step": 2, "of": 3, "stopped": "RuntimeError: out of memory"}
    assert run.names() == ["curves.png", "model-unfinished", "train.jsonl"]
    assert same_weights(loaded(run.out / "model-unfinished"), run.model)
    assert "failed after step 2 of 3; the unfinished model is in" in capsys.readouterr().err


def test_an_error_in_the_first_step_saves_nothing(run):
    def fail():
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        run(fail, number=1)
    assert run.names() == ["train.jsonl"]


def test_an_error_of_the_log_hides_no_error_of_the_run(run, monkeypatch):
    def fail():
        monkeypatch.setattr(RunLog, "flush", lambda self: 1 / 0)
        raise RuntimeError("the device is gone")

    with pytest.raises(RuntimeError, match="the device is gone"):
        run(fail, log_every=10)


def test_the_model_is_saved_before_the_last_evaluation_and_the_curves(run, monkeypatch, capsys):
    real = held_out.masked_loss

    def fails_at_the_end(*args):
        if (run.out / "model").is_dir():
            raise RuntimeError("out of memory")
        return real(*args)

    monkeypatch.setattr(held_out, "masked_loss", fails_at_the_end)
    with pytest.raises(RuntimeError, match="out of memory"):
        run(holdout=0.5)
    assert same_weights(loaded(run.out / "model"), run.model)
    assert run.names() == ["curves.png", "model", "train.jsonl"]
    assert "the finished model is in" in capsys.readouterr().err


def test_a_model_that_cannot_be_saved_is_not_lost_to_the_caller(run, monkeypatch):
    real = run.model.save_pretrained

    def fail(path):
        if run.out in Path(path).parents and Path(path).name == "model.partial":
            raise SafetensorError("I/O error")
        return real(path)

    monkeypatch.setattr(run.model, "save_pretrained", fail)
    with pytest.raises(NotSaved, match="it is whole in") as e:
        run()
    assert e.value.result[0] is run.model
    assert same_weights(loaded(e.value.path), run.model)
    assert run.names() == ["curves.png", "train.jsonl"]


def test_an_unfinished_model_that_is_saved_aside_is_said_to_be_unfinished(run, monkeypatch):
    real = finish.save

    def fail(model, tokenizer, path, replace):
        real(model, tokenizer, path.with_name("elsewhere"))
        raise NotSaved("out: could not be saved; it is whole in /elsewhere")

    monkeypatch.setattr(finish, "save", fail)
    monkeypatch.setattr(state, "write", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(NotSaved, match="whole in /elsewhere; SIGTERM ended the run after step 2 of 3"):
        run(lambda: signal.raise_signal(TERMINATE))
    assert run.names() == ["curves.png", "elsewhere", "train.jsonl"]


def test_without_room_for_a_checkpoint_a_signal_saves_the_model(run, monkeypatch, capsys):
    monkeypatch.setattr(state, "_write_tensors", lambda *args: 1 / 0)
    with pytest.raises(Stopped, match=r"after step 2 of 3; the unfinished model is in .*/model-unfinished$") as e:
        run(lambda: signal.raise_signal(TERMINATE))
    assert same_weights(loaded(e.value.path), run.model)
    assert run.names() == ["curves.png", "model-unfinished", "train.jsonl"]
    assert "no checkpoint could be saved (division by zero)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (Stopped(TERMINATE, "SIGTERM after step 2"), 143, "sft-kernels: SIGTERM after step 2\n"),
        (KeyboardInterrupt(), 130, "sft-kernels: interrupted\n"),
        (NotSaved("out: no room"), 1, "sft-kernels: out: no room\n"),
    ],
)
def test_the_command_says_it_in_one_line(error, status, said, monkeypatch, capsys):
    def fail(recipe):
        raise error

    monkeypatch.setattr(training, "train", fail)
    assert cli.main(["train"]) == status
    assert capsys.readouterr().err == said


def test_sigterm_ends_the_command_with_143_and_a_checkpoint(tmp_path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model_type": "llama", "vocab_size": 300, "max_position_embeddings": 64, **SHAPE}))
    recipe = recipe_in(tmp_path)
    options = ["--model", str(config), "--steps", "1000000", "--row-tokens", "64", "--log-every", "1"]
    command = [*CLI, *options, "--data", *recipe.data, "--out", recipe.out]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=env) as process:
        log = Path(recipe.out) / "train.jsonl"
        until = time.monotonic() + 60
        while not (log.exists() and log.stat().st_size) and time.monotonic() < until:
            time.sleep(0.05)
        process.terminate()
        said = process.communicate(timeout=60)[1]
    assert process.returncode == 143
    assert "Traceback" not in said
    last = rows_of(Path(recipe.out))[-1]
    assert last["stopped"] == "SIGTERM"
    assert said.splitlines()[-1].startswith(
        f"sft-kernels: SIGTERM after step {last['step']} of 1000000; --resume goes on from"
    )
    loaded(Path(recipe.out) / "checkpoints" / f"step-{last['step']}" / "model")


def test_a_generation_config_as_llama_2_has_it_costs_no_run(run, capsys):
    run.model.generation_config.temperature, run.model.generation_config.top_p = 0.9, 0.6
    run()
    config = loaded(run.out / "model").generation_config
    assert (config.do_sample, config.temperature, config.top_p) == (True, 0.9, 0.6)
    said = capsys.readouterr().out
    assert said.count("do_sample is now True, because it sets temperature=0.9, top_p=0.6") == 1
