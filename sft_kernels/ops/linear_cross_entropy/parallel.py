"""A head whose vocabulary is split over ranks (tensor parallelism): what they tell each other.

Of each token that is the logsumexp, the target's logit and the largest, packed into one all-reduce of maxima, and what
adds up in one of sums; of the rows' gradient, a sum. A logit is never sent.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from ..._backend import checks_enabled
from ..softmax_grad.rows import RowStats


class Shards(NamedTuple):
    """One rank's place in a head ``[classes, D]`` whose rows are split over the ranks of ``group``, in their order."""

    group: Any
    classes: int  # V
    start: int  # of this rank's slice
    longest: int  # slice of any rank: plans are made for it, so that all ranks make the same

    @classmethod
    def of(cls, weight, group):
        """The place of this rank, of whose head ``weight`` is either the slice, of one length on all ranks, or a
        DTensor, which may be split unevenly.

        Slices of several lengths raise on the CPU, and on a GPU under ``SFT_KERNELS_CHECK=1``.
        """
        if not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
            raise TypeError(f"process_group: expected a ProcessGroup, got {type(group).__name__}")
        if weight.dim() != 2:
            raise ValueError(f"process_group: goes with a head of two dimensions, got {tuple(weight.shape)}")
        V, ranks = weight.shape[0], group.size()
        if not _is_dtensor(weight):
            _check_lengths(V, weight.device, group)
            return cls(group, V * ranks, V * group.rank(), V)
        _local(weight, "linear_weight", group)
        longest = -(-V // ranks)  # as torch.chunk
        if longest * (ranks - 1) >= V:
            raise ValueError(f"linear_weight: {V} classes leave one of {ranks} ranks without any")
        return cls(group, V, longest * group.rank(), longest)

    def merge(self, rows):
        """The statistics of the whole vocabulary, from those of every rank's slice: two all-reduces of scalars, and a
        third where predictions are asked for.

        ::

            lse = M + log Σ_r exp(lse_r − M)      M = max_r lse_r      mean = Σ_r exp(lse_r − lse) mean_r
        """
        dtype = rows.target_logit.dtype
        top = torch.stack([rows.lse, rows.target_logit.double(), rows.max_logit.double()])
        dist.all_reduce(top, dist.ReduceOp.MAX, self.group)
        # Where a token's logits are ruled out on all ranks, or not a number on one, M is no base: its lse is M itself.
        base = top[0].nan_to_num(0.0, 0.0, 0.0)
        share = (rows.lse - base).exp()
        parts = [share]
        if rows.mean_logit is not None:  # a slice that is ruled out has no share
            parts.append((share * (rows.mean_logit - base)).where(share > 0, 0))
        if rows.sum_logit is not None:
            parts.append(rows.sum_logit)
        sums = torch.stack(parts)
        dist.all_reduce(sums, dist.ReduceOp.SUM, self.group)
        total, *rest = sums
        mean = None if rows.mean_logit is None else base + rest.pop(0) / (total + (total == 0))
        whole = None if rows.sum_logit is None else rest.pop(0)
        found = RowStats(base + total.log(), top[1].to(dtype), top[2].to(dtype), mean, whole)
        return found if rows.prediction is None else found._replace(prediction=self._prediction(rows, found.max_logit))

    def _prediction(self, rows, max_logit):
        """The smallest class that attains the largest logit on any rank; the last class if that is not a number."""
        mine = rows.starting_at(self.start).prediction
        mine = mine.where(rows.max_logit == max_logit, self.classes - 1)
        dist.all_reduce(mine, dist.ReduceOp.MIN, self.group)
        return mine

    def core(self, softmax_grad):
        """``softmax_grad`` with the vocabulary's statistics for the slice's: it reads the logits for the statistics of
        its own, and once more when it knows the others'."""
        return partial(self._softmax_grad, softmax_grad)

    def _softmax_grad(self, softmax_grad, logits, target, *, scale=None, coefficients=None, lse=None, **statistics):
        if lse is not None:
            return softmax_grad(logits, target, scale=scale, coefficients=coefficients, lse=lse)
        rows = self.merge(softmax_grad(logits, target, **statistics))
        if scale is not None:
            softmax_grad(logits, target, scale=scale, lse=rows.lse)
        return rows

    def sum(self, dx):
        """The rows' gradient: the sum of the ranks', which are given in the dtype of sums."""
        dist.all_reduce(dx, dist.ReduceOp.SUM, self.group)
        return dx


def replicated(tensor, name, shards):
    """The values of a DTensor that every rank holds in full, as its gradient will be; another tensor as it is."""
    if not _is_dtensor(tensor):
        return tensor
    if shards is None or not all(placement.is_replicate() for placement in tensor.placements):
        raise ValueError(
            f"{name}: expected a tensor, or with process_group a DTensor that is whole on every rank, got"
            f" {tensor.placements}"
        )
    return tensor.to_local(grad_placements=tensor.placements)


def local_head(weight, bias, shards):
    """This rank's slices of a head, or the whole of one that is not split (``shards`` None).

    Such a head may not be a DTensor: whether its ranks hold the same tokens only the caller knows.
    """
    if shards is not None:
        return _local(weight, "linear_weight", shards.group), _local(bias, "linear_bias", shards.group)
    if _is_dtensor(weight) or _is_dtensor(bias):
        raise ValueError(
            "linear_weight, linear_bias: a DTensor needs process_group, the group of ranks that split the vocabulary"
            " and hold the same tokens; under FSDP call the loss where the head is gathered"
        )
    return weight, bias


def _local(tensor, name, group):
    if not _is_dtensor(tensor):
        return tensor
    placement, *others = tensor.placements
    if others or not placement.is_shard(0):
        raise ValueError(f"{name}: expected a mesh of one dimension and placement as Shard(0), got {tensor.placements}")
    ranks, theirs = (dist.get_process_group_ranks(g) for g in (group, tensor.device_mesh.get_group()))
    if ranks != theirs:
        raise ValueError(f"process_group: {name} is split over ranks {theirs}, got a group of {ranks}")
    return tensor.to_local()


def _check_lengths(V, device, group):
    if not checks_enabled(device):
        return
    lengths = torch.tensor([V, -V], device=device)
    dist.all_reduce(lengths, dist.ReduceOp.MAX, group)
    longest, shortest = int(lengths[0]), -int(lengths[1])
    if longest != shortest:
        raise ValueError(
            f"linear_weight: expected slices of one length on all ranks, got {shortest} to {longest}; a DTensor may be"
            " split unevenly"
        )


def _is_dtensor(tensor):
    return hasattr(tensor, "device_mesh") and hasattr(tensor, "placements")
