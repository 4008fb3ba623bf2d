"""The traces of a run: a JSONL log with a line per step, some of them on the screen, curves as
PNG."""

import io
import json
import math
import sys
from contextlib import suppress
from pathlib import Path

import torch
from tqdm import tqdm

from .._terminal import output, printable, reason_of
from .out import BEST
from .whole import sync

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
    """Writes ``train.jsonl`` in ``out`` and shows the steps; a run that is there already raises
    ``FileExistsError``, unless the first ``keep`` bytes of its log are to be gone on from.

    Numbers may arrive as 0-d tensors on a device. Every ``every`` steps those of all steps since
    the last time are copied to the host at once: each step becomes a line of the file, and the last
    one also a line on the screen. Each line has the numbers of its own step, no means over several.
    A number that is not finite is ``null`` in the file. ``watch(row, sources)`` is called with each
    step's row before it is written, and with the ``sources`` that the step was given.

    ``done`` is the last step so far, ``total`` the last one planned. ``stopped`` says what ended
    the run before that, a signal's name or an error, and the file's last line says the same. A
    screen or a disk that fails later than here costs lines and not the run. ``curves`` says whether
    they can be drawn, which is tried here.
    """

    def __init__(self, out, total, every, watch=None, keep=None, done=0):
        out = Path(out)
        out.mkdir(parents=True, exist_ok=True)
        self.out = out
        self.path = out / "train.jsonl"
        self.history = self._begin(keep)
        self.every, self.total, self.watch = every, total, watch
        self.done, self.stopped, self.best = done, None, None
        self.pending = []
        self._unwritten, self._warned = b"", False
        self.curves = self._try_curves()
        self.bar = bar(total, "training", "step", initial=self.done)
        header = (f"{name:>{len(form.format(0))}}" for name, form in _COLUMNS)
        say(" ".join(header))

    def step(self, **values):
        self.pending.append(values)
        self.done = values["step"]
        with screen():
            self.bar.update()
        if len(self.pending) >= self.every:
            self.flush()

    def evaluation(self, step, measured):
        """Note what was measured on held-out data: ``loss``, ``accuracy``, ``kept`` and what else
        there is."""
        self.flush()
        self._write({"step": step, "eval": measured})
        numbers = f"loss {measured['loss']:.4f}, accuracy {measured['accuracy']:.3f}, {measured['kept']} tokens"
        if measured.get("score") is not None:
            numbers += f"; {measured['metric']} {measured['score']:.4g}, {measured['stopped']:.0%} of answers stop"
        say(f"{'':>6} held out after {step} steps: {numbers}")

    def ended(self, reason):
        """Note that the run ended early, after the last step so far."""
        self.stopped = reason
        self._write({"step": self.done, "of": self.total, "stopped": reason})

    def finished(self):
        """Note that the run is whole: its last step, the model and the last evaluation are there."""
        self._write({"step": self.done, "of": self.total, "finished": True, "best": self.best})

    def position(self):
        """The bytes of the log so far, which are on the disk after this."""
        self.flush()
        if self._unwritten:
            raise OSError(f"{self.path} cannot be written")
        sync(self.path)
        return self.path.stat().st_size

    def flush(self):
        sources = [row.pop("sources", None) for row in self.pending]
        for row, of_step in zip(_on_host(self.pending), sources, strict=True):
            if self.watch is not None:
                self.watch(row, of_step)
            self._write(row, at_once=False)
        if self.pending:
            say(" ".join(form.format(row[name]) for name, form in _COLUMNS))
            with screen():
                self.bar.set_postfix(loss=f"{row['loss']:.4f}")
        self.pending = []
        self._write_out()

    def close(self):
        """Write what is pending, and end the bar. Evaluations and the end of a run can still be
        written after."""
        try:
            self.flush()
        finally:
            with screen():
                self.bar.close()

    def finish(self):
        """Draw the curves and say what the whole run came to; a failure is a warning."""
        if self.curves:
            try:
                self.plot()
            except Exception as error:  # matplotlib and its back ends raise all kinds
                self.curves = False
                warn(f"curves.png could not be drawn ({reason_of(error)})")
        self._write_out()
        if self._unwritten:
            warn(f"the end of {self.path} is missing, {len(self._unwritten)} bytes")
        steps = [row for row in self.history if "skipped_steps" in row]
        if steps and (skipped := steps[-1]["skipped_steps"]):
            say(f"skipped {skipped} of {self.done} steps, because of the gradient's norm")
        if shares := [row["rounded_away"] for row in steps if row.get("rounded_away") is not None]:
            say(f"rounded away: {sum(shares) / len(shares):.2%} of the updates, mean over the steps")
        if self.best is not None:
            name, value, step = (self.best[key] for key in ("by", "value", "step"))
            say(f"best on held-out data: step {step}, {name} {value:.4g}; its model is in {self.out / BEST}")

    def plot(self):
        """``curves.png``: masked loss, held out too where it was measured, over the learning
        rate."""
        image, path = io.BytesIO(), self.out / "curves.png"
        _draw(self.history, image, dpi=120)
        if path.is_symlink():
            raise FileExistsError(f"{path} is a link")
        try:
            path.write_bytes(image.getvalue())
        except OSError:
            with suppress(OSError):
                path.unlink()  # half an image
            raise

    def _begin(self, keep):
        """The rows of the log's first ``keep`` bytes, and nothing behind them; None for a new log."""
        if keep is None:
            try:
                self.path.open("x").close()
            except FileExistsError as error:  # of a run that began while this one read its data
                raise FileExistsError(f"out: {self.out} holds a run already ({self.path.name})") from error
            return []
        self.path.touch()
        with self.path.open("r+b") as file:
            kept = file.read(keep)
            kept = kept[: kept.rfind(b"\n") + 1]
            rows = [self._row(number, line) for number, line in enumerate(kept.splitlines(), 1)]
            file.truncate(len(kept))
        if len(kept) < keep:
            warn(f"{self.path} lacks lines that were there, {keep - len(kept)} bytes")
        return rows

    def _row(self, number, line):
        try:
            row = json.loads(line)
            if isinstance(row["step"], int) and isinstance(row.get("skipped_steps", 0), int):
                return row
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            pass
        what = f"line {number} was not written by a run; put it back, or remove the file"
        raise ValueError(f"resume: {self.path}, {what}")

    def _try_curves(self):
        example = [{"step": 1, "loss": 2.0, "lr": 1e-3}, {"step": 1, "eval": {"loss": 2.0}}]
        try:
            if (self.out / "curves.png").is_dir():
                raise IsADirectoryError(f"{self.out / 'curves.png'} is a folder")
            _draw(example, io.BytesIO(), dpi=30)
        except Exception as error:
            warn(f"curves.png cannot be drawn, the run goes on without ({reason_of(error)})")
            return False
        return True

    def _write(self, row, at_once=True):
        self.history.append(row)
        self._unwritten += (json.dumps(_finite(row), allow_nan=False) + "\n").encode()
        if at_once:
            self._write_out()

    def _write_out(self):
        try:
            with self.path.open("ab", buffering=0) as file:  # a buffer would write again
                while self._unwritten:
                    self._unwritten = self._unwritten[file.write(self._unwritten) :]
        except OSError as error:
            if not self._warned:
                warn(f"{self.path} could not be written, to be tried again ({reason_of(error)})")
            self._warned = True


