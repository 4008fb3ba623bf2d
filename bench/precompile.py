"""Fills Triton's cache for a GPU without using it: ``python -m bench.precompile --arch 90 --share 0/16``.

What is compiled is what the cases of ``launches/``, every row of ``sft-kernels verify`` and the candidates of
``bench.sweep`` would launch: they run on a pretended GPU, under a driver that compiles and launches nothing. Several
processes, each with a share of them, fill one cache side by side. The exit status is 1 if a case raised.
"""

import argparse
import os
import sys
import time
from importlib import import_module

from .compile_report import OPS, recording
from .launches import __name__ as LAUNCHES
from .pretend import pretended


def cases(tiny=False):
    """Yields ``(name, launch)``; ``tiny`` takes the first of each kind."""
    for op in OPS:
        table = import_module(f"{LAUNCHES}.{op}").CASES
        for name in [*table][: 1 if tiny else None]:
            yield f"{op}, {name}", table[name][0]
    from sft_kernels.verify import DTYPES
    from sft_kernels.verify import OPS as verified

    for op, (_, case, families) in verified.items():
        for family in [*families][: 1 if tiny else None]:
            for name in [*DTYPES][: 1 if tiny else None]:
                if name not in families[family].get("not_for", ()):
                    yield f"{op}, {family}, {name}", _verified(case, op, DTYPES[name], families[family])
    if not tiny:
        from .sweep import launches

        yield from launches()


def _verified(case, op, dtype, options):
    return lambda: case(op, "triton", dtype, "cuda", options)


def _launcher(compiled):
    """Build what triton 3.6 launches a kernel with, half a second of C compiler each; returns why it cannot be.

    Later versions launch all kernels alike. The compiler needs the driver's library, but no GPU.
    """
    from triton.backends.nvidia import driver

    if not hasattr(driver, "make_launcher"):
        return None
    try:
        driver.CudaLauncher(compiled.src, compiled.metadata)
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m bench.precompile", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--arch", type=int, required=True, help="such as 90")
    parser.add_argument("--share", default="0/1", metavar="I/N", help="cases I, I + N, I + 2N, … alone")
    parser.add_argument("--tiny", action="store_true", help="a few cases, for a rehearsal")
    args = parser.parse_args(argv)
    try:
        at, of = map(int, args.share.split("/"))
    except ValueError:
        parser.error(f"--share: expected I/N, got {args.share}")
    if not 0 <= at < of:
        parser.error(f"--share: expected I/N with 0 ≤ I < N, got {args.share}")
    compiled, raised, lacking, start = set(), [], None, time.monotonic()
    with pretended():
        from sft_kernels._backend import Unavailable

        for name, launch in list(cases(args.tiny))[at::of]:
            with recording(args.arch) as launched:
                try:
                    launch()
                except Unavailable as reason:
                    print(f"{name}: {reason}")
                except Exception as error:
                    raised.append(f"{name}: {type(error).__name__}: {error}")
                    print(raised[-1], flush=True)
            for kernel, result in launched:
                if (kernel, result.hash) not in compiled:
                    compiled.add((kernel, result.hash))
                    lacking = lacking or _launcher(result)
    if lacking:
        print(f"launchers are left to the first launch: {lacking}")
    print(f"{len(compiled)} kernels in {time.monotonic() - start:.1f} s, {len(raised)} cases raised")
    return 1 if raised else 0


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # before triton is imported
    sys.exit(main())
