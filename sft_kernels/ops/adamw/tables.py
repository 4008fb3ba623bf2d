"""Where everything of a step lies: one table of addresses on the device, and a map from chunks of work to its rows.

A row stands for a parameter that has a gradient. Rows of the same dtypes stand together, so that one launch is one
range of chunks. The tables hold as long as the tensors are the same; where only gradients lie elsewhere the addresses
are sent again, without a sync.
"""

import weakref
from itertools import chain, pairwise
from operator import is_, itemgetter
from typing import NamedTuple

import numpy as np
import torch

from .sharding import Ranks, aligned_gradient, is_sharded, local, placement_in_whole
from .state import HALF, MASTERS, check_half, is_dense, laid_out_as, moments, state_of

CHUNK = 16384  # elements of a tensor that one program updates
# Columns of a row, int64: addresses of what is updated,
PARAM, GRAD, EXP_AVG, EXP_AVG_SQ, MAX_EXP_AVG_SQ, MASTER, STEP = range(7)
# and what else a program has to know. ALIGNED: GRAD_ALIGNED where the gradient's address is a multiple of 16, plus
# REST_ALIGNED where all the others are. The gradient stands apart because views into a bucket start anywhere. OFFSET,
# FIRST_MAP, MAPS: where elements stand in the whole (``sharding.placement_in_whole``).
NUMEL, FIRST_CHUNK, GROUP, INDEX, COPIES, ALIGNED, OFFSET, FIRST_MAP, MAPS = range(7, 16)
COLUMNS = 16
GRAD_ALIGNED, REST_ALIGNED = 1, 2
CORRECTIONS = 5  # columns of a row, int64: of which t, β1 and β2 it keeps the corrections, and those two
HYPER = 8  # columns of a group, fp64: lr, β1, β2, ε, λ, −1 or 1, max_grad_norm or 0, seed

_COLUMN_OF = {
    "exp_avg": EXP_AVG,
    "exp_avg_sq": EXP_AVG_SQ,
    "max_exp_avg_sq": MAX_EXP_AVG_SQ,
    "master": MASTER,
    "remainder": MASTER,
    "step": STEP,
}
_DTYPES = (torch.float32, *HALF)
_ON_DEVICE = float("nan")  # for a number that is a tensor there; compared as an object, it equals itself alone


class Combination(NamedTuple):
    """Of dtypes: what the rows of one launch have in common."""

    param: torch.dtype
    grad: torch.dtype
    state: torch.dtype
    master: str  # "none", "master" or "remainder"
    amsgrad: bool


class Launch(NamedTuple):
    combination: Combination
    first: int  # chunk
    chunks: int


def why_torch(optimizer):
    """What of the next step only torch's own code carries; None if nothing."""
    devices = set()
    for group in optimizer.param_groups:
        if group["differentiable"]:
            return "differentiable steps"
        for p in group["params"]:
            if p.grad is None:
                continue
            devices.add(p.device)
            state = optimizer.state.get(p, {})
            dtypes = {p.dtype, p.grad.dtype, *(state[name].dtype for name in moments(group) if name in state)}
            for dtype in (*dtypes, optimizer.state_dtype or p.dtype):
                if dtype not in _DTYPES:
                    return f"parameters, gradients or moments of {dtype}"
            if len({state[name].dtype for name in moments(group) if name in state}) > 1:
                return "moments of different dtypes"
            if not is_dense(local(p)):
                return "parameters with gaps between their elements"
            if optimizer.stochastic_rounding and not local(p).is_contiguous():
                return "stochastically rounded parameters that are not row-major"
    return "parameters on several devices" if len(devices) > 1 else None


