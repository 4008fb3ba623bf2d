"""Everything that a run has to remember to go on as if nothing had happened, in a checkpoint."""

import json
import random
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from .._terminal import reason_of
from ..ops.adamw.state import HALF
from . import model as models

_KIND = 1  # of checkpoints; another number is refused
_STATE = "state.json"
_SHARD = 4 << 30  # bytes in a file of tensors; safetensors takes a file's tensors into memory at once
# Fields that a resumed run may have otherwise: they say where it runs and what it shows and keeps.
_FREE = {"out", "resume", "cache", "log_every", "save_every", "keep", "tensorboard"}
# What a checkpoint's JSON holds beside other fields, and what it says of the best model.
_FIELDS = {"step": int, "recipe": dict, "data": list, "log_bytes": int, "best": (dict, type(None)), "parameters": list}
_BEST = {"step": int, "by": str, "value": (int, float), "loss": (int, float)}


class Parts(NamedTuple):
    """The parts of a run that change while it runs, beside the model's weights."""

    optimizer: torch.optim.Optimizer
    names: list[str]  # of the optimiser's parameters, in its order
    guard: object  # with ``tensors``, a dict, of which every tensor is written to in place
    device: torch.device
    own_weights: bool  # True for a model that was handed in: its trained weights are kept by name


def seed(number):
    """Seed torch, and for code of others Python and NumPy."""
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number % 2**32)  # noqa: NPY002


def write(folder, model, tokenizer, parts, **progress):
    """Write a checkpoint's files into ``folder``: ``model/``, which ``from_pretrained`` loads, the
    other tensors, and ``progress`` as JSON."""
    (folder / "model").mkdir()
    models.save_model(model, folder / "model")
    tokenizer.save_pretrained(folder / "model")
    _write_tensors(folder, _tensors(parts))
    state = {"kind": _KIND, "parameters": parts.names, **progress, "random": _random_state()}
    (folder / _STATE).write_text(json.dumps(state), encoding="utf-8")


def read_progress(folder):
    """The ``progress`` of a checkpoint; ``ValueError`` if it is of another version, or of nothing
    that :func:`write` wrote."""
    path = Path(folder) / _STATE
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"resume: {path} cannot be read ({reason_of(error)})") from error
    if not isinstance(state, dict) or state.get("kind") != _KIND:
        raise ValueError(f"resume: {folder} was written by another version of sft_kernels")
    best = state.get("best")
    if wrong := [*_wrong(state, _FIELDS), *_wrong(best, _BEST if isinstance(best, dict) else ())]:
        raise ValueError(f"resume: {path} does not hold what a run writes ({', '.join(wrong)})")
    return state


def _wrong(values, kinds):
    """The names of fields that are missing, of another kind or below 0 where they count."""
    return [
        name
        for name in kinds
        if not isinstance(values.get(name), kinds[name]) or (kinds[name] is int and values[name] < 0)
    ]


def check_same(recipe, folder, progress):
    """Raise ``ValueError`` that lists the fields in which ``recipe`` differs from the checkpoint's."""
    there, now = progress["recipe"], asdict(recipe)
    names = [name for name in (*now, *(there.keys() - now.keys())) if name not in _FREE]
    differ = [
        f"{name}: {there.get(name)!r} there, {now.get(name)!r} now"
        for name in names
        if there.get(name) != now.get(name) or (name in there) != (name in now)
    ]
    if differ:
        raise ValueError(f"resume: {folder} is of another recipe; {'; '.join(differ)}")


def restore(folder, parts, progress):
    """Put the tensors and random numbers of a checkpoint back. The model's weights are those of
    ``model/`` already, unless it was handed in."""
    if progress["parameters"] != parts.names:
        raise ValueError(f"resume: {folder} is of a model with other trained parameters")
    try:
        _put_back(folder, parts, progress)
    except Exception as error:  # safetensors and torch raise all kinds
        raise ValueError(f"resume: {folder} does not fit this run ({reason_of(error)})") from error


def _put_back(folder, parts, progress):
    optimizer, found, states = parts.optimizer, {}, {}
    index = {name: i for i, name in enumerate(parts.names)}
    for name, tensor in _read_tensors(folder):
        if name.startswith("optimizer/"):
            of, _, key = name.removeprefix("optimizer/").rpartition("/")
            states.setdefault(index[of], {})[key] = tensor
        else:
            found[name] = tensor
    if parts.own_weights:
        with torch.no_grad():
            for name, p in zip(parts.names, _parameters(optimizer), strict=True):
                p.copy_(found[f"parameter/{name}"])
    optimizer.load_state_dict({**optimizer.state_dict(), "state": states})
    optimizer.skipped_steps.copy_(found["skipped_steps"])
    for name, tensor in parts.guard.tensors.items():
        tensor.copy_(found[f"guard/{name}"])
    torch.set_rng_state(found["random/cpu"])
    if "random/device" in found and parts.device.type == "cuda":
        torch.cuda.set_rng_state(found["random/device"], parts.device)
    version, numbers, gauss = progress["random"]["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = progress["random"]["numpy"]
    np.random.set_state((name, np.array(keys, np.uint32), *rest))  # noqa: NPY002


def bytes_of(parts):
    """The size of the tensors that a checkpoint has beside ``model/``, once every state is there."""
    optimizer, total = parts.optimizer, 0
    for p in _parameters(optimizer):
        moment = (optimizer.state_dtype or p.dtype).itemsize
        remainder = 2 * (optimizer.master_weights == "split" and p.dtype in HALF)
        total += p.numel() * (2 * moment + remainder + parts.own_weights * p.element_size())
    return total


def _parameters(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def _tensors(parts):
    """Yield pairs of name and tensor."""
    optimizer = parts.optimizer
    for name, p in zip(parts.names, _parameters(optimizer), strict=True):
        if parts.own_weights:
            yield f"parameter/{name}", p.detach()
        for key, value in optimizer.state.get(p, {}).items():
            yield f"optimizer/{name}/{key}", value
    yield "skipped_steps", optimizer.skipped_steps
    for name, tensor in parts.guard.tensors.items():
        yield f"guard/{name}", tensor
    yield "random/cpu", torch.get_rng_state()
    if parts.device.type == "cuda":
        yield "random/device", torch.cuda.get_rng_state(parts.device)


def _write_tensors(folder, tensors):
    from safetensors.torch import save_file

    shard, size, number = {}, 0, 1
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > _SHARD:
            save_file(shard, folder / f"state-{number:05d}.safetensors")
            shard, size, number = {}, 0, number + 1
        shard[name] = tensor.contiguous()
        size += tensor.nbytes
    save_file(shard, folder / f"state-{number:05d}.safetensors")


def _read_tensors(folder):
    from safetensors import safe_open

    for file in sorted(Path(folder).glob("state-*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                # Memory of its own: that of the file may begin anywhere, and kernels may round by that.
                yield name, tensors.get_tensor(name).clone()


def _random_state():
    version, numbers, gauss = random.getstate()
    name, keys, *rest = np.random.get_state()  # noqa: NPY002
    return {"python": [version, numbers, gauss], "numpy": [name, keys.tolist(), *rest]}
