"""Other configurations of the kernels, timed: ``python -m bench.sweep --device cuda --results FOLDER``.

A configuration says how much of its operands a program holds and how many warps it has; which is fastest only a GPU can
say. The candidates are those that the compiler did not rule out (no spills to speak of). For each kernel all of them
take turns over the same inputs, behind a filled launch queue, after each has been held against the error budget. What
is chosen is written into the tables by hand.
"""

import argparse
import contextlib
import datetime
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch

import sft_kernels
from sft_kernels.ops.packed_attention import triton_shared
from sft_kernels.ops.softmax_grad import triton_impl
from sft_kernels.ops.softmax_grad.options import LossOptions

from . import right, timing
from .bench_packed_attention import lengths_of, useful_flops
from .facts import code_state, replace, versions
from .peers import Attention
from .results import device_facts, file_name
from .suite import recorded

# Rows, inner, warps, stages, for heads of 128; the first of each is the table's. Counted in the compiler for sm_90
# (registers, bytes of stack, CTAs an SM): bench/NOTES.md.
FORWARD = [(128, 64, 8, 3), (64, 64, 4, 3), (128, 128, 8, 2), (128, 64, 8, 2)]
DQUERY = [(128, 64, 8, 2), (64, 64, 4, 1), (64, 64, 4, 2), (64, 64, 8, 2)]
DKEY = [(128, 32, 8, 2), (128, 64, 8, 2), (64, 64, 8, 2), (64, 32, 4, 2)]
D = 128
# Groups of eight columns in a tile, warps. From the third on fewer rows are in flight on the GPU, 34 to 68 MB, so that
# the second read of a row may still find it in the L2 cache.
CORE = [(512, 8), (512, 4), (1024, 16), (1024, 8), (2048, 32), (2048, 16), (1024, 32)]
V = 128256


class Knob(NamedTuple):
    """One entry of a table of configurations, and what to try there."""

    kernel: str
    table: dict
    key: Any
    candidates: list
    passes: str  # what is timed

    @contextlib.contextmanager
    def at(self, candidate):
        """Within it the table says ``candidate``."""
        before = self.table[self.key]
        self.table[self.key] = candidate
        try:
            yield
        finally:
            self.table[self.key] = before


def attention_knobs(major):
    for kernel, candidates, passes in (
        ("forward", FORWARD, "forward"), ("dquery", DQUERY, "backward"), ("dkey", DKEY, "backward"),
    ):  # fmt: skip
        table = triton_shared.CONFIGS[kernel]
        found = dict.fromkeys(
            [table[major, D], *(triton_shared.Config(*each) for each in candidates)]
        )  # the table's first
        yield Knob(kernel, table, (major, D), [*found], passes)


def core_knob():
    table, key = triton_impl.CONFIGS, ("twice", 2)
    found = dict.fromkeys([table[key], *(triton_impl.Config(*each) for each in CORE)])
    return Knob("core", table, key, [*found], "forward + backward")


def launches():
    """Yields ``(name, launch)`` of each candidate, for ``bench.precompile``: the passes over one small row."""
    from .launches.packed_attention import _both
    from .launches.softmax_grad import _core

    small = {"core": lambda: _core(V, torch.bfloat16)}
    for knob in (core_knob(), *attention_knobs(9)):
        for candidate in knob.candidates:

            def launch(knob=knob, candidate=candidate):
                with knob.at(candidate):
                    small.get(knob.kernel, lambda: _both(D, torch.bfloat16))()

            yield f"sweep, {knob.kernel}, {label(candidate)}", launch


def label(candidate):
    return ", ".join(f"{name} {value}" for name, value in candidate._asdict().items())


class Attentions:
    """Forward or backward of attention over one layout, as a cell of its suite is."""

    def __init__(self, layout, T, device, tiny):
        Hq, Hkv = (4, 2) if tiny else (32, 8)
        self.parameters = {"layout": layout, "T": T, "Hq": Hq, "Hkv": Hkv, "D": D}
        self.device, self.tiny = device, tiny
        lengths = lengths_of(layout, T)
        self.bounds = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
        self.tiles = sft_kernels.AttentionTiles.from_cu_seqlens(self.bounds, T)
        self.longest = max(lengths)
        generator = torch.Generator(device).manual_seed(0)
        shapes = [(T, H, D) for H in (Hq, Hkv, Hkv, Hq)]
        made = [torch.randn(s, generator=generator, device=device).to(torch.bfloat16) for s in shapes]
        self.qkv, self.dout = [t.requires_grad_() for t in made[:3]], made[3]

    def _attend(self):
        return sft_kernels.packed_attention(*self.qkv, self.bounds, self.longest, tiles=self.tiles, impl="triton")

    def rival(self, knob, candidate):
        def prepare():
            return self._attend() if knob.passes == "backward" else None

        def run(out):
            with knob.at(candidate):
                if out is None:
                    return self._attend()
                return torch.autograd.grad(out, self.qkv, self.dout)

        return timing.Rival(run, prepare)

    def error(self, knob, candidate):
        """Returns what ``right.checked`` says of short segments and one of more than a tile, over as many key heads as
        a configuration is taken for."""

        def make(bounds, longest):
            return Attention(lambda q, k, v: sft_kernels.packed_attention(q, k, v, bounds, longest, impl="triton"))

        shapes = *((4, 4) if self.tiny else (16, 4)), D, (16, 140, 1, 41)
        with knob.at(candidate):
            return right.checked(right.attention_error, make, self.device, torch.bfloat16, *shapes)

    def flops(self, knob):
        return useful_flops({**self.parameters, "pass": knob.passes})


