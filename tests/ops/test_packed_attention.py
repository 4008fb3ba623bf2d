"""``packed_attention`` against the NumPy oracle, and what holds to the bit."""

import pytest
import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sft_kernels import packed_attention
from sft_kernels.ops.packed_attention import api

from .attention import check_case, differentiate, impl, skip_what_triton_leaves_to_torch, torch_only  # noqa: F401
from .helpers import DTYPES, Watch, run, same_bits

pytestmark = pytest.mark.usefixtures("impl")

BOUNDS = {
    "segments": [0, 5, 6, 17, 24],
    "one": [0, 24],
    "single tokens": [0, 1, 2, 3, 24],
    "empty first": [0, 0, 0, 10, 24],
    "empty middle": [0, 7, 7, 7, 24],
    "empty last": [0, 9, 24, 24],
    "tail": [0, 6, 13],
    "tail after empty": [0, 4, 13, 13],
}
T, D = 24, 32


def bounds(name="segments", dtype=torch.int32):
    return torch.tensor(BOUNDS[name], dtype=dtype)


def tensors(dtype=torch.float32, heads=4, key_heads=4, t=T):
    skip_what_triton_leaves_to_torch(dtype)
    return tuple(torch.randn(t, h, D).to(dtype) for h in (heads, key_heads, key_heads))


@torch_only
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gradients_of_many_query_heads_are_summed_in_fp32(dtype):
    """In half precision a sum that is rounded at each head is outside the budget."""
    check_case(tensors(dtype, 16, 1, t=200), torch.tensor([0, 200]))


@pytest.mark.parametrize("name", BOUNDS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("key_heads", [4, 2, 1], ids=["MHA", "GQA", "MQA"])
def test_output_and_gradients_stay_within_the_budget(name, causal, key_heads):
    check_case(tensors(key_heads=key_heads), bounds(name), causal=causal)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window_size", [(-1, -1), (3, 2)], ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_every_dtype(dtype, causal, window_size):
    check_case(tensors(dtype, 4, 2), bounds(), causal=causal, window_size=window_size)


WINDOWS = [
    (left, right, causal)
    for left in (-1, 0, 1, 4, 10, 11, 100)  # the longest segment is 11
    for right in (-1, 0, 1, 10, 100)
    for causal in (True, False)
    if left != 0 or not (causal or right == 0)  # where a token sees only itself: the next test
]


@pytest.mark.parametrize(("left", "right", "causal"), WINDOWS)
def test_windows(left, right, causal):
    check_case(tensors(heads=2, key_heads=2), bounds(), causal=causal, window_size=(left, right))


@pytest.mark.parametrize(("causal", "right"), [(True, -1), (True, 0), (True, 5), (False, 0)])
def test_a_window_of_the_token_itself_gives_its_value(causal, right):
    """The gradients of query and key are differences of equal numbers, so only rounding is left of them."""
    given, upstream = tensors(), torch.randn(T, 4, D)
    out, dquery, dkey, dvalue = run(
        lambda *t: packed_attention(*t, bounds(), causal=causal, window_size=(0, right)), given, upstream
    )
    assert torch.equal(out, given[2])
    assert torch.equal(dvalue, upstream)
    cancelled = (upstream * given[2]).abs().sum(-1, keepdim=True)
    for gradient, other in ((dquery, given[1]), (dkey, given[0])):
        assert (gradient.abs() <= 4 * torch.finfo(torch.float32).eps * D**-0.5 * cancelled * other.abs()).all()


@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [0.0, 0.3, -0.3, -1.0, 2])
def test_scale(scale, dtype, softcap):
    check_case(tensors(dtype), bounds(), scale=scale, softcap=softcap)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("window_size", "causal"), [((-1, -1), True), ((-1, -1), False), ((3, 2), False), ((4, -1), True)]
)
@pytest.mark.parametrize("softcap", [0.5, 30.0])
def test_softcap(softcap, window_size, causal, dtype):
    """Far below the scores, where it bends them all, and far above."""
    check_case(tensors(dtype, 4, 2), bounds(), causal=causal, window_size=window_size, softcap=softcap)


