"""The host waits for the device once a line on the screen, and not between."""

import traceback
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import sft_kernels
from sft_kernels.sft import run as running
from sft_kernels.sft import train as training
from sft_kernels.sft.recipe import Recipe
from sft_kernels.sft.report import RunLog
from sft_kernels.sft.train import train

from .small import model_of, recipe_in, rows_of

# The losses and the attention as they run here; on a GPU other code runs. AdamW's is the same but for the kernel.
OPS = f"{Path(sft_kernels.__file__).parent / 'ops'}/"


class Syncs(TorchDispatchMode):
    """Counts the reads for which the host would wait for a GPU, on a machine without one."""

    READ = ("item", "tolist", "cpu", "numpy", "nonzero", "equal", "__bool__", "__float__", "__int__", "__index__")
    OPS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "_unique2", "masked_select")

    def __init__(self, monkeypatch):
        super().__init__()
        self.found, self.on_host = [], 0
        for name in self.READ:
            monkeypatch.setattr(torch.Tensor, name, self._counted(name, getattr(torch.Tensor, name)))
        # Batches are made on the host, where reading costs nothing.
        monkeypatch.setattr(running, "collate", self._counted(None, running.collate))

    def _counted(self, name, function):
        def wrapper(*args, **kwargs):
            self._found(name)
            self.on_host += 1
            try:
                return function(*args, **kwargs)
            finally:
                self.on_host -= 1

        return wrapper

    def _found(self, name):
        if name is None or self.on_host:
            return
        files = [frame.filename for frame in traceback.extract_stack()]
        caller = [file for file in files if file != __file__ and "/torch/" not in file][-1]
        if caller.endswith("adamw/double_clip.py"):
            return  # it reads norms that lie on the host, and on a GPU waits for nothing: tests/ops has that
        if not caller.startswith(OPS) or caller.startswith(f"{OPS}adamw/"):
            self.found.append((name, caller))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in self.OPS:
            self._found(name)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize(("log_every", "lines"), [(None, 2), (1, 20), (7, 3)])
def test_the_host_waits_once_a_line_and_not_between(log_every, lines, tmp_path, tokenizer, monkeypatch):
    log_every = Recipe().log_every if log_every is None else log_every
    recipe = recipe_in(tmp_path, steps=20, accumulate=2, weigh="examples", spike=3.0, log_every=log_every)
    syncs, model = Syncs(monkeypatch), model_of(len(tokenizer))
    counts = []

    class Log(RunLog):
        """The run's, from whose making to whose end the reads are counted, after each step and at the end."""

        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            syncs.found.clear()
            syncs.__enter__()

        def step(self, **values):
            super().step(**values)
            counts.append(len(syncs.found))

        def close(self):
            super().close()
            counts.append(len(syncs.found))
            syncs.__exit__(None, None, None)

    monkeypatch.setattr(training, "RunLog", Log)
    train(recipe, model=model, tokenizer=tokenizer)
    assert counts == [*(step // recipe.log_every for step in range(1, 21)), lines], syncs.found
    assert [row["step"] for row in rows_of(tmp_path / "run") if "loss" in row] == [*range(1, 21)]
