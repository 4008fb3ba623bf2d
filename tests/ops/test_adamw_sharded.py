"""``AdamW`` over DTensors on several gloo ranks: FSDP2, tensor parallelism, and both, as over whole tensors."""

import copy
import warnings
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from sft_kernels import AdamW
from sft_kernels._budget import check

from .adamw import HYPER, IMPLS, precise
from .helpers import same_bits
from .ranks import Ranks

SHAPES = [(5, 3), (4, 6), (1,), (7,)]  # uneven, even, nothing on the second rank, uneven


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    ranks = Ranks(2, tmp_path_factory.mktemp("two"))
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    ranks = Ranks(4, tmp_path_factory.mktemp("four"))
    yield ranks
    ranks.close()


def whole(t):
    return t.full_tensor() if isinstance(t, DTensor) else t


def collected(optimizer, params):
    """Everything that a step writes, as whole tensors: precise parameters last."""
    states = [{name: whole(t).clone() for name, t in optimizer.state[p].items()} for p in params]
    for state in states:
        if "remainder" in state:
            state["remainder"] = state["remainder"].view(torch.int16)
    return [whole(p.detach()).clone() for p in params], states


def pair(mesh, placements, options, dtype=torch.float32, shapes=SHAPES):
    """The same parameters whole and distributed, and their optimisers."""
    values = [torch.randn(shape).to(dtype) for shape in shapes]
    plain = [nn.Parameter(v.clone()) for v in values]
    shards = [
        nn.Parameter(v if at is None else distribute_tensor(v, *(at if isinstance(at, tuple) else (mesh, at))))
        for v, at in zip(values, placements, strict=True)
    ]
    return plain, shards, AdamW(plain, **HYPER, **options), AdamW(shards, **HYPER, **options)


def step(optimizer, params, grads):
    for p, g in zip(params, grads, strict=True):
        g = g.clone()  # torch clips it
        p.grad = distribute_tensor(g, p.device_mesh, p.placements) if isinstance(p, DTensor) else g
    optimizer.step()


# ---- nothing is clipped: to the bit


def _same_bits_as_whole(options, dtype, placements):
    mesh = init_device_mesh("cpu", (2,))
    plain, shards, one, other = pair(mesh, placements, options, dtype)
    for _ in range(3):
        grads = [torch.randn(p.shape).to(dtype) for p in plain]
        step(one, plain, grads)
        step(other, shards, grads)
        if one._impl == "triton" or one._mixed:
            assert same_bits(collected(one, plain), collected(other, shards))
        for p, q in zip(plain, shards, strict=True):  # torch's own kernel has other bits where it ends
            check("parameter", whole(q.detach()), p.detach().double(), p.detach())
        norm = torch.cat([g.double().flatten() for g in grads]).norm()
        check("norm", other.last_grad_norm, norm, one.last_grad_norm)


OPTIONS = [
    (torch.float32, {}),
    (torch.bfloat16, {"master_weights": "split", "state_dtype": torch.float32}),
    (torch.bfloat16, {"stochastic_rounding": True}),
]
ROWS = [[Shard(0)]] * 4
COLUMNS = [[Shard(1)], [Shard(1)], [Replicate()], [Shard(0)]]


@IMPLS
@pytest.mark.parametrize(("dtype", "options"), OPTIONS, ids=str)
@pytest.mark.parametrize("placements", [ROWS, COLUMNS], ids=["rows", "columns"])
def test_where_nothing_is_clipped_the_bits_are_those_of_whole_tensors(two, dtype, options, placements, impl):
    two(_same_bits_as_whole, {**options, "max_grad_norm": 1e9, "impl": impl}, dtype, placements)


# ---- clipping


def _clips(options, mesh_shape, layouts):
    """The norm is that of whole tensors, and the update shrinks by it: after a first step, moments tell by how much."""
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=("dp", "tp")[: len(mesh_shape)])
    placements = [
        None if at is None else (mesh[at[0]], at[1]) if at[0] else (mesh, at[1]) for at in layouts
    ]  # fmt: skip
    plain, shards, _, optimizer = pair(mesh, placements, {**options, "max_grad_norm": 0.1})
    grads = [torch.randn(p.shape) for p in plain]
    step(optimizer, shards, grads)
    norm = torch.cat([g.double().flatten() for g in grads]).norm()
    check("norm", optimizer.last_grad_norm, norm, norm)
    for p, g in zip(shards, grads, strict=True):
        ref = (1 - HYPER["betas"][0]) * g.double() * 0.1 / (norm + 1e-6)
        check("exp_avg", whole(optimizer.state[p]["exp_avg"]), ref, ref.float())
    assert norm > 1
    return optimizer.last_grad_norm.item()


MIXED_MESH = [
    (None, [Shard(0), Shard(1)]),
    (None, [Shard(0), Replicate()]),
    (None, [Replicate(), Replicate()]),
    ("dp", [Shard(0)]),
]


@IMPLS
def test_the_norm_of_fsdp_is_that_of_the_model(two, impl):
    norms = two(_clips, {"impl": impl}, (2,), [(None, p) for p in ROWS])
    assert norms[0] == norms[1]


