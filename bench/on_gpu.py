"""Everything that only a GPU can show, in calls of minutes: ``python -m bench.on_gpu --out DIR --minutes N``.

The most valuable part first: all kernels compiled on the machine's cores while the GPU is free, each kernel once
against the oracle, the GPU tests, all of ``verify``, then what is measured, and compute-sanitizer last. ``PARTS`` says
what each is. Two calls are natural: three minutes that say what is broken, then seven that measure, the second with
``--after`` the first's DIR. How to go about it: the section "Fifteen minutes on a GPU" of bench/README.md.

DIR gets two files, ``summary.txt`` and ``results.tgz``, each under 16 MiB and rewritten after every part. Caches lie
under ``build/``, where a machine that is kept finds them again. Nothing is fetched. The exit status is 0 if every part
passed or had nothing to do, 1 if one did not, 2 for a wrong call or if there is no GPU.
"""

import argparse
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

from . import parts, wheels
from .facts import ROOT, code_state, first_line, versions
from .parts import Part, Stage

CACHE = ROOT / "build" / "gpu_cache"
SITE = CACHE / "peers"
NO_TESTS = 5  # pytest's exit status where none was collected
NO_CUDA = "left out by --without-cuda"
NOT_BUILT = "the CUDA kernels are not built: make cuda here, or pass --without-cuda"
QUIET = ("-q", "-p", "no:cacheprovider")
IMPLEMENTATIONS = {
    "cross_entropy": ("triton", "cuda", "torch"),
    "linear_cross_entropy": ("triton", "cuda", "torch"),
    "packed_attention": ("triton", "flash", "torch"),
    "adamw": ("triton", "cuda", "torch"),
}
PARTS = {  # in the order of their value
    "compile": "compiles every kernel, in parallel, while the GPU is free",
    "wheels": "unpacks the wheels of --peers",
    "smoke": "each op, implementation and dtype once against the oracle, launches blocking",
    "tests": "the tests marked gpu",
    "verify": "all of sft-kernels verify",
    "loss": "the suite of linear_cross_entropy",
    "attention": "the suite of packed_attention",
    "adamw": "the suite of AdamW",
    "step": "a whole training step of a 1 B model, stock and ours, padded and packed",
    "compare": "sft-kernels train --compare: twenty steps of the trainer, ours and plain PyTorch",
    "sweep": "other configurations of the core and of attention",
    "slow": "the rivals that compile for half a minute and more: QuACK, flash-attn 4, FlexAttention, torch.compile",
    "given": "the suite of cross_entropy over given logits",
    "counters": "Nsight Compute's counters of the core and of an attention kernel",
    "memcheck": "compute-sanitizer's memcheck over every kernel",
}


_MARKED = re.compile(r"^(pytestmark = .*|\s*@?)pytest\.mark\.gpu\b", re.M)


