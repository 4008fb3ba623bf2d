"""``patch_trl()``: TRL's SFTTrainer computes the head and its loss by ``linear_cross_entropy``.

Since 1.15 TRL's trainers do not call a model's head. Their forward hands the hidden states and the
head's weight to ``_ChunkedLogProbFunction`` in ``trl.trainer.utils``, which is looked up there at
every call.
"""

import importlib
import importlib.metadata
import importlib.util
import inspect
import sys

import torch

from ..ops.linear_cross_entropy.api import linear_cross_entropy
from ..ops.linear_cross_entropy.kept import KeptTokens

_MODULE, _NAME = "trl.trainer.utils", "_ChunkedLogProbFunction"
_KNOWN = "trl 1.15 and 1.16 are known to work"
_PARAMETERS = [
    "ctx",
    "hidden",
    "weight",
    "bias",
    "targets",
    "temperature",
    "chunk_size",
    "final_logit_softcapping",
    "logit_scale",
    "outputs",
]
# What a call may ask for beside the log-probability, in the order in which it is returned.
_OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
_SFT = {"log_probs", "entropy", "is_top1"}  # what SFTTrainer asks for


class LogProbs:
    """Takes the place of TRL's ``ChunkedLogProbFunction``, which ``stock`` remembers."""

    stock = None

    @classmethod
    def apply(
        cls,
        hidden,
        weight,
        bias,
        targets,
        temperature,
        chunk_size,
        final_logit_softcapping=None,
        logit_scale=1.0,
        outputs=_OUTPUTS,
    ):
        """Compute the label's log-probability, the entropy and if the label is the prediction.

        The logits are ``softcap(logit_scale · (hidden Wᵀ + b)) / temperature``. Outside of autocast
        the weight is cast as a whole if its dtype is not that of ``hidden``. Gradients flow through
        the log-probability and the entropy.

        Args:
            hidden, weight, bias: ``[N, D]``, ``[V, D]``, ``[V]`` or None.
            targets: ``[N]``, labels of which each carries loss.
            chunk_size: the width of TRL's tiles. It is not used: ``linear_cross_entropy`` plans its
                own chunks.
            outputs: names. A call that asks for anything but SFTTrainer's three goes to TRL's own
                function. The other trainers' calls do, so that a policy and its reference are not
                computed by different kernels.

        Returns:
            ``(log_probs, entropy, None, None, is_top1)``, ``[N]`` each: fp32, fp32 and bool.
        """
        if set(outputs) != _SFT:
            return cls.stock.apply(
                hidden,
                weight,
                bias,
                targets,
                temperature,
                chunk_size,
                final_logit_softcapping,
                logit_scale,
                outputs,
            )
        _refuse_zero3()
        if not torch.is_autocast_enabled(hidden.device.type):
            weight = weight.to(hidden.dtype)
            bias = None if bias is None else bias.to(hidden.dtype)
        if final_logit_softcapping is not None:
            final_logit_softcapping = final_logit_softcapping / temperature
        N, scale = len(hidden), logit_scale / temperature
        rows = torch.arange(N, device=targets.device)  # all of them: counting would be a sync
        _, tokens = linear_cross_entropy(
            hidden,
            weight,
            linear_bias=bias,
            kept=KeptTokens(rows, targets, count=N, size=N, shift=0),
            reduction="none",
            softcap=final_logit_softcapping,
            logit_scale=None if scale == 1 else scale,
            return_stats="tokens",
        )
        is_top1 = tokens.prediction == targets
        return tokens.logprob.float(), tokens.entropy.float(), None, None, is_top1


def patch_trl():
    """Make TRL's SFTTrainer compute the head and its loss by ``linear_cross_entropy``.

    Call it once, anywhere before ``trainer.train()``. It serves ``loss_type="nll"``
    (``"chunked_nll"`` is an alias of it) and ``"dft"``, in training and in evaluation, with the
    entropy and the token accuracy that the trainer logs. Models need no ``patch``. TRL's other
    trainers go on as before.

    A label outside the vocabulary raises ``IndexError`` on the CPU; elsewhere its loss is NaN.

    Calling it again changes nothing. :func:`unpatch_trl` undoes it.

    Raises:
        ImportError: TRL is not installed, or this version has no such function.
        RuntimeError: TRL's function has changed, or somebody else has replaced it.
        NotImplementedError: DeepSpeed ZeRO-3 is on. It is raised by the model's forward.
    """
    utils = _trl_utils()
    found = getattr(utils, _NAME)
    if found is LogProbs:
        return
    stock = _known_stock()
    if found is not stock:
        raise RuntimeError(f"patch_trl: {_MODULE}.{_NAME} was replaced by {found!r} already; undo that first")
    LogProbs.stock = stock
    setattr(utils, _NAME, LogProbs)


def unpatch_trl():
    """Undo :func:`patch_trl`; without it nothing changes.

    Raises:
        RuntimeError: somebody else has replaced ours since. Their replacement stays.
    """
    utils = sys.modules.get(_MODULE)
    found = getattr(utils, _NAME, None)
    if found is LogProbs:
        setattr(utils, _NAME, LogProbs.stock)
    elif LogProbs.stock is not None and found is not LogProbs.stock:
        raise RuntimeError(
            f"unpatch_trl: {_MODULE}.{_NAME} was replaced by {found!r} after patch_trl(); undo that first"
        )
    LogProbs.stock = None


def _trl_utils():
    """Returns ``trl.trainer.utils``; raises ``ImportError`` if TRL or its function is missing."""
    if importlib.util.find_spec("trl") is None:
        raise ImportError(f"patch_trl: trl is not installed; {_KNOWN}")
    utils = importlib.import_module(_MODULE)
    if getattr(utils, _NAME, None) is None:
        raise ImportError(
            f"patch_trl: trl {_version()} has no {_MODULE}.{_NAME} (1.15 has it with Triton only); {_KNOWN}"
        )
    return utils


def _known_stock():
    """Returns TRL's own function; raises ``RuntimeError`` if it is not the one that we know."""
    try:
        kernels = importlib.import_module("trl.kernels.chunked_logprob")
        stock, outputs = kernels.ChunkedLogProbFunction, list(kernels.OPTIONAL_OUTPUTS)
        parameters = list(inspect.signature(stock.forward).parameters)
    except (ImportError, AttributeError) as error:
        raise RuntimeError(
            f"patch_trl: trl {_version()} has no trl.kernels.chunked_logprob as it was ({error}); {_KNOWN}"
        ) from error
    if (parameters, outputs) != (_PARAMETERS, list(_OUTPUTS)):
        raise RuntimeError(
            f"patch_trl: ChunkedLogProbFunction has changed in trl {_version()}: expected the parameters"
            f" {_PARAMETERS} and the outputs {list(_OUTPUTS)}, got {parameters} and {outputs}; {_KNOWN}"
        )
    return stock


def _version():
    return importlib.metadata.version("trl")


def _refuse_zero3():
    """Raise under DeepSpeed ZeRO-3, which frees the head's weight before the backward."""
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    if is_deepspeed_zero3_enabled():
        raise NotImplementedError(
            "patch_trl: DeepSpeed ZeRO-3 is not supported, since it frees the head's weight before the"
            " backward; call unpatch_trl(), or use ZeRO-2 or FSDP"
        )
