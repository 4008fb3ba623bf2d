"""Host time of the ops' warm calls, without a GPU: ``python -m bench.host_time [NAME …]``.

Tensors are tiny and lie on the CPU, one thread, so that torch's own kernels have next to nothing to do. Triton's
launches go through all of its Python, as on a GPU, and stop there: the driver's share of a launch is missing, and so
are torch's questions to the CUDA runtime. Medians in µs; the cases of an op are taken in turn, in one process.

An op is one function in ``OPS``: it returns its cases, ``{name: function without arguments}``.
"""

import argparse
import contextlib
import os
import statistics
import sys
import time
import warnings

import torch
import torch.nn.functional as F

ARCH = 90
TENSORS = 291
ROUNDS, UNCOUNTED = 300, 5


def adamw():
    """A step over 291 tensors of one element, beside torch fused's: 291 calls of an empty loop."""
    from sft_kernels import AdamW

    def optimizer(make, **options):
        params = [torch.nn.Parameter(torch.ones(1)) for _ in range(TENSORS)]
        for p in params:
            p.grad = torch.ones_like(p)
        groups = [{"params": params[::2]}, {"params": params[1::2], "weight_decay": 0.0}]
        return params, make(groups, lr=1e-4, **options)

    _, fused = optimizer(torch.optim.AdamW, fused=True)
    clipped_params, clipped = optimizer(torch.optim.AdamW, fused=True)

    def clip_and_step():
        torch.nn.utils.clip_grad_norm_(clipped_params, 1.0)
        clipped.step()

    return {
        "torch fused": fused.step,
        "clip_grad_norm_ + torch fused": clip_and_step,
        "ours": optimizer(AdamW, impl="triton")[1].step,
        "ours, clipped": optimizer(AdamW, impl="triton", max_grad_norm=1.0)[1].step,
    }


def attention():
    """Both passes of causal attention over 64 tokens, the tiles handed over as a model's layers share them."""
    from sft_kernels import AttentionTiles, packed_attention

    T, Hq, Hkv, D = 64, 8, 2, 128
    given = [torch.randn(T, heads, D, dtype=torch.bfloat16) for heads in (Hq, Hkv, Hkv)]
    learned = [t.clone().requires_grad_() for t in given]
    upstream = torch.randn(T, Hq, D, dtype=torch.bfloat16)
    cu_seqlens = torch.tensor([0, 20, T], dtype=torch.int32)
    tiles = AttentionTiles.from_cu_seqlens(cu_seqlens, T)

    def forward(tensors=learned):
        return packed_attention(*tensors, cu_seqlens, tiles=tiles, impl="triton")

    return {
        "forward, no gradient": lambda: forward(given),
        "forward": forward,
        "forward + backward": lambda: torch.autograd.grad(forward(), learned, upstream),
    }


def tiles():
    """The tiles of a batch of 24 segments."""
    from sft_kernels import AttentionTiles

    cu_seqlens = torch.arange(25, dtype=torch.int32) * 341
    return {"from_cu_seqlens": lambda: AttentionTiles.from_cu_seqlens(cu_seqlens, 8192)}


