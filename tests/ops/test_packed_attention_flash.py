"""``impl="flash"`` over stand-ins of the libraries: which one is chosen, how it is called, and what becomes of it."""

import importlib
import inspect
import re
import sys
from types import ModuleType

import pytest
import torch
from torch.nn.attention import varlen
from torch.utils._python_dispatch import TorchDispatchMode

from sft_kernels import packed_attention
from sft_kernels.ops.packed_attention import api, flash_impl

from . import flash_signatures
from .attention import check_case, differentiate
from .flash_signatures import MODULES, STAND_INS, install
from .helpers import same_bits

T, D = 24, 16
BOUNDS = {
    "segments": [0, 5, 6, 17, 24],
    "empty": [0, 0, 7, 7, 24, 24],
    "tail": [0, 6, 6, 13],
    "single tokens and a tail": [0, 1, 2, 2, 3],
}
HOPPER, AMPERE, BLACKWELL = (9, 0), (8, 0), (10, 0)
NEWEST = ["flash_attn_4", "flash_attn_3", "flash_attn_2", "varlen_attn_2_12"]


def bounds(name="segments", dtype=torch.int32):
    return torch.tensor(BOUNDS[name], dtype=dtype)


def tensors(heads=4, key_heads=2, dtype=torch.bfloat16, d=D):
    return tuple(torch.randn(T, h, d).to(dtype) for h in (heads, key_heads, key_heads))


def flash(*args, **options):
    return packed_attention(*args, impl="flash", **options)


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    """Pretend that the CPU is a GPU, by default an H100, and forget what was imported. Returns a way to choose it."""

    def pretend(capability):
        monkeypatch.setattr(flash_impl, "compute_capability", lambda device: capability)

    flash_impl._load.cache_clear()
    pretend(HOPPER)
    yield pretend
    flash_impl._load.cache_clear()


@pytest.fixture(params=STAND_INS)
def library(request, monkeypatch):
    """The name of the one library that is installed, and the list of its calls."""
    return request.param, install(monkeypatch, request.param)


def computes(name, window_size=(-1, -1), softcap=None, causal=True, **_):
    """Whether a library does, gradients included, as its source says."""
    windowed = window_size != (-1, -1) if causal else window_size not in ((-1, -1), (-1, 0))
    if name == "flash_attn_4_beta4":  # on Hopper
        return softcap is None and not windowed
    return softcap is None or not name.startswith("varlen_attn")


@pytest.mark.parametrize("cu_seqlens", BOUNDS)
@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": False},
        {"window_size": (3, -1)},
        {"window_size": (3, 2)},
        {"window_size": (3, 2), "causal": False},
        {"window_size": (-1, 2), "causal": False},
        {"window_size": (2, -1), "causal": False},
        {"window_size": (-1, 0), "causal": False},
        {"window_size": (100, 100), "causal": False},
        {"scale": 0.3},
        {"scale": -0.3, "causal": False},
        {"scale": 0.0},
        {"softcap": 1.5},
        {"softcap": 1.5, "window_size": (3, -1), "scale": 0.5},
    ],
    ids=str,
)
def test_each_library_gives_the_oracles_answer_or_says_what_it_lacks(library, cu_seqlens, key_heads, options):
    name, calls = library
    given = tensors(key_heads=key_heads)
    if computes(name, **options):
        check_case(given, bounds(cu_seqlens), impl="flash", **options)
        assert [call["name"] for call in calls] == [name]
    else:
        lacks = r"torch's varlen_attn: has no softcap|4: the backward of this version has no (softcap|window)"
        with pytest.raises(RuntimeError, match=lacks):
            flash(*(t.requires_grad_() for t in given), bounds(cu_seqlens), **options)
        assert not calls