def test_a_softcap_bounds_the_scores():
    """All of a huge score's weight would lie on one key; capped at c none has more than e^{2c} times another."""
    query, key, value = tensors()
    _, lse = packed_attention(1000 * query, 1000 * key, value, bounds("one"), softcap=1.0, return_lse=True)
    seen = torch.arange(1, T + 1).log()
    assert ((lse - seen).abs() <= 1 + 1e-6).all()


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_asking_for_the_lse_changes_no_bit_of_the_rest(dtype, softcap):
    given, upstream = tensors(dtype), torch.randn(T, 4, D).to(dtype)
    out, _, *gradients = differentiate(
        lambda *t: packed_attention(*t, bounds("tail"), softcap=softcap, return_lse=True), given, upstream
    )
    without = run(lambda *t: packed_attention(*t, bounds("tail"), softcap=softcap), given, upstream)
    assert same_bits((out, *gradients), without)


def test_the_lse_carries_no_gradient():
    given = [t.requires_grad_() for t in tensors()]
    out, lse = packed_attention(*given, bounds(), return_lse=True)
    assert out.requires_grad
    assert not lse.requires_grad


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("max_seqlen", [None, 11, 24, 1000])
def test_boundaries_of_either_dtype_and_any_bound_change_no_bit(dtype, max_seqlen):
    given = tensors()
    assert same_bits(packed_attention(*given, bounds(dtype=dtype), max_seqlen), packed_attention(*given, bounds()))


def test_inputs_that_are_slices_of_one_projection():
    query, key, value = torch.randn(T, 3, 2, D).unbind(1)
    check_case((query, key, value), bounds())


@torch_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_under_autocast_dtypes_and_bits_are_those_of_torchs_own_attention(dtype):
    """One segment of the whole row, so that torch's own is the same thing; fp64 is not cast."""
    given = tensors(dtype)

    def torchs(*given):
        q, k, v = (t.transpose(0, 1)[None] for t in given)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)[0].transpose(0, 1)

    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = (run(f, given) for f in (lambda *t: packed_attention(*t, bounds("one")), torchs))
    assert [t.dtype for t in ours] == [t.dtype for t in theirs]
    assert same_bits(ours, theirs)


@pytest.mark.parametrize("lower", [0, 1, 2])
def test_under_autocast_the_three_may_be_of_different_dtypes(lower):
    """As in a model whose rotary embedding leaves query and key in fp32 and value in autocast's dtype."""
    given = [t.bfloat16() if i == lower else t for i, t in enumerate(tensors())]
    with torch.autocast("cpu", torch.bfloat16):
        out, *gradients = run(lambda *t: packed_attention(*t, bounds()), given)
    assert torch.equal(out, packed_attention(*(t.bfloat16() for t in given), bounds()))
    assert [gradient.dtype for gradient in gradients] == [t.dtype for t in given]


def test_autocast_is_looked_up_without_what_torch_2_11_cannot_trace(monkeypatch):
    def untraceable(device_type):
        raise AssertionError("is_autocast_available was called")

    monkeypatch.setattr(torch.amp, "is_autocast_available", untraceable)
    with torch.autocast("cpu", torch.bfloat16):
        assert packed_attention(*tensors(), bounds()).dtype == torch.bfloat16


def test_under_autocast_scores_are_capped_and_summed_in_fp32():
    given, options = tensors(), {"softcap": 2.0, "return_lse": True}
    cast = packed_attention(*(t.bfloat16() for t in given), bounds(), **options)
    with torch.autocast("cpu", torch.bfloat16):
        assert same_bits(packed_attention(*given, bounds(), **options), cast)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_rows_of_the_tail_get_zeros_and_touch_nothing(poison):
    cu_seqlens, given = bounds("tail"), tensors()
    poisoned = [t.clone() for t in given]
    for t in poisoned:
        t[13:] = poison
    clean, dirty = (run(lambda *t: packed_attention(*t, cu_seqlens), tensors, 1.0) for tensors in (given, poisoned))
    assert same_bits(dirty, clean)
    assert all((t[13:] == 0).all() for t in dirty)


@pytest.mark.parametrize("window_size", [(-1, -1), (2, 1)], ids=str)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("poison", [1.0, float("nan")])
def test_a_segment_does_not_leak_into_the_others(poison, causal, window_size):
    given = tensors()
    changed = [t.clone() for t in given]
    for t in changed:
        t[6:17] = poison
    before, after = (
        run(lambda *t: packed_attention(*t, bounds(), causal=causal, window_size=window_size), tensors)
        for tensors in (given, changed)
    )
    others = torch.tensor([*range(6), *range(17, T)])
    assert same_bits([t[others] for t in after], [t[others] for t in before])
    assert not torch.equal(after[0][6:17], before[0][6:17])


