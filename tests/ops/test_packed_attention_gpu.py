"""What only a GPU can show of packed attention: compiled kernels, no wait for the device, replay in a CUDA graph."""

import pytest
import torch
import torch.nn.functional as F

from sft_kernels import AttentionTiles, packed_attention

from .attention import check_case, differentiate
from .helpers import same_bits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
LENGTHS = [1, 16, 64, 65, 127, 128, 129, 0, 300, 700]
T = sum(LENGTHS) + 70


def boundaries(lengths=LENGTHS):
    return F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int().cuda()


def tensors(dtype=torch.bfloat16, heads=4, key_heads=2, D=128, tokens=T):
    return [torch.randn(tokens, h, D, device="cuda").to(dtype) for h in (heads, key_heads, key_heads)]


@pytest.mark.parametrize("D", [64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_every_head_dimension(dtype, D):
    if dtype == torch.float32 and D > 128:
        pytest.skip("torch's own code")
    check_case(tensors(dtype, D=D), boundaries(), impl="triton")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize(
    "options",
    [
        {"causal": False},
        {"window_size": (100, -1)},
        {"window_size": (90, 33), "causal": False},
        {"softcap": 5.0},
        {"softcap": 5.0, "window_size": (64, -1)},
        {"scale": -0.2},
    ],
    ids=str,
)
def test_options(options, D, dtype):
    check_case(tensors(dtype, D=D), boundaries(), impl="triton", **options)


@pytest.mark.parametrize("heads", [(8, 8), (8, 4), (8, 1), (6, 2)], ids=str)
def test_heads(heads):
    check_case(tensors(torch.bfloat16, *heads, D=64), boundaries(), impl="triton")


def attend(given, bounds, upstream, **options):
    return differentiate(
        lambda *t: packed_attention(*t, bounds, return_lse=True, impl="triton", **options), given, upstream
    )


@pytest.mark.parametrize("D", [64, 128, 256])
def test_same_inputs_same_bits(D):
    given, upstream = tensors(D=D), torch.randn(T, 4, D, device="cuda", dtype=torch.bfloat16)
    once = attend(given, boundaries(), upstream)
    assert all(same_bits(attend(given, boundaries(), upstream), once) for _ in range(5))


def test_nan_in_one_segment_and_in_the_tail_stays_there():
    given, upstream = tensors(), torch.randn(T, 4, 128, device="cuda", dtype=torch.bfloat16)
    before = attend(given, boundaries(), upstream)
    poisoned = torch.zeros(T, dtype=torch.bool, device="cuda")
    poisoned[17:81] = poisoned[sum(LENGTHS) :] = True
    for t in (*given, upstream):
        t[poisoned] = float("nan")
    after = attend(given, boundaries(), upstream)
    for t in (*before, *after):
        (t if t.dim() == 3 else t.T)[poisoned] = 0
    assert same_bits(after, before)


def test_nothing_waits_for_the_device():
    given, bounds = [t.requires_grad_() for t in tensors()], boundaries()
    packed_attention(*given, bounds, impl="triton").sum().backward()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = packed_attention(*given, bounds, softcap=5.0, impl="triton")
        torch.autograd.grad(out, given, torch.ones_like(out))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_graph_replays_with_other_lengths():
    """Tiles are built within the graph, from boundaries that lie in the same tensor."""
    given, bounds = [t.requires_grad_() for t in tensors()], boundaries()
    upstream = torch.randn(T, 4, 128, device="cuda", dtype=torch.bfloat16)

    def step():
        tiles = AttentionTiles.from_cu_seqlens(bounds, T)
        out = packed_attention(*given, bounds, tiles=tiles, impl="triton")
        return out, *torch.autograd.grad(out, given, upstream)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    for lengths in (LENGTHS, [T - 9, *[1] * 9], LENGTHS[::-1]):
        bounds.copy_(boundaries(lengths))
        graph.replay()
        assert same_bits(found, step())


@pytest.mark.parametrize("segments", [1, 10, 64, 300])
@pytest.mark.parametrize("block", [32, 128])
def test_tiles_are_those_of_the_host(segments, block):
    bounds = F.pad(torch.randint(0, 400, (segments,)).cumsum(0), (1, 0)).int()
    tokens = int(bounds[-1]) + 70
    expected = AttentionTiles.from_cu_seqlens(bounds, tokens, block=block)
    for given in (bounds, bounds.cuda(), bounds.long().cuda()):
        found = AttentionTiles.from_cu_seqlens(given, tokens, device="cuda", block=block)
        assert torch.equal(found.lists.cpu(), expected.lists)


def test_wrong_boundaries_on_the_device_touch_nothing_outside():
    given = tensors()
    for wrong in ([0, 900, 200, 5000], [-300, 40, 41, 2**31 - 1]):
        out = packed_attention(*given, torch.tensor(wrong, device="cuda", dtype=torch.int32), impl="triton")
        assert out.isfinite().all()
    torch.cuda.synchronize()


def test_addresses_beyond_32_bits():
    """Rows × row length pass 2³¹ elements of a projection that query, key and value are slices of."""
    tokens, width = 70_000, 32_768
    if torch.cuda.mem_get_info()[0] < 8 << 30:
        pytest.skip("needs 8 GB")
    projection = torch.empty(tokens, width // 128, 128, device="cuda", dtype=torch.bfloat16)
    query, key, value = (projection[:, at : at + 1] for at in (0, 100, 255))
    for t in (query, key, value):
        t.copy_(torch.randn(t.shape, device="cuda"))
    bounds = torch.tensor([0, tokens - 300, tokens], device="cuda", dtype=torch.int32)
    out = packed_attention(query, key, value, bounds, impl="triton")
    alone = packed_attention(
        *(t[-300:].contiguous() for t in (query, key, value)),
        torch.tensor([0, 300], device="cuda", dtype=torch.int32),
        impl="triton",
    )
    assert torch.equal(out[-300:], alone)


def test_compiled_is_eager():
    given, bounds = [t.requires_grad_() for t in tensors()], boundaries()
    torch._dynamo.reset()

    def attend(query, key, value, bounds):
        return packed_attention(query, key, value, bounds, softcap=5.0)

    upstream = torch.randn(T, 4, 128, device="cuda", dtype=torch.bfloat16)
    outs = [function(*given, bounds) for function in (torch.compile(attend, fullgraph=True), attend)]
    assert same_bits(*outs)
    assert same_bits(*(torch.autograd.grad(out, given, upstream) for out in outs))
