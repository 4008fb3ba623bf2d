"""Parts that pass, fail, crash, hang or come too late: each costs itself alone, and says so on disk."""

import json
import os
import signal
import sys
import tarfile
import time

import pytest

from bench import parts
from bench.parts import Part, Run, Stage


def python(code, *arguments):
    return (sys.executable, "-c", code, *map(str, arguments))


CRASH = f"import os; os.kill(os.getpid(), {int(signal.SIGSEGV)})"


def run(tmp_path, stages, seconds=60.0, before=()):
    """The outcomes, by name, of stages run for ``seconds``; their folder is ``tmp_path / "work"``."""
    folder, out = tmp_path / "work", tmp_path / "out"
    for each in (folder, out):
        each.mkdir(exist_ok=True)
    made = Run(folder, out, {"device": "none"}, time.monotonic() + seconds, dict(os.environ), before)
    return {outcome.name: outcome for outcome in made.go(stages)}


def verdicts(outcomes):
    return {name: outcome.verdict for name, outcome in outcomes.items()}


def document(tmp_path):
    with tarfile.open(tmp_path / "out" / parts.ARCHIVE) as archive:
        return json.load(archive.extractfile("summary.json"))


def test_a_part_that_fails_or_crashes_costs_itself_alone(tmp_path):
    stage = Stage(
        "all",
        (
            Part("fails", 20, python("print('why it failed'); raise SystemExit(3)")),
            Part("crashes", 20, python(CRASH)),
            Part("empty", 20, python("raise SystemExit(5)"), nothing_to_do=5),
            Part("missing", absent="there is no such thing"),
            Part("unfit", broken="it is not built"),
            Part("passes", 20, python("print('done')")),
        ),
    )
    outcomes = run(tmp_path, [stage])
    assert verdicts(outcomes) == {
        "fails": "failed", "crashes": "crashed", "empty": "absent", "missing": "absent", "unfit": "failed",
        "passes": "passed",
    }  # fmt: skip
    assert [outcome.ok for outcome in outcomes.values()] == [False, False, True, True, False, True]
    assert outcomes["fails"].detail == "exit 3: why it failed"
    assert outcomes["crashes"].detail == "SIGSEGV"
    assert outcomes["unfit"].detail == "it is not built"
    assert {part["name"]: part["verdict"] for part in document(tmp_path)["parts"]} == verdicts(outcomes)
    text = (tmp_path / "out" / parts.SUMMARY).read_text()
    assert "3 of 6 parts are well" in text
    assert "---- the end of fails.log\nwhy it failed" in text
    with tarfile.open(tmp_path / "out" / parts.ARCHIVE) as archive:
        assert archive.extractfile("passes.log").read() == b"done\n"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [parts.ARCHIVE, parts.SUMMARY]


def test_parts_of_a_stage_run_side_by_side_and_stages_follow_each_other(tmp_path):
    note = "import sys, time; print(sys.argv[1], time.time()); time.sleep(0.5); print(time.time())"
    stage = Stage("pair", (Part("a", 20, python(note, "a")), Part("b", 20, python(note, "b"))), 2)
    assert all(o.ok for o in run(tmp_path, [stage, Stage("next", (Part("c", 20, python(note, "c")),))]).values())
    times = {n: [float(w) for w in (tmp_path / "work" / f"{n}.log").read_text().split()[1:]] for n in "abc"}
    assert max(times["a"][0], times["b"][0]) < min(times["a"][1], times["b"][1])
    assert times["c"][0] >= max(times["a"][1], times["b"][1])


def test_no_more_run_side_by_side_than_the_stage_says(tmp_path):
    count = "import sys, os, time; d = sys.argv[1]; open(f'{d}/{os.getpid()}', 'w'); n = len(os.listdir(d));"
    count += " time.sleep(0.3); os.remove(f'{d}/{os.getpid()}'); print(n)"
    (seen := tmp_path / "seen").mkdir()
    names = "abcde"
    run(tmp_path, [Stage("all", tuple(Part(n, 20, python(count, seen)) for n in names), 2)])
    assert max(int((tmp_path / "work" / f"{n}.log").read_text()) for n in names) <= 2


def test_a_part_that_hangs_is_ended_with_its_children_and_the_next_one_runs(tmp_path):
    pid = tmp_path / "pid"
    hang = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "open(sys.argv[1], 'w').write(str(child.pid)); print('begun', flush=True); time.sleep(60)"
    )
    begin = time.monotonic()
    stage = Stage("all", (Part("hangs", 2, python(hang, pid)), Part("next", 20, python(""))))
    assert verdicts(run(tmp_path, [stage])) == {"hangs": "stopped", "next": "passed"}
    assert time.monotonic() - begin < 20
    assert (tmp_path / "work" / "hangs.log").read_text() == "begun\n"
    assert ended(int(pid.read_text()))


