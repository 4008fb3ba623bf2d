"""``impl="triton"``: layouts that try its tiles, its real sizes, and what its launches cost."""

import contextlib
import math
import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import triton
from torch._subclasses.fake_tensor import FakeTensorMode

from sft_kernels import AttentionTiles, packed_attention
from sft_kernels._budget import check
from sft_kernels.ops.packed_attention import api, triton_backward, triton_forward, triton_shared

from .attention import SMALL_TILES, check_case, differentiate, oracle
from .helpers import run, same_bits

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton is interpreted only where there is no GPU")

EDGES = [b + d for b in (SMALL_TILES // 2, SMALL_TILES, 3 * SMALL_TILES // 2, 2 * SMALL_TILES) for d in (-1, 0, 1)]
LAYOUTS = {  # lengths, and tokens behind them
    "zeros interspersed": ([0, 17, 0, 0, 33, 0], 0),
    "one long, many of 16": ([130] + [16] * 4, 0),
    "many of 16, one long, a tail": ([16] * 4 + [100], 37),
    "a tail longer than a tile": ([3, 20], 70),
    "one segment": ([50], 0),
    "edges": (EDGES, 5),
}


def boundaries(lengths):
    return F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()


def tensors(T, dtype=torch.float32, heads=2, key_heads=1, D=16):
    return [torch.randn(T, h, D).to(dtype) for h in (heads, key_heads, key_heads)]


def tiles_of(bounds, T, block=SMALL_TILES):
    return AttentionTiles.from_cu_seqlens(bounds, T, block=block)


# fp32 shares each tile among two programs, bf16 gives it to one.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name, causal, dtype):
    lengths, tail = LAYOUTS[name]
    bounds, T = boundaries(lengths), sum(lengths) + tail
    check_case(tensors(T, dtype), bounds, impl="triton", tiles=tiles_of(bounds, T), causal=causal)


@pytest.mark.parametrize(
    "options",
    [
        {"window_size": (15, -1)},
        {"window_size": (16, -1), "softcap": 3.0},
        {"window_size": (40, 17), "causal": False},
        {"window_size": (-1, 20), "causal": False, "softcap": 3.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_windows_over_several_tiles(dtype, options):
    lengths = [150, 16, 1, 33, 49, 65]
    bounds, T = boundaries(lengths), sum(lengths) + 3
    check_case(tensors(T, dtype), bounds, impl="triton", tiles=tiles_of(bounds, T), **options)


@pytest.mark.parametrize(
    ("dtype", "D"),
    [*((torch.bfloat16, D) for D in (64, 80, 96, 128, 192, 256)), *((torch.float16, D) for D in (64, 128))],
    ids=str,
)
def test_the_sizes_that_a_gpu_gets(dtype, D):
    """Tiles of 128 rows and 64, every head dimension, and one segment of each kind: small, a tile, tiles and a tail."""
    bounds = boundaries([30, 128, 200])
    check_case(tensors(370, dtype, D=D), bounds, impl="triton", softcap=20.0 if D == 80 else None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_segments_of_one_token_give_its_value(dtype):
    """The gradients of query and key are differences of equal numbers, so only rounding is left of them."""
    bounds, (query, key, value) = boundaries([1] * 20), tensors(23, dtype)
    upstream = torch.randn(23, 2, 16).to(dtype)
    out, lse, dquery, dkey, dvalue = attend((query, key, value), bounds, upstream, scale=1.0)
    assert torch.equal(out[:20], value[:20].expand(-1, 2, -1))
    torch.testing.assert_close(lse[:, :20], (query.float() * key.float()).sum(2).T[:, :20], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dvalue[:20], upstream[:20].float().sum(1, keepdim=True).to(dtype))
    cancelled = (upstream.float() * value.float()).abs().sum(-1, keepdim=True).sum(1, keepdim=True)
    for gradient, other in ((dquery, key), (dkey, query)):
        assert (gradient.abs() <= 4 * torch.finfo(torch.float32).eps * cancelled * other.abs().amax(1, True)).all()
    assert all((t[20:] == 0).all() for t in (out, dquery, dkey, dvalue))


@pytest.mark.parametrize("heads", [(6, 2), (3, 3), (4, 1)], ids=str)
def test_a_query_head_reads_its_own_key_head(heads):
    bounds = boundaries([40, 9])
    check_case(tensors(49, torch.bfloat16, *heads), bounds, impl="triton", tiles=tiles_of(bounds, 49))


def attend(given, bounds, upstream, **options):
    tiles = tiles_of(bounds, len(given[0]))
    return differentiate(
        lambda *t: packed_attention(*t, bounds, tiles=tiles, return_lse=True, impl="triton", **options), given, upstream
    )


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({}, torch.float32),
        ({}, torch.bfloat16),
        ({"causal": False}, torch.bfloat16),
        ({"window_size": (5, 9), "causal": False}, torch.bfloat16),
    ],
    ids=str,
)
def test_nan_in_one_segment_stays_there(options, dtype):
    lengths = [31, 17, 64, 3, 40]
    bounds, T = boundaries(lengths), sum(lengths) + 9
    given, upstream = tensors(T, dtype), torch.randn(T, 2, 16).to(dtype)
    before = attend(given, bounds, upstream, **options)
    poisoned = torch.zeros(T, dtype=torch.bool)
    for start, end in ((31, 48), (112, 115), (155, T)):
        poisoned[start:end] = True
        for t in (*given, upstream):
            t[start:end] = float("nan")
    after = attend(given, bounds, upstream, **options)
    assert all(t[31:48].isnan().all() for t in (after[0], *after[2:]))
    assert all((t[155:] == 0).all() for t in (after[0], *after[2:]))
    for t in (before[1], after[1]):
        t[:, poisoned] = 0
    for t in (*before, *after):
        if t.dim() == 3:
            t[poisoned] = 0
    assert same_bits(after, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_same_inputs_same_bits(dtype):
    bounds = boundaries([70, 3, 20])
    given, upstream = tensors(100, dtype), torch.randn(100, 2, 16).to(dtype)
    once, again = (attend(given, bounds, upstream, softcap=4.0) for _ in range(2))
    assert same_bits(once, again)


@pytest.mark.parametrize("length", [100, 9])  # two kernels of the backward, and one that computes all gradients
def test_large_scores_cost_fp32_gradients_no_digits(length):
    """One component of the keys adds 200 to every score. In base 2 the scores are whole numbers, which fp32 holds
    exactly, so the gradients must be as exact as those of small scores: the budget is that of an exact plain code."""
    query, key, value = (torch.randint(-1, 2, (length, 2, 16)).float() for _ in range(3))
    query[..., 0], key[..., 0] = 1, 200
    bounds, upstream, scale = boundaries([length]), torch.randn(length, 2, 16), math.log(2)
    _, _, *found = attend((query, key, value), bounds, upstream, scale=scale)
    expected = oracle((query, key, value), bounds.tolist(), upstream, scale=scale)[2:]
    for name, x, ref in zip(("dquery", "dkey", "dvalue"), found, expected, strict=True):
        kept = slice(1 if name == "dquery" else 0, None)  # dquery[..., 0] is 200 times a sum that cancels
        check(name, x[..., kept], ref[..., kept], ref[..., kept])


def test_the_order_of_the_tiles_changes_no_bit():
    """What is summed is summed within a program, so that nothing depends on which of them runs first."""
    bounds = boundaries([70, 3, 40])
    given, upstream = tensors(120, torch.bfloat16), torch.randn(120, 2, 16).to(torch.bfloat16)
    once, *_ = [attend(given, bounds, upstream)]
    with pytest.MonkeyPatch.context() as patch:
        make = AttentionTiles.from_cu_seqlens

        def shuffled(*args, **options):
            tiles = make(*args, **options)
            return tiles._replace(lists=tiles.lists.flip(1))

        patch.setattr(api, "checks_enabled", lambda device: False)
        patch.setattr(AttentionTiles, "from_cu_seqlens", shuffled)
        again = attend(given, bounds, upstream)
    assert same_bits(once, again)


@pytest.mark.parametrize("emptied", ["query", "key"])
def test_each_kernel_goes_by_its_own_list(emptied):
    """Without tiles a kernel writes nothing, so what it would have written is poison still."""
    bounds, given = boundaries([70, 3, 40]), tensors(120, torch.bfloat16)
    lists = tiles_of(bounds, 120).lists
    options = (SMALL_TILES, 0.25, (-1, 0), None)
    out, lse = triton_forward.launch(*given, lists, *options)
    lists = lists.clone()
    lists[0 if emptied == "query" else 1] = -1
    dquery, _, dvalue = triton_backward.launch(out, *given, out, lse, lists, *options)
    assert dquery[:70].isnan().all() == (emptied == "query")
    assert dvalue.isnan().all() == (emptied == "key")


def test_a_second_backward_and_any_layout_of_the_upstream_gradient():
    bounds, given = boundaries([20, 13]), [t.requires_grad_() for t in tensors(33)]
    out = packed_attention(*given, bounds, impl="triton", tiles=tiles_of(bounds, 33))
    first = torch.autograd.grad(out.sum(), given, retain_graph=True)  # expanded: strides of 0
    again = torch.autograd.grad(out, given, torch.ones(2, 33, 16).transpose(0, 1), retain_graph=True)
    assert same_bits(first, again)
    assert all(a.data_ptr() != b.data_ptr() for a, b in zip(first, again, strict=True))
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(out.sum(), given, create_graph=True)


# ---- what a launch costs


class Kernel:
    """Stands in for a kernel: keeps the grids that it is launched with."""

    def __init__(self):
        self.grids = []

    def __getitem__(self, grid):
        self.grids.append(grid)
        return lambda *args, **options: None


@pytest.mark.parametrize(("D", "split"), [(128, 1), (256, 2)])
def test_memory_and_programs_go_with_the_tokens(D, split, monkeypatch):
    """One segment as long as all the others together: neither is of the longest times the number of them. Of fp32 there
    are the lse and delta, no dQ."""
    B, Hq, Hkv = 64, 8, 4
    bounds = boundaries([16] * (B - 1) + [16 * (B - 1)])
    T = int(bounds[-1])
    kernels = {"forward": Kernel(), "dquery": Kernel(), "dkey": Kernel()}
    for name, kernel in kernels.items():
        monkeypatch.setattr(triton_forward if name == "forward" else triton_backward, f"_{name}_kernel", kernel)
    allocated = []

    def spy(owner, name):
        function = getattr(owner, name)

        def wrapper(*args, **options):
            allocated.append(function(*args, **options))
            return allocated[-1]

        monkeypatch.setattr(owner, name, wrapper)

    for owner in (torch, torch.Tensor):
        for name in ("empty", "empty_like", "zeros", "zeros_like", "full", "clone", "contiguous", "to", "float"):
            if hasattr(owner, name):
                spy(owner, name)
        for name in ("new_empty", "new_zeros", "new_full"):
            if hasattr(owner, name):
                spy(owner, name)
    query, key, value = tensors(T, torch.bfloat16, Hq, Hkv, D)
    tiles = AttentionTiles.from_cu_seqlens(bounds, T)
    allocated.clear()
    options = (tiles.block, 1.0, (-1, 0), None)
    out, lse = triton_forward.launch(query, key, value, tiles.lists, *options)
    triton_backward.launch(out, query, key, value, out, lse, tiles.lists, *options)
    found = sorted((str(t.dtype), tuple(t.shape)) for t in allocated)
    rows = [("torch.bfloat16", shape) for shape in [(T, Hkv, D)] * 2 + [(T, Hq, D)] * 2]
    assert found == [*rows, *[("torch.float32", (Hq, T))] * 2]

    live = sum(-(-l // 128) for l in bounds.diff().tolist())
    n = T // 128 + B + 1
    assert live <= n == tiles.lists.shape[1]
    # On sm_90 every kernel of heads of 128 takes whole tiles; of 256 those of the backward take halves.
    assert kernels["forward"].grids == [(n * Hq,)]
    assert kernels["dquery"].grids == [(n * split * Hq,)]
    assert kernels["dkey"].grids == [(n * split * Hkv,)]


def test_every_launch_and_the_question_for_the_capability_stand_under_the_tensors_device(monkeypatch):
    """Fake tensors on cuda:1 while cuda:0 is current: what is launched, and which device is current then."""
    current, seen = ["cuda:0"], []

    @contextlib.contextmanager
    def device(which):
        current.append(str(which))
        yield
        current.pop()

    class Recorder(Kernel):
        def __getitem__(self, grid):
            return lambda first, *args, **options: seen.append((self, current[-1]))

    def target():
        seen.append(("capability", current[-1]))
        return SimpleNamespace(arch=90)

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    driver = SimpleNamespace(get_current_target=target, get_current_device=lambda: current[-1])
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    triton_shared._capability_of.cache_clear()
    kernels = {name: Recorder() for name in ("forward", "dquery", "dkey")}
    for name, kernel in kernels.items():
        monkeypatch.setattr(triton_forward if name == "forward" else triton_backward, f"_{name}_kernel", kernel)
    with FakeTensorMode():
        query, key, tiles = (
            torch.empty(shape, dtype=dtype, device="cuda:1")
            for shape, dtype in (((10, 4, 64), torch.bfloat16), ((10, 2, 64), torch.bfloat16), ((2, 2, 3), torch.int32))
        )
        options = (128, 0.1, (-1, 0), None)
        out, lse = triton_forward.launch(query, key, key, tiles, *options)
        triton_backward.launch(out, query, key, key, out, lse, tiles, *options)
    assert seen == [(each, "cuda:1") for each in ("capability", *kernels.values())]  # asked once for each device
    triton_shared._capability_of.cache_clear()


def test_a_window_that_reaches_every_segment_is_none():
    mask = triton_shared.Mask.of(1.0, None, (49, 50), 50)
    assert (mask.left, mask.right) == (49, -1)
    assert triton_shared.Mask.of(1.0, None, (2**40, -1), 50).left == -1


def test_rows_further_apart_than_32_bits_can_say_are_copied():
    far = torch.empty((1 << 24) + 4).as_strided((2, 1, 4), (1 << 24, 4, 1))
    assert triton_shared.by_rows(far).is_contiguous()
    near = torch.empty(6, 8, 4)[::2]
    assert triton_shared.by_rows(near) is near


# ---- what is asked of whom


def test_auto_on_a_cpu_is_torch_and_fp64_and_wide_heads_are_torchs_own(monkeypatch):
    monkeypatch.delenv("SFT_KERNELS_IMPL", raising=False)
    bounds = boundaries([3])
    wide = [(torch.float32, 129, "128"), (torch.bfloat16, 257, "256")]
    for dtype, D, reason in [(torch.float64, 16, "float64"), *wide]:
        given = tensors(3, dtype, D=D)
        packed_attention(*given, bounds)
        with pytest.raises(RuntimeError, match=f"impl='triton': .*{reason}.* torch's own code"):
            packed_attention(*given, bounds, impl="triton")


@pytest.mark.parametrize(
    ("major", "shared", "D", "reason"),
    [(9, 227, 256, None), (8, 163, 256, None), (8, 99, 128, None), (8, 99, 129, "above 128"), (7, 96, 64, "7.5")],
)
def test_a_gpu_that_is_too_small_gets_torchs(major, shared, D, reason, monkeypatch):
    class Gpu:
        name, minor, shared_memory_per_block_optin = "a GPU", 5, shared << 10

    Gpu.major = major
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Gpu)
    with FakeTensorMode():
        found = api._needs_torch(torch.empty(4, 2, D, device="cuda", dtype=torch.bfloat16))
    assert found is None if reason is None else re.search(reason, found)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda t: tuple(t), TypeError, "tiles: expected AttentionTiles"),
        (lambda t: t._replace(total_tokens=49), ValueError, "tiles: .*50 tokens.*49"),
        (lambda t: t.to("meta"), ValueError, "tiles: .*device"),
        (lambda t: tiles_of(boundaries([10, 40]), 50), ValueError, "tiles: .*other boundaries"),
        (lambda t: t._replace(lists=t.lists.to_sparse()), TypeError, "tiles: expected a dense tensor"),
        (lambda t: t._replace(lists=torch.nested.nested_tensor([t.query])), TypeError, "tiles: expected a dense"),
        (lambda t: t._replace(lists=t.lists.float()), TypeError, "tiles: expected int32"),
        (lambda t: t._replace(lists=t.lists[:, :, :2]), ValueError, "tiles: .*shape"),
        (lambda t: t._replace(lists=t.query), ValueError, "tiles: .*shape"),
        (lambda t: t._replace(lists=t.lists.flip(1).mT.contiguous().mT), ValueError, "tiles: expected contiguous"),
    ],
    ids=["tuple", "tokens", "device", "boundaries", "sparse", "nested", "dtype", "columns", "one list", "strides"],
)
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_wrong_tiles_are_refused(impl, change, error, match):
    bounds = boundaries([40, 10])
    with pytest.raises(error, match=match):
        packed_attention(*tensors(50), bounds, tiles=change(tiles_of(bounds, 50)), impl=impl)


def test_tiles_change_no_bit_and_are_built_where_there_are_none():
    bounds, given = boundaries([40, 10]), tensors(50, torch.bfloat16)
    built = run(lambda *t: packed_attention(*t, bounds, impl="triton"), given)
    tiles = tiles_of(bounds, 50, 128)
    handed = run(lambda *t: packed_attention(*t, bounds, impl="triton", tiles=tiles), given)
    assert same_bits(handed, built)
    torchs = [run(lambda *t: packed_attention(*t, bounds, impl="torch", tiles=x), given) for x in (None, tiles)]  # noqa: B023
    assert same_bits(*torchs)


# ---- torch.compile


def test_the_operators_are_what_their_schemas_say():
    bounds, (query, key, value) = boundaries([20, 13]), tensors(35)
    tiles = tiles_of(bounds, 35)
    options = (tiles.block, 0.25, [-1, 0], 5.0)
    out, lse = torch.ops.sft_kernels.packed_attention(query, key, value, tiles.lists, *options)
    utilities = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        torch.ops.sft_kernels.packed_attention.default,
        (query, key, value, tiles.lists, *options),
        test_utils=utilities,
    )
    torch.library.opcheck(
        torch.ops.sft_kernels.packed_attention_backward.default,
        (torch.randn_like(out), query, key, value, out, lse, tiles.lists, *options),
        test_utils=utilities,
    )


class TestCompiled:
    @pytest.fixture(autouse=True)
    def _poison_unwritten_memory(self):
        """Off: what it wraps cannot be traced."""
        torch._dynamo.reset()

    def test_the_choice_for_a_gpu_is_traced_with_a_symbolic_head_dimension(self, monkeypatch):
        gpu = SimpleNamespace(major=9, minor=0, name="a GPU", shared_memory_per_block_optin=227 << 10)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)

        def choose(query):
            return query.new_empty(query.shape) if api._needs_torch(query) is None else None

        with FakeTensorMode():
            query = torch.empty(8, 2, 64, device="cuda", dtype=torch.bfloat16)
            chosen = torch.compile(choose, dynamic=True, fullgraph=True, backend="eager")(query)
        assert chosen.shape == query.shape

    @pytest.mark.parametrize("handed", [True, False], ids=["tiles handed", "tiles built"])
    def test_traced_whole_with_eagers_bits(self, handed):
        bounds, given = boundaries([20, 13, 40]), [t.requires_grad_() for t in tensors(75)]
        tiles = tiles_of(bounds, 75, 128)

        def attend(query, key, value, bounds, lists=None):
            t = None if lists is None else tiles._replace(lists=lists)
            return packed_attention(query, key, value, bounds, tiles=t, softcap=5.0, impl="triton")

        arguments = (*given, bounds, *([tiles.lists] if handed else []))
        upstream = torch.randn(75, 2, 16)
        eager = attend(*arguments)
        compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")(*arguments)
        assert same_bits(compiled, eager)
        assert same_bits(*(torch.autograd.grad(out, given, upstream) for out in (compiled, eager)))


def test_the_schedule_of_a_kernel_does_not_depend_on_the_lengths():
    found = []
    for T in (1, 1000):
        query = torch.empty(T, 8, 128, dtype=torch.bfloat16)
        mask = triton_shared.Mask.of(1.0, None, (-1, 0), T)
        found.append([triton_shared.sizes(name, query, query, 128, mask) for name in triton_shared.CONFIGS])
    assert found[0] == found[1]


def test_the_backward_makes_no_gradient_for_the_lse():
    """Zeros of its size, in a launch of their own, would be made and thrown away."""
    bounds, given = boundaries([20]), [t.requires_grad_() for t in tensors(20)]
    out = packed_attention(*given, bounds, impl="triton")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.autograd.grad(out, given, torch.ones_like(out.detach()))
    names = [event.name for event in profile.events()]
    assert "sft_kernels::packed_attention_backward" in names
    assert "aten::zeros" not in names