@IMPLS
def test_replicas_count_once_beside_shards(two, impl):
    norms = two(_clips, {"impl": impl}, (2,), [(None, [Shard(0)]), (None, [Replicate()]), None, (None, [Shard(0)])])
    assert norms[0] == norms[1]


@IMPLS
def test_tensor_parallel_and_sharded_parameters_share_one_norm(four, impl):
    assert len({*four(_clips, {"impl": impl}, (2, 2), MIXED_MESH)}) == 1


def _rounds_in_two_dimensions(options):
    mesh = init_device_mesh("cpu", (2, 2))
    placements = [[Shard(0), Shard(1)], [Shard(1), Shard(0)], [Replicate(), Shard(0)], [Shard(0), Shard(0)]]
    plain, shards, one, other = pair(mesh, placements, options, torch.bfloat16)
    for _ in range(2):
        grads = [torch.randn(p.shape).bfloat16() for p in plain]
        step(one, plain, grads)
        step(other, shards, grads)
    assert same_bits(collected(one, plain), collected(other, shards))


@IMPLS
def test_stochastic_rounding_knows_no_placement(four, impl):
    four(_rounds_in_two_dimensions, {"stochastic_rounding": True, "impl": impl})


def test_a_placement_that_cannot_be_counted_is_refused():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for impl in ("torch", "triton"):
            p = nn.Parameter(DTensor.from_local(torch.ones(4).bfloat16(), mesh, [Partial()]))
            p.grad = DTensor.from_local(torch.ones(4).bfloat16(), mesh, [Partial()])
            optimizer = AdamW([p], stochastic_rounding=True, impl=impl)
            with pytest.raises(ValueError, match=r"stochastic_rounding.*P\("):
                optimizer.step()
            assert not optimizer.state
    finally:
        dist.destroy_process_group()


# ---- skipping


def _skips(options, found_inf):
    rank, mesh = dist.get_rank(), init_device_mesh("cpu", (2,))
    _, shards, _, optimizer = pair(mesh, ROWS, options)
    grads = [torch.randn(shape) for shape in SHAPES]
    step(optimizer, shards, grads)
    before = collected(optimizer, shards)
    if found_inf:
        optimizer.found_inf = torch.tensor(float(rank == 1))
    elif rank == 1:
        grads[0][3, 1] = float("nan")  # in the rows of rank 1, where distribute_tensor leaves what rank 0 has
    for p, g in zip(shards, grads, strict=True):
        p.grad = distribute_tensor(g, mesh, [Shard(0)], src_data_rank=None)
    optimizer.step()
    assert same_bits(collected(optimizer, shards), before)
    assert optimizer.skipped_steps == 1
    optimizer.found_inf = torch.tensor(0.0)
    step(optimizer, shards, [torch.randn(shape) for shape in SHAPES])
    assert optimizer.skipped_steps == 1
    assert all(state["step"] == 2 for state in optimizer.state.values())


@IMPLS
@pytest.mark.parametrize("found_inf", [False, True], ids=["nan", "found_inf"])
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0, "master_weights": "split"}], ids=str)
def test_what_is_bad_on_one_rank_is_skipped_on_both(two, options, found_inf, impl):
    two(_skips, {**options, "skip_nonfinite": True, "impl": impl}, found_inf)


# ---- a model under FSDP2, its checkpoints and other shards


def _model(dtype, **sharding):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 4)).to(dtype)
    if sharding:
        fully_shard(model, **sharding)
    return model


def _trained(model, optimizer, batches):
    for x in batches:
        optimizer.zero_grad()
        model(x).float().square().mean().backward()
        optimizer.step()


def _trains(options, dtype):
    mesh = init_device_mesh("cpu", (2,))
    plain, sharded = _model(dtype), _model(dtype, mesh=mesh)
    batches = list(torch.randn(3, 8, 6).to(dtype))
    for model in (plain, sharded):
        _trained(model, AdamW(model.parameters(), **HYPER, **options), batches)
    for p, q in zip(plain.parameters(), sharded.parameters(), strict=True):
        check("parameter", whole(q.detach()), p.detach().double(), p.detach())


@IMPLS
def test_a_model_under_fsdp2_trains_as_a_whole_one(two, impl):
    two(_trains, {"max_grad_norm": 0.1, "skip_nonfinite": True, "impl": impl}, torch.float32)


