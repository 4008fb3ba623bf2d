"""Nsight Compute is asked as it should be, and a part in which it counted nothing has failed."""

import os
import subprocess
import sys

import pytest

from bench import counters
from bench.timing import ROOT

CSV = """==PROF== Connected to process 1
"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","1","_softmax_grad_kernel","dram__bytes_read.sum","Gbyte","2.10"
"0","1","_softmax_grad_kernel","lts__t_sector_hit_rate.pct","%","33.3"
"""


@pytest.mark.parametrize("kernel", counters.KERNELS)
def test_what_is_counted_is_launched_more_often_than_is_skipped(kernel):
    command = [sys.executable, "-m", "bench.pretend", "bench.counters", kernel, "--tiny"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "3 times" in done.stdout


@pytest.mark.parametrize(
    ("csv", "status", "passed"),
    [
        (CSV, 0, True), (CSV, 1, False), ("==ERROR== no permission", 0, False),
        (CSV.replace("_softmax", "_other"), 0, False), (None, 0, False),
    ],
    ids=["counted", "failed", "refused", "another kernel", "no file"],
)  # fmt: skip
def test_a_profile_passes_with_counters_alone(csv, status, passed, tmp_path, monkeypatch, capsys):
    file, said = tmp_path / "core.csv", tmp_path / "arguments"
    ncu = tmp_path / "ncu"
    write = f"cat > {file} <<'END'\n{csv}\nEND" if csv else ":"
    ncu.write_text(f'#!/bin/sh\necho "$@" > {said}\n{write}\nexit {status}\n')
    ncu.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert counters.main(["core", "--profile", str(file)]) == (0 if passed else 1)
    arguments = said.read_text()
    assert arguments.startswith("--clock-control none")
    assert "dram__bytes_read.sum" in arguments
    assert f"--log-file {file} {sys.executable} -m bench.counters core" in arguments
    out = capsys.readouterr().out
    if passed:
        assert "dram__bytes_read.sum" in out
        assert "2.10 Gbyte" in out
    else:
        assert f"ncu ended with {status}" in out
