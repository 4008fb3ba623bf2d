"""The command line on any terminal, pipe or disk: its lines and its status."""

import contextlib
import errno
import io
import json
import os
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from sft_kernels import cli
from sft_kernels._terminal import Output, coloured, one_line, output, printable, taken
from sft_kernels.sft.saving import NotSaved

from .conftest import CLOSING, ENV, MAIN, ROOT, conversation, process

HOSTILE = "a\x1b[2Jb\x9bc\u202ed\u2066e\u2028f\x07g\x00h\udcffi\x7fj"
ESCAPED = r"a\x1b[2Jb\x9bc\u202ed\u2066e\u2028f\x07g\x00h\udcffi\x7fj"
full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")


class Broken:
    """A stream of which nobody knows more than that it fails."""

    def __init__(self, error):
        self.error, self.calls = error, 0

    def write(self, text):
        self.calls += 1
        raise self.error

    def flush(self):
        raise self.error


NO_READER = BrokenPipeError(errno.EPIPE, "Broken pipe")
NO_SPACE = OSError(errno.ENOSPC, "No space left on device")


def stream(encoding, errors="strict"):
    return io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors=errors, write_through=True)


# ---- text


def test_printable_is_one_line_without_control_characters():
    assert printable(HOSTILE) == ESCAPED
    assert printable("a\r\n\tb 模型 é") == "a   b 模型 é"
    assert printable("x" * 5000) == "x" * 4000 + " …"
    assert one_line(ValueError(f"first\n   second {HOSTILE}\r\n")) == f"first second {ESCAPED}"
    assert one_line(ValueError()) == "ValueError"


def test_a_message_is_cut_before_it_is_escaped():
    began = time.perf_counter()
    assert len(printable("\x1b" * 10_000_000)) == len(one_line(ValueError("\x1b" * 10_000_000))) == 4002
    assert time.perf_counter() - began < 3  # escaping all takes three times as long


# ---- streams


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
@pytest.mark.parametrize(
    ("encoding", "shown"),
    [
        ("ascii", r"\xe9 \u2026 \u6a21 \udcff"),
        ("latin-1", r"é \u2026 \u6a21 \udcff"),
        ("cp1252", r"é … \u6a21 \udcff"),
        ("utf-8", r"é … 模 \udcff"),
    ],
)
def test_a_character_that_the_encoding_lacks_is_escaped(encoding, errors, shown):
    inner = stream(encoding, errors)
    print("é … 模 \udcff", file=Output(inner))
    assert inner.buffer.getvalue().decode(encoding) == f"{shown}\n"


CLOSED = ValueError("I/O operation on closed file")


@pytest.mark.parametrize("inner", [None, Broken(NO_READER), Broken(NO_SPACE), Broken(CLOSED)])
def test_a_stream_that_fails_drops_the_rest(inner):
    out = Output(inner)
    print("one", file=out)
    print("two", file=out, flush=True)
    out.writelines(["three"])
    assert inner is None or inner.calls == 1
    assert out.lost is (NO_SPACE if inner is not None and inner.error is NO_SPACE else None)
    assert not out.isatty()
    assert out.encoding == "utf-8"
    with pytest.raises((OSError, AttributeError)):
        out.fileno()


def test_a_stand_in_is_equal_to_its_stream_and_made_once():
    inner = io.StringIO()
    out = output(inner)
    assert output(out) is out
    assert out in (sys.stdout, inner)
    assert out != io.StringIO()
    assert hash(out) == hash(output(inner))


def test_the_streams_of_a_command_are_put_back_and_let_only_bars_move(monkeypatch):
    out, err = stream("utf-8"), stream("utf-8")
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    with taken():
        print(HOSTILE)
        print(f"\r{HOSTILE}\n\x1b[A", end="", file=sys.stderr)
        for part in ("\rbar", "\n\n", "\x1b[A\x1b[A", "\r", "a\rb", "\x1b[Ac", "\n"):
            sys.stderr.write(part)
            sys.stdout.write(part)
        with coloured("plain"):
            sys.stdout.write("\x1b[1m")
        with coloured("plain", HOSTILE):
            sys.stdout.write("\x1b[1m")
    assert (sys.stdout, sys.stderr) == (out, err)
    moves = r"a b\x1b[Ac"
    begin, end = f"{ESCAPED}\n bar\n\n\\x1b[A\\x1b[A ", "\n\x1b[1m\\x1b[1m"
    assert out.buffer.getvalue().decode() == f"{begin}{moves}{end}"
    assert err.buffer.getvalue().decode() == f"\r{ESCAPED}\n\\x1b[A\rbar\n\n\x1b[A\x1b[A\r{moves}\n"


