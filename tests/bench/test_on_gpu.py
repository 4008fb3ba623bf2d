"""Parts that pass, fail, crash, hang or come too late: each costs itself alone, and says so on disk."""

import json
import os
import signal
import sys
import time

import pytest

from bench import on_gpu
from bench.on_gpu import Part


def python(code, *arguments):
    return (sys.executable, "-c", code, *map(str, arguments))


def verdicts(outcomes):
    return {outcome.name: outcome.verdict for outcome in outcomes}


CRASH = f"import os; os.kill(os.getpid(), {int(signal.SIGSEGV)})"


def test_a_part_that_fails_or_crashes_costs_itself_alone(tmp_path):
    parts = [
        Part("fails", 1, python("print('why it failed'); raise SystemExit(3)")),
        Part("crashes", 1, python(CRASH)),
        Part("empty", 1, python("raise SystemExit(5)"), nothing_to_do=5),
        Part("missing", 1, absent="there is no such thing"),
        Part("passes", 1, python("print('done')")),
    ]
    outcomes = on_gpu.run_parts(parts, tmp_path, 1, {"device": "none"})
    assert verdicts(outcomes) == {
        "fails": "failed", "crashes": "crashed", "empty": "absent", "missing": "absent", "passes": "passed",
    }  # fmt: skip
    assert [outcome.ok for outcome in outcomes] == [False, False, True, True, True]
    assert outcomes[0].detail == "exit 3: why it failed"
    assert outcomes[1].detail == "SIGSEGV"
    assert (tmp_path / "passes.log").read_text() == "done\n"
    assert [part["verdict"] for part in json.loads((tmp_path / "summary.json").read_text())["parts"]] == [
        outcome.verdict for outcome in outcomes
    ]


def test_a_part_that_hangs_is_ended_with_its_children_and_the_next_one_runs(tmp_path):
    pid = tmp_path / "pid"
    hang = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "open(sys.argv[1], 'w').write(str(child.pid)); print('begun', flush=True); time.sleep(60)"
    )
    start = time.monotonic()
    parts = [Part("hangs", 1.5 / 60, python(hang, pid)), Part("next", 1, python(""))]
    outcomes = on_gpu.run_parts(parts, tmp_path, 1, {})
    assert verdicts(outcomes) == {"hangs": "stopped", "next": "passed"}
    assert time.monotonic() - start < 10
    assert (tmp_path / "hangs.log").read_text() == "begun\n"
    assert ended(int(pid.read_text()))


def ended(pid):
    """Gone, or a zombie that nobody has waited for yet."""
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


def test_it_stops_in_time(tmp_path):
    start = time.monotonic()
    sleep = python("import time; time.sleep(60)")
    outcomes = on_gpu.run_parts([Part("long", 5, sleep), Part("late", 5, sleep)], tmp_path, 1.5 / 60, {})
    assert verdicts(outcomes) == {"long": "stopped", "late": "not reached"}
    assert not any(outcome.ok for outcome in outcomes)
    assert time.monotonic() - start < 10


def test_a_part_is_on_disk_before_the_next_begins(tmp_path):
    """And what has not run is named as such, so that an interrupted run does not read like a whole one."""
    look = "import json, sys; found = [p['verdict'] for p in json.load(open(sys.argv[1]))['parts']]\n"
    look += "assert found == ['passed', 'not reached'], found"
    parts = [Part("first", 1, python("")), Part("second", 1, python(look, tmp_path / "summary.json"))]
    assert verdicts(on_gpu.run_parts(parts, tmp_path, 1, {}))["second"] == "passed"
    assert "second" in (tmp_path / "summary.txt").read_text()


def test_parts_write_their_caches_and_temporary_files_inside(tmp_path):
    look = (
        "import os, sys, tempfile\n"
        "assert tempfile.gettempdir().startswith(sys.argv[1])\n"
        "for name in ('TRITON_CACHE_DIR', 'TORCHINDUCTOR_CACHE_DIR', 'XDG_CACHE_HOME', 'CUDA_CACHE_PATH'):\n"
        "    assert os.environ[name].startswith(sys.argv[1]), name\n"
        "import sft_kernels\n"
        "assert sys.dont_write_bytecode"
    )
    (outcome,) = on_gpu.run_parts([Part("look", 1, python(look, tmp_path))], tmp_path, 1, {})
    assert outcome.ok, outcome.detail


def test_the_most_valuable_part_comes_first(tmp_path):
    names = [part.name for part in on_gpu.parts(tmp_path, "cuda")]
    assert names[:3] == ["smoke", "tests", "verify"]
    assert names[-4:] == [f"bench_{op}" for op in on_gpu.SUITES]
    (smoke,) = on_gpu.parts(tmp_path, "cuda", smoke=True)
    assert smoke.minutes == 3
    assert "--smoke" in smoke.command


def test_sanitizer_is_absent_for_a_reason_or_runs_all_its_tools(tmp_path, monkeypatch):
    monkeypatch.setattr(on_gpu, "ROOT", tmp_path)
    assert [part.absent for part in on_gpu.sanitizer(())] == ["there is no csrc"]
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "adamw.cu").touch()
    assert [part.absent for part in on_gpu.sanitizer(())] == ["the CUDA kernels are not built: make cuda"]
    (tmp_path / "sft_kernels").mkdir()
    (tmp_path / "sft_kernels" / "_C.abi3.so").touch()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert [part.absent for part in on_gpu.sanitizer(())] == ["compute-sanitizer is not on the path"]
    tool = tmp_path / "compute-sanitizer"
    tool.touch()
    tool.chmod(0o755)
    assert [part.command[2] for part in on_gpu.sanitizer(())] == ["memcheck", "racecheck", "initcheck"]


@pytest.mark.parametrize("ok", [True, False])
def test_the_exit_status_says_whether_every_part_passed(tmp_path, monkeypatch, ok):
    parts = [Part("first", 1, python("" if ok else "raise SystemExit(1)")), Part("last", 1, python(""))]
    monkeypatch.setattr(on_gpu, "parts", lambda *args, **kwargs: parts)
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    assert on_gpu.main(["--out", str(tmp_path), "--minutes", "1", "--rehearse"]) == (0 if ok else 1)
    assert not (tmp_path / "cache").exists()
    assert "a rehearsal" in (tmp_path / "summary.txt").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--minutes", "5"], "no GPU"),
        (["--minutes", "0", "--rehearse"], "--minutes: expected more than 0, got 0"),
        (["--minutes", "nan", "--rehearse"], "--minutes: expected more than 0, got nan"),
    ],
)
def test_a_wrong_call_and_a_machine_without_gpu_are_refused(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(on_gpu.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(on_gpu, "parts", lambda *args, **kwargs: [])  # so that a call that is let through ends
    with pytest.raises(SystemExit) as stopped:
        on_gpu.main(["--out", str(tmp_path / "out"), *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
