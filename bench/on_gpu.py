"""Everything that only a GPU can show, in one call: ``python -m bench.on_gpu --out DIR --minutes N``.

The most valuable part first: every kernel once against the oracle, the tests marked ``gpu``, all of ``verify``,
compute-sanitizer over the compiled kernels, the suites. Each part is a process of its own with its own time limit, so
that one that hangs or crashes costs itself alone, and leaves its log, its JSON and a rewritten ``summary.txt`` and
``summary.json`` in DIR before the next begins. Run it from the repository; the package need not be installed. Nothing
is fetched, and nothing is written outside DIR. The exit status is 0 where every part passed or had nothing to do, 1
where one did not, 2 for a wrong call or where there is no GPU.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

from .results import first_line, versions
from .timing import ROOT

SUITES = ("linear_cross_entropy", "adamw", "packed_attention", "cross_entropy")
NO_TESTS = 5  # pytest's exit status where none was collected


class Part(NamedTuple):
    """One process. Without a command it has nothing to do, and ``absent`` says why."""

    name: str
    minutes: float
    command: tuple[str, ...] | None = None
    absent: str | None = None
    nothing_to_do: int | None = None  # the exit status that says so


class Outcome(NamedTuple):
    name: str
    verdict: str  # "passed", "absent", "failed", "crashed", "stopped", "not reached"
    seconds: float = 0.0
    detail: str = ""

    @property
    def ok(self):
        return self.verdict in ("passed", "absent")


def parts(out, device, smoke=False, tiny=False):
    """The parts in their order; ``tiny`` for a rehearsal."""

    def python(*arguments):
        return (sys.executable, "-m", *map(str, arguments))

    def verify(name, minutes, *options):
        command = python("sft_kernels.cli", "verify", "--device", device, "--json", out / f"{name}.json", *options)
        return Part(name, minutes, command)

    found = [verify("smoke", 3, "--smoke")]
    if smoke:
        return found
    quiet = ("-q", "-p", "no:cacheprovider")
    tests = python("pytest", "tests", "-m", "gpu", "--continue-on-collection-errors", *quiet)
    found.append(Part("tests", 8, tests, nothing_to_do=NO_TESTS))
    found.append(verify("verify", 6))
    found += sanitizer(python("sft_kernels.cli", "verify", "--smoke", "--device", device, "--impls", "cuda"))
    for op in SUITES:
        options = ("--benchmark-quiet", "--device", device, "--results", out, "--plots", out)
        options += ("--tiny",) if tiny else ()
        found.append(Part(f"bench_{op}", 6, python("pytest", f"bench/bench_{op}.py", *quiet, *options)))
    return found


def sanitizer(command):
    """compute-sanitizer's tools over a command that runs every compiled kernel once."""
    why = None
    if not any((ROOT / "csrc").glob("*.cu")):
        why = "there is no csrc"
    elif not any((ROOT / "sft_kernels").glob("_C*.so")):
        why = "the CUDA kernels are not built: make cuda"
    elif shutil.which("compute-sanitizer") is None:
        why = "compute-sanitizer is not on the path"
    if why:
        return [Part("sanitizer", 0, absent=why)]
    tools = ("memcheck", "racecheck", "initcheck")
    return [
        Part(f"sanitizer_{tool}", 4, ("compute-sanitizer", "--tool", tool, "--error-exitcode", "1", *command))
        for tool in tools
    ]


def run_parts(parts, out, minutes, facts):
    """Run them one after another within ``minutes`` of wall clock; every outcome is on disk before the next begins."""
    deadline = time.monotonic() + 60 * minutes
    env = environment(out)
    outcomes, parts = [], list(parts)

    def flush():  # an interruption must not leave what reads like a whole run
        write_summary(out, facts, [*outcomes, *(Outcome(part.name, "not reached") for part in parts[len(outcomes) :])])

    flush()
    for part in parts:
        left = deadline - time.monotonic()
        if part.command is None:
            outcomes.append(Outcome(part.name, "absent", detail=part.absent))
        elif left < 1:
            outcomes.append(Outcome(part.name, "not reached", detail=f"the {minutes:g} minutes were spent"))
        else:
            outcomes.append(run(part, min(60 * part.minutes, left), out / f"{part.name}.log", env))
        flush()
        print(line(outcomes[-1]), flush=True)
    return outcomes


def run(part, limit, log, env):
    """One part, killed with all its children after ``limit`` seconds."""
    start = time.monotonic()
    with log.open("w") as stream:
        process = subprocess.Popen(
            part.command,
            cwd=ROOT,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:  # also on an interrupt, and whatever a finished part left running
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    took = time.monotonic() - start
    if status is None:
        return Outcome(part.name, "stopped", took, f"after its {limit:.0f} s")
    if status == 0:
        return Outcome(part.name, "passed", took)
    if status == part.nothing_to_do:
        return Outcome(part.name, "absent", took, "nothing to run")
    if status < 0:
        return Outcome(part.name, "crashed", took, signal.Signals(-status).name)
    lines = log.read_text(errors="replace").strip().splitlines()
    return Outcome(part.name, "failed", took, f"exit {status}: {lines[-1][:100] if lines else 'no output'}")


def environment(out):
    """Caches and temporary files inside ``out``, the checkout importable, no network."""
    cache = out / "cache"
    folders = {
        name: str(cache / name.lower())
        for name in "TMPDIR XDG_CACHE_HOME TRITON_HOME TRITON_CACHE_DIR TORCHINDUCTOR_CACHE_DIR CUDA_CACHE_PATH"
        " MPLCONFIGDIR".split()
    }
    for folder in folders.values():
        Path(folder).mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return (
        os.environ
        | folders
        | {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1"}
        | {"HYPOTHESIS_STORAGE_DIRECTORY": str(cache / "hypothesis")}
    )


def line(outcome):
    return f"{outcome.name:<28}{outcome.verdict:<13}{outcome.seconds:>7.1f} s  {outcome.detail}".rstrip()


def write_summary(out, facts, outcomes):
    head = ", ".join(f"{key} {value}" for key, value in facts.items())
    (out / "summary.txt").write_text("\n".join([head, "", *map(line, outcomes)]) + "\n")
    document = {"facts": facts, "parts": [outcome._asdict() for outcome in outcomes]}
    (out / "summary.json").write_text(json.dumps(document, indent=1) + "\n")


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m bench.on_gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for logs, JSON, plots and the summary")
    parser.add_argument("--minutes", type=float, required=True, help="wall clock for everything")
    parser.add_argument("--smoke", action="store_true", help="the first part alone")
    parser.add_argument("--rehearse", action="store_true", help="the same parts on the CPU with tiny shapes")
    args = parser.parse_args(argv)
    if not args.minutes > 0:
        parser.error(f"--minutes: expected more than 0, got {args.minutes:g}")
    if not args.rehearse and not torch.cuda.is_available():
        parser.error(f"no GPU: torch {torch.__version__} sees no CUDA device; --rehearse runs the parts on the CPU")
    out = args.out.resolve()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out: {error}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the running part is ended too
    device = "cpu" if args.rehearse else "cuda"
    name = first_line(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"])
    facts = {"device": "CPU, a rehearsal" if args.rehearse else name, **versions()}
    facts["commit"] = first_line(["git", "rev-parse", "HEAD"])
    try:
        outcomes = run_parts(parts(out, device, args.smoke, tiny=args.rehearse), out, args.minutes, facts)
    finally:
        shutil.rmtree(out / "cache", ignore_errors=True)
    return 0 if all(outcome.ok for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