def test_standard_output_claims_no_colours_unless_they_are_let_through(monkeypatch):
    class Tty(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stdout", Tty())
    monkeypatch.setattr(sys, "stderr", Tty())
    with taken():
        assert (sys.stdout.isatty(), sys.stderr.isatty()) == (False, True)
        with coloured("train"):
            assert sys.stdout.isatty()


@contextlib.contextmanager
def without_reader():
    """A stream with a buffer, on a pipe whose other end is closed."""
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as file:
        yield file


def test_nothing_stays_in_the_buffer_of_a_pipe_that_is_closed(monkeypatch):
    with without_reader() as inner:
        monkeypatch.setattr(sys, "stdout", inner)
        with taken() as out:
            print("x")
        assert isinstance(out.failed, BrokenPipeError)
        inner.flush()  # nor does its end, at the end of this block, raise
        os.fstat(inner.fileno())


# ---- the command


def test_inspect_on_any_stream(chats, monkeypatch, capsys):
    with without_reader() as inner:
        monkeypatch.setattr(sys, "stdout", inner)
        assert cli.main(["inspect", str(chats)]) == 0
    for other in (None, Broken(NO_READER), Broken(CLOSED), stream("ascii")):
        monkeypatch.setattr(sys, "stdout", other)
        assert cli.main(["inspect", str(chats)]) == 0
        assert sys.stdout is other
    assert r" \xb7" in other.buffer.getvalue().decode("ascii")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys, "stdout", Broken(NO_SPACE))
    assert cli.main(["inspect", str(chats)]) == 1
    assert capsys.readouterr().err == "sft-kernels: the output was lost (No space left on device)\n"