class Cores:
    """The core over rows of a large vocabulary, in place, as a fused loss launches it."""

    def __init__(self, N, columns, device):
        generator = torch.Generator(device).manual_seed(0)
        self.device, self.options = device, LossOptions(columns)
        self.fresh = torch.randn(N, columns, generator=generator, device=device).to(torch.bfloat16)
        self.logits = self.fresh.clone()
        self.target = torch.randint(columns, (N,), generator=generator, device=device)
        self.scale = torch.full((N,), 1 / N, device=device)

    def rival(self, knob, candidate):
        def run(_):
            with knob.at(candidate):
                return triton_impl.softmax_grad(self.logits, self.target, self.options, self.scale)

        # Gradients of gradients are nearly constant, and a GPU is faster on such data than on a model's.
        return timing.Rival(run, lambda: self.logits.copy_(self.fresh))

    def bytes(self):
        """Returns the bytes that cannot be left out: each logit is read once and written once."""
        return 2 * self.logits.nbytes

    def error(self, knob, candidate):
        """Returns what ``right.checked`` says of some of the rows that are timed."""
        with knob.at(candidate):
            return right.checked(right.core_error, triton_impl.softmax_grad, self.fresh[:64], self.target[:64])


def measure(device, tiny, write):
    """Time every candidate; ``write(cell)`` is called with each cell as soon as it is known."""
    inputs = Cores(*((8, 512) if tiny else (8192, V)), device)
    write(cell(core_knob(), f"core, {len(inputs.target)} rows", inputs, device, tiny))
    del inputs
    torch.cuda.empty_cache()
    major = torch.cuda.get_device_capability(device)[0]
    layouts = [("mix", 128)] if tiny else [("mix", 16 << 10), (8 << 10, 16 << 10)]
    for layout, T in layouts:
        inputs = Attentions(layout, T, device, tiny)
        for knob in attention_knobs(major):
            name = f"{knob.kernel}, {T} tokens of {layout}"
            write(cell(knob, name, inputs, device, tiny))


def cell(knob, name, inputs, device, tiny):
    candidates = knob.candidates[:2] if tiny else knob.candidates
    rows = {label(c): inputs.error(knob, c) for c in candidates}
    rivals = {label(c): inputs.rival(knob, c) for c in candidates if "error" in rows[label(c)]}
    moved = inputs.bytes() if isinstance(inputs, Cores) else None
    floor = {"copy": timing.copy(moved // 2, device)} if moved else {}
    rounds = (2, 2) if tiny else (7, 40)
    samples, failed = timing.interleaved(rivals | floor, [()], device, budget=1.0, rounds=rounds)
    for row, reason in failed.items():
        rows[row]["raised"] = reason
    for row in rivals:
        if row in samples:
            rows[row] |= recorded(samples[row])
    found = {"cell": name, "rows": rows}
    if moved:
        return found | {"machine": {"copy": recorded(samples["copy"])}}
    return found | {"flops": inputs.flops(knob)}


def table(found):
    """Returns a cell as text, the fastest first."""

    def middle(row):
        return timing.spread(row.get("queued_seconds") or row["seconds"])[0]

    lines = [found["cell"]]
    timed = {name: row for name, row in found["rows"].items() if "seconds" in row}
    for name, row in sorted(timed.items(), key=lambda item: middle(item[1])):
        right = "" if row["error"] <= 1 else f"  OFF: {row['error']:.3g} × the error budget"
        if "flops" in found:
            rate = f"{found['flops'] / middle(row) / 1e12:>8.0f} TFLOP/s"
        else:
            rate = f"{middle(found['machine']['copy']) / middle(row):>8.0%} of a copy's bandwidth"
        lines.append(f"  {name:<44}{middle(row) * 1e3:>10.3f} ms{rate}{right}")
    for name, row in found["rows"].items():
        if name not in timed:
            lines.append(f"  {name:<44}{row.get('absent') or row.get('raised')}")
    return "\n".join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m bench.sweep", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", required=True, choices=("cuda",))
    parser.add_argument("--results", type=Path, required=True, help="folder of the JSON file")
    parser.add_argument("--tiny", action="store_true", help="shapes for a rehearsal; its timings are no figures")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    commit, changes = code_state()
    args.results.mkdir(parents=True, exist_ok=True)
    path = args.results / file_name("sweep", device, args.tiny)
    document = {
        "op": "sweep",
        "rehearsal": args.tiny,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "uncommitted_changes": changes,
        "device": {"type": device.type, **device_facts(device)},
        "versions": versions(),
        "cells": [],
    }
    off = []

    def write(found):
        document["cells"].append(found)
        replace(path, json.dumps(document, indent=1) + "\n")
        print(table(found), flush=True)
        own = next(iter(found["rows"]))  # the table's; a candidate may ask for more than the GPU has
        for name, row in found["rows"].items():
            if row.get("error", 0) > 1 or (name == own and "seconds" not in row):
                off.append(f"{found['cell']}: {name}")

    measure(device, args.tiny, write)
    for name in off:
        print(f"off or not measured: {name}")
    return 1 if off else 0


if __name__ == "__main__":
    sys.exit(main())
