"""Versions, the commit, the machine: a figure is read with them. Imports nothing but the standard library."""

import functools
import importlib.metadata
import platform
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
DISTRIBUTIONS = (
    "torch triton liger-kernel cut-cross-entropy quack-kernels trl apex bitsandbytes torchao flash-attn flash-attn-3"
    " flash-attn-4 nvidia-cutlass-dsl-libs-cu13 apache-tvm-ffi transformers"
).split()


def versions():
    """Returns ``{name: version}`` of Python and of every distribution that is installed of those that matter here."""
    found = {"python": platform.python_version()}
    for name in DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def code_state():
    """Returns ``(commit, whether tracked files differ from it)`` as of the first call; None where git does not say.

    To be called before anything is measured: what is committed during a run is not what ran.
    """
    commit = first_line(["git", "rev-parse", "HEAD"])
    changes = ["git", "status", "--porcelain", "--untracked-files=no"]
    return commit, None if commit is None else first_line(changes) is not None


def first_line(command):
    """Returns the first line that a command prints, run in the repository, or None if it is missing, fails or is
    silent."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else None


def publish(parsed, name, page):
    """Writes a page of Markdown to ``parsed.out``, else into bench/results; prints it if ``parsed.only`` names some."""
    out = parsed.out
    if out is None and not parsed.only:
        out = ROOT / "bench" / "results" / name
    if out is None:
        print(page)
    else:
        replace(out, page)


def replace(path, content):
    """Write bytes or text into a file that is whole at every moment: the old one, or the new."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    partial.replace(path)