class NoSync(TorchDispatchMode):
    """Fails where a value of a tensor is read on the host."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten._local_scalar_dense.default, "read on the host"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", BOUNDS)
@pytest.mark.parametrize("max_seqlen", [17, 1000])
def test_boundaries_on_a_device_are_not_read_on_the_host(library, name, max_seqlen, monkeypatch):
    given, upstream = tensors(4, 4), torch.randn(T, 4, D).bfloat16()
    expected = differentiate(lambda *t: flash(*t, bounds(name), return_lse=True), given, upstream)
    monkeypatch.setattr(api, "checks_enabled", lambda device: False)
    for module in (api, flash_impl):
        monkeypatch.delattr(module, "segment_lengths")
    with NoSync():
        results = differentiate(lambda *t: flash(*t, bounds(name), max_seqlen, return_lse=True), given, upstream)
    assert same_bits(results, expected)


@pytest.mark.parametrize("wrong", [[0, 9, 8, 24], [0, 7, 25], [0, 30, 24], [-3, 4, 24]], ids=str)
def test_wrong_boundaries_on_a_device_lead_no_library_out_of_the_row(library, wrong, monkeypatch):
    """And on the host they are refused before a library is called."""
    cu_seqlens, (_, calls) = torch.tensor(wrong), library
    for max_seqlen in (None, 24):
        with pytest.raises(ValueError, match="cu_seqlens"):
            flash(*tensors(4, 4), cu_seqlens, max_seqlen)
    assert not calls
    monkeypatch.setattr(api, "checks_enabled", lambda device: False)
    flash(*tensors(4, 4), cu_seqlens, 24)
    assert len(calls) == 1


def test_the_bound_is_the_longest_segment_where_that_is_known(library, monkeypatch):
    """But two for one token: FlashAttention-2 would take the row for that many segments of one token."""
    _, calls = library
    singles = torch.arange(T + 1)
    for cu_seqlens, max_seqlen in ((bounds(), None), (bounds(), 20), (singles, None), (singles, 1)):
        flash(*tensors(4, 4), cu_seqlens, max_seqlen)
    monkeypatch.setattr(api, "checks_enabled", lambda device: False)
    for cu_seqlens, max_seqlen in ((bounds(), None), (bounds(), 20), (singles, 1)):
        flash(*tensors(4, 4), cu_seqlens, max_seqlen)
    assert [call.get("max_seqlen_q", call.get("max_q")) for call in calls] == [11, 11, 2, 2, 11, 20, 2]


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_rows_of_the_tail_get_zeros_and_touch_nothing(library, poison):
    given = tensors(4, 4)
    poisoned = [t.clone() for t in given]
    for t in poisoned:
        t[13:] = poison
    clean, dirty = (
        differentiate(lambda *t: flash(*t, bounds("tail"), return_lse=True), t, torch.ones(T, 4, D))
        for t in (given, poisoned)
    )
    assert same_bits(clean, dirty)


@pytest.mark.parametrize("cu_seqlens", [[0], [0, 0], [0, 0, 0]], ids=str)
def test_a_row_of_nothing_but_tail_calls_no_library(library, cu_seqlens):
    results = differentiate(
        lambda *t: flash(*t, torch.tensor(cu_seqlens), return_lse=True), tensors(4, 4), torch.ones(T, 4, D)
    )
    out, lse, *gradients = results
    assert all((t == 0).all() for t in (out, *gradients))
    assert (lse == -torch.inf).all()
    assert not library[1]


def test_strides_and_dtypes_that_the_libraries_do_not_take_are_made_good(library):
    given = [torch.randn(T, D, 4).to(torch.float16).mT for _ in range(3)]
    check_case(given, torch.tensor([0, 9, 5, 9, 24, 9], dtype=torch.int32)[::2], impl="flash")


def test_the_lse_is_asked_for_only_where_it_is_wanted(library):
    given, (_, calls) = tensors(4, 4), library
    out, _ = flash(*given, bounds("tail"), return_lse=True)
    assert same_bits(flash(*given, bounds("tail")), out)
    asked = [call.get("return_lse", call.get("return_attn_probs", getattr(call.get("return_aux"), "lse", None)))
             for call in calls]  # fmt: skip
    assert asked == [True, False]


def test_under_autocast(library):
    given = tensors(4, 4, torch.float32)
    expected = flash(*(t.bfloat16() for t in given), bounds())
    with torch.autocast("cpu", torch.bfloat16):
        assert same_bits(flash(*given, bounds()), expected)


@pytest.mark.parametrize(
    ("version", "capability", "passed_over"),
    [
        ("flash_attn_4", HOPPER, False),
        ("flash_attn_4_beta4", HOPPER, True),
        ("flash_attn_4_beta4", BLACKWELL, False),
    ],
)
def test_a_backward_that_is_not_deterministic_is_passed_over(version, capability, passed_over, gpu, monkeypatch):
    calls = install(monkeypatch, version, "flash_attn_3", "flash_attn_2")
    gpu(capability)
    torch.use_deterministic_algorithms(True)
    try:
        flash(*(t.requires_grad_() for t in tensors(4, 4)), bounds())
        flash(*tensors(4, 4), bounds())
    finally:
        torch.use_deterministic_algorithms(False)
    assert [call["name"] for call in calls] == ["flash_attn_3" if passed_over else version, version]


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_libraries_own_switch_follows_use_deterministic_algorithms(library, deterministic):
    """torch's varlen_attn has none: its backward looks for itself."""
    torch.use_deterministic_algorithms(deterministic)
    try:
        flash(*tensors(4, 4), bounds())
    finally:
        torch.use_deterministic_algorithms(False)
    (call,) = library[1]
    assert call.get("deterministic", deterministic) is deterministic


