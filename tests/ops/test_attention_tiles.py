"""``AttentionTiles``: every row once, longest first, within the bound, whatever the lengths."""

import contextlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from sft_kernels import AttentionTiles
from sft_kernels.ops.packed_attention import tiles as module
from sft_kernels.ops.packed_attention import triton_tiles

from .helpers import same_bits

BLOCKS = (32, 64, 128)
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton is interpreted only where there is no GPU")


def boundaries(lengths, dtype=torch.int32):
    return torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0)], dtype=dtype)


def expected(lengths, tail, block):
    """The lists in plain Python."""
    query, key, start = [], [], 0
    for l in lengths:
        for offset in range(0, l, block):
            rows = min(block, l - offset)
            tile, size = (start, start + l, start + offset), 2 if rows > block // 2 else 1
            steps = [-(-met // (block // 2)) * size for met in (offset + rows, l - offset)]
            query.append((steps[0], tile))
            key.append((steps[1], tile))
        start += l
    behind = [(-1, start + tail, first) for first in range(start, start + tail, block)]
    n = (start + tail) // block + len(lengths) + 1
    fill = [(-1, -1, -1)] * (n - len(query) - len(behind))
    return [[*(tile for _, tile in sorted(found, key=lambda each: -each[0])), *behind, *fill] for found in (query, key)]


@settings(max_examples=200)
@given(
    st.lists(st.one_of(st.integers(0, 5), st.integers(0, 300)), max_size=12),
    st.integers(0, 300),
    st.sampled_from(BLOCKS),
    st.sampled_from([torch.int32, torch.int64]),
)
def test_the_lists_are_those_of_a_loop_over_the_segments(lengths, tail, block, dtype):
    found = AttentionTiles.from_cu_seqlens(boundaries(lengths, dtype), sum(lengths) + tail, block=block)
    query, key = expected(lengths, tail, block)
    assert found.query.tolist() == [list(tile) for tile in query]
    assert found.key.tolist() == [list(tile) for tile in key]
    assert (found.total_tokens, found.block) == (sum(lengths) + tail, block)
    assert found.query.dtype == found.key.dtype == torch.int32


@pytest.mark.parametrize("lengths", ["ones", "mix", "zeros", "one long", "edges"])
def test_a_hundred_thousand_segments(lengths):
    """What a loop would take long for: every row is in one tile, the lists are sorted and no longer than promised."""
    n = 100_000
    l = {
        "ones": torch.ones(n),
        "mix": torch.empty(n).log_normal_(5.36, 1.0).clamp(16, 4096),
        "zeros": torch.randint(0, 2, (n,)) * 7,
        "one long": torch.cat([torch.full((n - 1,), 16), torch.tensor([1 << 20])]),
        "edges": torch.arange(n) % 258,
    }[lengths].long()
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), l.cumsum(0)])
    T = int(bounds[-1]) + 1000
    tiles = AttentionTiles.from_cu_seqlens(bounds, T)
    for of_queries, found in ((True, tiles.query), (False, tiles.key)):
        assert len(found) == T // 128 + n + 1
        live = found[found[:, 2] >= 0].long()
        assert len(live) == int(((torch.cat([l, torch.tensor([1000])]) + 127) // 128).sum())
        assert (found[len(live) :] == -1).all()
        start, stop, first = live.unbind(1)
        seen = torch.zeros(T + 1, dtype=torch.int64)
        seen.index_add_(0, first, torch.ones_like(first))
        seen.index_add_(0, torch.minimum(first + 128, stop), -torch.ones_like(first))
        assert (seen.cumsum(0)[:T] == 1).all()
        segments = start >= 0
        assert ((first - start)[segments] % 128 == 0).all()
        work = first + 128 - start if of_queries else stop - first
        size = torch.where(stop - first > 64, 2, 1)
        work = torch.where(segments, (torch.minimum(work, stop - start) + 63) // 64 * size, 0)
        assert (work.diff() <= 0).all()


def test_the_same_lists_every_time():
    bounds = boundaries(torch.randint(0, 400, (2000,)).tolist())
    once, again = (AttentionTiles.from_cu_seqlens(bounds, int(bounds[-1])) for _ in range(2))
    assert same_bits(once.lists, again.lists)


# ---- as a GPU makes them


@interpreted
@settings(max_examples=300)
@given(
    st.lists(st.one_of(st.integers(0, 5), st.integers(0, 300)), max_size=9),
    st.integers(0, 300),
    st.sampled_from(BLOCKS),
    st.sampled_from([torch.int32, torch.int64]),
)
def test_one_launch_makes_the_lists_that_numpy_makes(lengths, tail, block, dtype):
    bounds, T = boundaries(lengths, dtype), sum(lengths) + tail
    assert same_bits(triton_tiles.launch(bounds, T, block), module.lists_by_numpy(bounds, T, block))


@interpreted
@settings(max_examples=100)
@given(st.lists(st.integers(-400, 400), min_size=1, max_size=9), st.integers(0, 300))
def test_both_force_wrong_boundaries_into_the_row_alike(wrong, T):
    bounds = torch.tensor(wrong)
    assert same_bits(triton_tiles.launch(bounds, T, 32), module.lists_by_numpy(bounds, T, 32))


@interpreted
@pytest.mark.parametrize("segments", [63, 64, 65, 128, 130])
def test_more_segments_than_a_program_meets_at_once_and_more_tiles_than_one_has(segments):
    lengths = torch.randint(0, 90, (segments,))
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    T = int(bounds[-1]) + 100
    assert module.empty_lists(bounds, T, 64).shape[1] > 2 * triton_tiles.TILES
    assert same_bits(triton_tiles.launch(bounds, T, 64), module.lists_by_numpy(bounds, T, 64))


@interpreted
def test_boundaries_that_are_not_adjacent():
    bounds = boundaries([3, 200, 70])
    apart = torch.stack([bounds, bounds + 1], 1)[:, 0]
    assert same_bits(triton_tiles.launch(apart, 280, 128), module.lists_by_numpy(bounds, 280, 128))


class Dispatched(TorchDispatchMode):
    """Names of the operators that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@interpreted
def test_the_launcher_allocates_and_launches_once(monkeypatch):
    launched = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *arguments: launched.append(grid)

    monkeypatch.setattr(triton_tiles, "_tiles_kernel", Kernel())
    bounds = boundaries([3, 0, 200, 128])
    with Dispatched() as dispatched:
        triton_tiles.launch(bounds, 340, 128)
    assert dispatched.names == ["new_empty"]
    assert launched == [(1,)]


@pytest.mark.parametrize(
    ("home", "device", "operators"),
    [
        ("cuda", None, ["attention_tiles"]),
        ("meta", "meta", ["attention_tiles"]),
        ("cpu", "meta", ["_to_copy", "attention_tiles"]),  # the boundaries are sent, not the lists
    ],
)
def test_one_operator_makes_the_lists_on_a_device(home, device, operators, monkeypatch):
    """Nothing is brought to the host, and no shape depends on a value."""
    monkeypatch.setattr(module, "checks_enabled", lambda device: False)
    mode = FakeTensorMode() if home == "cuda" else contextlib.nullcontext()
    with mode:
        bounds = torch.zeros(9, dtype=torch.int32, device=home)
        with Dispatched() as dispatched:
            found = AttentionTiles.from_cu_seqlens(bounds, 8192, device=device)
    assert dispatched.names == operators
    assert found.lists.shape == (2, 8192 // 128 + 9, 3)
    assert found.lists.device.type == (device or home)


def test_the_operator_is_what_its_schema_says():
    torch.library.opcheck(
        torch.ops.sft_kernels.attention_tiles.default,
        (boundaries([3, 200]), 210, 128),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_compiled_with_a_symbolic_number_of_tokens_and_segments():
    torch._dynamo.reset()

    def build(bounds, row):
        return AttentionTiles.from_cu_seqlens(bounds, row.shape[0]).lists

    compiled = torch.compile(build, dynamic=True, fullgraph=True, backend="aot_eager")
    for lengths, tail in (([3, 200], 7), ([100, 1, 0, 77], 0)):
        arguments = boundaries(lengths), torch.empty(sum(lengths) + tail)
        assert same_bits(compiled(*arguments), build(*arguments))


def test_other_lengths_under_the_same_bounds_give_lists_of_the_same_shape(monkeypatch):
    """So that a graph that built one builds the other. Traced once, as a graph would be."""
    monkeypatch.setattr(module, "checks_enabled", lambda device: False)

    def build(bounds):
        return AttentionTiles.from_cu_seqlens(bounds, 400).lists

    a, b = boundaries([3, 0, 200, 128]), boundaries([100, 100, 100, 100])
    graph = make_fx(build, tracing_mode="fake")(a)
    assert same_bits(graph(a), build(a))
    assert same_bits(graph(b), build(b))


@pytest.mark.parametrize("wrong", [[3, 5, 9], [0, 9, 4, 9], [0, 5, 400], [-7, -3, 5], [0, 2**31 - 1, 3]], ids=str)
def test_wrong_boundaries_that_nobody_reads_still_give_every_row_once_and_none_outside(wrong, monkeypatch):
    with pytest.raises(ValueError, match="cu_seqlens"):
        AttentionTiles.from_cu_seqlens(torch.tensor(wrong), 300)
    monkeypatch.setattr(module, "checks_enabled", lambda device: False)
    tiles = AttentionTiles.from_cu_seqlens(torch.tensor(wrong), 300)
    for found in (tiles.query, tiles.key):
        rows = [range(first, min(first + 128, stop)) for _, stop, first in found.tolist() if first >= 0]
        assert sorted(row for tile in rows for row in tile) == [*range(300)]


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"cu_seqlens": [0, 3]}, TypeError, "cu_seqlens"),
        ({"cu_seqlens": torch.tensor([0.0, 3.0])}, TypeError, "cu_seqlens"),
        ({"cu_seqlens": torch.tensor([[0, 3]])}, ValueError, "cu_seqlens"),
        ({"cu_seqlens": torch.tensor([], dtype=torch.int32)}, ValueError, "cu_seqlens"),
        ({"cu_seqlens": torch.tensor([0, 3]).to_sparse()}, TypeError, "cu_seqlens: expected a dense tensor"),
        ({"total_tokens": -1}, ValueError, "total_tokens"),
        ({"total_tokens": 2**31}, ValueError, "total_tokens"),
        ({"total_tokens": 3.0}, ValueError, "total_tokens"),
        ({"total_tokens": 2}, ValueError, "cu_seqlens"),
        ({"block": 96}, ValueError, "block"),
    ],
    ids=str,
)
def test_a_bad_argument_is_named(change, error, match):
    arguments = {"cu_seqlens": torch.tensor([0, 3]), "total_tokens": 3} | change
    with pytest.raises(error, match=match):
        AttentionTiles.from_cu_seqlens(**arguments)


def test_tiles_move_with_the_batch():
    tiles = AttentionTiles.from_cu_seqlens(boundaries([3, 200]), 210)
    moved = tiles.to("meta")
    assert moved.lists.device.type == "meta"
    assert moved[1:] == tiles[1:]


def test_moving_is_one_copy():
    tiles = AttentionTiles.from_cu_seqlens(boundaries([3, 200]), 210)
    with Dispatched() as dispatched:
        moved = tiles.to("meta", non_blocking=True)
    assert dispatched.names == ["_to_copy"]
    assert moved.query.device.type == moved.key.device.type == "meta"
