"""SIGINT and SIGTERM while a command runs, and while its process starts and ends."""

import contextlib
import signal
import sys
import time

import pytest

from sft_kernels import _signals, cli
from sft_kernels.sft import held_out
from sft_kernels.sft import train as training

from .conftest import process

ENDS = [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]


@pytest.mark.parametrize(("number", "status", "word"), ENDS)
@pytest.mark.parametrize("disguised", [False, True], ids=["as it is", "as an error of a library"])
def test_a_signal_is_one_line(number, status, word, disguised, trainer, monkeypatch, capsys):
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]

    def fail(recipe):
        try:
            signal.raise_signal(number)
        except BaseException as error:
            if disguised:
                raise ImportError("numpy.core.multiarray failed to import") from error
            raise

    monkeypatch.setattr(training, "train", fail)
    assert trainer.run() == status
    assert capsys.readouterr().err == f"sft-kernels: {word}\n"
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before


class Garbage:
    """Python ignores what is raised where this is collected."""

    def __init__(self, number):
        self.number = number

    def __del__(self):
        signal.raise_signal(self.number)


def swallow(number):
    with contextlib.suppress(KeyboardInterrupt):
        signal.raise_signal(number)


@pytest.mark.parametrize(("number", "status", "word"), ENDS)
@pytest.mark.parametrize("lose", [Garbage, swallow])
def test_a_signal_that_is_lost_comes_again(lose, number, status, word, trainer, monkeypatch, capsys):
    monkeypatch.setattr(_signals, "_SECONDS", 0.3)
    ignored, went_on = [], []

    def fail(recipe):
        lose(number)
        time.sleep(5)
        went_on.append(None)

    monkeypatch.setattr(training, "train", fail)
    monkeypatch.setattr(sys, "unraisablehook", ignored.append)
    hook = sys.unraisablehook
    assert trainer.run() == status
    assert capsys.readouterr().err == f"sft-kernels: {word}\n"
    assert not ignored + went_on
    assert sys.unraisablehook is hook
    assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_a_signal_that_was_made_another_error_after_saving_counts(trainer, monkeypatch, capsys):
    def fail(recipe):
        (trainer.out / "model").mkdir(parents=True)
        swallow(signal.SIGTERM)
        raise RuntimeError("initialization failed")

    monkeypatch.setattr(training, "train", fail)
    assert trainer.run() == 143
    assert capsys.readouterr().err == "sft-kernels: terminated\n"


@pytest.mark.parametrize(("number", "status", "word"), ENDS)
def test_a_signal_in_the_first_evaluation(number, status, word, train, monkeypatch, capfd):
    monkeypatch.setattr(held_out, "masked_loss", lambda *args: signal.raise_signal(number))
    assert cli.main([str(arg) for arg in train]) == status
    said = capfd.readouterr().err
    assert "Traceback" not in said
    assert said.splitlines()[-1] == f"sft-kernels: {word}"
    assert [path.name for path in train[-1].iterdir()] == ["train.jsonl"]


def test_handlers_of_others_stay_and_ours_serve_once(trainer, monkeypatch):
    seen = []

    def look(recipe):
        seen.append(signal.getsignal(signal.SIGTERM))
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        seen.append(signal.getsignal(signal.SIGINT))
        raise ValueError

    monkeypatch.setattr(training, "train", look)
    kept = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        assert trainer.run() == 130
    finally:
        signal.signal(signal.SIGTERM, kept)
    assert seen == [signal.SIG_IGN, signal.default_int_handler]


@pytest.mark.parametrize(("number", "status", "word"), ENDS)
def test_a_signal_while_the_process_ends_is_quiet(number, status, word):
    before = f"import atexit, signal; atexit.register(signal.raise_signal, {int(number)})"
    done = process("--version", before=before)
    assert (done.returncode, done.stderr) == (status, "")
    assert done.stdout.startswith("sft-kernels ")


@pytest.mark.parametrize(("number", "status", "word"), ENDS)
def test_a_signal_during_the_imports(number, status, word, chats):
    before = f"""
import signal, sys
class Signal:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            signal.raise_signal({int(number)})
sys.meta_path.insert(0, Signal())
"""
    done = process("inspect", chats, before=before)
    assert done.returncode == status
    assert (done.stdout, done.stderr) == ("", f"sft-kernels: {word}\n")
