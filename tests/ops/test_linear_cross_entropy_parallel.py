"""A head split over ranks by its vocabulary: the loss, statistics and gradients of the whole head, on every rank."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sft_kernels import KeptTokens, linear_cross_entropy
from sft_kernels._budget import check
from sft_kernels.ops.linear_cross_entropy.matmul import padded
from sft_kernels.ops.linear_cross_entropy.parallel import Shards
from sft_kernels.ops.softmax_grad import torch_impl
from sft_kernels.ops.softmax_grad.options import LossOptions
from sft_kernels.verify import loss_oracle, plain_linear_cross_entropy

from .helpers import D, N, labels, run, same_bits
from .ranks import Ranks

V = 102
RANKS = 2
UNEVEN_BYTES = 7 * 56 * 4  # of logits at a time where the slices are not alike
LOOPS = {
    "auto": {},
    "tokens": {"chunking": "tokens", "max_logits_bytes": 9 * 64 * 4},
    "vocab": {"chunking": "vocab", "max_logits_bytes": 24 * N * 4},
}
EVERY = {"label_smoothing": 0.1, "softcap": 5.0, "logit_scale": 0.5, "z_loss": 0.01}
IMPLS = pytest.mark.parametrize("impl", ["torch", "triton"])


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    ranks = Ranks(RANKS, tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.close()


def inputs(dtype=torch.float32, v=V):
    head = torch.randn(v, D) * 2 / D**0.5
    return [t.to(dtype) for t in (torch.randn(N, D), head, torch.randn(v))], labels(v=v)


def my_slice(v=V):
    width = v // RANKS
    return slice(dist.get_rank() * width, (dist.get_rank() + 1) * width)


def hold(dtype, options, loop, impl, upstream=1.0):
    """This rank's results against the oracle of the whole head."""
    tensors, y = inputs(dtype)
    s = my_slice()
    mine = [tensors[0], *(t[s].clone() for t in tensors[1:])]
    group = dist.group.WORLD

    def ours(hidden, weight, bias):
        return linear_cross_entropy(
            hidden, weight, y, linear_bias=bias, process_group=group, impl=impl, **LOOPS[loop], **options
        )

    def plain(hidden, weight, bias):
        return plain_linear_cross_entropy(hidden, weight, bias, y, **options)

    found, eager = run(ours, mine, upstream), run(plain, tensors, upstream)
    ref = loss_oracle(tensors, y, upstream=upstream, **options)
    for name, x, r, e in zip(("loss", "dinput", "dweight", "dbias"), found, ref, eager, strict=True):
        mine = (r[s], e[s]) if name in ("dweight", "dbias") else (r, e)
        check(name, x, *mine)
    return found[:2]


@IMPLS
@pytest.mark.parametrize("loop", [*LOOPS])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reduction": "sum"},
        {"reduction": "none"},
        {"num_items": 40},
        {"token_weight": torch.linspace(-0.5, 2, N)},
        {"weight": torch.linspace(0.2, 2, V)},
        EVERY,
        {**EVERY, "reduction": "none"},
    ],
    ids=lambda options: ", ".join(options) or "mean",
)
def test_loss_and_gradients_are_those_of_the_whole_head(ranks, options, loop, impl):
    first, second = ranks(hold, torch.float32, options, loop, impl, -1.7)
    assert same_bits(first, second)


@IMPLS
@pytest.mark.parametrize("loop", [*LOOPS])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_in_every_dtype(ranks, dtype, loop, impl):
    if dtype == torch.float64:
        if impl == "triton":
            pytest.skip("float64 is torch's own code")
        ranks(hold_double, loop)
    else:
        ranks(hold, dtype, {}, loop, impl)


def hold_double(loop):
    tensors, y = inputs(torch.float64)
    s = my_slice()
    mine = [tensors[0], *(t[s].clone() for t in tensors[1:])]
    found = run(
        lambda h, w, b: linear_cross_entropy(h, w, y, linear_bias=b, process_group=dist.group.WORLD, **LOOPS[loop]),
        mine,
    )
    ref = loss_oracle(tensors, y)
    for x, r in zip(found, (*ref[:2], ref[2][s], ref[3][s]), strict=True):
        torch.testing.assert_close(x, torch.as_tensor(r), rtol=1e-12, atol=1e-14)


