"""Kills a run at random moments and lets it go on: ``python -m bench.kill_and_resume``, on a CPU.

A run of ``sft-kernels train`` that nobody kills is compared, to the bit, with one that gets SIGKILL at ``--kills``
moments drawn at random over its whole time, from the start of the process to the writing of its last file, and goes on
with ``--resume`` after each. If it ends before the next kill, another run begins. ``--at STEP`` kills once, as soon as
that step's line is in the log.

The model is of random weights. Noise on the embeddings and dropout draw random numbers, and answers to held-out prompts
choose a best model.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

GPT2 = {"model_type": "gpt2", "vocab_size": 320, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 128}
OPTIONS = {
    "row-tokens": 128, "accumulate": 2, "lr": 3e-3, "holdout": 0.1, "eval-every": 10, "max-new-tokens": 8,
    "save-every": 7, "log-every": 1, "dropout": 0.1, "neftune-alpha": 5.0,
}  # fmt: skip
WORDS = ("red", "blue", "green", "two words", "look")


def prepare(folder):
    """Write data and a config; returns the options that all runs have."""
    folder.mkdir(parents=True)
    rng = random.Random(0)
    with open(folder / "chats.jsonl", "x") as file:
        for _ in range(80):
            word = rng.choice(WORDS)
            turns = [{"role": "user", "content": f"Say {word}, {rng.random()}"}, {"role": "assistant", "content": word}]
            file.write(json.dumps({"messages": turns}) + "\n")
    (folder / "config.json").write_text(json.dumps(GPT2))
    options = [part for name, value in OPTIONS.items() for part in (f"--{name}", str(value))]
    return ["--data", str(folder / "chats.jsonl"), "--model", str(folder / "config.json"), *options]


def start(options, out, *more):
    command = [sys.executable, "-m", "sft_kernels.cli", "train", *options, "--out", str(out), *more]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=env)


def finish(process):
    said = process.communicate()[1].decode()
    if process.returncode:
        raise SystemExit(f"a run ended with {process.returncode}:\n{said[-2000:]}")


def kill(process, after=None, step=None, log=None):
    """Kill after so many seconds, or once ``step`` is in the log; returns True unless the run ended before."""
    until = time.monotonic() + (after if after is not None else 600)
    while time.monotonic() < until and process.poll() is None:
        if step is not None and log.exists() and f'{{"step": {step}, "loss"' in log.read_text():
            break
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return process.returncode == -signal.SIGKILL


def contents(out):
    """A digest of each file that a run leaves. The picture, the times of ``speed.jsonl`` and the recipe's ``out`` and
    ``resume`` do not count."""
    found = {}
    for file in sorted(out.rglob("*")):
        if not file.is_file() or file.name in ("curves.png", "speed.jsonl", "files.json"):
            continue
        data = file.read_bytes()
        if file.name == "state.json":
            state = json.loads(data)
            state["recipe"] = {k: v for k, v in state["recipe"].items() if k not in ("out", "resume")}
            data = json.dumps(state).encode()
        found[file.relative_to(out).as_posix()] = hashlib.sha256(data).hexdigest()
    return found


def where(out):
    steps = sorted(int(p.name.removeprefix("step-")) for p in out.glob("checkpoints/step-*") if p.suffix == "")
    left = sorted(p.name for p in out.rglob("*.partial")) + sorted(p.name for p in out.rglob("*.replaced"))
    log = out / "train.jsonl"
    lines = log.read_text().count("\n") if log.exists() else 0
    return f"{lines} lines, checkpoints {steps or 'none'}{', half: ' + ', '.join(left) if left else ''}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("out/kill_and_resume"), help="a new folder")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--at", type=int, help="kill once, after this step")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    rng = random.Random(options.seed)
    shared = [*prepare(options.folder), "--steps", str(options.steps)]
    begin = time.monotonic()
    finish(start(shared, options.folder / "whole"))
    seconds = time.monotonic() - begin
    print(f"a run of {options.steps} steps that nobody kills: {seconds:.1f} s", flush=True)
    kills, runs = 0, 1
    while kills < (1 if options.at else options.kills):
        out = options.folder / f"killed-{runs}"
        process = start(shared, out, "--resume")
        if options.at:
            hit = kill(process, step=options.at, log=out / "train.jsonl")
        else:
            hit = kill(process, after=rng.uniform(0, seconds))
        kills += hit
        print(f"{kills:>3}. {'killed' if hit else 'ended before'}, run {runs}: {where(out)}", flush=True)
        runs += not hit
    if hit:
        finish(start(shared, options.folder / f"killed-{runs}", "--resume"))
    one, differ = contents(options.folder / "whole"), []
    folders = sorted(options.folder.glob("killed-*"))
    for folder in folders:
        other = contents(folder)
        differ += [f"{folder.name}/{name}" for name in one.keys() | other.keys() if one.get(name) != other.get(name)]
    print(
        f"{kills} kills in {len(folders)} runs; of {len(one)} files a run, {len(differ)} differ {sorted(differ) or ''}"
    )
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())
