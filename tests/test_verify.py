"""``sft-kernels verify`` passes what is right, and fails what is planted."""

import json
import os
import subprocess
import sys
from functools import wraps

import pytest
import torch

from sft_kernels import _backend, verify
from sft_kernels._backend import Unavailable
from sft_kernels.cli import main
from sft_kernels.ops.adamw import torch_impl as adamw
from sft_kernels.ops.packed_attention import torch_impl as attention
from sft_kernels.ops.softmax_grad import torch_impl as core

FAULTS = {}


def fault(*ops):
    """Plant a wrong implementation, to be found at one of ``ops``."""

    def register(function):
        FAULTS[function.__name__] = (ops, function)
        return function

    return register


LOSSES = ("cross_entropy", "linear_cross_entropy")


@fault(*LOSSES)
def no_minus_one_at_the_target(logits, target, options, scale=None, **more):
    return core.softmax_grad(logits, target if scale is None else target * 0 - 1, options, scale, **more)


@fault(*LOSSES)
def smoothing_forgotten_in_the_gradient(logits, target, options, scale=None, **more):
    rows = core.softmax_grad(logits.clone(), target, options, scale, **more)
    core.softmax_grad(logits, target, options._replace(label_smoothing=0.0), scale, **more)
    return rows


@fault(*LOSSES)
def the_cap_has_no_slope(logits, target, options, scale=None, **more):
    rows = core.softmax_grad(u := options.shape(logits), target, options._replace(softcap=None), scale, **more)
    if scale is not None and more.get("out") is None:
        logits.copy_(u)
    return rows


@fault(*LOSSES)
def the_penalty_is_linear(logits, target, options, scale=None, **more):
    return core.softmax_grad(logits, target, options._replace(z_loss=options.z_loss / 2), scale, **more)


@fault(*LOSSES)
def the_last_row_is_not_written(logits, target, options, scale=None, **more):
    out = logits if more.get("out") is None else more["out"]
    last = out[-1:].clone()
    rows = core.softmax_grad(logits, target, options, scale, **more)
    out[-1:] = last
    return rows


@fault("linear_cross_entropy")
def a_target_in_another_slice_is_taken_for_the_first_class(logits, target, options, scale=None, **more):
    return core.softmax_grad(logits, target.clamp(min=0), options, scale, **more)


@fault(*LOSSES)
def entropy_in_bits(*args, **more):
    rows = core.softmax_grad(*args, **more)
    if rows is None or rows.mean_logit is None:
        return rows
    return rows._replace(mean_logit=rows.lse - (rows.lse - rows.mean_logit) / 0.6931)


@fault(*LOSSES)
def nothing_is_ever_correct(*args, **more):
    rows = core.softmax_grad(*args, **more)
    return rows and rows._replace(max_logit=rows.max_logit + 1)


def around_adamw(function):
    @wraps(function)
    def step(optimizer):
        with torch.no_grad():
            function(optimizer, [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None])

    return step


@fault("adamw")
@around_adamw
def decay_in_the_gradient(optimizer, params):
    for p in params:
        p.grad.add_(p, alpha=optimizer.param_groups[0]["weight_decay"])
    adamw.step(optimizer)


@fault("adamw")
@around_adamw
def no_clip(optimizer, params):
    optimizer.max_grad_norm = None
    adamw.step(optimizer)


@fault("adamw")
@around_adamw
def a_bad_step_is_taken(optimizer, params):
    optimizer.skip_nonfinite = False
    adamw.step(optimizer)


@fault("adamw")
@around_adamw
def one_step_ahead(optimizer, params):
    adamw.step(optimizer)
    for p in params:
        optimizer.state[p]["step"] += 1


@fault("adamw")
@around_adamw
def the_last_element_is_not_updated(optimizer, params):
    last = [p.flatten()[-1:].clone() for p in params]
    adamw.step(optimizer)
    for p, old in zip(params, last, strict=True):
        p.view(-1)[-1:] = old


@fault("packed_attention")
def segments_see_each_other(query, key, value, cu_seqlens, max_seqlen, lengths, **options):
    lengths = [sum(lengths)]
    return attention.packed_attention(query, key, value, cu_seqlens[[0, -1]], None, lengths, **options)


@fault("packed_attention")
def a_window_one_too_wide(*args, window_size, **options):
    left, right = window_size
    return attention.packed_attention(*args, window_size=(left + (left >= 0), right), **options)


@fault("packed_attention")
def heads_in_the_wrong_groups(query, key, value, *args, **options):
    key, value = (t.flip(1) for t in (key, value))
    return attention.packed_attention(query, key, value, *args, **options)


@fault("packed_attention")
def the_cap_is_ignored(*args, softcap, **options):
    return attention.packed_attention(*args, softcap=None, **options)


@fault("packed_attention")
def the_lse_is_in_bits(*args, **options):
    out, lse = attention.packed_attention(*args, **options)
    return out, lse / 0.6931


@fault("packed_attention")
def the_tail_is_not_zeroed(query, *args, **options):
    out, lse = attention.packed_attention(query, *args, **options)
    return torch.cat([out[:-1], query[-1:]]), lse


CORES = {"adamw": "adamw", "packed_attention": "packed_attention"}


def plant(monkeypatch, op, function, impl="torch"):
    implementations = _backend._IMPLEMENTATIONS[CORES.get(op, "softmax_grad")]
    monkeypatch.setattr(sys.modules[__name__], "planted", function, raising=False)
    monkeypatch.setitem(implementations, impl, f"{__name__}:planted")