def losses():
    """Forward and backward over 16 tokens, 12 of them kept, of 32 units and 96 classes, beside torch's plain losses."""
    from sft_kernels import KeptTokens, cross_entropy, linear_cross_entropy

    N, D, V, K = 16, 32, 96, 12
    y = torch.randint(0, V, (N,))
    y[K:] = -100
    kept, padded = (KeptTokens.from_labels(y, capacity=capacity) for capacity in (None, N))
    head = [torch.randn(n, D, requires_grad=True) for n in (N, V)]
    logits = [torch.randn(N, V, requires_grad=True)]

    def both(loss, inputs, **options):
        return lambda: torch.autograd.grad(loss(*inputs, **options), inputs)

    def ours(x, w, **options):
        loss = linear_cross_entropy(x, w, impl="triton", **options)
        return loss[0] if "return_stats" in options else loss

    return {
        "F.cross_entropy(F.linear)": both(lambda x, w: F.cross_entropy(F.linear(x, w), y), head),
        "linear, kept": both(ours, head, kept=kept),
        "linear, kept, statistics": both(ours, head, kept=kept, return_stats=True),
        "linear, kept, capacity": both(ours, head, kept=padded),
        "linear, kept, 4 chunks": both(ours, head, kept=kept, chunking="tokens", max_logits_bytes=V * K),
        "linear, kept, vocab": both(ours, head, kept=kept, chunking="vocab"),
        "linear, labels": both(ours, head, target=y),
        "F.cross_entropy": both(lambda x: F.cross_entropy(x, y), logits),
        "cross_entropy": both(lambda x: cross_entropy(x, y, impl="triton"), logits),
    }


OPS = {"adamw": adamw, "attention": attention, "tiles": tiles, "losses": losses}


@contextlib.contextmanager
def as_on_a_gpu(arch=ARCH):
    """Triton takes CPU tensors and launches nothing, and no op reads a value to check it or makes tiles in NumPy.

    Yields a list of the names of the kernels that would have been launched.
    """
    import triton
    from triton.compiler.compiler import CompiledKernel
    from triton.runtime import driver

    from sft_kernels import _backend
    from sft_kernels.ops.packed_attention.tiles import lists_by_triton

    from .compile_report import _Driver

    if triton.knobs.runtime.interpret:
        raise RuntimeError("measures the launcher, which there is not under TRITON_INTERPRET=1")
    launched, checked = [], _backend.checks_enabled
    before = CompiledKernel._init_handles, _backend._why_no_triton, checked.__code__, driver._active

    def ready(kernel):
        kernel.module = kernel.function = True  # never loaded
        kernel._run = lambda *arguments: launched.append(kernel.name)

    CompiledKernel._init_handles, _backend._why_no_triton = ready, lambda device, interpreted: None
    # Its code, since modules hold the function by a name of their own, also those that are not loaded yet.
    checked.__code__ = (lambda device: False).__code__
    driver.set_active(_Driver(arch))
    override = torch.library.Library("sft_kernels", "IMPL")
    with warnings.catch_warnings(action="ignore"):  # that it overrides
        override.impl("attention_tiles", lists_by_triton, "CPU", allow_override=True)
    try:
        yield launched
    finally:  # reset_active() would look for a GPU
        override._destroy()
        CompiledKernel._init_handles, _backend._why_no_triton, checked.__code__, driver._active = before


def measure(op, rounds=ROUNDS):
    """Yields ``(name, microseconds, launches)`` of each case of ``op``: a median, and Triton's launches a call."""
    cases = OPS[op]()
    times, launches = {name: [] for name in cases}, {}
    with as_on_a_gpu() as launched:
        for i in range(UNCOUNTED + rounds):
            for name, call in cases.items():
                launched.clear()
                start = time.perf_counter()
                call()
                elapsed = time.perf_counter() - start
                if i >= UNCOUNTED:
                    times[name].append(elapsed * 1e6)
                launches[name] = len(launched)
    for name, each in times.items():
        yield name, statistics.median(each), launches[name]


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m bench.host_time", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("ops", nargs="*", metavar="NAME", help=f"of {', '.join(OPS)}; all without it")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="counted calls of each case (%(default)s)")
    args = parser.parse_args(argv)
    if unknown := {*args.ops} - {*OPS}:
        parser.error(f"NAME: expected some of {', '.join(OPS)}, got {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    for op in args.ops or OPS:
        first = None
        for name, microseconds, launches in measure(op, args.rounds):
            first = first or microseconds
            print(f"{op:<12}{name:<32}{microseconds:8.1f} µs{microseconds / first:8.2f}{launches:6} Triton launches")
    return 0


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # before triton is imported
    sys.exit(main())
