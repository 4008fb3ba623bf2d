"""Ratios and peak memory of ``linear_cross_entropy`` against plain PyTorch and torch's own chunked loss.

``python -m bench.linear_cross_entropy [--json FILE]``. Times are medians of repeats that take turns within one process;
memory is the growth of the process's peak resident set over a forward and backward, each variant in a process of its
own.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from sft_kernels import linear_cross_entropy

N, D, V = 2048, 768, 32000
MASKED = (0.0, 0.5, 0.75, 0.95)


def variants():
    """Name → loss of (hidden, weight, labels). torch's chunked loss exists from 2.13 on."""
    named = {
        "ours": linear_cross_entropy,
        "unfused": lambda x, w, y: F.cross_entropy(F.linear(x, w), y),
    }
    if hasattr(F, "linear_cross_entropy"):
        options = torch.nn.LinearCrossEntropyOptions()
        named["torch chunked"] = lambda x, w, y: F.linear_cross_entropy(x, w, y, options=options)
    return named


def inputs(masked):
    """Hidden states, head and labels; the masked labels are the first ones, as prompts are."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, D, generator=generator).requires_grad_()
    w = torch.randn(V, D, generator=generator).mul_(D**-0.5).requires_grad_()
    y = torch.randint(0, V, (N,), generator=generator)
    y[: int(masked * N)] = -100
    return x, w, y


def timed(loss, x, w, y):
    x.grad = w.grad = None
    start = time.perf_counter()
    loss(x, w, y).backward()
    return time.perf_counter() - start


def floor(x, w, y):
    """The three products at exactly the shapes of the kept rows."""
    with torch.no_grad():
        kept = x[y != -100]
        start = time.perf_counter()
        logits = kept @ w.T
        logits @ w
        logits.T @ kept
        return time.perf_counter() - start


def measure(masked, repeats):
    x, w, y = inputs(masked)
    named = variants()
    samples = {name: [] for name in [*named, "floor"]}
    for _ in range(repeats + 1):
        for name, loss in named.items():
            samples[name].append(timed(loss, x, w, y))
        samples["floor"].append(floor(x, w, y))
    return {name: taken[1:] for name, taken in samples.items()}  # the first round warms up


def peak_extra_bytes(name, masked):
    """Growth of the peak resident set over one forward and backward, in a process of its own."""
    command = [sys.executable, "-m", "bench.linear_cross_entropy", "--peak-of", name, "--masked", str(masked)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _peak_of(name, masked):
    def high_water_mark():
        return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmHWM"))

    loss = variants()[name]
    tiny = torch.randn(8, 8, requires_grad=True), torch.randn(8, 8, requires_grad=True), torch.arange(8)
    loss(*tiny).backward()  # thread pools and code pages
    x, w, y = inputs(masked)
    before = high_water_mark()
    loss(x, w, y).backward()
    return high_water_mark() - before


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    parser.add_argument("--masked", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak_of:
        print(_peak_of(args.peak_of, args.masked))
        return

    results = []
    print(f"{N} × {D} × {V} fp32, forward + backward, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'masked':>7} {'loss':>14} {'median s':>9} {'min–max':>13} {'ours is':>9} {'of floor':>9} {'peak MB':>8}")
    for masked in MASKED:
        samples = measure(masked, args.repeats)
        median = {name: statistics.median(taken) for name, taken in samples.items()}
        for name, taken in samples.items():
            peak = None if name == "floor" else peak_extra_bytes(name, masked)
            spread = f"{min(taken):.2f}–{max(taken):.2f}"
            print(
                f"{masked:>7.0%} {name:>14} {median[name]:>9.3f} {spread:>13} {median[name] / median['ours']:>8.2f}×"
                f" {median[name] / median['floor']:>8.2f}× {'' if peak is None else f'{peak / 1e6:.0f}':>8}",
                flush=True,
            )
            results.append({"masked": masked, "loss": name, "seconds": taken, "peak_extra_bytes": peak})
    if args.json:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
        facts = {"shape": [N, D, V], "dtype": "float32", "device": f"{platform.machine()} CPU", "commit": commit}
        facts |= {"threads": torch.get_num_threads(), "torch": torch.__version__, "results": results}
        args.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
