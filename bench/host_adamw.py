"""Host time of a warm step of ``AdamW`` over 291 tensors beside torch fused's, without a GPU.

``python -m bench.host_adamw``. Every tensor has one element and lies on the CPU, one thread, so that torch's kernel has
next to nothing to do: its time is host time, but for 291 calls of an empty loop. Triton's launches are bound and looked
up as ``compile_report`` does, and not made: the driver's share is missing, of two launches. Medians, taken in turn in
one process.
"""

import os
import statistics
import time

import torch

TENSORS = 291


def _optimizer(make, **options):
    params = [torch.nn.Parameter(torch.ones(1)) for _ in range(TENSORS)]
    for p in params:
        p.grad = torch.ones_like(p)
    groups = [{"params": params[::2]}, {"params": params[1::2], "weight_decay": 0.0}]
    return params, make(groups, lr=1e-4, **options)


def measure(rounds=60):
    """Medians in µs: ``{"torch fused": …, "clip_grad_norm_ + torch fused": …, "ours, …": …}``."""
    from sft_kernels import AdamW, _backend

    from .compile_report import recording

    _, fused = _optimizer(torch.optim.AdamW, fused=True)
    clipped_params, clipped = _optimizer(torch.optim.AdamW, fused=True)

    def clip_and_step():
        torch.nn.utils.clip_grad_norm_(clipped_params, 1.0)
        clipped.step()

    why, _backend._why_no_triton = _backend._why_no_triton, lambda device, interpreted: None  # as on a GPU
    steps = {"torch fused": fused.step, "clip_grad_norm_ + torch fused": clip_and_step}
    for name, options in {"ours": {}, "ours, clipped": {"max_grad_norm": 1.0}}.items():
        steps[name] = _optimizer(AdamW, impl="triton", **options)[1].step

    times = {name: [] for name in steps}
    with recording(90):
        for i in range(rounds):
            for name, step in steps.items():
                start = time.perf_counter()
                step()
                if i >= 5:
                    times[name].append((time.perf_counter() - start) * 1e6)
    _backend._why_no_triton = why
    return {name: statistics.median(each) for name, each in times.items()}


def main():
    torch.set_num_threads(1)
    found = measure()
    for name, microseconds in found.items():
        print(f"{name:32}{microseconds:8.0f} µs{microseconds / found['torch fused']:8.2f}")


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    main()