def statistics(impl, loop):
    (hidden, weight, bias), y = inputs()
    _, whole = linear_cross_entropy(hidden, weight, y, linear_bias=bias, return_stats=True, impl=impl)
    s = my_slice()
    with torch.no_grad():
        losses, mine = linear_cross_entropy(
            hidden, weight[s], y, linear_bias=bias[s], reduction="none", process_group=dist.group.WORLD,
            return_stats=True, impl=impl, **LOOPS[loop],
        )  # fmt: skip
    torch.testing.assert_close([*mine], [*whole])
    torch.testing.assert_close(losses.sum(), whole.nll_sum)


@IMPLS
@pytest.mark.parametrize("loop", [*LOOPS])
def test_statistics_are_those_of_the_whole_head(ranks, loop, impl):
    ranks(statistics, impl, loop)


def sure_tokens(impl):
    """Rank 1 holds the label of every token, far ahead of all else."""
    hidden, weight = torch.eye(4).repeat(2, 1), torch.zeros(8, 4)
    weight[4:] = 20 * torch.eye(4)
    y = torch.arange(4).repeat(2) + 4
    s = my_slice(8)
    mine = [hidden, weight[s].clone()]
    found = run(lambda h, w: linear_cross_entropy(h, w, y, process_group=dist.group.WORLD, impl=impl), mine)
    ref = loss_oracle((hidden, weight), y)
    eager = run(lambda h, w: plain_linear_cross_entropy(h, w, None, y), [hidden.double(), weight.double()])
    for x, r, e in zip(found, (*ref[:2], ref[2][s]), (*eager[:2], eager[2][s]), strict=True):
        check("sure", x, r, e)


@IMPLS
def test_a_sure_token_keeps_its_digits(ranks, impl):
    ranks(sure_tokens, impl)


def with_kept_tokens(capacity, impl):
    (hidden, weight, _), y = inputs()
    s, kept = my_slice(), KeptTokens.from_labels(y, shift=True, capacity=capacity)
    leaves = [hidden.requires_grad_(), weight[s].clone().requires_grad_()]
    common = {"process_group": dist.group.WORLD, "shift": True, "impl": impl}
    found = linear_cross_entropy(*leaves, kept=kept, **common)
    other = linear_cross_entropy(*leaves, y, **common)
    assert torch.equal(found, other)
    grads = torch.autograd.grad(found, leaves, retain_graph=True)
    torch.testing.assert_close(grads, torch.autograd.grad(other, leaves))
    assert same_bits(torch.autograd.grad(2 * found, leaves), [2 * g for g in grads])  # a second backward


@IMPLS
@pytest.mark.parametrize("capacity", [None, N])
def test_kept_tokens_and_a_second_backward(ranks, capacity, impl):
    ranks(with_kept_tokens, capacity, impl)


