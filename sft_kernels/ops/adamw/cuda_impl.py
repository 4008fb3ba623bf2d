"""The step in CUDA C++ (``csrc/adamw.cuh``): the same launches as Triton's, the table of addresses inside them.

The operators are implemented by the compiled library; their schemas are here. They write through the addresses of the
table, so a compiler must not trace them.
"""

import torch

from ..._backend import Unavailable
from .tables import Tables

NORM_BLOCKS = 1024  # of adamw.cuh
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
MASTERS = ("none", "master", "remainder")

NAMESPACE = "sft_kernels_cuda"
_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_library.define(
    "adamw_sum_of_squares(Tensor table, Tensor(a!) partials, Tensor(b!) sums, Tensor(c!) finished, int first, int last,"
    " int grad, bool anew) -> ()"
)
_library.define(
    "adamw_update(Tensor table, Tensor maps, Tensor hyper, Tensor sums, Tensor? grad_scale, Tensor? found_inf,"
    " Tensor(a!)? norm_out, Tensor(b!)? skipped, Tensor(c!) done, Tensor(d!)? stats, int first, int last, int param,"
    " int grad, int state, int master, bool has_norm, bool clip, bool skip, bool shared_found, bool round) -> ()"
)


@torch.compiler.disable
def step(optimizer):
    """One update of ``optimizer`` (an :class:`sft_kernels.AdamW`), its gradients ready, which are left as they are."""
    if optimizer._tables is None:
        tables = Tables(optimizer, NORM_BLOCKS, by_value=True)
        for launch in tables.launches:
            _check(launch.combination)
        optimizer._tables = tables
    tables = optimizer._tables
    if tables.launches:
        with torch.no_grad():
            tables.send_hyper(optimizer)
            _launch(optimizer, tables)
            tables.keep_what_is_captured(optimizer)


def _check(kind):
    """Raise :class:`Unavailable` for dtypes that there is no kernel for."""
    own = torch.bfloat16 if kind.param == torch.float32 else kind.param
    moments = (torch.float32, own)
    gradients = (kind.param, torch.float32) if kind.param == torch.bfloat16 else (kind.param,)
    for name, dtype, carried in (("moments", kind.state, moments), ("gradients", kind.grad, gradients)):
        if dtype not in carried:
            raise Unavailable(f"impl='cuda': the CUDA kernels have no {dtype} {name} of {kind.param} parameters")


def _launch(optimizer, tables):
    device, operators = tables.device, torch.ops.sft_kernels_cuda
    scale, found = (getattr(optimizer, name, None) for name in ("grad_scale", "found_inf"))
    scale, found = (None if t is None else t.to(device, torch.float32, non_blocking=True) for t in (scale, found))
    skip = bool(optimizer.skip_nonfinite)
    measured = optimizer.max_grad_norm is not None or skip
    norm = None
    if measured:
        norm = torch.empty((), dtype=torch.float32, device=device)
        for i, (kind, first, last) in enumerate(tables.row_ranges):
            operators.adamw_sum_of_squares(
                tables.table, tables.partials, tables.sums, tables.finished, first, last, DTYPES[kind.grad], i == 0
            )
        if tables.ranks.groups:
            tables.sums[1] = 0.0 if found is None else (found > 0).double().reshape(())
            tables.ranks.sum_(tables.sums)
        optimizer.last_grad_norm = norm

    for i, (kind, first, last) in enumerate(tables.row_ranges):
        operators.adamw_update(
            tables.table,
            tables.maps,
            tables.hyper,
            tables.sums,
            scale,
            found,
            norm if i == 0 else None,
            optimizer.skipped_steps if i == 0 and skip else None,
            tables.done,
            tables.stats,
            first,
            last,
            DTYPES[kind.param],
            DTYPES[kind.grad],
            DTYPES[kind.state],
            MASTERS.index(kind.master),
            measured,
            optimizer.max_grad_norm not in (None, float("inf")),
            skip,
            measured and bool(tables.ranks.groups),
            optimizer.stochastic_rounding and kind.param == torch.bfloat16,
        )
