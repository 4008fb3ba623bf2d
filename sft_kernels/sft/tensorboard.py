"""TensorBoard's view of a run: the numbers of ``train.jsonl`` and ``speed.jsonl`` as scalars."""

import importlib
import threading

from .._terminal import reason_of
from .progress import warn
from .speed import per_second

_QUEUE = 4096  # events that wait for the thread that writes them; the training waits if there are more


def check():
    """Raise ``ImportError``, which names the extra, if TensorBoard's writer cannot be imported."""
    try:
        importlib.import_module("torch.utils.tensorboard")
    except ImportError as error:
        what = "the module tensorboard is missing"
        if not isinstance(error, ModuleNotFoundError) or error.name != "tensorboard":
            what = f"its writer cannot be imported ({reason_of(error)})"
        install = "pip install --no-build-isolation '.[tensorboard]' in a clone"
        message = f'tensorboard: {what}; the extra "tensorboard" brings it: {install}'
        raise ImportError(message, name="tensorboard") from error


class Board:
    """Writes a run's scalars as events into ``folder``, by a thread of the writer's own.

    Events of an earlier process from the step ``purge`` on are hidden, as the run goes on before
    them. A failure is one warning, and ends the writing.
    """

    def __init__(self, folder, purge=None):
        self._writer = None
        self._hook, threading.excepthook = threading.excepthook, self._uncaught
        self._try(lambda: self._open(folder, purge))

    def _open(self, folder, purge):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(folder, purge_step=purge, max_queue=_QUEUE)

    def steps(self, rows, speed):
        """Add the scalars of some steps' ``rows``, and of the reading ``speed`` of the time they took."""
        for row in rows:
            shares = {f"{name}_share": row[name] / row["tokens"] for name in ("kept", "padding")}
            self._add("train", row["step"], {name: row[name] for name in ("loss", "lr", "grad_norm")} | shares)
        tokens, kept = (per_second(speed, name) for name in ("tokens", "kept"))
        self._add("train", speed["step"], {"tokens_per_second": tokens, "kept_tokens_per_second": kept})

    def evaluation(self, step, measured):
        """Add what was measured on held-out data."""
        scalars = {name: measured[name] for name in ("loss", "accuracy")}
        if measured.get("score") is not None:
            scalars[measured["metric"]] = measured["score"]
        self._add("eval", step, scalars)

    def flush(self):
        """Wait until the events are on the disk."""
        self._try(lambda: self._writer and self._writer.flush())

    def close(self):
        """Write what waits; later scalars are dropped."""
        writer, self._writer = self._writer, None
        self._try(lambda: writer and writer.close())
        if threading.excepthook == self._uncaught:
            threading.excepthook = self._hook

    def _uncaught(self, args):
        """Let no traceback be printed of the writer's thread, whose error is raised here at the next call."""
        if not type(args.thread).__module__.startswith("tensorboard."):
            self._hook(args)

    def _add(self, group, step, scalars):
        def add():
            for name, value in scalars.items():
                self._writer.add_scalar(f"{group}/{name}", value, step)

        if self._writer is not None:
            self._try(add)

    def _try(self, action):
        try:
            action()
        except Exception as error:  # the thread's own, which are raised again here
            self._writer = None
            warn(f"tensorboard: no more events are written ({reason_of(error)})")
