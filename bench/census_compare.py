"""One model of the census: its loss and gradients as they are, and after ``patch(model)``."""

import contextlib
import copy
import logging
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
import transformers

from sft_kernels.integrations import head_counts, patch

from . import census_models

# Of a gradient's own norm, or of a thousandth of all gradients' norm if that is more. Both sides are fp32 and add up in
# another order, which costs about 1e-6, and 3e-5 in models that are nearly certain of their labels (p - 1 cancels). A
# wrong scale, mask or bias is off by far more than 1e-4.
TOLERANCE = 1e-4
RUNS = ("fused", "materialised", "unused", "refused", "failed")  # verdicts on classes whose stock loss runs
MODELING = Path(transformers.__file__).parent


class Row(NamedTuple):
    """One class of the census."""

    name: str
    verdict: str  # one of RUNS, "no loss" or "not built"
    agrees: str = ""  # "equal", "DIFFERENT", or "stock varies" if two unpatched runs differ as well
    batch: str = ""
    error: float | None = None  # largest relative difference of the loss and the gradients
    reason: str = ""


class Step(NamedTuple):
    """The result of a training step without an optimiser."""

    loss: torch.Tensor
    gradients: dict


def step(model, inputs):
    """Returns the :class:`Step` of ``model`` on ``inputs``; ``ValueError`` if there is no finite loss."""
    torch.manual_seed(2)
    model.zero_grad(set_to_none=True)
    loss = model(**inputs).loss
    if loss is None:
        raise ValueError("the forward returns no loss")
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    if not all(x.isfinite().all() for x in (loss, *gradients.values())):
        raise ValueError("the loss or a gradient is not finite")
    if not any(gradient.any() for gradient in gradients.values()):
        raise ValueError("every gradient is zero")
    return Step(loss.detach(), gradients)


class Difference(NamedTuple):
    """The largest relative difference of two steps, and the parameter (or the loss) that has it."""

    error: float
    where: str


def difference(stock, other):
    """The :class:`Difference` of two steps; infinite if other parameters have a gradient."""
    unlike = stock.gradients.keys() ^ other.gradients.keys()
    if unlike:
        return Difference(float("inf"), min(unlike))
    total = torch.stack([gradient.norm() for gradient in stock.gradients.values()]).norm()
    found = [Difference(float((other.loss - stock.loss).abs() / stock.loss.abs()), "the loss")]
    for name, gradient in stock.gradients.items():
        scale = max(gradient.norm(), 1e-3 * total)
        found.append(Difference(float((other.gradients[name] - gradient).norm() / scale), name))
    return max(found)


def examine(name):
    """The :class:`Row` of the class ``name``."""
    try:
        model = census_models.build(name)
    except Exception as error:
        return Row(name, "not built", reason=first_line(error))
    return compare(name, model, census_models.batches(model))


def compare(name, model, batches):
    """The :class:`Row` of ``model``, on the first of ``batches`` on which its own loss runs."""
    reason = "no batch"
    for candidate in batches:
        batch, inputs = candidate
        try:
            stock = step(copy.deepcopy(model), inputs)
        except Exception as error:
            reason = first_line(error)
        else:
            break
    else:
        return Row(name, "no loss", reason=reason)
    # Copies, because a forward may replace modules and buffers.
    again = difference(stock, step(copy.deepcopy(model), inputs))
    patched = copy.deepcopy(model)
    del model
    with notes() as said:
        try:
            patch(patched, log_materialised=True)
        except (TypeError, ValueError) as error:
            return Row(name, "refused", batch=batch, reason=first_line(error))
        try:
            found = step(patched, inputs)
        except Exception as error:
            return Row(name, "failed", "DIFFERENT", batch, reason=first_line(error))
    counts = head_counts(patched)
    verdict = "materialised" if counts.materialised else "fused" if counts.fused else "unused"
    error, where = difference(stock, found)
    agrees = "equal" if error <= TOLERANCE else "stock varies" if again.error > TOLERANCE else "DIFFERENT"
    if agrees != "equal":
        said.append(f"the largest difference is in {where}")
    return Row(name, verdict, agrees, batch, error, "; ".join(dict.fromkeys(said)))


@contextlib.contextmanager
def notes():
    """Collects the messages of the patch: the operations that need real logits, and warnings."""
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage().replace(f"{MODELING}/", ""))
    logger = logging.getLogger("sft_kernels.integrations")
    logger.addHandler(handler)
    propagate, logger.propagate = logger.propagate, False
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield said
        said += [str(warning.message) for warning in caught if str(warning.message).startswith("patch")]
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate


def first_line(error):
    lines = str(error).strip().splitlines()
    # A strict configuration says first that it is invalid, then why.
    line = lines[1].strip() if len(lines) > 1 and lines[0].startswith("Class validation error") else (lines or [""])[0]
    return f"{type(error).__name__}: {line}"[:200]
