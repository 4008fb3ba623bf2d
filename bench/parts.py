"""Runs processes within a time that is kept to the second, and leaves two files that are whole at every moment.

Parts of a stage run side by side; stages follow each other. A part that hangs or dies costs itself alone: it has a
limit of its own, and is killed with its process group. After every part ``summary.txt`` and ``results.tgz`` are
rewritten: a run that is cut off leaves what it had.
"""

import contextlib
import io
import json
import os
import signal
import subprocess
import tarfile
import time
from collections import deque
from pathlib import Path
from typing import NamedTuple

from .facts import ROOT, replace

ARCHIVE, SUMMARY = "results.tgz", "summary.txt"
LARGEST = 15 << 20  # bytes of the archive: some carriers take files of up to 16 MiB
_LOG = 256 << 10  # bytes of a log that are kept: a quarter from its beginning, the rest from its end
_CLOSING = 3.0  # seconds that are kept back to write both files a last time


class Part(NamedTuple):
    """One process. Without a command there is nothing to run: ``absent`` or ``broken`` says why."""

    name: str  # its stage's, or begins with that and a full stop
    seconds: float = 0.0  # limit
    command: tuple[str, ...] | None = None
    absent: str | None = None  # no failure
    broken: str | None = None  # a failure
    env: dict = {}  # noqa: RUF012, nobody changes it
    nothing_to_do: int | None = None  # the exit status that says so


class Stage(NamedTuple):
    """Parts that may run at the same time, ``side_by_side`` of them."""

    name: str
    parts: tuple[Part, ...]
    side_by_side: int = 1
    again: bool = False  # runs even if it has passed before: what it leaves stays on its machine


class Outcome(NamedTuple):
    name: str
    verdict: str  # one of the keys of VERDICTS
    seconds: float = 0.0
    detail: str = ""

    @property
    def ok(self):
        return VERDICTS[self.verdict]


VERDICTS = {  # whether all is well
    "passed": True,
    "passed before": True,
    "absent": True,
    "failed": False,
    "crashed": False,
    "stopped": False,
    "not reached": False,
}


class Run:
    """One run: ``folder`` is where parts write, ``out`` where the two files go.

    Args:
        folder: holds logs and whatever parts leave; all of it is archived.
        out: gets ``summary.txt`` and ``results.tgz``, nothing else.
        facts: ``{name: value}`` for the head of the summary.
        deadline: on ``time.monotonic()``; everything has ended by then.
        env: the environment of every part.
        before: names of parts that have passed before; they are left out, except in stages that run ``again``.
    """

    def __init__(self, folder, out, facts, deadline, env, before=()):
        self.folder, self.out, self.facts, self.env = folder, out, facts, env
        self.before = frozenset(before)
        self.end = deadline - min(_CLOSING, 0.2 * max(0.0, deadline - time.monotonic()))
        self.outcomes = {}

    def go(self, stages):
        """Run all stages; returns the outcomes, in the order of the plan."""
        for stage in stages:  # an interruption must not leave what reads like a whole run
            for part in stage.parts:
                self.outcomes[part.name] = Outcome(part.name, "not reached")
        self.flush()
        for stage in stages:
            self._stage(stage)
        return list(self.outcomes.values())

    def _stage(self, stage):
        waiting, running = deque(stage.parts), []
        try:
            while waiting or running:
                while waiting and len(running) < stage.side_by_side:
                    part = waiting.popleft()
                    outcome = self._without_running(part, stage)
                    if outcome is None:
                        running.append(_Running(part, self.folder / f"{part.name}.log", self.env, self.end))
                    else:
                        self._note(outcome)
                for process in [p for p in running if p.ended()]:
                    running.remove(process)
                    self._note(process.outcome())
                time.sleep(0.02)
        finally:  # also on an interrupt
            for process in running:
                process.kill()

    def _without_running(self, part, stage):
        if part.name in self.before and not stage.again:
            return Outcome(part.name, "passed before")
        if part.broken:
            return Outcome(part.name, "failed", detail=part.broken)
        if part.command is None:
            return Outcome(part.name, "absent", detail=part.absent)
        if time.monotonic() > self.end - 0.5:
            return Outcome(part.name, "not reached", detail="the time was spent")
        return None

    def _note(self, outcome):
        self.outcomes[outcome.name] = outcome
        self.flush()
        print(line(outcome), flush=True)

    def flush(self):
        """Write both files; each is whole, the old one or the new."""
        outcomes = list(self.outcomes.values())
        document = {"facts": self.facts, "parts": [outcome._asdict() for outcome in outcomes]}
        archive, left_out = packed(self.folder, json.dumps(document, indent=1) + "\n")
        replace(self.out / ARCHIVE, archive)
        text = summary(self.facts, outcomes, self.folder)
        text += "".join(f"left out of {ARCHIVE}, too large: {name}\n" for name in left_out)
        replace(self.out / SUMMARY, text)