class Plan:
    """The stages of one call."""

    def __init__(self, folder, *, rehearse=False, without_cuda=False, peers=None, arch=90):
        self.folder, self.rehearse, self.without_cuda, self.arch = folder, rehearse, without_cuda, arch
        self.peers = peers
        self.tiny = ("--tiny",) if rehearse else ()

    def stages(self):
        """All of them, in the order of ``PARTS``. A CPU gets three times as long for each."""
        found = [getattr(self, f"_{name}")() for name in PARTS]
        if not self.rehearse:
            return found
        return [s._replace(parts=tuple(p._replace(seconds=3 * p.seconds) for p in s.parts)) for s in found]

    def _python(self, *arguments):
        """The command ``python -m …``; in a rehearsal under a pretended GPU."""
        before = ("bench.pretend",) if self.rehearse else ()
        return (sys.executable, "-m", *before, *map(str, arguments))

    def _compile(self):
        workers = 2 if self.rehearse else min(16, os.cpu_count() or 1)
        command = (sys.executable, "-m", "bench.precompile", "--arch", str(self.arch), *self.tiny, "--share")
        env = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
        found = tuple(Part(f"compile.{i:02}", 75, (*command, f"{i}/{workers}"), env=env) for i in range(workers))
        return Stage("compile", found, workers, again=True)

    def _wheels(self):
        part = Part("wheels", absent="no --peers")
        if self.peers:
            part = Part("wheels", 60, (sys.executable, "-m", "bench.wheels", str(self.peers), "--into", str(SITE)))
        return Stage("wheels", (part,), again=True)

    def _smoke(self):
        return Stage("smoke", tuple(self._verified("smoke", 60, "--smoke", blocking=True)), 4)

    def _verify(self):
        return Stage("verify", tuple(self._verified("verify", 100)), 4)

    def _verified(self, stage, seconds, *options, blocking=False):
        """A process for each op and implementation, so that a fault poisons no other."""
        for op, implementations in IMPLEMENTATIONS.items():
            for implementation in implementations:
                name = f"{stage}.{op}.{implementation}"
                if implementation == "cuda" and (why := self._no_library()):
                    yield Part(name, **why)
                    continue
                if self.rehearse and implementation == "flash":
                    yield Part(name, absent="needs a GPU")
                    continue
                command = self._python("sft_kernels.cli", "verify", "--device", "cuda", *options, "--ops", op)
                command += ("--impls", implementation, "--json", str(self.folder / f"{name}.json"))
                env = {"CUDA_LAUNCH_BLOCKING": "1"} if blocking else {}
                yield Part(name, seconds, command, env=env)

    def _no_library(self):
        """Returns how a part of the CUDA kernels ends if they are not there, else None."""
        if self.without_cuda:
            return {"absent": NO_CUDA}
        if self.rehearse:
            return {"absent": "needs a GPU"}
        return None if any((ROOT / "sft_kernels").glob("_C*.so")) else {"broken": NOT_BUILT}

    def _tests(self):
        found = []
        for path in sorted((ROOT / "tests").rglob("test_*.py")):
            if not _MARKED.search(path.read_text(encoding="utf-8")):
                continue
            name = f"tests.{'.'.join(path.relative_to(ROOT / 'tests').with_suffix('').parts)}"
            if path.parent.name == "csrc" and (why := self._no_library()) and not self.rehearse:
                found.append(Part(name, **why))
                continue
            command = (sys.executable, "-m", "pytest", str(path.relative_to(ROOT)), "-m", "gpu", *QUIET)
            env = (
                {} if self.rehearse else {"SFT_KERNELS_NO_SKIPS": "1"}
            )  # a file of which all is skipped has not passed
            found.append(Part(name, 110, command, env=env, nothing_to_do=NO_TESTS if self.rehearse else None))
        return Stage("tests", tuple(found), 6)

    def _suite(self, name, module, seconds, rivals="quick"):
        options = (*QUIET, "-s", "--benchmark-quiet", "--device", "cuda", "--rivals", rivals)
        options += ("--results", self.folder, "--plots", self.folder, *self.tiny)
        return Part(name, seconds, self._python("pytest", f"bench/{module}.py", *options))

    def _loss(self):
        return Stage("loss", (self._suite("loss", "bench_linear_cross_entropy", 90),))

    def _attention(self):
        return Stage("attention", (self._suite("attention", "bench_packed_attention", 90),))

    def _adamw(self):
        return Stage("adamw", (self._suite("adamw", "bench_adamw", 45),))

    def _given(self):
        return Stage("given", (self._suite("given", "bench_cross_entropy", 60),))

    def _slow(self):
        suites = {"attention": "packed_attention", "loss": "linear_cross_entropy", "given": "cross_entropy"}
        found = [self._suite(f"slow.{name}", f"bench_{op}", 150, "slow") for name, op in suites.items()]
        if self.peers:  # impl="flash" by the library that the wheels bring
            flash = self._verified("slow.verify", 150)
            found += [part for part in flash if part.name.endswith(".flash")]
        return Stage("slow", tuple(found))

    def _step(self):
        return self._module("step", "bench.whole_step", 100)

    def _compare(self):
        return self._module("compare", "bench.compare", 90)

    def _sweep(self):
        return self._module("sweep", "bench.sweep", 75)

    def _module(self, name, module, seconds):
        options = ("--device", "cuda", "--results", self.folder, *self.tiny)
        return Stage(name, (Part(name, seconds, self._python(module, *options)),))

    def _counters(self):
        """Under ncu, where that is; a rehearsal runs the kernels without it."""
        found = []
        for kernel in ("core", "attention"):
            name = f"counters.{kernel}"
            profile = () if self.rehearse else ("--profile", self.folder / f"{name}.csv")
            command = self._python("bench.counters", kernel, *self.tiny, *profile)
            missing = not self.rehearse and shutil.which("ncu") is None
            found.append(Part(name, absent="ncu is not on the path") if missing else Part(name, 60, command))
        return Stage("counters", tuple(found))

    def _memcheck(self):
        found = []
        for implementation in ("triton", "cuda"):
            name = f"memcheck.{implementation}"
            why = self._no_library() if implementation == "cuda" else None
            if why is None and shutil.which("compute-sanitizer") is None:
                why = {"absent": "compute-sanitizer is not on the path"}
            if why is None:
                command = self._python("sft_kernels.cli", "verify", "--smoke", "--device", "cuda")
                command += ("--impls", implementation)
                why = {"command": ("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "1", *command)}
                why["env"] = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # in whose blocks stray accesses would be legal
            found.append(Part(name, 150, **why))
        return Stage("memcheck", tuple(found), 2)


def chosen(stages, only):
    """Returns the stages and parts that a name of ``only`` means: a stage's, a part's, or a beginning up to a full
    stop."""
    kept = []
    for stage in stages:
        found = tuple(p for p in stage.parts if any(p.name == name or p.name.startswith(f"{name}.") for name in only))
        if found:
            kept.append(stage._replace(parts=found))
    return kept


def environment(scratch, with_peers=False):
    """Returns the environment of every part: caches under ``build/``, temporary files in ``scratch``, no network."""
    folders = {
        name: CACHE / name.lower()
        for name in "XDG_CACHE_HOME TRITON_HOME TRITON_CACHE_DIR TORCHINDUCTOR_CACHE_DIR CUDA_CACHE_PATH"
        " MPLCONFIGDIR HYPOTHESIS_STORAGE_DIRECTORY".split()
    } | {"TMPDIR": scratch}
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
    path = (str(ROOT), os.environ.get("PYTHONPATH"), *(wheels.paths(SITE) if with_peers else ()))
    path = os.pathsep.join(filter(None, path))
    settings = {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    return os.environ | {name: str(folder) for name, folder in folders.items()} | settings


def _gpu():
    """Returns ``(name and driver, architecture)`` as nvidia-smi says them, or None."""
    said = first_line(["nvidia-smi", "--query-gpu=name,driver_version,compute_cap", "--format=csv,noheader"])
    if said is None:
        return None
    name, driver, capability = (each.strip() for each in said.split(","))
    return f"{name}, driver {driver}", int(capability.replace(".", ""))


def main(argv=None, start=None):
    start = time.monotonic() if start is None else start
    parser = argparse.ArgumentParser(
        prog="python -m bench.on_gpu",
        description=(__doc__ or "").partition("\n")[0],
        epilog="parts: " + "; ".join(f"{name}: {what}" for name, what in PARTS.items()),
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for summary.txt and results.tgz")
    parser.add_argument("--minutes", type=float, required=True, help="wall clock for everything")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these parts; smoke.adamw is some of smoke")
    parser.add_argument("--after", type=Path, metavar="DIR", help="leave out what passed in the run that wrote DIR")
    parser.add_argument("--peers", type=Path, metavar="FOLDER", help="wheels of other libraries to measure beside ours")
    parser.add_argument("--without-cuda", action="store_true", help="the CUDA kernels may be absent")
    parser.add_argument("--rehearse", action="store_true", help="the same parts with tiny shapes on a pretended GPU")
    args = parser.parse_args(argv)
    if not args.minutes > 0:
        parser.error(f"--minutes: expected more than 0, got {args.minutes:g}")
    gpu = ("a rehearsal, no GPU", 90) if args.rehearse else _gpu()
    if gpu is None:
        parser.error("no GPU: nvidia-smi finds none; --rehearse runs the parts on the CPU")
    if args.peers and not args.peers.is_dir():
        parser.error(f"--peers: {args.peers} is no folder")
    before, facts = set(), {"device": gpu[0], **versions()}
    facts["commit"], facts["uncommitted changes"] = code_state()
    if args.after:
        try:
            earlier, before = parts.passed_in(args.after)
        except ValueError as error:
            parser.error(f"--after: {error}")
        for name in ("device", "torch", "triton"):
            if earlier.get(name) != facts.get(name):
                parser.error(f"--after: {args.after} is of {name} {earlier.get(name)}, this is {facts.get(name)}")
        if earlier.get("commit") != facts["commit"]:  # what was mended since is for the caller to run again: --only
            facts["passed before at"] = earlier.get("commit")
    work = CACHE.parent / "on_gpu" / str(os.getpid())
    folder, scratch = work / "results", work / "tmp"
    plan = Plan(
        folder,
        rehearse=args.rehearse,
        without_cuda=args.without_cuda,
        peers=args.peers and args.peers.resolve(),
        arch=gpu[1],
    )
    stages = plan.stages()
    if args.only:
        known = {stage.name for stage in stages} | {part.name for stage in stages for part in stage.parts}
        for name in args.only:
            if name not in known and not chosen(stages, [name]):
                parser.error(f"--only: no part is called {name}; there are {', '.join(PARTS)}")
        stages = chosen(stages, [*args.only, *(["wheels"] if args.peers else [])])
    out = args.out.resolve()
    try:
        out.mkdir(parents=True, exist_ok=True)
        folder.mkdir(parents=True)
    except OSError as error:
        parser.error(f"--out: {error}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that running parts are ended too
    env = environment(scratch, with_peers=args.peers is not None)
    run = parts.Run(folder, out, facts, start + 60 * args.minutes, env, before)
    try:
        outcomes = run.go(stages)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return 0 if all(outcome.ok for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
