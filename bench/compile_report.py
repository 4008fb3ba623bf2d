"""Every Triton kernel compiled for sm_80 and sm_90 without a GPU, and held against a committed table of budgets.

``python -m bench.compile_report [--ops NAME … | --csrc] [--json FILE]``. The cases in ``launches/`` call the real
launchers with tensors on the CPU, under a driver that compiles what would be launched and launches nothing: so
signatures, alignment and constants are those of the launcher, and nothing is measured that nobody launches. What is
read off the binaries: ``binary.py``. With ``--csrc`` the same of the CUDA kernels, from the library as it is built:
``csrc.py``. The exit status is 1 where a budget is broken, 2 for a wrong call.
"""

import argparse
import contextlib
import json
import os
import pkgutil
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from . import binary, csrc, launches
from .results import versions

OPS = tuple(sorted(module.name for module in pkgutil.iter_modules(launches.__path__)))
ARCHS = (80, 90)


class Row(NamedTuple):
    op: str
    case: str
    kernel: str
    facts: binary.Facts
    broken: list


class Launch(NamedTuple):
    kernel: str
    compiled: Any  # triton's CompiledKernel, never loaded


class _Driver:
    """Stands in for a GPU of ``arch`` as far as Triton's launcher asks; the architecture is also the device's number,
    by which kernels are cached."""

    def __init__(self, arch):
        from triton.backends.compiler import GPUTarget

        self.target, self.arch = GPUTarget("cuda", arch, 32), arch

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.arch

    def get_current_stream(self, device):
        return 0


@contextlib.contextmanager
def recording(arch):
    """Within it Triton's launches are compiled for ``arch`` and kept in the list that is yielded, not made."""
    import triton
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    if triton.knobs.runtime.interpret:
        raise RuntimeError("compiles nothing under TRITON_INTERPRET=1")
    launched, run, active = [], JITFunction.run, driver._active

    def compiling(self, *args, grid, warmup, **kwargs):
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        launched.append(Launch(self.fn.__name__, compiled))
        return compiled

    JITFunction.run = compiling
    driver.set_active(_Driver(arch))
    try:
        yield launched
    finally:
        JITFunction.run = run
        driver._active = active  # reset_active() would look for a GPU


def report(ops=OPS):
    """Yield a :class:`Row` for each kernel of each case on each architecture."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        for op in ops:
            for name, (launch, needs) in import_module(f"{launches.__name__}.{op}").CASES.items():
                for arch in ARCHS:
                    with recording(arch) as launched:
                        launch()
                    if {kernel for kernel, _ in launched} != {*needs}:
                        found = sorted({kernel for kernel, _ in launched})
                        raise RuntimeError(f"{op}, {name}: launched {found}, the table has {sorted(needs)}")
                    for kernel, compiled in {(k, c.hash): (k, c) for k, c in launched}.values():
                        file.write_bytes(compiled.asm["cubin"])
                        metadata, need = compiled.metadata, needs[kernel]
                        facts = binary.facts(file, arch, metadata.num_warps, metadata.shared, need.element)
                        yield Row(op, name, kernel, facts, binary.broken(facts, need))


def line(row):
    def widths(found):
        return " ".join(f"{bits}×{count}" for bits, count in found.items()) or "–"

    facts = row.facts
    in_flight = " ".join(f"{loop.in_flight / 1024:.0f}" for loop in facts.loops) or f"{facts.in_flight / 1024:.0f}"
    instructions = "–" if facts.instructions is None else f"{facts.instructions:.1f}"
    columns = (
        f"{row.op:<17}{row.case:<38}{row.kernel:<22}{facts.arch:>3}{facts.registers:>5}{facts.stack:>6}"
        f"{facts.shared / 1024:>7.1f}{facts.resident_warps:>4}{in_flight:>12}{instructions:>6}  "
        f"{widths(facts.loads):<18}{widths(facts.stores):<16}{' '.join(facts.tensor_core) or '–':<6}"
    )
    return columns.rstrip() + "".join(f"\n    BROKEN: {sentence}" for sentence in row.broken)


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m bench.compile_report", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--ops", nargs="+", choices=OPS, default=OPS, help="all without it")
    parser.add_argument("--csrc", action="store_true", help="the kernels of csrc, as they are built, and not Triton's")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows")
    args = parser.parse_args(argv)
    if args.csrc and csrc.library() is None:
        parser.error("--csrc: the library is not built: make cuda")
    print(
        f"{'op':<17}{'case':<38}{'kernel':<22}{'sm':>3}{'regs':>5}{'stack':>6}{'sh. KB':>7}{'wrp':>4}{'KB fly':>12}"
        f"{'instr':>6}  {'loads, bits':<18}{'stores, bits':<16}mma"
    )
    rows = []
    for row in map(Row._make, csrc.report()) if args.csrc else report(args.ops):
        rows.append(row)
        print(line(row), flush=True)
    off = sum(bool(row.broken) for row in rows)
    print(f"\n{len(rows)} kernels, {off} outside their budget")
    if args.json:
        document = {"facts": versions(), "rows": [{**r._asdict(), "facts": r.facts._asdict()} for r in rows]}
        args.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 1 if off else 0


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # before triton is imported
    sys.exit(main())