def test_same_inputs_same_bits():
    given = tensors(torch.bfloat16, 4, 2)
    once, again = (run(lambda *t: packed_attention(*t, bounds()), given) for _ in range(2))
    assert same_bits(once, again)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", [[0], [0, 0], [0, 0, 0]], ids=str)
@pytest.mark.parametrize("t", [0, 3])
def test_nothing_but_tail_or_nothing_at_all_is_still_differentiable(name, t, dtype):
    given = tensors(dtype, t=t)
    if t:
        given[2][1] = float("nan")
    out, lse, *gradients = differentiate(
        lambda *t: packed_attention(*t, torch.tensor(name), return_lse=True),
        given,
        torch.ones(t, 4, D),
    )
    assert all((x == 0).all() for x in (out, *gradients))
    assert lse.shape == (4, t)
    assert lse.dtype == torch.promote_types(dtype, torch.float32)
    assert (lse == -torch.inf).all()


@torch_only
@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("window_size", [(-1, -1), (50, -1)], ids=str)
def test_work_and_memory_go_with_the_squares_of_the_lengths(window_size, softcap, return_lse):
    lengths = [100] * 20
    t, heads, squares = sum(lengths), 2, sum(l * l for l in lengths)
    saved = {}

    def save(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    given = [x.requires_grad_() for x in tensors(heads=heads, key_heads=heads, t=t)]
    cu_seqlens = F.pad(torch.tensor(lengths).cumsum(0), (1, 0))
    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor), Watch() as watch:
        out = packed_attention(*given, cu_seqlens, window_size=window_size, softcap=softcap, return_lse=return_lse)
        (out[0] if return_lse else out).sum().backward()
    # All heads' scores of one segment in fp32, twice; a boolean mask over the whole row would already take t² bytes.
    assert watch.largest <= max(2 * 4 * heads * 100**2, given[0].nbytes) < t * t
    # Two products and two gradients of each, and one more for the lse.
    assert watch.flops == (6 + return_lse) * 2 * D * heads * squares
    # Softmax, with a cap tanh, and the mask in fp32 or as booleans, beside what is no larger than the inputs.
    assert sum(saved.values()) <= squares * (2 * 4 * heads + 1) + 8 * given[0].nbytes


class Live(TorchDispatchMode):
    """Notes the most bytes that lived at once, of what operations returned."""

    def __init__(self):
        super().__init__()
        self.bytes_of, self.most = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            storage = tensor.untyped_storage()
            self.bytes_of[StorageWeakRef(storage)] = storage.nbytes()
        self.bytes_of = {ref: size for ref, size in self.bytes_of.items() if not ref.expired()}
        self.most = max(self.most, sum(self.bytes_of.values()))
        return out


@torch_only
def test_without_gradients_no_more_than_scores_and_their_softmax_live_at_once():
    l, heads = 100, 16
    query, key, value = tensors(heads=heads, key_heads=1, t=l)
    with torch.no_grad(), Live() as live:
        packed_attention(query, key, value, torch.tensor([0, l]))
    # Beside these two there are the inputs and one [l, l]; the bias of all heads would be a third.
    assert live.most < 3 * 4 * heads * l * l


def jagged(tensor):
    return torch.nested.nested_tensor([tensor[:1], tensor[1:]], layout=torch.jagged)


def nested(tensor):
    return torch.nested.nested_tensor([tensor[:1], tensor[1:]], layout=torch.strided)


UNSUPPORTED = {
    "fp8": lambda *shape: torch.ones(shape).to(torch.float8_e4m3fn),
    "coo": lambda *shape: torch.ones(shape).to_sparse(),
    "csr": lambda *shape: torch.ones(shape).to_sparse_csr(),
    "jagged": lambda *shape: jagged(torch.ones(shape)),
    "nested": lambda *shape: nested(torch.ones(shape)),
}


def test_fp8_is_refused_for_all_three_and_under_autocast():
    given = [t.to(torch.float8_e4m3fn) for t in tensors()]
    with pytest.raises(TypeError, match=r"query: expected floating point .*float8"):
        packed_attention(*given, bounds())
    given[0] = given[0].float()
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(TypeError, match=r"key: expected floating point .*float8"),
    ):
        packed_attention(*given, bounds())


