"""A sweep sets each candidate, leaves the table as it was, and names what is off; kernels are compiled ahead."""

import contextlib
import json
import os
import subprocess
import sys

import pytest
import torch

from bench import right, sweep
from bench.timing import ROOT
from sft_kernels.ops.packed_attention import triton_shared
from sft_kernels.ops.softmax_grad import triton_impl

KNOBS = {knob.kernel: knob for knob in (sweep.core_knob(), *sweep.attention_knobs(9))}


def run(*command, **environment):
    path = {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore::RuntimeWarning"}
    return subprocess.run(
        [sys.executable, "-m", *map(str, command)],
        cwd=ROOT,
        env=os.environ | path | environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("kernel", KNOBS)
def test_the_tables_own_configuration_comes_first_and_none_twice(kernel):
    knob = KNOBS[kernel]
    assert knob.candidates[0] == knob.table[knob.key]
    assert len({*knob.candidates}) == len(knob.candidates) > 2


def test_a_candidate_is_in_force_inside_and_the_table_is_put_back():
    knob = KNOBS["dkey"]
    before = dict(knob.table)
    with contextlib.suppress(ZeroDivisionError), knob.at(knob.candidates[1]):
        found = triton_shared.config_of("dkey", 9, 128, 8)
        raise ZeroDivisionError
    assert found == knob.candidates[1]
    assert knob.table == before


@pytest.mark.parametrize("kernel", ["core", "forward", "dkey"])
def test_what_is_held_against_the_budget_is_what_is_timed(kernel, monkeypatch):
    """Small launches may take another entry of the table, or half of its rows."""
    knob = KNOBS[kernel]
    device = torch.device("cpu")
    inputs = sweep.Cores(8, 512, device) if kernel == "core" else sweep.Attentions("mix", 64, device, tiny=True)
    module = triton_impl if kernel == "core" else triton_shared
    taken, config_of = [], module.config_of

    def spied(*args):
        taken.append((args[0], config_of(*args)))
        return taken[-1][1]

    monkeypatch.setattr(module, "config_of", spied)
    for candidate in knob.candidates[:2]:
        taken.clear()
        assert inputs.error(knob, candidate)["error"] <= 1
        found = {config for name, config in taken if kernel == "core" or name == kernel}
        assert found == {candidate}


def test_a_core_that_is_off_is_found():
    def wrong(logits, target, options, scale):
        rows = triton_impl.softmax_grad(logits, target, options, scale)
        logits[-1, 3] *= 1.1
        return rows

    logits, target = torch.randn(8, 512).bfloat16(), torch.randint(512, (8,))
    assert right.core_error(triton_impl.softmax_grad, logits, target) <= 1
    target[-1] = 3
    assert right.core_error(wrong, logits, target) > 1


def test_candidates_that_are_off_or_cannot_run_are_named():
    knob = KNOBS["dquery"]
    bad, worse = knob.candidates[1:3]

    class Inputs:
        def error(self, knob, candidate):
            return (
                {"error": 3.0} if candidate == bad else {"raised": "no room"} if candidate == worse else {"error": 0.1}
            )

        def rival(self, knob, candidate):
            return sweep.timing.Rival(lambda _: None)

        def flops(self, knob):
            return 1e12

    found = sweep.cell(knob, "a cell", Inputs(), torch.device("cpu"), tiny=False)
    text = sweep.table(found)
    assert f"  {sweep.label(worse):<44}no room" in text.splitlines()
    assert any(sweep.label(bad) in line and "OFF: 3 ×" in line for line in text.splitlines())
    assert "seconds" not in found["rows"][sweep.label(worse)]


@pytest.mark.parametrize(
    ("rows", "status"),
    [
        ([{"error": 0.5, "seconds": [1.0]}, {"error": 0.5, "seconds": [2.0]}], 0),
        ([{"error": 0.5, "seconds": [1.0]}, {"raised": "out of resources"}], 0),
        ([{"error": 0.5, "seconds": [1.0]}, {"error": 1.5, "seconds": [1.0]}], 1),
        ([{"error": 0.5, "raised": "an illegal access"}, {"error": 0.5, "seconds": [1.0]}], 1),
    ],
    ids=["right", "a candidate that does not fit", "a candidate that is off", "the table's own is not timed"],
)
def test_it_fails_if_one_is_off_or_the_tables_own_is_not_timed(rows, status, tmp_path, monkeypatch, capsys):
    """The rest of the command is for a rehearsal to run."""
    found = {"cell": "a cell", "flops": 1e12, "rows": {str(at): row for at, row in enumerate(rows)}}
    monkeypatch.setattr(sweep, "measure", lambda device, tiny, write: write(found))
    monkeypatch.setattr(sweep, "device_facts", lambda device: {})
    monkeypatch.setattr(sweep, "file_name", lambda *args: "sweep.json")
    assert sweep.main(["--device", "cuda", "--results", str(tmp_path)]) == status
    assert json.loads((tmp_path / "sweep.json").read_text())["cells"] == [found]
    assert ("off or not measured" in capsys.readouterr().out) == bool(status)


def test_kernels_are_compiled_into_the_cache_and_found_there_again(tmp_path):
    """A share of the cases; a second process finds all of it, and a share that is none is refused."""
    environment = {"TRITON_CACHE_DIR": str(tmp_path)}
    environment["TRITON_INTERPRET"] = "0"
    first = run("bench.precompile", "--arch", 90, "--tiny", "--share", "0/4", **environment)
    assert first.returncode == 0, first.stdout + first.stderr
    cubins = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.cubin")}
    assert cubins
    assert f"{len(cubins)} kernels" in first.stdout
    again = run("bench.precompile", "--arch", 90, "--tiny", "--share", "0/4", **environment)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.cubin")} == cubins
    assert again.returncode == 0
    for share in ("4/4", "x", "-1/2"):
        assert run("bench.precompile", "--arch", 90, f"--share={share}").returncode == 2
