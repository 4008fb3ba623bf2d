"""The traces of a run: a JSONL log with a line per step, some of them on the screen, curves as PNG."""

import json
from pathlib import Path

import torch
from tqdm import tqdm

_COLUMNS = (
    ("step", "{:>6d}"),
    ("loss", "{:>8.4f}"),
    ("lr", "{:>9.2e}"),
    ("grad_norm", "{:>9.3f}"),
    ("examples", "{:>8d}"),
    ("rows", "{:>5d}"),
    ("tokens", "{:>7d}"),
    ("kept", "{:>7d}"),
)


class RunLog:
    """Writes ``train.jsonl`` in ``out`` and shows the steps; a run that is there already raises ``FileExistsError``.

    Numbers may arrive as 0-d tensors on a device. Every ``every`` steps those of all steps since the last time are
    copied to the host at once: each step becomes a line of the file, and the last one also a line on the screen. Each
    line has the numbers of its own step, no means over several.
    """

    def __init__(self, out, total, every):
        out = Path(out)
        out.mkdir(parents=True, exist_ok=True)
        self.out = out
        self.file = (out / "train.jsonl").open("x", encoding="utf-8")
        self.every = every
        self.pending = []
        self.history = []
        self.bar = tqdm(total=total, desc="training", unit="step")
        header = (f"{name:>{len(form.format(0))}}" for name, form in _COLUMNS)
        tqdm.write(" ".join(header))

    def step(self, **values):
        self.pending.append(values)
        self.bar.update()
        if len(self.pending) >= self.every:
            self.flush()

    def evaluation(self, step, loss):
        self.flush()
        self._write({"step": step, "eval": loss._asdict()})
        numbers = f"loss {loss.loss:.4f}, accuracy {loss.accuracy:.3f}, {loss.kept} tokens"
        tqdm.write(f"{'':>6} held out after {step} steps: {numbers}")

    def flush(self):
        for row in _on_host(self.pending):
            self._write(row)
        if self.pending:
            tqdm.write(" ".join(form.format(row[name]) for name, form in _COLUMNS))
            self.bar.set_postfix(loss=f"{row['loss']:.4f}")
        self.pending = []
        self.file.flush()

    def close(self):
        self.flush()
        self.bar.close()
        self.file.close()

    def _write(self, row):
        self.history.append(row)
        self.file.write(json.dumps(row) + "\n")

    def plot(self):
        """``curves.png``: masked loss, held out too where it was measured, over the learning rate."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        steps = [row for row in self.history if "loss" in row]
        held_out = [row for row in self.history if "eval" in row]
        figure, (loss, lr) = pyplot.subplots(2, 1, sharex=True, figsize=(8, 6), height_ratios=(3, 1))
        loss.plot([r["step"] for r in steps], [r["loss"] for r in steps], linewidth=1, label="train")
        if held_out:
            loss.plot([r["step"] for r in held_out], [r["eval"]["loss"] for r in held_out], "o-", label="held out")
        loss.set_ylabel("masked loss, nats a token")
        loss.legend()
        lr.plot([r["step"] for r in steps], [r["lr"] for r in steps], color="tab:gray")
        lr.set_ylabel("learning rate")
        lr.set_xlabel("optimiser step")
        for axis in (loss, lr):
            axis.grid(alpha=0.3)
        figure.tight_layout()
        figure.savefig(self.out / "curves.png", dpi=120)
        pyplot.close(figure)


def _on_host(rows):
    """``rows`` with numbers in the place of tensors, which are copied from their device in one piece."""
    tensors = [value for row in rows for value in row.values() if isinstance(value, torch.Tensor)]
    # fp64 holds fp32 and every count exactly.
    numbers = iter(torch.stack([t.detach().double() for t in tensors]).tolist() if tensors else ())

    def number(value):
        if not isinstance(value, torch.Tensor):
            return value
        return next(numbers) if value.is_floating_point() else int(next(numbers))

    return [{name: number(value) for name, value in row.items()} for row in rows]
