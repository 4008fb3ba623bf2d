"""Runs that are stopped or killed, and what they leave."""

import json
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from sft_kernels.sft import run as running
from sft_kernels.sft.finish import Stopped
from sft_kernels.sft.out import SPEED, TENSORBOARD
from sft_kernels.sft.recipe import Recipe
from sft_kernels.sft.train import train

from .conftest import chat

ROOT = Path(__file__).parents[2]


def recipe_of(folder, model):
    """A run of three steps an epoch, with noise on the embeddings, evaluations and checkpoints."""
    data = folder / "chats.jsonl"
    words = ("Two words.", "red", "blue and green", "How many?", "look")
    data.write_text("".join(json.dumps(chat(f"How many {i}?", words[i % 5])) + "\n" for i in range(14)))
    return Recipe(
        data=[str(data)],
        model=str(model),
        out=str(folder / "run"),
        row_tokens=80,
        accumulate=2,
        steps=11,
        lr=1e-2,
        precision="fp32",
        neftune_alpha=5.0,
        holdout=0.15,
        eval_every=3,
        max_new_tokens=4,
        save_every=2,
        log_every=4,
    )


def stopped_in(number, recipe, **given):
    """Run ``recipe`` until SIGTERM comes in micro-batch ``number``."""
    loss, calls = running.linear_cross_entropy, []

    def called(*args, **kwargs):
        calls.append(None)
        if len(calls) == number:
            signal.raise_signal(signal.SIGTERM)
        return loss(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "linear_cross_entropy", called)
        with pytest.raises(Stopped) as e:
            train(recipe, **given)
    return e.value


def killed(moment, recipe):
    done = subprocess.run(
        [sys.executable, "-m", "tests.sft.killed", moment, json.dumps(asdict(recipe))], cwd=ROOT, capture_output=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]


def files_of(out):
    """All that a run leaves, as bytes by name, but for the picture and for what tells the time."""
    files = [file for file in Path(out).rglob("*") if file.is_file() and file.suffix != ".png"]
    files = [file for file in files if file.relative_to(out).parts[0] not in (SPEED, TENSORBOARD)]
    return {file.relative_to(out).as_posix(): file.read_bytes() for file in files}


def assert_same(a, b):
    """Two folders of runs, whose recipes differ in ``out`` alone, are equal to the bit."""
    a, b = files_of(a), files_of(b)
    assert a.keys() == b.keys()
    for name in a:
        if name.endswith("files.json"):
            continue  # has the hash of the next
        if name.endswith("state.json"):
            one, other = json.loads(a[name]), json.loads(b[name])
            for state in (one, other):
                for field in ("out", "resume"):
                    del state["recipe"][field]
            assert one == other
        else:
            assert a[name] == b[name], name
