"""What a run leaves: names, contents, the table's arithmetic; and what the suites say their cells are."""

import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from bench import (
    bench_adamw,
    bench_cross_entropy,
    bench_linear_cross_entropy,
    bench_packed_attention,
    facts,
    peers,
    results,
    timing,
)
from bench.suite import labels

CPU = torch.device("cpu")
SUITE = SimpleNamespace(op="adamw", passes="one step", device=CPU, tiny=False)
SUITES = [
    bench_linear_cross_entropy.LinearCrossEntropy,
    bench_cross_entropy.CrossEntropy,
    bench_adamw.AdamWStep,
    bench_packed_attention.PackedAttention,
]


def cell(kept=None):
    parameters = {"N": 8, "dtype": "float32"}
    if kept:
        parameters |= {"kept": kept, "pattern": "prompt", "logits": "uniform"}
    return {
        "cell": f"kept {kept}",
        "parameters": parameters,
        "floor_seconds": 0.001,
        "floor": "bytes at copy bandwidth",
        "machine": {"copy": [0.001]},
        "rows": {
            "ours": {"error": 0.5, "seconds": [0.002, 0.001, 0.003], "peak_extra_bytes": 5_000_000},
            "filtered": {"error": 3.25, "seconds": [0.004] * 3, "peak_extra_bytes": None},
            "elsewhere": {"absent": "No module named 'elsewhere'"},
            "broken": {"raised": "IndexError: off the end"},
        },
    }


def test_a_file_names_op_device_torch_and_day():
    assert re.fullmatch(r"adamw_cpu_\d+\.\d+\.\w+_\d{8}\.json", results.file_name("adamw", CPU))
    assert results.file_name("adamw", CPU, tiny=True).endswith("_rehearsal.json")


def test_a_run_never_overwrites_an_earlier_one(tmp_path):
    for _ in range(3):
        results.Results(SUITE, tmp_path).add(cell())
    names = sorted(path.stem for path in tmp_path.iterdir())
    assert len(names) == 3
    assert names[1:] == [names[0] + "_2", names[0] + "_3"]


def test_a_file_holds_what_is_needed_to_judge_it_after_every_cell(tmp_path):
    run = results.Results(SUITE, tmp_path)
    for count in (1, 2):
        run.add(cell())
        document = json.loads(run.path.read_text())
        assert len(document["cells"]) == count
    assert document["versions"]["torch"] == torch.__version__
    assert document["device"]["threads"] == torch.get_num_threads()
    if (timing.ROOT / ".git").exists():
        assert re.fullmatch("[0-9a-f]{40}", document["commit"])
    assert document["cells"][0]["rows"]["ours"]["seconds"] == [0.002, 0.001, 0.003]


def test_the_table_shows_ratio_floor_peak_and_who_is_off_or_absent(tmp_path):
    run = results.Results(SUITE, tmp_path)
    run.add(cell())
    lines = {line.split("  ")[0]: line for line in results.table(run.document).splitlines()}
    assert re.search(r" 2\.000 .* 1\.00× +50\.0% +5  yes$", lines["ours"])
    assert re.search(r" 4\.000 .* 2\.00× +25\.0% +OFF: 3\.25 × the error budget$", lines["filtered"])
    assert "not measured: elsewhere: No module named 'elsewhere'" in lines
    assert "not measured: broken: raised IndexError: off the end" in lines
    assert "Shapes and sweep are thinned for the CPU." in lines


def test_on_a_gpu_the_table_goes_by_the_time_behind_a_filled_queue(tmp_path):
    run = results.Results(SUITE, tmp_path)
    measured = cell()
    rows = measured["rows"]
    rows["ours"] |= {"queued_seconds": [0.0016], "host_seconds": [0.0004]}
    rows["filtered"] |= {"host_seconds": [0.0002], "version": "peer 1.2"}
    run.add(measured | {"gpu": {"sm_mhz": [1500, 1700, 1980], "slowed_by": ["power cap"]}})
    run.document["device"]["type"] = "cuda"
    lines = {line.split("  ")[0]: line for line in results.table(run.document).splitlines()}
    assert re.search(r" 1\.600 .* 2\.000 +0\.400 +1\.00× +62\.5% +5  yes$", lines["ours"])
    assert re.search(r" 4\.000 .* 4\.000 +0\.200 +2\.50× +25\.0% .*OFF: .*, peer 1\.2$", lines["filtered"])
    assert "SM clock 1500–1980 MHz, slowed by power cap" in lines