class NoLaunch(TorchDispatchMode):
    """Fails where anything is computed."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        raise AssertionError(f"{function} was launched")


@pytest.mark.parametrize(
    ("cu_seqlens", "error", "match"),
    [
        (torch.tensor([1, 24]), ValueError, "cu_seqlens.*start at 0"),
        (torch.tensor([0, 9, 8, 24]), ValueError, "cu_seqlens.*decrease"),
        (torch.tensor([0, 25]), ValueError, "cu_seqlens.*25.*24"),
        (torch.tensor([0, 30, 24]), ValueError, "cu_seqlens"),
        (torch.tensor([[0, 24]]), ValueError, "cu_seqlens.*shape"),
        (torch.tensor([], dtype=torch.int32), ValueError, "cu_seqlens.*shape"),
        (torch.tensor(24), ValueError, "cu_seqlens.*shape"),
        (torch.tensor([0.0, 24.0]), TypeError, "cu_seqlens"),
    ],
    ids=["start", "decrease", "past the end", "past the end and back", "2-d", "empty", "0-d", "float"],
)
def test_bad_boundaries_are_named_before_anything_is_launched(cu_seqlens, error, match):
    given = tensors()
    with pytest.raises(error, match=match), NoLaunch():
        packed_attention(*given, cu_seqlens, scale=-1.0)


@torch_only
def test_boundaries_that_cost_a_sync_to_check_are_read_once_by_the_implementation(monkeypatch):
    given = tensors()
    expected = packed_attention(*given, bounds("tail"))
    monkeypatch.setattr(api, "checks_enabled", lambda device: False)
    assert same_bits(packed_attention(*given, bounds("tail")), expected)
    with pytest.raises(ValueError, match=r"max_seqlen.*6"):
        packed_attention(*given, bounds("tail"), 6)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"query": torch.randn(T, D)}, ValueError, "query"),
        ({"query": torch.zeros(T, 2, D, dtype=torch.int64)}, TypeError, "query"),
        ({"query": torch.randn(T, 3, D)}, ValueError, "query.*multiple of the 2"),
        ({"key": torch.randn(T - 1, 2, D)}, ValueError, "key"),
        ({"key": torch.randn(T, 2, D + 1)}, ValueError, "key"),
        ({"key": torch.randn(T, 2, D).double()}, TypeError, "key"),
        ({"key": torch.randn(T, 2, D, device="meta")}, ValueError, "key.*device"),
        ({"key": torch.randn(T, 0, D), "value": torch.randn(T, 0, D)}, ValueError, "query|key"),
        ({"value": torch.randn(T, 1, D)}, ValueError, "value"),
        ({"value": torch.randn(T, 2, 2 * D)}, ValueError, "value"),
        ({"value": torch.randn(T, 2, D).bfloat16()}, TypeError, "value"),
        ({"max_seqlen": 10}, ValueError, "max_seqlen.*11"),
        ({"window_size": (-2, 0)}, ValueError, "window_size"),
        ({"window_size": (1, 2, 3)}, ValueError, "window_size"),
        ({"window_size": (1.5, 0)}, ValueError, "window_size"),
        ({"max_seqlen": -1}, ValueError, "max_seqlen.*at least 0"),
        ({"max_seqlen": 11.0}, TypeError, "max_seqlen"),
        ({"scale": float("nan")}, ValueError, "scale"),
        ({"scale": float("inf")}, ValueError, "scale"),
        ({"softcap": 0.0}, ValueError, "softcap"),
        ({"softcap": -1.0}, ValueError, "softcap"),
        ({"softcap": float("inf")}, ValueError, "softcap"),
        ({"softcap": float("nan")}, ValueError, "softcap"),
        ({"cu_seqlens": torch.tensor([0, 24], device="meta")}, ValueError, "cu_seqlens.*device"),
        ({"query": torch.randn(T, 2, 0)}, ValueError, "query"),
        ({"impl": "fast"}, ValueError, "impl"),
        *(
            ({name: make(T, 2, D)}, TypeError, f"{name}: expected")
            for name in ("query", "key", "value")
            for make in UNSUPPORTED.values()
        ),
        *(
            ({"cu_seqlens": make(torch.tensor([0, 11, T]))}, TypeError, "cu_seqlens: expected a dense tensor")
            for make in (torch.Tensor.to_sparse, jagged, nested)
        ),
    ],
    ids=lambda change: "-".join(change) if isinstance(change, dict) else None,
)
def test_a_bad_argument_is_named_before_anything_is_launched(change, error, match):
    arguments = dict(zip(("query", "key", "value"), tensors(heads=2, key_heads=2), strict=True)) | {
        "cu_seqlens": bounds(),
        "scale": -1.0,
    }
    with pytest.raises(error, match=match), NoLaunch():
        packed_attention(**{**arguments, **change})