def _resumes(options, dtype, folder, at, other_dim):
    mesh = init_device_mesh("cpu", (2,))
    batches = list(torch.randn(4, 8, 6).to(dtype))

    def make(**more):
        model = _model(dtype, mesh=mesh, **more)
        return model, AdamW(model.parameters(), **HYPER, **options)

    model, optimizer = make()
    _trained(model, optimizer, batches[:at])
    if at == 0:  # torch steps once, with a rate of 0, to see what the state is
        get_state_dict(model, optimizer)
    states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.save(states, checkpoint_id=folder)
    more = {"shard_placement_fn": lambda p: Shard(p.dim() - 1)} if other_dim else {}
    resumed, twin = make(**more)
    for p in resumed.parameters():
        p.detach().zero_()
    states = dict(zip(("model", "optimizer"), get_state_dict(resumed, twin), strict=True))
    dcp.load(states, checkpoint_id=folder)
    set_state_dict(resumed, twin, model_state_dict=states["model"], optim_state_dict=states["optimizer"])
    ours, theirs = (collected(o, list(m.parameters())) for o, m in ((optimizer, model), (twin, resumed)))
    assert same_bits(ours, theirs)
    if other_dim and optimizer._impl == "torch" and not optimizer._mixed:
        return  # torch's own kernel has other bits where it ends
    for _ in range(2):
        grads = [torch.randn(p.shape).to(dtype) for p in model.parameters()]
        step(optimizer, list(model.parameters()), grads)
        step(twin, list(resumed.parameters()), grads)
    ours, theirs = (collected(o, list(m.parameters())) for o, m in ((optimizer, model), (twin, resumed)))
    assert same_bits(ours, theirs)


@IMPLS
@pytest.mark.parametrize("other_dim", [False, True], ids=["same shards", "other shards"])
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {"amsgrad": True}),
        (torch.bfloat16, {"master_weights": "split", "state_dtype": torch.float32}),
        (torch.bfloat16, {"master_weights": "float32"}),
        (torch.bfloat16, {"stochastic_rounding": True}),
    ],
    ids=str,
)
def test_a_distributed_checkpoint_resumes_to_the_bit(two, tmp_path, dtype, options, other_dim, impl):
    two(_resumes, {**options, "impl": impl}, dtype, str(tmp_path / "checkpoint"), 2, other_dim)


def test_what_is_collected_is_as_precise_as_the_state():
    p = nn.Parameter(torch.ones(3).bfloat16())
    optimizer = AdamW([p], lr=1e-4, master_weights="split", impl="triton")
    step(optimizer, [p], [torch.ones(3).bfloat16()])
    assert (precise(optimizer, p) < 1).all()
    assert (p == 1).all()


# ---- shards in plain tensors, which know nothing of one another


def norms_of_shards():
    from torch.distributed.optim import ZeroRedundancyOptimizer

    class Unlike(ZeroRedundancyOptimizer):
        def _init_local_optimizer(self):
            super()._init_local_optimizer()

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    params, alone = list(model.parameters()), [dist.new_group([rank]) for rank in range(2)][dist.get_rank()]
    zero = partial(ZeroRedundancyOptimizer, params)
    refused = {
        "max_grad_norm": [
            lambda: zero(AdamW, max_grad_norm=1.0),
            lambda: zero(AdamW, max_grad_norm=float("inf")),
            lambda: zero(partial(AdamW, max_grad_norm=1.0)),
            lambda: zero(lambda params, **options: AdamW(params, max_grad_norm=1.0, **options), lr=0.1),
            lambda: Unlike(params, AdamW, max_grad_norm=1.0, parameters_as_bucket_view=True),
        ],
        "skip_nonfinite": [lambda: zero(AdamW, skip_nonfinite=True)],
    }
    for name, calls in refused.items():
        for call in calls:
            with pytest.raises(ValueError, match=rf"^{name}: ZeroRedundancyOptimizer .*shard's; .*clip_grad_norm_"):
                call()
    AdamW(params, max_grad_norm=1.0, skip_nonfinite=True)  # beside one
    zero(AdamW, max_grad_norm=1.0, process_group=alone)  # whose shard is the whole

    optimizer, reference = zero(AdamW, lr=0.1, state_dtype=torch.float64, impl="torch"), copy.deepcopy(model)
    plain = AdamW(reference.parameters(), lr=0.1, state_dtype=torch.float64, impl="torch")
    for _ in range(2):
        for module in (model, reference):
            module.zero_grad()
            module(torch.ones(2, 4)).square().sum().backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        plain.step()
    assert same_bits(list(model.parameters()), list(reference.parameters()))
    with pytest.raises(ValueError, match="impl holds for all parameters"):
        AdamW([{"params": params, "impl": "triton"}])


def norms_of_flat_shards():
    for use_orig_params in (False, True):
        for split in (ShardingStrategy.FULL_SHARD, ShardingStrategy.NO_SHARD):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = FullyShardedDataParallel(
                    nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)),
                    sharding_strategy=split,
                    use_orig_params=use_orig_params,
                    device_id=torch.device("cpu"),
                )
            AdamW(model.parameters())
            if split == ShardingStrategy.NO_SHARD:
                AdamW(model.parameters(), max_grad_norm=1.0)
                continue
            for options in ({"max_grad_norm": 1.0}, {"skip_nonfinite": True}):
                with pytest.raises(ValueError, match=r"FullyShardedDataParallel .*shard's; .*model.clip_grad_norm_"):
                    AdamW(model.parameters(), **options)


@pytest.mark.parametrize("function", [norms_of_shards, norms_of_flat_shards])
def test_a_norm_of_a_shard_is_refused(two, function):
    two(function)