def test_verify_on_any_stream(monkeypatch, capsys):
    argv = ["verify", "--ops", "adamw", "--impls", "torch", "--dtypes", "float32", "--smoke"]
    for stdout in (stream("ascii"), None, Broken(NO_READER)):
        monkeypatch.setattr(sys, "stdout", stdout)
        assert cli.main(argv) == 0
    monkeypatch.setattr(sys, "stdout", Broken(NO_SPACE))
    assert cli.main(argv) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_run_that_saved_its_model_ends_with_0_if_its_output_is_lost(trainer, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", Broken(NO_SPACE))
    assert trainer.run() == 0
    assert capsys.readouterr().err == "sft-kernels: the output was lost (No space left on device)\n"


def test_a_run_that_saved_its_model_ends_with_0_if_what_follows_fails(trainer, capsys):
    trainer.error = RuntimeError(f"out of\nmemory {HOSTILE}")
    assert trainer.run() == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("sft-kernels: warning: the model is in ")
    assert line.endswith(f"then RuntimeError: out of memory {ESCAPED}")


def test_a_name_that_is_too_long_does_not_hide_the_error(trainer, capsys):
    trainer.error, trainer.saves, trainer.out = ValueError("data: bad"), False, trainer.out / ("x" * 300)
    assert trainer.run() == 1
    assert capsys.readouterr().err == "sft-kernels: data: bad\n"


@pytest.mark.parametrize("error", [ValueError("data: bad"), NotSaved("out: saved elsewhere")])
def test_a_run_that_did_not_save_there_ends_with_1(error, trainer, capsys):
    trainer.error, trainer.saves = error, isinstance(error, NotSaved)
    assert trainer.run() == 1
    assert capsys.readouterr().err == f"sft-kernels: {error}\n"
    trainer.saves = False
    (trainer.out / "model").mkdir(parents=True, exist_ok=True)  # an earlier run's
    assert trainer.run() == 1


def test_an_error_that_is_a_bug_keeps_its_traceback(trainer):
    trainer.error, trainer.saves = RuntimeError("a bug"), False
    stdout = sys.stdout
    with pytest.raises(RuntimeError, match="a bug"):
        trainer.run()
    assert sys.stdout is stdout


@pytest.mark.parametrize("error", [ValueError, OSError, ImportError, KeyboardInterrupt])
def test_an_error_is_one_line_without_control_characters(error, trainer, capsys):
    trainer.error, trainer.saves = error(f"first\n  second {HOSTILE}"), False
    assert trainer.run() == (130 if error is KeyboardInterrupt else 1)
    assert capsys.readouterr().err == f"sft-kernels: first second {ESCAPED}\n"


def test_names_of_files_and_values_of_recipes_are_escaped(tmp_path, capsys):
    path = tmp_path / "\x1b[31m.jsonl"
    path.write_text(conversation("\x1b[1m\u202e", "b\x9b") + "{\n")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text('model: "a\\e[31mb"\n')
    assert cli.main(["inspect", str(path), "--skip-bad"]) == 0
    for argv in (f"train --config {recipe} --help", "train --\x1b[2Jx", "verify --\x1b[1m"):
        with pytest.raises(SystemExit):
            cli.main(argv.split(" "))
    said = "".join(capsys.readouterr())
    assert r"\x1b[31m.jsonl:1: " in said
    assert r"\x1b[31mb" in said
    assert all(c.isprintable() or c == "\n" for c in said)


# ---- what is missing


def test_a_missing_module_is_named_with_the_extra_that_brings_it(trainer, capsys):
    trainer.saves = False
    trainer.error = ModuleNotFoundError("No module named 'yaml.x'", name="yaml.x")
    assert trainer.run() == 1
    assert capsys.readouterr().err == (
        'sft-kernels: the module yaml is missing; the extra "train" brings what the trainer needs: '
        "pip install --no-build-isolation '.[train]' in a clone\n"
    )
    trainer.error = ModuleNotFoundError("No module named 'sentencepiece'", name="sentencepiece")
    assert trainer.run() == 1
    assert capsys.readouterr().err == "sft-kernels: the module sentencepiece is missing\n"
    trainer.error = ImportError("cannot import name 'a' from 'transformers'", name="transformers")
    assert trainer.run() == 1
    assert "cannot import name 'a' from 'transformers'; the extra" in capsys.readouterr().err
    trainer.error = ModuleNotFoundError("No module named 'sft_kernels.x'", name="sft_kernels.x")
    with pytest.raises(ImportError):
        trainer.run()


def test_the_modules_of_the_extra_are_those_of_pyproject():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    names = {part.split(">")[0].split("=")[0].strip().lower() for part in extras["train"]}
    assert {*cli._TRAIN} == {{"pyyaml": "yaml"}.get(name, name) for name in names}


# ---- processes


def saved(train):
    out = train[-1]
    rows = [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]
    assert ["loss" in row for row in rows] == [False, True, False, False]  # two measurements and the end
    return (out / "model" / "model.safetensors").is_file()


def test_a_run_whose_readers_are_gone_goes_on(train):
    with without_reader() as pipe:
        done = process(*train, capture_output=False, stdout=pipe, stderr=pipe)
    assert done.returncode == 0
    assert saved(train)


def test_a_run_without_descriptors_writes_its_text_into_no_file(train):
    """The shell closes all three, so that a file opened later gets the number of one."""
    argv = [*CLOSING, sys.executable, "-c", MAIN, *map(str, train)]
    assert subprocess.run(argv, cwd=ROOT, env=ENV).returncode == 0
    assert saved(train)


@full
def test_a_run_on_a_full_disk_and_an_ascii_terminal_says_what_is_lost(train, monkeypatch):
    err = stream("ascii")
    with contextlib.suppress(OSError), open("/dev/full", "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        assert cli.main([str(arg) for arg in train]) == 0
    said = err.buffer.getvalue().decode("ascii")
    assert said.splitlines()[-1] == "sft-kernels: the output was lost (No space left on device)"
    assert saved(train)


@pytest.mark.parametrize("argv", [["--help"], ["train", "--help"]])
def test_help_on_any_terminal(argv):
    with without_reader() as pipe:
        done = process(*argv, capture_output=False, stdout=pipe, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (0, "")
    plain = {**ENV, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = process(*argv, env=plain)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.isascii()
    if Path("/dev/full").exists():
        with open("/dev/full", "w") as file:
            done = process(*argv, capture_output=False, stdout=file, stderr=subprocess.PIPE)
        assert done.returncode == 1
        assert done.stderr == "sft-kernels: the output was lost (No space left on device)\n"


def test_a_wrong_option_on_an_ascii_terminal():
    done = process("train", "--stepz", "é…", env={**ENV, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 2
    assert done.stderr.isascii()
    assert "--stepz" in done.stderr


def test_an_opened_file_gets_no_number_of_a_closed_stream(tmp_path):
    """Neither what Python prints nor what is written to the descriptors ends in it."""
    before = f"""
import os, sys, sft_kernels.cli as cli
def work(argv):
    with open({str(tmp_path / "mine")!r}, "w") as file:
        print("stdout"); print("stderr", file=sys.stderr)
        os.write(1, b"1"); os.write(2, b"2")
        file.write(str(file.fileno() > 2))
    return 0
cli._inspect = work
"""
    argv = [*CLOSING, sys.executable, "-c", f"{before}\n{MAIN}", "inspect"]
    assert subprocess.run(argv, cwd=ROOT).returncode == 0
    assert (tmp_path / "mine").read_text() == "True"