class Tables:
    """The tables of ``optimizer`` as it stands, with its state made where it is missing.

    ``by_value``: the addresses stay on the host, in ``table``, and travel with each launch.

    Attributes:
        launches: one :class:`Launch` per combination of dtypes; none where there is no gradient.
        addresses: int64 ``[rows, COLUMNS]`` on the device; None ``by_value``.
        rows: int32 ``[chunks]``, the row of each chunk; None ``by_value``.
        table: the addresses on the host.
        row_ranges: of each launch its combination, its first row and the one behind its last.
        maps: int64 ``[·, 2]``, of ``sharding.placement_in_whole``; ``mapped``: whether there are any.
        ranks: :class:`sharding.Ranks`.
        hyper, sums, partials, done, corrections, finished, stats: working memory of the kernels.

    Raises:
        ValueError, RuntimeError: as the step does, before anything is written.
    """

    def __init__(self, optimizer, partials, by_value=False):
        groups = optimizer.param_groups
        self._groups = [(len(group["params"]), group["amsgrad"]) for group in groups]
        self._all = [p for group in groups for p in group["params"]]
        self._present = [p.grad is not None for p in self._all]
        owner = [i for i, group in enumerate(groups) for _ in group["params"]]
        index = [i for i, present in enumerate(self._present) if present]
        params = [self._all[i] for i in index]
        for p in params:
            check_half(optimizer, p)
        rounded = [optimizer.stochastic_rounding and p.dtype == torch.bfloat16 for p in params]
        whole = [placement_in_whole(p) if r else (0, []) for p, r in zip(params, rounded, strict=True)]
        self.ranks = Ranks(params)
        self.launches, self.row_ranges, self.device = [], [], params[0].device if params else None
        self._by_value = by_value
        if not params:
            return

        self._sharded = any(map(is_sharded, params))
        self._names, combinations = [], {}
        for row, (i, p) in enumerate(zip(index, params, strict=True)):
            group = groups[owner[i]]
            names = _settle(optimizer, group, p)
            self._names.append(names)
            state, master = optimizer.state[p], next((name for name in names if name in MASTERS), "none")
            kind = Combination(p.dtype, p.grad.dtype, state["exp_avg"].dtype, master, group["amsgrad"])
            combinations.setdefault(kind, []).append(row)
        self._permuted = [row for row, p in enumerate(params) if not local(p).is_contiguous()]
        self._getters = [itemgetter(*names) for names in self._names]
        self._get = self._getters[0] if all(names == self._names[0] for names in self._names) else None
        self._keys = list(optimizer.state)
        at = {id(p): i for i, p in enumerate(self._keys)}
        self._positions = [at[id(p)] for p in params]
        if self._positions == list(range(len(self._keys))):
            self._positions = None
        self._weak = [
            weakref.ref(optimizer.state[p][name])
            for p, names in zip(params, self._names, strict=True)
            for name in names
        ]

        order = [row for rows in combinations.values() for row in rows]  # of the table; everything else is by `index`
        place = np.empty(len(order), np.int64)
        place[order] = np.arange(len(order))
        owners = np.repeat(place, [len(names) for names in self._names])
        columns = [_COLUMN_OF[name] for names in self._names for name in names]
        n = len(order)  # where addresses go: parameters and states, and gradients
        self._fixed_at = np.concatenate([place, owners]), np.concatenate([np.full(n, PARAM), columns])
        self._moving_at = place, np.full(n, GRAD)
        numel = np.array([local(params[row]).numel() for row in order], np.int64)
        chunks = np.maximum(-(-numel // CHUNK), 1)  # an empty tensor has a step to count
        ends = np.cumsum(chunks)
        self._table = np.zeros((len(order), COLUMNS), np.int64)
        self.table = torch.from_numpy(self._table)
        self._table[:, NUMEL] = numel
        self._table[:, FIRST_CHUNK] = ends - chunks
        self._table[:, GROUP] = [owner[index[row]] for row in order]
        self._table[:, INDEX] = [index[row] for row in order]
        self._table[:, COPIES] = [self.ranks.copies(params[row]) for row in order]
        self._table[:, OFFSET] = [whole[row][0] for row in order]
        self._table[:, MAPS] = [len(whole[row][1]) for row in order]
        self._table[:, FIRST_MAP] = np.cumsum(self._table[:, MAPS]) - self._table[:, MAPS]
        self.mapped = any(maps for _, maps in whole)
        first = row = 0
        for kind, rows in combinations.items():
            self.row_ranges.append((kind, row, row + len(rows)))
            row += len(rows)
            count = int(chunks[: len(rows)].sum())
            chunks = chunks[len(rows) :]
            self.launches.append(Launch(kind, first, count))
            first += count
        row_of_chunk = np.repeat(np.arange(len(order), dtype=np.int32), np.diff(ends, prepend=0))
        self.rows = None if by_value else _sent(row_of_chunk, self.device)[0]
        self.maps, _ = _sent(np.array([m for row in order for m in whole[row][1]] or [(1, 1)], np.int64), self.device)
        group_of_chunk = self._table[row_of_chunk, GROUP]
        edges = [0, *(np.flatnonzero(np.diff(group_of_chunk)) + 1).tolist(), first]
        self._runs = [(int(group_of_chunk[a]), a, b) for a, b in pairwise(edges)]

        def zeros(*shape, dtype):
            return torch.zeros(shape, dtype=dtype, device=self.device)

        self.hyper = self._hyper = self._hyper_source = None
        self.sums = zeros(2, dtype=torch.float64)  # of squares, and how many ranks found infinities
        self.partials = zeros(partials, dtype=torch.float64)
        self.done = zeros(len(order), dtype=torch.int32)  # chunks of a row
        self.corrections = zeros(len(order), CORRECTIONS, dtype=torch.int64)  # no step has t = 0
        self.finished = zeros(1, dtype=torch.int32)  # programs of the norm
        self.stats = zeros(first, 3, dtype=torch.float32) if optimizer.update_stats else None
        self._source = self.addresses = None
        self._send(*self._read(optimizer, params, [p.grad for p in params]))

    # ---- do they still hold

    def hold(self, optimizer):
        """Whether the tensors are those of the tables, whose addresses are then brought up to date."""
        groups = optimizer.param_groups
        if self._groups != [(len(group["params"]), group["amsgrad"]) for group in groups]:
            return False
        params = [p for group in groups for p in group["params"]]
        if not all(map(is_, params, self._all)):
            return False
        grads = [p.grad for p in params]
        if self._present != [g is not None for g in grads]:
            return False
        if not self.launches:
            return True
        if False in self._present:
            params = [p for p, present in zip(params, self._present, strict=True) if present]
            grads = [g for g in grads if g is not None]
        try:
            fixed, moving, what = self._read(optimizer, params, grads)
        except (KeyError, RuntimeError):  # somebody emptied a state; sparse gradients have no address
            return False
        if fixed != self._fixed or what != self._what:
            return False
        if moving != self._moving:
            self._send(fixed, moving, what)
        return True

    def _read(self, optimizer, params, grads):
        """Addresses of parameters and state, addresses of gradients, and what else must not change."""
        # States by their place: to look each up would hash each parameter, in Python.
        states = list(optimizer.state.values())
        if len(states) != len(self._keys) or not all(map(is_, optimizer.state, self._keys)):
            raise KeyError("other parameters have state")
        if self._positions is not None:
            states = [states[i] for i in self._positions]
        if self._get is not None:
            found = list(chain.from_iterable(map(self._get, states)))
        else:
            found = [t for get, state in zip(self._getters, states, strict=True) for t in get(state)]
        what = [all(map(is_, found, [ref() for ref in self._weak]))]
        if self._sharded:
            what += [[getattr(t, "placements", None) for t in tensors] for tensors in (params, grads)]
            params, grads, found = (list(map(local, tensors)) for tensors in (params, grads, found))
        # A stretch of memory may come back with another dtype or another layout.
        for tensors in (params, grads):
            what += [list(map(_is_contiguous, tensors)), [t.dtype for t in tensors]]
            what.append([tensors[i].stride() for i in self._permuted])
        what.append(list(map(_numel, params)))
        return [*map(_address, params), *map(_address, found)], list(map(_address, grads)), what

    def _send(self, fixed, moving, what):
        self._fixed, self._moving, self._what = fixed, moving, what
        self._table[self._fixed_at], self._table[self._moving_at] = fixed, moving
        odd = self._table[:, :STEP] % 16 != 0
        rest = np.delete(odd, GRAD, axis=1).any(1)
        self._table[:, ALIGNED] = np.where(odd[:, GRAD], 0, GRAD_ALIGNED) + np.where(rest, 0, REST_ALIGNED)
        if self._by_value:
            return
        # Memory of its own each time: a captured graph goes on reading what it was captured with.
        self.addresses, self._source = _sent(self._table, self.device)
        if is_capturing(self.device):
            self._moving = None  # only a replay sends this: the next step sends its own

    def keep_what_is_captured(self, optimizer):
        """Let what a graph is being captured with live as long as ``optimizer``: nobody says when a graph is gone."""
        if is_capturing(self.device):
            kept = (self, self.addresses, self._source, self.hyper, self._hyper_source)
            optimizer._captured.update((id(x), x) for x in kept)

    # ---- hyperparameters

    def send_hyper(self, optimizer):
        """Bring the groups' hyperparameters to the device; those that are tensors there are copied at each step."""
        values, tensors = [], []
        bound = optimizer.max_grad_norm
        bound = 0.0 if bound is None or bound == float("inf") else bound  # an infinite norm over infinity is NaN
        for i, group in enumerate(optimizer.param_groups):
            for j, x in enumerate((group["lr"], *group["betas"], group["eps"], group["weight_decay"])):
                if isinstance(x, torch.Tensor):
                    if x.device.type == self.device.type:
                        tensors.append((i, j, x))
                        x = _ON_DEVICE
                    else:  # on the host
                        x = x.item()
                values.append(x)
            values += (-1.0 if group["maximize"] else 1.0, bound, group.get("seed", 0))
        if values != self._hyper:
            self.hyper, self._hyper_source = _sent(np.array(values, np.float64).reshape(-1, HYPER), self.device)
            self._hyper = None if is_capturing(self.device) else values  # as in ``_send``
        for i, j, x in tensors:
            self.hyper[i, j].copy_(local(x).detach().reshape(()))

    # ---- statistics

    def summed_stats(self, groups):
        """fp64 ``[groups, 3]`` of this rank: Σ δ², Σ θ², and how many updates were rounded away; and a list, how many
        elements."""
        sums = torch.zeros(groups, 3, dtype=torch.float64, device=self.device)
        for group, first, last in self._runs:
            sums[group] += self.stats[first:last].sum(0, dtype=torch.float64)
        counts = [int(self._table[self._table[:, GROUP] == i, NUMEL].sum()) for i in range(groups)]
        return sums, counts


def _settle(optimizer, group, p):
    """Let gradient and state of ``p`` lie as ``p`` does; returns the names of what its state has."""
    aligned_gradient(p)
    state = state_of(optimizer, group, p)
    names = [*moments(group), *(name for name in MASTERS if name in state)]
    stride = local(p).stride()
    if local(p.grad).stride() != stride:
        p.grad = laid_out_as(p, p.grad)
    for name in names:
        if local(state[name]).stride() != stride:
            state[name] = laid_out_as(p, state[name])
    if state["step"].dtype != torch.float32:
        state["step"] = state["step"].float()
    return [*names, "step"]


def is_capturing(device):
    """Returns True while a graph is captured on the current stream of ``device``."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


_address, _numel, _is_contiguous = torch.Tensor.data_ptr, torch.Tensor.numel, torch.Tensor.is_contiguous


def _sent(array, device):
    """``(tensor, source)``: ``array`` on ``device``, and the memory on the host, pinned for a GPU, that it is copied
    from. Pinned in a capture it is that graph's own, and lasts as long as it is referred to."""
    source = torch.from_numpy(array.copy())
    source = source.pin_memory() if device.type == "cuda" else source
    return source.to(device, non_blocking=True), source