class Collectives(TorchDispatchMode):
    """``(name, dtype, shape)`` of every collective."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace in ("c10d", "_c10d_functional"):
            tensor = args[0][0] if isinstance(args[0], list) else args[0]
            self.seen.append((function.overloadpacket.__name__, tensor.dtype, tuple(tensor.shape)))
        return function(*args, **(kwargs or {}))


def what_is_sent(loop, options, chunks):
    (hidden, weight, _), y = inputs()
    leaves = [hidden.requires_grad_(), weight[my_slice()].clone().requires_grad_()]
    kept = KeptTokens.from_labels(y)
    bound = {"tokens": -(-kept.count // chunks) * 56 * 4, "vocab": 17 * kept.count * 4}[loop]
    with Collectives() as found:
        loss = linear_cross_entropy(
            *leaves, kept=kept, process_group=dist.group.WORLD, chunking=loop, max_logits_bytes=bound, **options
        )
        loss = loss[0] if options.get("return_stats") else loss
        loss.backward()
    return found.seen, kept.count


@pytest.mark.parametrize(("loop", "chunks"), [("tokens", 1), ("tokens", 3), ("vocab", 3)])
@pytest.mark.parametrize(
    ("options", "sums"), [({}, 1), ({"return_stats": True}, 2), ({"return_stats": True, "label_smoothing": 0.1}, 3)]
)
def test_scalars_travel_in_two_reductions_and_no_logit_travels(ranks, loop, chunks, options, sums):
    for seen, kept in ranks(what_is_sent, loop, options, chunks):
        assert {name for name, *_ in seen} == {"allreduce_"}
        lengths, scalars, (dx,) = seen[:1], seen[1:-1], seen[-1:]
        assert lengths == [("allreduce_", torch.int64, (2,))]  # the check of the slices' lengths, on a CPU
        parts = 1 if loop == "vocab" else chunks
        assert [shape[0] for _, _, shape in scalars] == [3, sums] * parts
        assert sum(shape[1] for _, _, shape in scalars) == 2 * kept
        assert dx == ("allreduce_", torch.float32, (kept, D))


def distributed(v, impl):
    """DTensors, split unevenly; every gradient comes back as its input is placed."""
    mesh = init_device_mesh("cpu", (RANKS,))
    (hidden, weight, bias), y = inputs(v=v)
    whole = run(lambda h, w, b: plain_linear_cross_entropy(h, w, b, y), [hidden, weight, bias])
    ref = loss_oracle((hidden, weight, bias), y)
    leaves = [
        distribute_tensor(t, mesh, [placement]).requires_grad_()
        for t, placement in ((hidden, Replicate()), (weight, Shard(0)), (bias, Shard(0)))
    ]
    loss = linear_cross_entropy(
        *leaves[:2], y, linear_bias=leaves[2], process_group=mesh.get_group(), impl=impl, chunking="tokens",
        max_logits_bytes=UNEVEN_BYTES,
    )  # fmt: skip
    loss.backward()
    check("loss", loss.detach(), ref[0], whole[0])
    for name, leaf, r, e in zip(("dinput", "dweight", "dbias"), leaves, ref[1:], whole[1:], strict=True):
        assert isinstance(leaf.grad, DTensor)
        assert leaf.grad.placements == leaf.placements
        check(name, leaf.grad.full_tensor(), r, e)


@IMPLS
@pytest.mark.parametrize("v", [102, 97, 3])
def test_a_dtensor_may_be_split_unevenly(ranks, v, impl):
    ranks(distributed, v, impl)


def test_ranks_of_unlike_slices_take_as_many_chunks():
    """What the test above rests on: by its own slice, 49 or 48 of 97 classes, each rank would plan for itself."""
    torch.manual_seed(0)
    _, y = inputs(v=97)
    kept = int((y != -100).sum())
    chunks = {-(-kept // (UNEVEN_BYTES // (4 * padded(width)))) for width in (49, 48)}
    assert len(chunks) == 2


def refused(case):
    (hidden, weight, bias), y = inputs()
    mesh, s = init_device_mesh("cpu", (RANKS,)), my_slice()

    def split(tensor, dimension=0):
        return distribute_tensor(tensor, mesh, [Shard(dimension)])

    changed = {
        "lengths": {"linear_weight": weight[: 50 + dist.get_rank()]},
        "no group": {"linear_weight": split(weight), "process_group": None},
        "placement": {"linear_weight": split(weight, 1)},
        "input": {"linear_weight": split(weight), "input": split(hidden)},
        "too few": {"linear_weight": split(weight[:1])},
        "not a group": {"process_group": "tp"},
        "probabilities": {"target": torch.rand(N, V)},
        "bias": {"linear_bias": bias},
        "places": {"linear_weight": weight[s][:, None]},
    }[case]
    call = {"input": hidden, "linear_weight": weight[s], "target": y, "process_group": dist.group.WORLD} | changed
    with pytest.raises((ValueError, TypeError)) as raised:
        linear_cross_entropy(**call)
    return str(raised.value)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("lengths", "linear_weight: expected slices of one length"),
        ("no group", "linear_weight, linear_bias: a DTensor needs process_group"),
        ("placement", r"linear_weight: expected a mesh of one dimension and placement as Shard\(0\)"),
        ("input", "input: expected a tensor, or with process_group a DTensor that is whole"),
        ("too few", "linear_weight: 1 classes leave one of 2 ranks without any"),
        ("not a group", "process_group: expected a ProcessGroup, got str"),
        ("probabilities", "process_group: probabilities"),
        ("bias", "linear_bias: expected shape"),
        ("places", "process_group: goes with a head of two dimensions"),
    ],
)
def test_what_cannot_be_split_is_refused_on_every_rank(ranks, case, message):
    for text in ranks(refused, case):
        with pytest.raises(AssertionError, match=message):
            raise AssertionError(text)


def compiled(loop):
    (hidden, weight, bias), y = inputs()
    s, kept = my_slice(), KeptTokens.from_labels(y)
    leaves = [t.requires_grad_() for t in (hidden, weight[s].clone(), bias[s].clone())]

    def loss(hidden, weight, bias):
        return linear_cross_entropy(
            hidden, weight, kept=kept, linear_bias=bias, process_group=dist.group.WORLD, impl="triton", **LOOPS[loop]
        )

    found, eager = torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves), loss(*leaves)
    torch.testing.assert_close(found, eager)
    torch.testing.assert_close(torch.autograd.grad(found, leaves), torch.autograd.grad(eager, leaves))


@pytest.mark.parametrize("loop", [*LOOPS])
def test_it_compiles_whole(ranks, loop):
    ranks(compiled, loop)


def out_of_range():
    (hidden, weight, _), y = inputs()
    y[0] = V
    with pytest.raises(IndexError, match=f"label {V} of token 0"):
        linear_cross_entropy(hidden, weight[my_slice()], y, process_group=dist.group.WORLD)


def test_labels_range_over_the_whole_vocabulary(ranks):
    ranks(out_of_range)


def test_a_token_whose_logits_are_ruled_out_on_all_ranks_has_no_mean_logit(monkeypatch):
    """One rank, of which nothing need be sent: as the rows of a whole head."""
    monkeypatch.setattr(dist, "all_reduce", lambda *_: None)
    logits, y = torch.randn(4, V), torch.zeros(4, dtype=torch.int64)
    logits[1], logits[2, 5], logits[3] = float("-inf"), float("-inf"), float("nan")
    rows = torch_impl.softmax_grad(logits, y, LossOptions(V), stats=True, predict=True)
    merged = Shards(None, V, 0, V).merge(rows)
    assert torch.equal(merged.prediction[:3], rows.prediction[:3])
    assert 0 <= merged.prediction[3] < V  # of what are no numbers
    assert merged.mean_logit[1] == 0
    for found, wanted in zip(merged[:3], rows[:3], strict=True):
        torch.testing.assert_close(found, wanted, equal_nan=True)
    torch.testing.assert_close(merged.entropy, rows.entropy, equal_nan=True)


# ---- values of each token


def token_stats(loop, dtype, options, impl):
    """This rank's values and gradients against the oracle of the whole head; the reduction's own on request."""
    tensors, y = inputs(dtype)
    s, g = my_slice(), [torch.rand(N) - 0.5 for _ in range(3)]
    mine = [tensors[0], *(t[s].clone() for t in tensors[1:])]

    def ours(hidden, weight, bias):
        return linear_cross_entropy(
            hidden, weight, y, linear_bias=bias, process_group=dist.group.WORLD, impl=impl, return_stats="tokens",
            **LOOPS[loop], **options,
        )  # fmt: skip

    def plain(hidden, weight, bias):
        return plain_linear_cross_entropy(hidden, weight, bias, y, return_stats="tokens", **options)

    found, eager = run(ours, mine, 1.7, g), run(plain, tensors, 1.7, g)
    ref = loss_oracle(tensors, y, upstream=1.7, of_stats=g, **options)
    assert found[4].tolist() == ref[4].tolist()
    for i in (0, 1, 2, 3, 5, 6, 7):
        mine = (ref[i][s], eager[i][s]) if i > 5 else (ref[i], eager[i])
        check(str(i), found[i], *mine)
    return found[:6]


@IMPLS
@pytest.mark.parametrize("loop", [*LOOPS])
@pytest.mark.parametrize(
    ("dtype", "options"),
    [(torch.float32, {}), (torch.float16, {**EVERY, "reduction": "none"})],
    ids=["", "fp16, every"],
)
def test_values_of_each_token_are_those_of_the_whole_head(ranks, loop, dtype, options, impl):
    first, second = ranks(token_stats, loop, dtype, options, impl)
    assert same_bits(first, second)


def predictions():
    """Five rows, three of which have several largest logits, in one slice or in both."""
    logits = torch.zeros(5, 8)
    logits[1, 6] = logits[2, 5] = logits[2, 2] = logits[3, 4] = 1
    logits[4, :4] = -1
    y = torch.zeros(5, dtype=torch.int64)
    weight = logits.T.contiguous()[my_slice(8)]
    _, found = linear_cross_entropy(torch.eye(5), weight, y, process_group=dist.group.WORLD, return_stats="tokens")
    return found.prediction.tolist()


def test_of_several_largest_logits_the_smallest_class_of_all_ranks_is_the_prediction(ranks):
    for found in ranks(predictions):
        assert found == [0, 6, 2, 4, 4]


@pytest.mark.parametrize(("loop", "chunks"), [("tokens", 1), ("tokens", 3), ("vocab", 3)])
def test_predictions_travel_in_a_third_reduction(ranks, loop, chunks):
    for seen, kept in ranks(what_is_sent, loop, {"return_stats": "tokens"}, chunks):
        scalars, dx = seen[1:-1], seen[-1]
        whole = loop == "vocab" or chunks == 1
        each = [(torch.float64, 3), (torch.float64, 2), (torch.int64, None)] * (1 if whole else chunks)
        found = [(dtype, shape[0] if len(shape) == 2 else None) for _, dtype, shape in scalars]
        assert found == each
        assert dx == ("allreduce_", torch.float32, (kept, D))
