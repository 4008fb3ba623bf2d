"""The traces of a run: a JSONL log with a line per step, some of them on the screen, a page of
curves, a table at the end."""

import io
import json
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from .._terminal import reason_of
from . import course, curves, summary
from .jsonl import JsonLines
from .out import CURVES, LOG, SPEED, TENSORBOARD
from .progress import bar, can_draw, duration, say, screen, warn
from .speed import Speed, per_second
from .tensorboard import Board
from .whole import sync

_COLUMNS = (
    ("step", "{:>6d}"),
    ("loss", "{:>8.4f}"),
    ("lr", "{:>9.2e}"),
    ("grad_norm", "{:>9.3f}"),
    ("examples", "{:>8d}"),
    ("rows", "{:>5d}"),
    ("tokens", "{:>7d}"),
    ("padding", "{:>7d}"),
    ("kept", "{:>7d}"),
)
# What the bar shows of, if there is one.
_BESIDE = (("kept/s", "{:>8}"), ("left", "{:>8}"))
_BAR = "{desc} {n_fmt}/{total_fmt} {percentage:3.0f}%|{bar}|{postfix}"


class RunLog:
    """Writes ``train.jsonl`` in ``out`` and shows the steps; a run that is there already raises
    ``FileExistsError``, unless the first ``keep`` bytes of its log are to be gone on from.

    Numbers may arrive as 0-d tensors on a device. Every ``every`` steps those of all steps since
    the last time are copied to the host at once: each step becomes a line of the file, and the last
    one also a line on the screen. Each line has the numbers of its own step, no means over several.
    A number that is not finite is ``null`` in the file. ``watch(row, sources)`` is called with each
    step's row before it is written, and with the ``sources`` that the step was given.

    The time that the steps took goes to ``speed.jsonl``, see :class:`~.speed.Speed`. A terminal has
    a bar with tokens per second and the time left; without one they stand in the lines.

    ``done`` is the last step so far, ``total`` the last one planned. ``clip`` is the gradient norm
    that is clipped to, and ``tensorboard`` asks for events, too. ``stopped`` says what ended
    the run before that, a signal's name or an error, and the file's last line says the same. A
    screen or a disk that fails later than here costs lines and not the run. ``curves`` says whether
    :meth:`finish` draws them; that it can is tried here.
    """

    def __init__(self, out, total, every, watch=None, keep=None, done=0, *, clip=None, tensorboard=False, curves=True):
        out = Path(out)
        out.mkdir(parents=True, exist_ok=True)
        self.out = out
        self.file = JsonLines(out / LOG)
        self.history = self._begin(keep)
        self.every, self.total, self.watch, self.clip = every, total, watch, clip
        self.done, self.stopped, self.best = done, None, None
        self.pending = []
        self.curves = curves and self._try_curves()
        # A measurement after the last step stays, and a run that starts again measures step 0 again.
        purge = None if keep is None else done and done + 1
        self.board = Board(out / TENSORBOARD, purge) if tensorboard else None
        self.drawn = can_draw()
        self.columns = _COLUMNS if self.drawn else (*_COLUMNS, *_BESIDE)
        # Without a terminal the lines of the steps say it all.
        self.bar = bar(total, "training", "step", self.drawn, initial=done, bar_format=_BAR, dynamic_ncols=True)
        say(" ".join(f"{name:>{len(form.format(0))}}" for name, form in self.columns))
        self.speed = Speed(out / SPEED, None if keep is None else done)

    def step(self, **values):
        self.pending.append(values)
        self.done = values["step"]
        with screen():
            self.bar.update()
        if len(self.pending) >= self.every:
            self.flush()

    @contextmanager
    def aside(self):
        """The time of the block does not count as training. The device is done with all steps so far
        when it begins."""
        self.flush()
        try:
            yield
        finally:
            self.speed.restart()

    def evaluation(self, step, measured):
        """Note what was measured on held-out data: ``loss``, ``accuracy``, ``kept`` and what else
        there is."""
        self.flush()
        self._write({"step": step, "eval": measured})
        if self.board:
            self.board.evaluation(step, measured)
        numbers = f"loss {measured['loss']:.4f}, accuracy {measured['accuracy']:.3f}, {measured['kept']} tokens"
        if measured.get("score") is not None:
            numbers += f"; {measured['metric']} {measured['score']:.4g}, {measured['stopped']:.0%} of answers stop"
        say(f"{'':>6} held out after {step} steps: {numbers}")

    def ended(self, reason):
        """Note that the run ended early, after the last step so far."""
        self.stopped = reason
        self._write({"step": self.done, "of": self.total, "stopped": reason})
        if self.board:
            self.board.close()

    def finished(self):
        """Note that the run is whole: its last step, the model and the last evaluation are there."""
        self._write({"step": self.done, "of": self.total, "finished": True, "best": self.best})

    def position(self):
        """The bytes of the log so far, which are on the disk after this."""
        self.flush()
        path = self.file.path
        if self.file.unwritten:
            raise OSError(f"{path} cannot be written")
        sync(path)
        if self.board:
            self.board.flush()
        return path.stat().st_size

    def flush(self):
        sources = [row.pop("sources", None) for row in self.pending]
        rows = _on_host(self.pending)
        for row, of_step in zip(rows, sources, strict=True):
            if self.watch is not None:
                self.watch(row, of_step)
            self._write(row, at_once=False)
        if rows:
            speed = self.speed.read(rows)
            self._show(rows[-1], speed)
            if self.board:
                self.board.steps(rows, speed)
        self.pending = []
        self.file.write()

    def _show(self, row, speed):
        beside = {
            "kept/s": f"{per_second(speed, 'kept'):,.0f}",
            "left": duration(self.speed.left(self.total - self.done)),
        }
        shown = row | beside
        if self.drawn:
            rate, left = beside.values()
            text = f"loss {row['loss']:.4f}, lr {row['lr']:.1e}, {rate} kept/s, {left} left"
            with screen():
                self.bar.set_postfix_str(text, refresh=False)
        # The bar is drawn again below the line.
        say(" ".join(form.format(shown[name]) for name, form in self.columns))

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
        found = course.of(
            self.history, speed=self.speed.rows, out=self.out, total=self.total, clip=self.clip, best=self.best
        )
        if self.curves and found.steps:
            try:
                self.plot(found)
            except Exception as error:  # matplotlib and its back ends raise all kinds
                self.curves = False
                warn(f"{CURVES} could not be drawn ({reason_of(error)})")
        self.file.write()
        if self.file.unwritten:
            warn(f"the end of {self.file.path} is missing, {len(self.file.unwritten)} bytes")
        if self.board:
            self.board.close()
        if found.steps:
            for line in summary.table(found):
                say(line)

    def plot(self, found):
        """Write ``curves.png`` of a :class:`~.course.Course`."""
        image, path = io.BytesIO(), self.out / CURVES
        curves.draw(found, image, dpi=120)
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
        path = self.file.path
        if keep is None:
            try:
                path.open("x").close()
            except FileExistsError as error:  # of a run that began while this one read its data
                raise FileExistsError(f"out: {self.out} holds a run already ({path.name})") from error
            return []
        path.touch()
        with path.open("r+b") as file:
            kept = file.read(keep)
            kept = kept[: kept.rfind(b"\n") + 1]
            rows = [self._row(number, line) for number, line in enumerate(kept.splitlines(), 1)]
            file.truncate(len(kept))
        if len(kept) < keep:
            warn(f"{path} lacks lines that were there, {keep - len(kept)} bytes")
        return rows

    def _row(self, number, line):
        try:
            row = json.loads(line)
            if isinstance(row["step"], int) and isinstance(row.get("skipped_steps", 0), int):
                return row
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            pass
        what = f"line {number} was not written by a run; put it back, or remove the file"
        raise ValueError(f"resume: {self.file.path}, {what}")

    def _try_curves(self):
        try:
            if (self.out / CURVES).is_dir():
                raise IsADirectoryError(f"{self.out / CURVES} is a folder")
            curves.draw(course.EXAMPLE, io.BytesIO(), dpi=30, trial=True)
        except Exception as error:
            warn(f"{CURVES} cannot be drawn, the run goes on without ({reason_of(error)})")
            return False
        return True

    def _write(self, row, at_once=True):
        self.history.append(row)
        self.file.add(row)
        if at_once:
            self.file.write()


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