@pytest.mark.parametrize("kept", [(None,), (1.0, 0.2)])
def test_plots_are_drawn_for_sweeps_and_for_single_cells(tmp_path, kept):
    pytest.importorskip("matplotlib")
    run = results.Results(SUITE, tmp_path)
    for share in kept:
        run.add(cell(share))
    path = results.plot(run.document, tmp_path / "plots" / "adamw.png")
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("suite", SUITES[:2] + SUITES[3:])
def test_the_input_sets_together_exceed_the_cache(suite, monkeypatch):
    monkeypatch.setattr(timing, "last_level_cache", lambda device: 1 << 20)
    suite = suite("cpu", tiny=True)
    sets = suite.sets(next(iter(suite.cells().values())))
    sizes = [sum(t.nbytes for t in tensors) for tensors in sets]
    assert sum(sizes) - max(sizes) >= 1 << 20
    assert len({tensors[0].data_ptr() for tensors in sets}) == len(sets)


@pytest.mark.parametrize("kept", [1.0, 0.5, 0.35, 0.2, 0.05])
def test_labels_keep_their_share_where_they_should(kept):
    N, example = 1024, 256
    prompt, scattered = (
        labels(N, 100, kept, pattern, torch.Generator().manual_seed(0)) for pattern in ("prompt", "scattered")
    )
    count = int((prompt != -100).sum())
    assert count == int((scattered != -100).sum()) == round(kept * example) * (N // example)
    steps = (prompt.view(-1, example) != -100).int().diff(dim=1)
    assert (steps >= 0).all()  # masked first, then kept
    if kept < 1:
        assert ((scattered != -100).int().diff() != 0).sum() > 20


def test_sweep_has_the_shares_masks_and_logits_of_the_design():
    suite = bench_linear_cross_entropy.LinearCrossEntropy("cpu")
    suite.device = torch.device("cuda")
    cells = [(p["kept"], p["pattern"], p["logits"]) for p in suite.cells().values()]
    shares = (1.0, 0.5, 0.35, 0.2, 0.05)
    assert {(share, "prompt", logits) for share in shares for logits in ("uniform", "peaked")} <= set(cells)
    assert {(share, "scattered", "uniform") for share in shares[1:]} <= set(cells)
    shapes = [(p["N"], p["D"], p["V"]) for p in suite.cells().values()]
    assert shapes.count((8192, 4096, 128256)) == len(cells) - 1
    assert shapes[5] == (16384, 2048, 248320)  # TRL's, which a short call still reaches
    assert cells[5] == (1.0, "prompt", "uniform")


def test_attention_has_the_mixes_and_the_shapes_of_published_tables():
    suite = bench_packed_attention.PackedAttention("cpu")
    suite.device = torch.device("cuda")
    cells = [(p["layout"], p["T"] >> 10, p["Hq"], p["Hkv"]) for p in suite.cells().values()]
    assert {("mix", t, 32, 8) for t in (8, 16, 32, 64)} <= set(cells)
    assert {(n << 10, 32, 16, 16) for n in (1, 4, 16)} <= set(cells)
    assert {p["D"] for p in suite.cells().values()} == {128}
    flex = [name for name, p in suite.cells().items() if not suite.left_out("FlexAttention", p)]
    assert flex == ["mix of 16384, 32/8 heads, forward", "mix of 16384, 32/8 heads, backward"]
    assert not any(suite.left_out(name, p) for name in ("ours", "padded SDPA") for p in suite.cells().values())


@pytest.mark.parametrize("suite", SUITES)
def test_every_rival_is_quick_or_slow_and_ours_is_both(suite):
    quick, slow = (suite("cpu", tiny=True, rivals=rivals) for rivals in ("quick", "slow"))
    left = {name for name, why in quick.absent.items() if why == "left to a run with --rivals slow"}
    assert left == peers.SLOW & quick.adapters().keys()
    assert slow.adapters().keys() == quick.adapters().keys()
    over = {name for name, why in slow.absent.items() if why == "left to a run with --rivals quick"}
    assert over == slow.adapters().keys() - left - {"ours"}
    assert "ours" in quick.present
    assert "ours" in slow.present


def test_who_is_left_out_of_a_cell_is_neither_built_nor_compared(monkeypatch):
    suite = bench_adamw.AdamWStep("cpu", tiny=True)
    (name,) = suite.cells()
    monkeypatch.setattr(suite, "left_out", lambda name, p: "too slow" if name == "torch foreach" else None)
    compared = []
    error = suite.error
    monkeypatch.setattr(suite, "error", lambda adapter, p: compared.append(adapter) or error(adapter, p))
    rows = suite.measure(name)["rows"]
    assert rows["torch foreach"] == {"absent": "too slow", "version": peers.version("torch foreach")}
    assert suite.present["torch foreach"] not in compared
    assert "seconds" in rows["torch fused"]


def test_peaked_logits_are_those_of_a_model_that_mostly_knows():
    for suite in (s("cpu", tiny=True) for s in SUITES[:2]):
        p = next(p for p in suite.cells().values() if p["logits"] == "peaked")
        *operands, y = suite.sets(p)[0]
        logits = operands[0] if len(operands) == 1 else operands[0] @ operands[1].T
        kept = y != -100
        sure = logits[kept].softmax(-1).gather(1, y[kept][:, None])
        assert 0.5 < sure.mean().item() < 0.98


def test_the_optimiser_steps_a_model_of_a_billion_in_291_tensors():
    suite = bench_adamw.AdamWStep("cpu")
    suite.device = torch.device("cuda")
    p = next(iter(suite.cells().values()))
    assert len(bench_adamw.llama_shapes(p)) == 291
    assert 0.95e9 < bench_adamw.numel(p) < 1.05e9


@pytest.mark.parametrize(
    ("dtype", "state", "clip", "each"),
    [("float32", "float32", None, 28), ("float32", "float32", 1.0, 32), ("bfloat16", "float32", 1.0, 24),
     ("bfloat16", "bfloat16", 1.0, 16)],
)  # fmt: skip
def test_the_optimisers_floor_counts_its_bytes(dtype, state, clip, each):
    suite = bench_adamw.AdamWStep("cpu", tiny=True)
    p = next(iter(suite.cells().values())) | {"dtype": dtype, "state_dtype": state, "clip": clip}
    seconds, _ = suite.floor(p, {"copy": 0.001})
    bandwidth = 2 * suite._copied(p) / 0.001
    assert seconds == pytest.approx(bench_adamw.numel(p) * each / bandwidth)


def test_a_mix_fills_the_row_and_useful_flops_are_those_of_the_live_pairs():
    lengths = bench_packed_attention.lengths_of("mix", 65536)
    assert sum(lengths) == 65536
    assert all(16 <= l <= 4096 for l in lengths[:-1])
    assert 250 < 65536 / len(lengths) < 500
    assert bench_packed_attention.lengths_of(512, 2048) == [512] * 4
    p = {"layout": 4, "T": 8, "Hq": 3, "D": 5, "pass": "forward"}
    pairs = 2 * sum(i + 1 for i in range(4))  # two examples, token i sees i + 1
    assert bench_packed_attention.useful_flops(p) == 2 * 2 * 5 * 3 * pairs
    assert bench_packed_attention.useful_flops(p | {"pass": "backward"}) == 2.5 * 2 * 2 * 5 * 3 * pairs


def test_a_suite_from_end_to_end(tmp_path):
    """The plugin's statistics are those of the samples in the file: taken in turns, handed over by the clock."""
    report = tmp_path / "plugin.json"
    command = [sys.executable, "-m", "pytest", "bench/bench_adamw.py", "--tiny", "-q", "-p", "no:cacheprovider"]
    command += ["--device", "cpu", "--results", tmp_path / "r", "--plots", tmp_path / "p", f"--benchmark-json={report}"]
    # A run of its own: beside workers of ours the plugin would measure nothing.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(command, cwd=timing.ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    (file,) = (tmp_path / "r").iterdir()
    rows = json.loads(file.read_text())["cells"][0]["rows"]
    plugin = {test["name"]: test["stats"]["data"] for test in json.loads(report.read_text())["benchmarks"]}
    measured = [name for name, row in rows.items() if "seconds" in row]
    assert {"ours", "torch fused", "torch foreach"} <= set(measured)
    for name in measured:
        (data,) = (data for test, data in plugin.items() if test.endswith(f"{name}]"))
        assert data == pytest.approx(rows[name]["seconds"])
    assert rows["ours"]["peak_extra_bytes"] is not None
    assert "A rehearsal with tiny shapes: no figure." in done.stdout


def test_what_git_does_not_say_is_unknown_not_clean(monkeypatch):
    facts.code_state.cache_clear()
    monkeypatch.setattr(facts, "first_line", lambda command: None)
    try:
        assert facts.code_state() == (None, None)
    finally:
        facts.code_state.cache_clear()