class _Running:
    """A part whose process has begun."""

    def __init__(self, part, log, env, end):
        self.part, self.log, self.start = part, log, time.monotonic()
        self.end = min(self.start + part.seconds, end)
        self.stopped = False
        with log.open("w") as stream:
            self.process = subprocess.Popen(
                part.command,
                cwd=ROOT,
                env=env | part.env,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def ended(self):
        """Returns True once the process is gone, which at its limit it is."""
        if self.process.poll() is None:
            if time.monotonic() < self.end:
                return False
            self.stopped = True
        self.kill()
        return True

    def kill(self):
        """End the process and its group. One that the driver does not let go of is left behind."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(2)

    def outcome(self):
        took, status, name = time.monotonic() - self.start, self.process.returncode, self.part.name
        if self.stopped or status is None:
            return Outcome(name, "stopped", took, f"after its {self.end - self.start:.0f} s")
        if status == 0:
            return Outcome(name, "passed", took)
        if status == self.part.nothing_to_do:
            return Outcome(name, "absent", took, "nothing to run")
        if status < 0:
            return Outcome(name, "crashed", took, signal.Signals(-status).name)
        return Outcome(name, "failed", took, f"exit {status}: {_last_lines(self.log, 1)[:150] or 'no output'}")


def _last_lines(log, count):
    with log.open("rb") as stream:
        stream.seek(max(0, log.stat().st_size - (64 << 10)))
        lines = stream.read().decode(errors="replace").strip().splitlines()
    return "\n".join(lines[-count:])


def line(outcome):
    """Returns one line of the summary."""
    return f"{outcome.name:<42}{outcome.verdict:<14}{outcome.seconds:>7.1f} s  {outcome.detail}".rstrip()


def summary(facts, outcomes, folder):
    """Returns the summary's text: the facts, a line a part, and the end of the log of every part that went wrong."""
    ok = sum(outcome.ok for outcome in outcomes)
    parts = [", ".join(f"{key} {value}" for key, value in facts.items()), f"{ok} of {len(outcomes)} parts are well"]
    parts.append("\n".join(map(line, outcomes)))
    for outcome in outcomes:
        log = folder / f"{outcome.name}.log"
        if outcome.verdict in ("failed", "crashed", "stopped") and log.exists():
            parts.append(f"---- the end of {log.name}\n{_last_lines(log, 12)[-2000:]}")
    return "\n\n".join(parts) + "\n"


def packed(folder, document):
    """Returns ``(archive, names of files left out)``: the files in ``folder`` and ``summary.json``, small ones first.

    A long log loses its middle. As many files as fit ``LARGEST`` are in it.
    """
    files = [("summary.json", document.encode())]
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError, IsADirectoryError):  # a part that runs may rename its file
            files.append((path.relative_to(folder).as_posix(), _content(path)))
    files.sort(key=lambda file: len(file[1]))
    left_out = []
    while True:
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w:gz", compresslevel=6) as archive:
            for name, content in files:
                entry = tarfile.TarInfo(name)
                entry.size, entry.mtime = len(content), int(time.time())
                archive.addfile(entry, io.BytesIO(content))
        if stream.tell() <= LARGEST or len(files) == 1:
            return stream.getvalue(), left_out
        left_out.append(files.pop()[0])


def _content(path):
    size = path.stat().st_size
    if path.suffix != ".log" or size <= _LOG:
        return path.read_bytes()
    with path.open("rb") as stream:
        begin = stream.read(_LOG // 4)
        stream.seek(size - _LOG * 3 // 4)
        end = stream.read()
    return begin + f"\n… {size - _LOG} bytes …\n".encode() + end


def passed_in(folder):
    """Returns ``(facts, names of the parts that had passed)`` of an earlier run whose two files lie in ``folder``.

    Raises ``ValueError`` if they do not.
    """
    try:
        with tarfile.open(Path(folder) / ARCHIVE) as archive:
            document = json.load(archive.extractfile("summary.json"))
    except (OSError, KeyError, EOFError, tarfile.TarError, ValueError) as error:
        raise ValueError(f"{folder} holds no {ARCHIVE} of an earlier run ({error})") from error
    passed = ("passed", "passed before")
    return document["facts"], {part["name"] for part in document["parts"] if part["verdict"] in passed}
