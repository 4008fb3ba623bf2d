"""How long packed attention's kernels keep a GPU busy, and how long the last program keeps it waiting: a simulation.

``python -m bench.attention_schedule [--plot FILE]``. The hardware hands out the programs of a grid in order, each to
the first SM that is free. So a schedule is a list of costs: here the programs that the launchers would make of a
batch's ``AttentionTiles``, beside FlashAttention-2's grid of ``ceil(max_seqlen / 128) × batch × heads``, and beside the
ideal, all work spread evenly. Nothing here was measured: orders of the same work are compared under one model of its
cost.

The model, in units of one step of 128 queries past 64 keys of one head:

- a step of r rows past n others costs (0.2 + 0.8 r / 128) n / 64: what is loaded of the others does not shrink with r;
- a program with work costs 1.5 more: reading its own rows, filling the pipeline, writing its result;
- a program without work costs 0.05, one that only writes zeros or delta 0.5;
- an SM holds one program at a time, as the compile report says of D = 128.
"""

import argparse
import heapq
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from sft_kernels import AttentionTiles
from sft_kernels.ops.packed_attention.triton_shared import config_of

from .bench_packed_attention import lengths_of

SMS = {"H100": (132, 9), "A100": (108, 8)}  # SMs, and the compute capability whose configurations they take
KERNELS = ("forward", "dquery", "dkey")
FIXED, NOTHING, WRITING = 1.5, 0.05, 0.5
D = 128


class Schedule(NamedTuple):
    makespan: float
    ideal: float  # the work of the programs that have some, over the SMs
    longest: float  # program
    programs: int
    live: int

    @property
    def over_ideal(self):
        return self.makespan / self.ideal


def step(rows, others):
    return (0.2 + 0.8 * rows / 128) * others / 64


def schedule(costs, sms):
    """The :class:`Schedule` of programs of ``costs``, in this order, on ``sms``."""
    busy_until = [0.0] * sms
    for cost in costs:
        heapq.heapreplace(busy_until, busy_until[0] + cost)
    live = [cost for cost in costs if cost > NOTHING]
    return Schedule(max(busy_until), sum(live) / sms, max(live), len(costs), len(live))


def ours(kernel, lengths, Hq, Hkv, capability, tail=0):
    """The costs of the programs of ``kernel``, causal, in the order of its grid."""
    config = config_of(kernel, capability, D, Hkv)
    tiles = AttentionTiles.from_cu_seqlens(torch.tensor([0, *lengths]).cumsum(0), sum(lengths) + tail)
    split, small = tiles.block // config.rows, tiles.block // 2
    costs = []
    for start, stop, first in (tiles.key if kernel == "dkey" else tiles.query).tolist():
        for part in range(split):
            at = first + part * config.rows
            costs += [_cost(kernel, config, small, start, stop, at, Hq // Hkv)] * (Hkv if kernel == "dkey" else Hq)
    return costs


def _cost(kernel, config, small, start, stop, first, group):
    if first >= stop:
        return NOTHING
    if start < 0 or (kernel == "dquery" and stop - start <= small):
        return WRITING
    rows = small if stop - first <= small else config.rows
    heads, met = (group, stop - first) if kernel == "dkey" else (1, min(first + rows, stop) - start)
    products = {"forward": 2, "dquery": 3, "dkey": 4}[kernel] / 2  # of rows with others, a forward's step having two
    return FIXED + heads * -(-met // config.inner) * step(rows, config.inner) * products


def flash_attention_2(kernel, lengths, heads):
    """The costs of FlashAttention-2's programs in the order of its grid, tiles fastest; its backward is one kernel."""
    costs = []
    for _ in range(heads):
        for l in lengths:
            for first in range(0, max(lengths), 128):
                if first >= l:
                    costs.append(NOTHING)
                    continue
                met = min(first + 128, l) if kernel == "forward" else l - first
                costs.append(FIXED + -(-met // 64) * step(128, 64) * (1 if kernel == "forward" else 2.5))
    return costs


def table(T, Hq, Hkv, layout="mix", seed=0):
    """Rows of ``(GPU, kernel, Schedule)``, ours and FlashAttention-2's, of one batch."""
    lengths = lengths_of(layout, T, seed)
    for gpu, (sms, capability) in SMS.items():
        for kernel in KERNELS:
            yield gpu, kernel, schedule(ours(kernel, lengths, Hq, Hkv, capability), sms)
        for kernel in ("forward", "backward"):
            yield gpu, f"FA2 {kernel}", schedule(flash_attention_2(kernel, lengths, Hq), sms)


def plot(path, sizes, Hq=32, Hkv=8):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(SMS), figsize=(10, 4), sharey=True)
    found = {T: list(table(T << 10, Hq, Hkv)) for T in sizes}
    for axis, gpu in zip(axes, SMS, strict=True):
        for name in [*KERNELS, "FA2 forward", "FA2 backward"]:
            heights = [next(s.over_ideal for g, k, s in found[T] if (g, k) == (gpu, name)) for T in sizes]
            axis.plot(sizes, heights, marker="o", linestyle="--" if name in KERNELS else ":", label=name)
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.set_xscale("log", base=2)
        axis.set_xticks(sizes, [f"{T} k" for T in sizes])
        axis.set_xlabel("tokens, lognormal lengths of mean 350")
        axis.set_title(f"{gpu}, {SMS[gpu][0]} SMs, {Hq}/{Hkv} heads of {D}: simulated")
    axes[0].set_ylabel("time until the last program ends / ideal")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m bench.attention_schedule", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw the mixes")
    args = parser.parse_args(argv)
    columns = ("batch", "GPU", "kernel", "programs", "live", "longest", "ideal", "makespan", "over")
    print("{:<22}{:<6}{:<14}{:>9}{:>8}{:>9}{:>9}{:>10}{:>7}".format(*columns))
    for Hq, Hkv in ((32, 8), (8, 2)):
        for layout, T in [*(("mix", k) for k in (8, 16, 32, 64)), (512, 16), (2048, 16), (8192, 16)]:
            for gpu, kernel, s in table(T << 10, Hq, Hkv, layout):
                print(
                    f"{layout!s:<6}{T:>3} k, {f'{Hq}/{Hkv}':<8} {gpu:<6}{kernel:<14}{s.programs:>9}{s.live:>8}"
                    f"{s.longest:>9.1f}{s.ideal:>9.1f}{s.makespan:>10.1f}{s.over_ideal:>7.2f}"
                )
    if args.plot:
        plot(args.plot, (8, 16, 32, 64))
    return 0


if __name__ == "__main__":
    sys.exit(main())