def ended(pid):
    """Returns True for a process that is gone, or a zombie that nobody has waited for yet."""
    for _ in range(50):
        try:
            os.kill(pid, 0)
            with open(f"/proc/{pid}/stat") as stat:
                if stat.read().rsplit(")", 1)[1].split()[0] == "Z":
                    return True
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.05)
    return False


def test_it_stops_to_the_second(tmp_path):
    sleep = python("import time; time.sleep(60)")
    begin = time.monotonic()
    stages = [
        Stage("long", (Part("long", 50, sleep), Part("beside", 50, sleep)), 2),
        Stage("late", (Part("late", 9, sleep),)),
    ]
    outcomes = run(tmp_path, stages, seconds=4)
    assert time.monotonic() - begin < 4
    assert verdicts(outcomes) == {"long": "stopped", "beside": "stopped", "late": "not reached"}
    assert not any(outcome.ok for outcome in outcomes.values())


def test_an_interruption_ends_what_runs_and_names_what_did_not(tmp_path, monkeypatch):
    pids = []
    begin = parts._Running.__init__

    def spied(self, *args):
        begin(self, *args)
        pids.append(self.process.pid)

    interrupted = []

    def interrupt(*args):
        if len(pids) == 2 and not interrupted:
            interrupted.append(True)
            raise KeyboardInterrupt

    monkeypatch.setattr(parts._Running, "__init__", spied)
    monkeypatch.setattr(parts.time, "sleep", interrupt)
    sleep = python("import time; time.sleep(60)")
    stage = Stage("all", (Part("a", 50, sleep), Part("b", 50, sleep), Part("c", 50, sleep)), 2)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, [stage])
    monkeypatch.undo()
    assert all(map(ended, pids))
    assert [part["verdict"] for part in document(tmp_path)["parts"]] == ["not reached"] * 3


def test_a_part_is_on_disk_before_the_next_begins(tmp_path):
    """And what has not run is named as such, so that an interrupted run does not read like a whole one."""
    look = "import json, sys, tarfile; d = json.load(tarfile.open(sys.argv[1]).extractfile('summary.json'))\n"
    look += "assert [p['verdict'] for p in d['parts']] == ['passed', 'not reached'], d"
    archive = tmp_path / "out" / parts.ARCHIVE
    stage = Stage("all", (Part("first", 20, python("")), Part("second", 20, python(look, archive))))
    assert verdicts(run(tmp_path, [stage]))["second"] == "passed"


def test_what_has_passed_before_is_left_out_and_stays_passed(tmp_path):
    good, bad = python(""), python("raise SystemExit(1)")
    stage = Stage("s", (Part("s.a", 20, good), Part("s.b", 20, bad), Part("s.c", absent="no")))
    again = Stage("t", (Part("t.a", 20, good),), again=True)
    run(tmp_path, [again, stage])
    facts, passed = parts.passed_in(tmp_path / "out")
    assert facts == {"device": "none"}
    assert passed == {"t.a", "s.a"}
    fails = Stage("s", (Part("s.a", 20, bad), Part("s.b", 20, good), Part("s.c", 20, good)))
    outcomes = run(tmp_path, [again, fails], before=passed)
    assert verdicts(outcomes) == {"t.a": "passed", "s.a": "passed before", "s.b": "passed", "s.c": "passed"}
    assert all(outcome.ok for outcome in outcomes.values())
    assert parts.passed_in(tmp_path / "out")[1] == {"t.a", "s.a", "s.b", "s.c"}


def test_a_folder_without_an_earlier_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no results\.tgz"):
        parts.passed_in(tmp_path)
    (tmp_path / parts.ARCHIVE).write_bytes(b"not an archive")
    with pytest.raises(ValueError, match=r"holds no results\.tgz"):
        parts.passed_in(tmp_path)


def test_the_archive_stays_small_and_says_what_it_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "LARGEST", 40_000)
    make = "import os, sys; open(sys.argv[1] + '/large', 'wb').write(os.urandom(100_000));"
    make += " open(sys.argv[1] + '/small', 'wb').write(os.urandom(10_000))"
    run(tmp_path, [Stage("s", (Part("s", 20, python(make, tmp_path / "work")),))])
    archive = tmp_path / "out" / parts.ARCHIVE
    assert archive.stat().st_size <= 40_000
    with tarfile.open(archive) as found:
        assert set(found.getnames()) == {"summary.json", "s.log", "small"}
    assert "left out of results.tgz, too large: large" in (tmp_path / "out" / parts.SUMMARY).read_text()


def test_a_long_log_loses_its_middle(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "_LOG", 1000)
    run(tmp_path, [Stage("s", (Part("s", 20, python("print('a' * 5000 + 'z' * 5000)")),))])
    with tarfile.open(tmp_path / "out" / parts.ARCHIVE) as found:
        log = found.extractfile("s.log").read().decode()
    assert log.startswith("a" * 250 + "\n… 9001 bytes …\n")
    assert log.endswith("z" * 749 + "\n")