@pytest.mark.parametrize(
    ("installed", "capability", "options", "chosen"),
    [
        (NEWEST, HOPPER, {}, "flash_attn_4"),
        (NEWEST, BLACKWELL, {}, "flash_attn_4"),
        (NEWEST, AMPERE, {}, "flash_attn_2"),
        (NEWEST, HOPPER, {"d": 12}, "flash_attn_2"),
        (NEWEST, HOPPER, {"d": 192}, "flash_attn_4"),
        (NEWEST, BLACKWELL, {"d": 192}, "flash_attn_2"),
        (NEWEST[1:], HOPPER, {}, "flash_attn_3"),
        (NEWEST[1:], BLACKWELL, {}, "flash_attn_2"),
        (NEWEST[2:], HOPPER, {}, "flash_attn_2"),
        (NEWEST[3:], HOPPER, {}, "varlen_attn_2_12"),
        (NEWEST[3:], AMPERE, {}, "varlen_attn_2_12"),
        (["varlen_attn_2_11"], HOPPER, {}, "varlen_attn_2_11"),
    ],
)
def test_the_newest_that_can_is_chosen(installed, capability, options, chosen, gpu, monkeypatch):
    calls = install(monkeypatch, *reversed(installed))
    gpu(capability)
    flash(*tensors(**options), bounds())
    assert [call["name"] for call in calls] == [chosen]


def test_what_the_deterministic_backward_of_flash_attn_3_refuses_goes_to_another(monkeypatch):
    calls = install(monkeypatch, "flash_attn_3", "flash_attn_2")
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        try:
            flash(*tensors(d=256), bounds())
        finally:
            torch.use_deterministic_algorithms(False)
    assert [call["name"] for call in calls] == ["flash_attn_3", "flash_attn_2"]


def test_flash_attn_3_is_found_under_either_name(monkeypatch):
    calls = install(monkeypatch, "flash_attn_3")
    monkeypatch.setitem(sys.modules, "flash_attn_3.flash_attn_interface", sys.modules["flash_attn_interface"])
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    flash(*tensors(), bounds())
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("installed", "capability", "tensor", "option", "reasons"),
    [
        ([], HOPPER, {}, {}, [f"{library}: not installed" for library in ("4", "3", "2", "varlen_attn")]),
        (NEWEST, (7, 5), {}, {}, ["4: .*9, 10.*has 7.5", "3: .* 9.*has 7.5", "2: .*8.*7.5", "varlen_attn: .*8.*7.5"]),
        (NEWEST, HOPPER, {"d": 264}, {}, ["4: head dim.* 256, not 264", "3: .*264", "2: .*264", "varlen_attn: .*264"]),
        (NEWEST[3:], HOPPER, {"d": 12}, {}, ["2: not installed", "varlen_attn: head dim.*multiples of 8.*not 12"]),
        (NEWEST[3:], HOPPER, {}, {"softcap": 5.0}, ["varlen_attn: has no softcap"]),
    ],
)  # fmt: skip
def test_where_none_can_each_ones_lack_is_named(installed, capability, tensor, option, reasons, gpu, monkeypatch):
    calls = install(monkeypatch, *installed)
    gpu(capability)
    with pytest.raises(RuntimeError) as error:
        flash(*tensors(**tensor), bounds(), **option)
    assert not calls
    for reason in reasons:
        assert re.search(reason, str(error.value))


def test_an_installation_that_does_not_load_is_quoted(monkeypatch):
    """A namespace package flash_attn is there wherever flash-attn 4 is."""
    install(monkeypatch)
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))

    def broken(name):
        if name == "flash_attn_interface":
            raise ImportError("undefined symbol: _ZN3c10")
        return importlib.import_module(name)

    monkeypatch.setattr(flash_impl, "import_module", broken)
    with pytest.raises(RuntimeError, match=r"3: not installed \(undefined symbol.*2: not installed .*no attribute"):
        flash(*tensors(), bounds())


def test_versions_before_what_the_adapters_ask_for_are_named(monkeypatch):
    def old(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False): ...

    install(monkeypatch)
    for module in MODULES:
        stand_in = ModuleType(module)
        stand_in.flash_attn_varlen_func = old
        monkeypatch.setitem(sys.modules, module, stand_in)
    with pytest.raises(RuntimeError, match=r"4: this version.*3: this version.*2: needs version 2\.6"):
        flash(*tensors(), bounds())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_other_dtypes_are_refused(dtype, library):
    with pytest.raises(RuntimeError, match=f"fp16 or bf16, got {dtype}"):
        flash(*tensors(4, 4, dtype), bounds())
    assert not library[1]


def test_a_cpu_is_refused(monkeypatch):
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="NVIDIA GPU, got cpu"):
        flash(*tensors(), bounds())


def test_auto_never_takes_it(library, monkeypatch):
    monkeypatch.delenv("SFT_KERNELS_IMPL", raising=False)
    packed_attention(*tensors(), bounds())
    assert not library[1]


def assert_recorded(function, record):
    here, recorded = (inspect.signature(each).parameters.values() for each in (function, record))
    assert [(p.name, p.kind, p.default) for p in here] == [(p.name, p.kind, p.default) for p in recorded]


def test_the_recorded_signature_is_that_of_the_torch_that_is_here():
    minor = int(torch.__version__.split(".")[1])
    assert_recorded(varlen.varlen_attn, getattr(flash_signatures, f"varlen_attn_2_{min(minor, 12)}"))


def test_the_recorded_signature_is_that_of_the_flash_attn_4_that_is_here():
    cute = pytest.importorskip("flash_attn.cute", exc_type=ImportError)
    assert_recorded(cute.flash_attn_varlen_func, flash_signatures.flash_attn_4)
