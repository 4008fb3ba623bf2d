"""A patched model on two gloo ranks: DistributedDataParallel, fully_shard, and the self-check on all ranks."""

from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from sft_kernels.integrations import fused, head_counts, patch, unpatch
from sft_kernels.integrations.heads import HeadCall

from ..ops.ranks import Ranks
from .models import V, assert_alike, llama, train


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    ranks = Ranks(2, tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.close()


def batch(nothing_kept=False):
    rank = dist.get_rank()
    ids = torch.randint(0, V, (2, 9), generator=torch.Generator().manual_seed(rank))
    labels = ids.clone()
    labels[:, : 9 if nothing_kept and rank else 2 + rank] = -100
    return {"input_ids": ids, "labels": labels}


def loss_inside(model, ids, labels):
    return model(input_ids=ids, labels=labels, num_items_in_batch=torch.tensor(14)).loss


def loss_outside(model, ids, labels):
    logits = model(input_ids=ids).logits[:, :-1]
    return F.cross_entropy(logits.reshape(-1, V).float(), labels[:, 1:].reshape(-1), reduction="sum") / 14


def as_unpatched(loss, options, early, nothing_kept=False):
    """Train a model in DistributedDataParallel, stock and patched."""
    results = []
    for patched in (False, True):
        model = llama()
        if options.get("find_unused_parameters"):
            model.unused = torch.nn.Linear(3, 3)
        wrapped = DistributedDataParallel(patch(model) if patched and early else model, **options)
        if patched and not early:
            patch(wrapped)
        results.append(train(wrapped, lambda m: loss(m, *batch(nothing_kept).values())))
    stock, ours = results
    assert_alike(ours, stock)
    return tuple(head_counts(wrapped))


OPTIONS = [
    {},
    {"find_unused_parameters": True},
    {"static_graph": True},
    {"gradient_as_bucket_view": True},
]


@pytest.mark.parametrize("loss", [loss_inside, loss_outside])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_data_parallel(ranks, loss, options):
    assert ranks(as_unpatched, loss, options, True) == [(3, 3, 0)] * 2


@pytest.mark.parametrize("loss", [loss_inside, loss_outside])
def test_data_parallel_patched_outside_and_a_rank_without_a_kept_label(ranks, loss):
    assert ranks(as_unpatched, loss, {}, False, True) == [(3, 3, 0)] * 2


def planted(wrong, loss):
    """The error of each rank, if on the ranks ``wrong`` the model does something else to its logits."""
    model = DistributedDataParallel(patch(llama()))
    right = HeadCall.stock_rows
    factor = 1.2 if dist.get_rank() in wrong else 1
    with mock.patch.object(HeadCall, "stock_rows", lambda call, select: right(call, select) * factor):
        try:
            loss(model, *batch().values())
        except RuntimeError as error:
            return str(error)


@pytest.mark.parametrize("loss", [loss_inside, loss_outside])
@pytest.mark.parametrize("wrong", [(0,), (1,), (0, 1)], ids=str)
def test_the_self_check_raises_on_all_ranks(ranks, wrong, loss):
    for rank, error in enumerate(ranks(planted, wrong, loss)):
        assert "the fused loss of LlamaForCausalLM.lm_head is not that of the unpatched model" in error
        assert ("seen on another rank" in error) == (rank not in wrong)


def failing():
    """The error of each rank, if the check itself fails on one."""
    model = DistributedDataParallel(patch(llama()))
    right = fused._difference

    def difference(*args):
        if dist.get_rank() == 1:
            raise MemoryError("planted")
        return right(*args)

    with mock.patch.object(fused, "_difference", difference):
        try:
            loss_inside(model, *batch().values())
        except Exception as error:
            return str(error)


def test_no_rank_waits_for_one_that_failed(ranks):
    first, second = ranks(failing)
    assert "seen on another rank" in first
    assert second == "planted"


def sharded(model, reshard_head):
    """``model`` as accelerate shards it: its last layers together, and whole until the backward, or not."""
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard([model.model.norm, model.lm_head], mesh=mesh, reshard_after_forward=reshard_head)
    return fully_shard(model, mesh=mesh)


def as_unpatched_sharded(loss, early, reshard_head):
    """The same for fully_shard; returns the error, if there is one."""
    results = []
    for patched in (False, True):
        model = llama()
        model = sharded(patch(model) if patched and early else model, reshard_head)
        if patched:
            patch(model)
        try:
            losses, grads, parameters = train(model, lambda m: loss(m, *batch().values()))
        except RuntimeError as error:
            assert patched
            return str(error)
        whole = [{name: x.full_tensor() for name, x in found.items()} for found in (grads, parameters)]
        results.append((losses, *whole))
    stock, ours = results
    assert_alike(ours, stock)
    counts = tuple(head_counts(model))
    assert isinstance(unpatch(model).lm_head, FSDPModule)
    loss_outside(model, *batch().values())
    assert "_sft_kernels" not in vars(model.lm_head)
    return counts


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("loss", [loss_inside, loss_outside])
def test_fully_sharded(ranks, loss, early):
    assert ranks(as_unpatched_sharded, loss, early, False) == [(3, 3, 0)] * 2


@pytest.mark.parametrize("loss", [loss_inside, loss_outside])
def test_a_weight_that_is_freed_when_the_head_has_run_is_told(ranks, loss):
    for error in ranks(as_unpatched_sharded, loss, True, True):
        assert "the weight of LlamaForCausalLM.lm_head was freed" in error
        assert "reshard_after_forward=False" in error


def split_over_ranks():
    """The error of a head that is split over ranks for good."""
    model = llama()
    weight = distribute_tensor(model.lm_head.weight.detach(), init_device_mesh("cpu", (2,)), [Shard(0)])
    model.lm_head.weight = torch.nn.Parameter(weight)
    try:
        patch(model)
    except TypeError as error:
        return str(error)


def test_a_head_split_over_ranks_is_refused(ranks):
    for error in ranks(split_over_ranks):
        assert "lm_head is a Linear with a weight of" in error
        assert "call linear_cross_entropy with a process_group" in error
