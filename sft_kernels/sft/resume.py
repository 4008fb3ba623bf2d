"""Finds the start of a run: its own newest checkpoint, or an earlier run's model."""

from pathlib import Path
from typing import NamedTuple

from . import saving, state, whole
from .checkpoints import FOLDER, Checkpoints, only_run
from .files import CONFIG
from .hub import PREFIX
from .out import BEST, UNFINISHED, check_again
from .progress import say


class Earlier(NamedTuple):
    """A run that goes on."""

    found: int  # bytes of the log when the run was found
    folder: Path | None = None  # the checkpoint; None if none is complete
    progress: dict | None = None

    @property
    def model(self):
        return None if self.folder is None else self.folder / "model"

    @property
    def step(self):
        return 0 if self.folder is None else self.progress["step"]

    @property
    def log_bytes(self):
        return 0 if self.folder is None else self.progress["log_bytes"]


def find(recipe):
    """The :class:`Earlier` run in ``recipe.out``, or None if there is none.

    Raises ``ValueError`` if that run is finished, or if its recipe was another one, and
    ``FileExistsError`` if it still runs. What it left half is removed.
    """
    out = check_again(recipe.out)
    if not (out / "train.jsonl").exists() and not (out / FOLDER).exists():
        say(f"resume: there is no run in {out}, this is a new one")
        return None
    with only_run(out):
        if (last := _last_line(out / "train.jsonl")) and '"finished": true' in last:
            raise ValueError(
                f"resume: the run in {out} is finished; to go on with its model under a new schedule, give "
                f"--init-from {out} and another --out"
            )
        for path in (out / name for name in ("model", UNFINISHED, BEST)):
            whole.clear_up(path)
        for path in filter(saving.is_room, out.iterdir()):  # which may be larger than what is free
            whole.remove(path)
        checkpoints = Checkpoints(out, recipe.keep)
        checkpoints.clear_up()
        path = checkpoints.newest()
        size = _log_size(out)
    if path is None:
        if (out / "model").exists():
            raise ValueError(f"resume: {out} holds a model and no complete checkpoint; give another out")
        say(f"resume: {out} holds no complete checkpoint, so the run starts again")
        return Earlier(size)
    progress = state.read_progress(path)
    state.check_same(recipe, path, progress)
    say(f"resume: going on after step {progress['step']}, from {path}")
    return Earlier(size, path, progress)


def check_still(out, earlier):
    """Raise ``FileExistsError`` if another process has gone on with the run since it was found."""
    if _log_size(out) != earlier.found:
        raise FileExistsError(f"out: another process went on with the run in {out} meanwhile; start this one again")


def earlier_model(name):
    """The folder of the model that ``init_from`` names: a model, or that of a run or of a checkpoint.

    Of a run it is the best model, or else the last one: of the end, of the newest complete
    checkpoint, of an error.
    """
    if name.startswith(PREFIX):
        return name
    path = Path(name)
    if not path.is_dir():
        raise ValueError(f"init_from: {name} is no folder; give a model, a run or a checkpoint")
    if (path / CONFIG).is_file():
        return name
    places = [path / BEST, path / "model"]
    if (path / FOLDER).is_dir() and (newest := Checkpoints(path, 1).newest()):
        places.append(newest / "model")
    found = next((place for place in [*places, path / UNFINISHED] if (place / CONFIG).is_file()), None)
    if found is None:
        raise ValueError(f"init_from: {name} holds no model, neither of its own nor of a run or a checkpoint")
    say(f"init_from: starting anew from {found}")
    return str(found)


def _log_size(out):
    path = out / "train.jsonl"
    return path.stat().st_size if path.exists() else 0


def _last_line(path):
    try:
        with open(path, "rb") as file:
            file.seek(max(0, file.seek(0, 2) - 4096))
            return file.read().decode(errors="replace").rstrip("\n").rpartition("\n")[2]
    except FileNotFoundError:
        return None
