"""A run that kills itself: ``python -m tests.sft.killed MOMENT RECIPE``, the recipe as JSON.

SIGKILL comes as after ``kill -9``: nothing is caught, closed or cleared up.
"""

import json
import os
import signal
import sys

import torch

from sft_kernels.sft import checkpoints, state, whole
from sft_kernels.sft import run as running
from sft_kernels.sft import train as training
from sft_kernels.sft.recipe import Recipe


def kill(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def in_micro_batch(number):
    """In the forward of a micro-batch; counted from 1 in this process."""
    loss, calls = running.linear_cross_entropy, []

    def counted(*args, **kwargs):
        calls.append(None)
        if len(calls) == number:
            kill()
        return loss(*args, **kwargs)

    running.linear_cross_entropy = counted


def in_checkpoint(step):
    """When the tensors of a checkpoint are written, but not its list of files."""
    write = state._write_tensors

    def written(folder, tensors):
        write(folder, tensors)
        if folder.name == f"step-{step}.partial":
            file = folder / "state-00001.safetensors"
            file.write_bytes(file.read_bytes()[:100])
            kill()

    state._write_tensors = written


def before_rotation(step):
    """When a checkpoint is complete and the oldest is still there."""
    remove = checkpoints.Checkpoints._remove

    def removed(self, path):
        if (self.folder / f"step-{step}").exists():
            kill()
        remove(self, path)

    checkpoints.Checkpoints._remove = removed


def between_best_models(number):
    """When the old best model has made room and the new one is not there yet."""
    sync, calls = whole.sync, []

    def synced(path):
        sync(path)
        if path.name == "best.partial" and (path.parent / "best").exists():
            calls.append(None)
            if len(calls) == number:
                (path.parent / "best").rename(whole.replaced(path.parent / "best"))
                kill()

    whole.sync = synced


def at_the_end(_):
    """When the model is saved and the last evaluation has not begun."""
    from sft_kernels.sft import finish

    finish._evaluate_last = kill


MOMENTS = {f.__name__: f for f in (in_micro_batch, in_checkpoint, before_rotation, between_best_models, at_the_end)}

if __name__ == "__main__":
    torch.set_num_threads(1)
    name, number = sys.argv[1].split(":")
    MOMENTS[name](int(number))
    training.train(Recipe(**json.loads(sys.argv[2])))
