"""``AdamW``: torch's, with the defaults of fine-tuning, and clipping and skipping inside the step."""

import numbers
from itertools import chain
from typing import NamedTuple

import torch

from ..._backend import named, resolve
from ..._checks import unlike_dense
from .double_clip import DoubleClip
from .groups import decay_groups as decay_groups  # imported from here by what was written for earlier versions
from .sharding import are_flat_shards, zero_ranks
from .state import HALF, MASTERS, MOMENTS, check_fit, check_half, refuse_unfit

_TorchAdamW = torch.optim.AdamW  # under whose name ours may stand later


class AdamW(_TorchAdamW):
    """``torch.optim.AdamW`` with ``clip_grad_norm_`` and a skip of non-finite steps folded into ``step``.

    Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (arXiv:1711.05101). Two defaults differ from torch's:
    ``betas[1]`` is 0.95 and ``weight_decay`` 0.1. Pair it with :func:`decay_groups`, which keeps decay off biases and
    norms.

    Args:
        params, lr, betas, eps, weight_decay, amsgrad, maximize, capturable, differentiable: as in torch.
        foreach, fused: as in torch; either selects ``impl="torch"``. With neither, the fused path where the parameters
            allow it.
        max_grad_norm: clip the global 2-norm of all gradients to this, as ``torch.nn.utils.clip_grad_norm_`` would
            before the step. ``float("inf")`` clips nothing and still measures. The norm of DTensors is that of whole
            tensors, each copy counted once. ``impl="torch"`` leaves the gradients clipped, the others leave them alone.
            A ``UserWarning`` says once if something else clips too: see the README.
        skip_nonfinite: where the norm is not finite, leave parameters, moments and step as they are and count it.
        master_weights: ``"float32"``: an fp16 or bf16 parameter has an fp32 copy in its state, under ``"master"``,
            which is updated in its place, and the parameter is its rounding. Without it, updates smaller than half a
            unit in the parameter's last place are lost. What else writes to the parameter, the next step overwrites.
            ``"split"``: a bf16 parameter is the upper half of its master; the bits of the lower are kept under
            ``"remainder"``. The same updates for two bytes less; what else writes to the parameter counts.
        stochastic_rounding: a bf16 parameter without a master is rounded up or down at random, right on average. The
            random bits depend on the group's ``"seed"`` (0 unless set, below 2³²), the parameter's step, its place
            among the parameters, and the element's index in the unsharded tensor alone.
        state_dtype: the floating dtype of the moments; None for the parameter's, as in torch.
        update_stats: count what :meth:`update_statistics` gives.
        impl: ``"auto"`` or an implementation's name. Each step goes by where the parameters are: they may be moved to a
            GPU after the optimiser is built.

    Attributes:
        last_grad_norm: fp32 0-d tensor on the device, the norm before clipping; None before the first step, and where
            neither ``max_grad_norm`` nor ``skip_nonfinite`` asks for it. The step does not wait for it.
        skipped_steps: int64 0-d tensor, on the device of the last step.

    ``impl="triton"`` updates all parameters of the same dtypes in one launch, after one more for the norm. fp64 and
    complex numbers, parameters with gaps between their elements or on several devices, and ``differentiable`` are
    torch's own code.

    torch's kernels want parameter, gradient and moments of one dtype. Where any differs, or there is a master, every
    parameter is updated on its own: in fp32 (fp64 for fp64), each tensor that is written rounded once, without a sync.

    Raises:
        ValueError: an option out of range, or a combination that cannot work: ``differentiable`` with an option that
            torch's lacks; ``foreach`` or ``fused`` where dtypes are to differ; ``foreach`` with ``capturable`` and
            ``skip_nonfinite``; ``stochastic_rounding`` with ``master_weights``; either but for ``"float32"`` with fp16
            parameters; parameters in fp8 or integers, sparse or nested, if they are to be trained; ``max_grad_norm`` or
            ``skip_nonfinite`` where each rank has a shard in plain tensors (``ZeroRedundancyOptimizer``,
            ``FullyShardedDataParallel``), for the norm would be a shard's; from ``step``, a DTensor
            that is rounded stochastically and neither sharded nor replicated.
        RuntimeError: from ``step``, gradients in fp8 or integers, sparse or nested; sparse ones also in torch.
        Unavailable: from ``step``, an ``impl`` that cannot run where the parameters are, or does not carry them; at
            once if they are on a GPU already.
    """

    def __init__(
        self,
        params,
        lr=1e-3,
        betas=(0.9, 0.95),
        eps=1e-8,
        weight_decay=0.1,
        amsgrad=False,
        *,
        maximize=False,
        foreach=None,
        capturable=False,
        differentiable=False,
        fused=None,
        max_grad_norm=None,
        skip_nonfinite=False,
        master_weights=None,
        stochastic_rounding=False,
        state_dtype=None,
        update_stats=False,
        impl="auto",
    ):
        named("adamw", impl)
        max_grad_norm = _checked_norm(max_grad_norm)
        if impl not in ("auto", "torch") and (foreach is not None or fused is not None):
            raise ValueError(f"foreach and fused are options of impl='torch'; got impl={impl!r}")
        if master_weights not in (None, "float32", "split"):
            raise ValueError(f"master_weights: expected None, 'float32' or 'split', got {master_weights!r}")
        if stochastic_rounding and master_weights is not None:
            raise ValueError("stochastic_rounding: a master needs none; got master_weights too")
        if state_dtype not in (None, torch.float32, torch.float64, *HALF):
            raise ValueError(f"state_dtype: expected None or a floating dtype, got {state_dtype!r}")
        ours = {
            "max_grad_norm": max_grad_norm,
            "skip_nonfinite": skip_nonfinite or None,
            "master_weights": master_weights,
            "stochastic_rounding": stochastic_rounding or None,
            "state_dtype": state_dtype,
            "update_stats": update_stats or None,
        }
        asked = [name for name, value in ours.items() if value is not None]
        if differentiable and asked:
            raise ValueError(f"differentiable=True does not take {' or '.join(asked)}")
        if update_stats and (foreach or fused):
            raise ValueError("update_stats: torch's foreach and fused kernels count nothing")
        if capturable and skip_nonfinite and foreach:
            raise ValueError("skip_nonfinite reads a flag back with foreach=True, which capturable=True forbids")
        self._asked_impl = impl
        self._impl = "torch" if foreach is not None or fused is not None else impl
        self.max_grad_norm = max_grad_norm
        self.skip_nonfinite = skip_nonfinite
        self.master_weights = master_weights
        self.stochastic_rounding = bool(stochastic_rounding)
        self.state_dtype = state_dtype
        self.update_stats = bool(update_stats)
        self._double_clip = self._watch_for_a_double_clip()
        self._forget()
        measured = "max_grad_norm" if max_grad_norm is not None else "skip_nonfinite" if skip_nonfinite else None
        if measured and zero_ranks() > 1:
            raise ValueError(
                f"{measured}: ZeroRedundancyOptimizer hands each rank its shard of the parameters, so the norm would be"
                f" a shard's; leave {measured} out and call torch.nn.utils.clip_grad_norm_(model.parameters(), …)"
                " before the step"
            )
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )
        if measured and are_flat_shards([p for group in self.param_groups for p in group["params"]]):
            raise ValueError(
                f"{measured}: FullyShardedDataParallel hands each rank its shard of the parameters, so the norm would"
                f" be a shard's; leave {measured} out and call model.clip_grad_norm_ before the step"
            )
        device = next((p.device for group in self.param_groups for p in group["params"]), None)
        if device is not None and device.type == "cuda":  # elsewhere the parameters may yet be moved to a GPU
            resolve("adamw", self._impl, device)
        self._choose_path()  # again: torch has set _step_supports_amp_scaling from ``fused`` alone
        self.last_grad_norm = None
        self.skipped_steps = torch.zeros((), dtype=torch.int64, device=device)

    def add_param_group(self, param_group):
        """As in torch; a group that asks for neither ``foreach`` nor ``fused`` takes the fused path where it can."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if group["foreach"] is not None or group["fused"] is not None:
            if self._impl not in ("auto", "torch"):
                self.param_groups.pop()
                raise ValueError(f"foreach and fused are options of impl='torch'; got impl={self._impl!r}")
            self._impl = "torch"
        if self.stochastic_rounding:
            group.setdefault("seed", 0)
        try:
            self._check_group(group)
        except ValueError:
            self.param_groups.pop()
            raise
        if group["foreach"] is None and group["fused"] is None and not group["differentiable"]:
            # torch's fused kernel reads betas that are tensors back, which no graph can capture.
            captured = group["capturable"] and isinstance(group["betas"][0], torch.Tensor)
            group["fused"] = (all(map(_fusible, group["params"])) and not captured) or None  # None: torch chooses
        self._choose_path()

    def _check_group(self, group):
        # ZeroRedundancyOptimizer hands the options of the whole to each group, too.
        own = {name: getattr(self, name) for name in _OPTIONS} | {"impl": self._asked_impl}
        for name in own:
            if name in group and not (group[name] == own[name] and zero_ranks()):
                raise ValueError(f"{name} holds for all parameters: an option of AdamW, not of a group")
        seed = group.get("seed", 0)
        if not (isinstance(seed, int) and 0 <= seed < 2**32):
            raise ValueError(f"seed: expected a whole number from 0 to 2³² − 1, got {seed!r}")
        one_dtype = next((name for name in ("fused", "foreach") if group[name]), None)
        for p in group["params"]:
            if p.requires_grad:
                check_fit(p, "params")
            check_half(self, p)
            if self.state_dtype is not None and p.is_complex():
                raise ValueError(f"state_dtype: expected floating-point parameters, got one of {p.dtype}")
            if one_dtype and (self.state_dtype not in (None, p.dtype) or self._wants_master(p) or self._rounds(p)):
                raise ValueError(
                    f"{one_dtype}=True updates tensors of one dtype, to nearest; a {p.dtype} parameter is to have "
                    f"state_dtype={self.state_dtype}, master_weights={self.master_weights!r}, "
                    f"stochastic_rounding={self.stochastic_rounding}"
                )

    def _wants_master(self, p):
        return self.master_weights is not None and p.dtype in HALF

    def _rounds(self, p):
        return self.stochastic_rounding and p.dtype == torch.bfloat16

    def _is_mixed(self, p):
        """Whether torch's kernels cannot update ``p``: its state has, or is to have, another dtype, or a master; or it
        is rounded stochastically."""
        state = self.state.get(p, {})
        dtype = state["exp_avg"].dtype if "exp_avg" in state else self.state_dtype or p.dtype
        return dtype != p.dtype or any(name in state for name in MASTERS) or self._wants_master(p) or self._rounds(p)

    def _choose_path(self):
        """To be called when parameters or state come in: looked up at each step, it would cost as much as a step."""
        self._forget()
        fused = all(group["fused"] for group in self.param_groups)
        captured = any(group["capturable"] for group in self.param_groups)
        # Outside torch's fused kernel skipping reads a flag back; the mixed path does not.
        self._mixed = (
            (self.skip_nonfinite and captured and not fused)
            or self.update_stats
            or any(self._is_mixed(p) for group in self.param_groups for p in group["params"])
        )
        # torch.amp.GradScaler then leaves unscaling to the step.
        self._step_supports_amp_scaling = self._mixed or fused

    def step(self, closure=None):
        """One optimiser step; returns the closure's loss, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        watch = self._double_clip
        if watch is not None and torch.compiler.is_compiling():
            watch = None
        p = None if watch is None else watch.before(self)
        self._implementation()(self)
        if p is not None and watch.after(self, p):
            self._double_clip = None
        return loss

    def _watch_for_a_double_clip(self):
        return None if self.max_grad_norm in (None, float("inf")) else DoubleClip()

    def _torch_step(self):
        """torch's own step."""
        step = _TorchAdamW.step
        # torch wraps the step of a class to run step hooks. Ours is wrapped already, and hooks run once.
        if getattr(step, "hooked", False):
            step = step.__wrapped__
        step(self)

    def _device(self):
        """The device of the first parameter with a gradient, or else of the first; None without parameters."""
        params = [group["params"] for group in self.param_groups]
        with_gradients = (p.device for p in chain.from_iterable(params) if p.grad is not None)
        return next(with_gradients, None) or next((p.device for p in chain.from_iterable(params)), None)

    def _implementation(self):
        """The step's implementation, by where the parameters are now: they may have been moved since the last step."""
        device = self._device()
        implementation, torchs = (resolve("adamw", impl, device) for impl in (self._impl, "torch"))
        if implementation is not torchs and self._tables is not None and self._tables.hold(self):
            return implementation
        self._tables = None
        refuse_unfit(self)
        if device is not None and self.skipped_steps.device != device:
            self.skipped_steps = _moved(self.skipped_steps, device)
        if implementation is torchs:
            return torchs
        from .tables import why_torch

        return resolve("adamw", self._impl, device, why_torch(self))

    def _forget(self):
        """Forget where the tensors lie. What graphs were captured with stays."""
        self._tables = self._torch_stats = None
        self._captured = getattr(self, "_captured", {})

    def update_statistics(self):
        """:class:`UpdateStatistics` of the last step that was taken, from ``update_stats=True``; None before the first.

        Tensors on the device, to be read when it suits: nothing here waits. DTensors: of this rank's shards.
        """
        if not self.update_stats:
            raise ValueError("update_statistics: wants AdamW(update_stats=True)")
        if self._tables is not None:
            sums, counts = self._tables.summed_stats(len(self.param_groups))
        elif self._torch_stats is not None:
            sums, counts = self._torch_stats
        else:
            return None
        counts = torch.tensor(counts, dtype=torch.float64).to(sums.device, non_blocking=True)
        return UpdateStatistics(sums[:, 2] / counts, (sums[:, 0] / sums[:, 1]).sqrt(), self.skipped_steps.clone())

    def load_state_dict(self, state_dict):
        """As in torch, but nothing is lost: moments keep the dtype they come with, unless ``state_dtype`` asks for one.

        A half-precision parameter keeps an fp32 ``"master"`` that comes, whatever ``master_weights`` says; where it is
        to have one and none comes, it starts from the parameter. A master of another dtype went through torch's AdamW,
        which casts it and then leaves it behind: it does not count. How a group is computed (``foreach``, ``fused``,
        ``capturable``, ``differentiable``) is not state: this optimiser's choice stays.

        Raises:
            ValueError: groups or shapes unlike this optimiser's; moments of another dtype with ``differentiable``.
        """
        held = []

        def hold(_, state_dict):
            """Keep from torch what it would cast to the parameter's dtype."""
            groups, state = state_dict["param_groups"], dict(state_dict["state"])
            if [len(group["params"]) for group in groups] != [len(group["params"]) for group in self.param_groups]:
                return None  # torch says so
            choices = ("foreach", "fused", "capturable", "differentiable")
            for theirs, ours in zip(groups, self.param_groups, strict=True):
                for i, p in zip(theirs["params"], ours["params"], strict=True):
                    if i in state:
                        held.append((p, self._lossless(p, state[i])))
                        state[i] = {name: value for name, value in state[i].items() if name not in _LOSSLESS}
            groups = [
                {name: ours[name] for name in ours if name == "seed"} | theirs | {name: ours[name] for name in choices}
                for theirs, ours in zip(groups, self.param_groups, strict=True)
            ]
            return {**state_dict, "state": state, "param_groups": groups}

        def give_back(_):
            for p, tensors in held:
                self.state[p].update(tensors)
            self._choose_path()

        # After and before what users registered: their hooks see whole dicts and whole states.
        hooks = (
            self.register_load_state_dict_pre_hook(hold),
            self.register_load_state_dict_post_hook(give_back, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def _lossless(self, p, entry):
        """Moments and master of ``p`` out of the ``entry`` of a state dict, as its state is to have them."""
        tensors = {name: entry[name].to(p.device) for name in _LOSSLESS if name in entry}
        for name, tensor in tensors.items():
            if tensor.shape != p.shape:
                raise ValueError(f"state_dict: expected {name} of shape {tuple(p.shape)}, got {tuple(tensor.shape)}")
        master, remainder = (tensors.pop(name, None) for name in MASTERS)
        if self.state_dtype is not None:
            tensors = {name: tensor.to(self.state_dtype) for name, tensor in tensors.items()}
        if master is not None and p.dtype in HALF and master.dtype == torch.float32:
            tensors["master"] = master
        elif remainder is not None and p.dtype == remainder.dtype == torch.bfloat16:
            tensors["remainder"] = remainder
        for name, tensor in tensors.items():
            check_fit(tensor, f"state_dict: {name}")
        if self.defaults["differentiable"] and any(tensor.dtype != p.dtype for tensor in tensors.values()):
            raise ValueError(f"state_dict: differentiable=True takes moments of {p.dtype} alone")
        return tensors

    def __getstate__(self):
        own = (
            "_impl",
            "_asked_impl",
            *_OPTIONS,
            "last_grad_norm",
            "skipped_steps",
            "_mixed",
            "_step_supports_amp_scaling",
        )
        return super().__getstate__() | {name: getattr(self, name) for name in own}

    def __setstate__(self, state):
        super().__setstate__(state)  # also what torch's load_state_dict ends with
        self.__dict__.setdefault("_asked_impl", self._impl)  # an earlier version kept one of the two
        if not hasattr(self, "_double_clip"):
            self._double_clip = self._watch_for_a_double_clip()
        self._forget()


class UpdateStatistics(NamedTuple):
    """What the last step did, per group where not said otherwise.

    ``rounded_away``: the share of elements that were to move and were kept in too few bits to do so.
    ``update_to_weight``: the 2-norm of the update, decay included, over that of the weights before it. Both fp64
    ``[groups]``. ``skipped_steps``: int64, of all steps.
    """

    rounded_away: torch.Tensor
    update_to_weight: torch.Tensor
    skipped_steps: torch.Tensor


def _checked_norm(max_grad_norm):
    """``max_grad_norm`` as a number, or None; raises by name for anything that is not a positive number."""
    if max_grad_norm is None:
        return None
    if isinstance(max_grad_norm, torch.Tensor) and max_grad_norm.numel() == 1 and not max_grad_norm.is_complex():
        max_grad_norm = max_grad_norm.item()
    if isinstance(max_grad_norm, bool) or not isinstance(max_grad_norm, numbers.Real):
        raise ValueError(f"max_grad_norm: expected a positive number or None, got {max_grad_norm!r}")
    if not max_grad_norm > 0:
        raise ValueError(f"max_grad_norm: expected a positive number or None, got {max_grad_norm}")
    return max_grad_norm


_OPTIONS = ("max_grad_norm", "skip_nonfinite", "master_weights", "stochastic_rounding", "state_dtype", "update_stats")
_LOSSLESS = (*MOMENTS, *MASTERS)


def _moved(count, device):
    """``count`` on ``device``; one on the meta device has counted nothing."""
    return torch.zeros_like(count, device=device) if count.is_meta else count.to(device)


def _fusible(p):
    """Whether torch's fused kernel updates ``p`` rightly: it walks parameter and moments by address."""
    if not (unlike_dense(p) is None and p.is_floating_point() and p.device.type in ("cpu", "cuda")):
        return False
    return torch.empty_like(p, device="meta").stride() == p.stride()
