"""What Nsight Compute counts of one kernel: ``python -m bench.counters core|attention`` launches it a few times.

``profiled`` is the command that runs this under ncu. The clocks are left alone (``--clock-control none``).
"""

import argparse
import sys

# torch and the package are imported where a kernel is launched: whoever asks for the command does not wait for them.

KERNELS = {"core": "_softmax_grad_kernel", "attention": "_dkey_kernel"}
METRICS = (  # time; bytes to and from memory; what the L2 cache caught; how busy each part was
    "gpu__time_duration.sum",
    "dram__bytes_read.sum",
    "dram__bytes_write.sum",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "lts__t_sector_hit_rate.pct",
    "lts__t_bytes.sum",
    "sm__inst_executed.sum",
    "sm__inst_issued.avg.pct_of_peak_sustained_active",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "launch__registers_per_thread",
    "launch__occupancy_limit_registers",
    "launch__occupancy_limit_shared_mem",
)
WARM_UP = 2  # launches that are not counted


def profiled(kernel, command, csv):
    """Returns the command that counts one launch of ``kernel`` within ``command``, into the file ``csv``."""
    ncu = ("ncu", "--clock-control", "none", "--target-processes", "all", "--metrics", ",".join(METRICS))
    ncu += ("--kernel-name", f"regex:^{KERNELS[kernel]}", "--launch-skip", str(WARM_UP), "--launch-count", "1")
    return (*ncu, "--csv", "--log-file", str(csv), *command)


def core(tiny):
    """The core over 8192 rows of Llama 3's vocabulary, as a loss launches it."""
    import torch

    from sft_kernels.ops.softmax_grad import triton_impl
    from sft_kernels.ops.softmax_grad.options import LossOptions

    N, V = (8, 512) if tiny else (8192, 128256)
    logits = torch.randn(N, V, device="cuda", dtype=torch.bfloat16)
    target = torch.randint(V, (N,), device="cuda")
    scale = torch.full((N,), 1 / N, device="cuda")
    return lambda: triton_impl.softmax_grad(logits, target, LossOptions(V), scale)


def attention(tiny):
    """Attention's backward over two segments of 8192 tokens, 32 query and 8 key heads of 128."""
    import torch

    from sft_kernels import packed_attention

    from .bench_packed_attention import lengths_of

    T, Hq, Hkv, D = (128, 4, 2, 32) if tiny else (16384, 32, 8, 128)
    bounds = torch.tensor([0, *lengths_of(T // 2, T)]).cumsum(0).to("cuda", torch.int32)
    shapes = [(T, H, D) for H in (Hq, Hkv, Hkv)]
    leaves = [torch.randn(s, device="cuda", dtype=torch.bfloat16).requires_grad_() for s in shapes]
    dout = torch.randn(T, Hq, D, device="cuda", dtype=torch.bfloat16)
    out = packed_attention(*leaves, bounds, T // 2, impl="triton")
    return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m bench.counters", description=__doc__.splitlines()[0])
    parser.add_argument("kernel", choices=[*KERNELS])
    parser.add_argument("--tiny", action="store_true", help="small shapes, for a rehearsal")
    args = parser.parse_args(argv)
    launch = {"core": core, "attention": attention}[args.kernel](args.tiny)
    for _ in range(WARM_UP + 1):
        launch()
    print(f"launched {KERNELS[args.kernel]} {WARM_UP + 1} times")
    return 0


if __name__ == "__main__":
    sys.exit(main())