def bar(total, desc, unit, shown=True, **options):
    """A bar on the error output, or one that shows nothing if the screen is gone or ``shown`` is false."""
    disable = True  # tqdm flushes both streams, and an error in the middle of it cannot be cleared up
    with screen():
        for stream in (sys.stdout, sys.stderr):
            getattr(stream, "flush", bool)()
        disable = not shown
    return tqdm(total=total, desc=desc, unit=unit, file=output(sys.stderr), disable=disable, **options)


def say(text, file=None):
    """Print one line beside the bar, without control characters; blank lines may come first.

    A screen that is gone raises nothing, and one that cannot show a character gets an escape.
    """
    line = text.lstrip("\n")
    stream = output(sys.stdout if file is None else file)
    with screen(), tqdm.external_write_mode(file=stream):
        stream.write(f"{text[: len(text) - len(line)]}{printable(line)}\n")


def warn(text):
    """Print a warning beside the bar, to the screen's error output."""
    say(f"warning: {text}", sys.stderr)


def screen():
    """The context of writing to a screen that may be gone."""
    # A terminal that is gone raises OSError, a closed file ValueError.
    return suppress(OSError, ValueError)


def _finite(value):
    """``value`` with ``None`` in the place of numbers that JSON has not: NaN and infinities."""
    if isinstance(value, dict):
        return {name: _finite(entry) for name, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _draw(history, file, dpi):
    # Not pyplot, which would choose a back end for the whole process.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = [row for row in history if "loss" in row]
    held_out = [row for row in history if "eval" in row]
    figure = Figure(figsize=(8, 6))
    FigureCanvasAgg(figure)
    loss, lr = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    losses = [math.nan if r["loss"] is None else r["loss"] for r in steps]
    loss.plot([r["step"] for r in steps], losses, linewidth=1, label="train")
    if held_out:
        losses = [r["eval"]["loss"] for r in held_out]
        loss.plot([r["step"] for r in held_out], losses, "o-", label="held out")
    loss.set_ylabel("masked loss, nats a token")
    loss.legend()
    lr.plot([r["step"] for r in steps], [r["lr"] for r in steps], color="tab:gray")
    lr.set_ylabel("learning rate")
    lr.set_xlabel("optimiser step")
    for axis in (loss, lr):
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(file, format="png", dpi=dpi)


def _on_host(rows):
    """``rows`` with numbers in the place of tensors, which are copied from their device in one
    piece."""
    tensors = [value for row in rows for value in row.values() if isinstance(value, torch.Tensor)]
    # fp64 holds fp32 and every count exactly.
    numbers = iter(torch.stack([t.detach().double() for t in tensors]).tolist() if tensors else ())

    def number(value):
        if not isinstance(value, torch.Tensor):
            return value
        return next(numbers) if value.is_floating_point() else int(next(numbers))

    return [{name: number(value) for name, value in row.items()} for row in rows]
