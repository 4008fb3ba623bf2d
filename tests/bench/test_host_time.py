"""Host times are those of the launches that a GPU would get, and leave everything as it was."""

import os
import re
import subprocess
import sys

import pytest

from bench import host_time

triton = pytest.importorskip("triton")


def test_every_case_is_measured_with_the_launches_that_it_makes():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "bench.host_time", "--rounds", "3"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = {}
    for line in done.stdout.splitlines():
        op, case, microseconds, ratio, launches = re.fullmatch(
            r"(\w+) +(.*?) +([\d.]+) µs +([\d.]+) +(\d+) Triton launches", line
        ).groups()
        assert float(microseconds) > 0
        assert float(ratio) > 0
        found[op, case] = int(launches)
    assert {op for op, _ in found} == {*host_time.OPS}
    expected = {
        ("adamw", "torch fused"): 0,
        ("adamw", "ours, clipped"): 2,
        ("attention", "forward"): 1,
        ("attention", "forward + backward"): 3,
        ("tiles", "from_cu_seqlens"): 1,
        ("losses", "linear, kept"): 3,  # the core, and two gradients times the upstream scalar
        ("losses", "linear, kept, 4 chunks"): 6,
        ("losses", "cross_entropy"): 2,
    }
    assert found | expected == found


def test_an_unknown_op_exits_with_two():
    with pytest.raises(SystemExit) as stopped:
        host_time.main(["nonsense"])
    assert stopped.value.code == 2


def test_it_refuses_to_interpret(monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"), host_time.as_on_a_gpu():
        pass
