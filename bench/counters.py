"""Nsight Compute's counters of one kernel: ``python -m bench.counters core|attention`` launches it a few times.

With ``--profile FILE`` it does so under ncu, which leaves the clocks alone (``--clock-control none``), writes FILE as
CSV, and must have counted something.
"""

import argparse
import csv
import subprocess
import sys
from pathlib import Path

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


def profiled(kernel, command, file):
    """Returns the command that counts one launch of ``kernel`` within ``command``, into ``file``."""
    ncu = ("ncu", "--clock-control", "none", "--target-processes", "all", "--metrics", ",".join(METRICS))
    ncu += ("--kernel-name", f"regex:^{KERNELS[kernel]}", "--launch-skip", str(WARM_UP), "--launch-count", "1")
    return (*ncu, "--csv", "--log-file", str(file), *command)


def counted(kernel, file):
    """Returns ``{metric: "value unit"}`` of ``kernel`` from ncu's CSV; empty if it counted nothing."""
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.exists() else []
    lines = [line for line in lines if line.startswith('"')]  # beside them stands what ncu says of itself
    rows = [row for row in csv.DictReader(lines) if row.get("Kernel Name", "").startswith(KERNELS[kernel])]
    return {row["Metric Name"]: f"{row['Metric Value']} {row['Metric Unit']}".strip() for row in rows}


def profile(kernel, file):
    """Count ``kernel`` into ``file`` in a process under ncu; returns an exit status."""
    command = (sys.executable, "-m", "bench.counters", kernel)
    done = subprocess.run(profiled(kernel, command, file), check=False)
    found = counted(kernel, file)
    for name, value in found.items():
        print(f"{name:<64}{value}")
    if done.returncode or not found:
        said = file.read_text(errors="replace").strip().splitlines() if file.exists() else []
        print(f"ncu ended with {done.returncode} and counted {len(found)} metrics: {said[-1] if said else 'no file'}")
        return 1
    return 0


def core(tiny):
    """The core over 8192 rows of Llama 3's vocabulary, as a loss launches it."""
    import torch

    from sft_kernels.ops.softmax_grad import triton_impl
    from sft_kernels.ops.softmax_grad.options import LossOptions

    N, V = (8, 512) if tiny else (8192, 128256)
    logits = torch.randn(N, V, device="cuda", dtype=torch.bfloat16)
    target = torch.randint(V, (N,), device="cuda")
    scale = torch.full((N,), 1 / N, device="cuda")
    fresh = logits.clone()

    def launch():
        logits.copy_(fresh)  # in place: gradients of gradients would be nearly constant
        triton_impl.softmax_grad(logits, target, LossOptions(V), scale)

    return launch


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
    parser = argparse.ArgumentParser(prog="python -m bench.counters", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("kernel", choices=[*KERNELS])
    parser.add_argument("--tiny", action="store_true", help="small shapes, for a rehearsal")
    parser.add_argument("--profile", type=Path, metavar="FILE", help="under ncu, into this CSV file")
    args = parser.parse_args(argv)
    if args.profile is not None:
        return profile(args.kernel, args.profile)
    launch = {"core": core, "attention": attention}[args.kernel](args.tiny)
    for _ in range(WARM_UP + 1):
        launch()
    print(f"launched {KERNELS[args.kernel]} {WARM_UP + 1} times")
    return 0


if __name__ == "__main__":
    sys.exit(main())
