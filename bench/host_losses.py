"""Host time of the losses, forward and backward, beside torch's plain ones, without a GPU.

``python -m bench.host_losses``. 16 tokens, of which 12 are kept, 32 hidden units and 96 classes, fp32 on the CPU, one
thread: the products have next to nothing to do. Triton's launches are bound and looked up as ``compile_report`` does,
and not made: the driver's share is missing. Labels are not checked, as on a GPU. Medians, taken in turn in one process.
"""

import os
import statistics
import time

import torch
import torch.nn.functional as F

N, D, V, KEPT = 16, 32, 96, 12


def _losses():
    """``{name: (loss, inputs)}``: each loss is a function of its differentiable inputs."""
    from sft_kernels import KeptTokens, cross_entropy, linear_cross_entropy

    y = torch.randint(0, V, (N,))
    y[KEPT:] = -100
    kept, padded = (KeptTokens.from_labels(y, capacity=capacity) for capacity in (None, N))
    head = [torch.randn(n, D, requires_grad=True) for n in (N, V)]
    logits = [torch.randn(N, V, requires_grad=True)]

    def ours(**options):
        return (lambda x, w: linear_cross_entropy(x, w, impl="triton", **options)), head

    def with_statistics(x, w):
        return linear_cross_entropy(x, w, kept=kept, return_stats=True, impl="triton")[0]

    chunks = {"chunking": "tokens", "max_logits_bytes": 4 * V * KEPT // 4}
    return {
        "F.cross_entropy(F.linear)": (lambda x, w: F.cross_entropy(F.linear(x, w), y), head),
        "linear_cross_entropy, kept": ours(kept=kept),
        "linear_cross_entropy, kept, statistics": (with_statistics, head),
        "linear_cross_entropy, kept, capacity": ours(kept=padded),
        "linear_cross_entropy, kept, 4 chunks": ours(kept=kept, **chunks),
        "linear_cross_entropy, kept, vocab": ours(kept=kept, chunking="vocab"),
        "linear_cross_entropy, labels": ours(target=y),
        "F.cross_entropy": (lambda x: F.cross_entropy(x, y), logits),
        "cross_entropy": ((lambda x: cross_entropy(x, y, impl="triton")), logits),
    }


def measure(rounds=100):
    """Medians in µs of forward and backward: ``{"F.cross_entropy": …, "cross_entropy": …, …}``."""
    from sft_kernels import _backend
    from sft_kernels.ops.softmax_grad import reduction

    from .compile_report import recording

    before = _backend._why_no_triton, reduction.checks_enabled
    _backend._why_no_triton = lambda device, interpreted: None  # as on a GPU
    reduction.checks_enabled = lambda device: False
    try:
        losses = _losses()
        times = {name: [] for name in losses}
        with recording(90):
            for i in range(rounds):
                for name, (loss, inputs) in losses.items():
                    start = time.perf_counter()
                    torch.autograd.grad(loss(*inputs), inputs)
                    if i >= 5:
                        times[name].append((time.perf_counter() - start) * 1e6)
    finally:
        _backend._why_no_triton, reduction.checks_enabled = before
    return {name: statistics.median(each) for name, each in times.items()}


def main():
    torch.set_num_threads(1)
    for name, microseconds in measure().items():
        print(f"{name:44}{microseconds:8.0f} µs")


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    main()