@pytest.mark.parametrize(("name", "op"), [(name, op) for name, (ops, _) in FAULTS.items() for op in ops])
def test_a_planted_fault_fails(monkeypatch, name, op):
    plant(monkeypatch, op, FAULTS[name][1])
    failed = [row for row in verify.verify([op], ["torch"], ["float32"]) if row.verdict == "FAIL"]
    assert failed
    assert all(row.ratio > 1 and row.quantity for row in failed)


@pytest.mark.parametrize("op", [*LOSSES, "adamw", "packed_attention"])
def test_what_is_right_passes_in_every_dtype(op):
    rows = list(verify.verify([op], ["torch"]))
    assert {row.verdict for row in rows} == {"ok"}, [row for row in rows if row.verdict != "ok"]
    assert {row.dtype for row in rows} == {"float32", "bfloat16", "float16"}
    assert all(0 <= row.ratio <= 1 for row in rows)


def test_the_command_prints_the_table_writes_the_rows_and_fails_on_a_fault(monkeypatch, capsys, tmp_path):
    call = [
        "verify",
        "--ops",
        "cross_entropy",
        "--impls",
        "torch",
        "--dtypes",
        "float32",
        "--device",
        "cpu",
        "--json",
        str(tmp_path / "rows"),
    ]
    assert main(call) == 0
    rows = json.loads((tmp_path / "rows").read_text())["rows"]
    printed = capsys.readouterr().out.splitlines()
    assert len(rows) == len(printed) - 3
    assert all(row["options"] in line and line.endswith("ok") for row, line in zip(rows, printed[1:], strict=False))
    assert printed[-1] == f"{len(rows)} within the budget, 0 failed, 0 absent"

    plant(monkeypatch, "cross_entropy", no_minus_one_at_the_target)
    assert main(call) == 1
    assert "FAIL" in capsys.readouterr().out


def test_rows_are_on_disk_as_they_come(monkeypatch, tmp_path):
    """A process that is killed leaves the rows that it had."""
    path = tmp_path / "rows"
    found = []

    def rows(*args, **options):
        for count in range(3):
            found.append(len(json.loads(path.read_text())["rows"]) if count else path.exists())
            yield verify.Row("op", "torch", "float32", str(count), "loss", 0.0, 0.0, 0.0, "ok")

    monkeypatch.setattr(verify, "verify", rows)
    assert main(["verify", "--device", "cpu", "--json", str(path)]) == 0
    assert found == [False, 1, 2]
    assert len(json.loads(path.read_text())["rows"]) == 3
    assert [file.name for file in tmp_path.iterdir()] == ["rows"]


def test_smoke_is_one_row_for_each_op_implementation_and_dtype():
    rows = list(verify.verify(impls=["torch"], smoke=True))
    assert len(rows) == len({(row.op, row.impl, row.dtype) for row in rows}) == 4 * 3


def test_an_implementation_that_crashes_fails_and_one_that_is_absent_says_why(monkeypatch, capsys):
    def crashes(*args, **options):
        raise RuntimeError("illegal address")

    def absent(*args, **options):
        raise Unavailable("needs a GPU")

    call = ["verify", "--ops", "packed_attention", "--smoke", "--device", "cpu"]
    plant(monkeypatch, "packed_attention", crashes)
    assert main(call) == 1
    assert "RuntimeError: illegal address" in capsys.readouterr().out
    plant(monkeypatch, "packed_attention", absent)
    assert main(call) == 0
    assert "needs a GPU" in capsys.readouterr().out
    assert main([*call, "--impls", "torch"]) == 1  # asked for by name
    assert "torch was asked for" in capsys.readouterr().err


def test_a_device_that_is_not_there_is_refused(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["verify", "--device", "nowhere"])
    assert stopped.value.code == 2
    assert "--device nowhere" in capsys.readouterr().err


SITE = """
import os
from sft_kernels import _backend
if os.environ.get("TRITON_INTERPRET") == "1":
    _backend._IMPLEMENTATIONS["packed_attention"]["triton"] = os.environ["PLANTED"]
"""


@pytest.mark.parametrize(
    ("planted", "status", "verdict"),
    [
        (_backend._IMPLEMENTATIONS["packed_attention"]["torch"], 0, "ok"),
        ("os:abort", 1, "FAIL"),
    ],
)
def test_on_a_cpu_tritons_rows_come_from_a_process_that_interprets(tmp_path, planted, status, verdict):
    """The implementation exists only where ``TRITON_INTERPRET`` is set, which the caller does not set."""
    (tmp_path / "sitecustomize.py").write_text(SITE)
    code = "from sft_kernels import _backend; _backend._IMPLEMENTATIONS['packed_attention']['triton'] = 'none:none'\n"
    code += "from sft_kernels.cli import main; raise SystemExit(main())"
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.getcwd()]), "PLANTED": planted}
    command = [sys.executable, "-c", code, "verify", "--ops", "packed_attention", "--impls", "triton", "--smoke"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    assert f" {verdict}" in done.stdout


def test_python_oo_is_enough():
    """The command's help and one of its rows, without docstrings and ``assert``."""
    code = """
from sft_kernels import verify

call = ["--ops", "cross_entropy", "--impls", "torch", "--dtypes", "float32", "--smoke", "--device", "cpu"]
status = verify.main(call)
assert False, "left out under -OO"
try:
    verify.main(["--help"])
except SystemExit as stopped:
    raise SystemExit(status or stopped.code)
"""
    env = {**os.environ, "PYTHONOPTIMIZE": "2", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "1 within the budget, 0 failed" in done.stdout
    assert "against a float64 oracle" in done.stdout
