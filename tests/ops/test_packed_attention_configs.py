"""A sweep sets entries of ``CONFIGS``: they take effect at the next launch, over tiles that were built before."""

import pytest
import torch

from sft_kernels import AttentionTiles, packed_attention
from sft_kernels.ops.packed_attention import triton_backward, triton_forward, triton_shared
from sft_kernels.ops.packed_attention.triton_shared import CONFIGS, Config

from .attention import check_case

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton is interpreted only where there is no GPU")

BOUNDARIES = torch.tensor([0, 30, 158, 298], dtype=torch.int32)  # small, a tile, a tile and a tail
T = 308
# What a sweep on an H100 tries beside the table, with heads of 128.
CANDIDATES = [
    ("forward", Config(64, 64, 4, 3)),
    ("forward", Config(128, 128, 8, 2)),
    ("dquery", Config(64, 64, 4, 1)),
    ("dquery", Config(64, 64, 4, 2)),
    ("dkey", Config(128, 64, 8, 2)),
    ("dkey", Config(64, 64, 8, 2)),
]


def tensors(heads, D):
    return [torch.randn(T, heads, D, dtype=torch.bfloat16) for _ in range(3)]


@pytest.fixture
def launched(monkeypatch):
    """Returns the constants that each kernel was launched with last."""
    seen, sizes = {}, triton_shared.sizes

    def spy(name, *arguments):
        seen[name] = sizes(name, *arguments)
        return seen[name]

    for module in (triton_forward, triton_backward):
        monkeypatch.setattr(module, "sizes", spy)
    return seen


@pytest.mark.parametrize(
    ("name", "config"), CANDIDATES, ids=lambda x: x if isinstance(x, str) else "-".join(map(str, x))
)
def test_a_candidate_is_right_and_no_other_kernel_changes(name, config, launched, monkeypatch):
    """With half as many rows a program, two programs share a tile."""
    tiles, given = AttentionTiles.from_cu_seqlens(BOUNDARIES, T), tensors(4, 128)
    mask = triton_shared.Mask.of(128**-0.5, None, (150, 0), T)
    before = {each: triton_shared.sizes(each, given[0], given[1], 128, mask) for each in CONFIGS}
    monkeypatch.setitem(CONFIGS[name], (9, 128), config)
    check_case(given, BOUNDARIES, impl="triton", tiles=tiles, window_size=(150, -1))
    assert launched[name] != before[name]
    assert launched == before | {
        name: before[name]
        | {
            "ROWS": config.rows,
            "SPLIT": 128 // config.rows,
            "INNER": config.inner,
            "num_warps": config.warps,
            "num_stages": config.stages,
        }
    }


def test_programs_of_other_rows_are_refused(monkeypatch):
    """A small tile is the work of one program."""
    monkeypatch.setitem(CONFIGS["forward"], (9, 64), Config(32, 64, 4, 3))
    with pytest.raises(ValueError, match="CONFIGS: expected rows of 64 or 128"):
        packed_attention(*tensors(1, 64), BOUNDARIES, impl="triton")
