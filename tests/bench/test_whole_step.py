"""The same step four ways: the same loss, the same update, and figures that are those of the data."""

import gzip
import json

import pytest
import torch

from bench import whole_step
from bench.bench_packed_attention import lengths_of
from bench.whole_step import VARIANTS, Setup, Trainer

CPU = torch.device("cpu")
OURS, STOCK = ("ours, packed", "ours, padded"), ("stock, padded", "stock, packed")


def run(folder, *options):
    """``(exit status, the document)`` of a rehearsal."""
    status = whole_step.main(["--device", "cpu", "--tiny", "--results", str(folder), *options])
    (path,) = folder.glob("*.json")
    return status, json.loads(path.read_text())


def alter(monkeypatch, name, **fields):
    """Replace parts of one variant."""
    monkeypatch.setitem(VARIANTS, name, VARIANTS[name]._replace(**fields))


def one_segment(batches):
    """The same packed rows, in which every example sees those before it."""
    for batch in batches:
        bounds = torch.tensor([0, batch.tokens], dtype=torch.int32)
        yield batch._replace(cu_seqlens=bounds, max_seqlen=batch.tokens)


def one_count_of_positions(batches):
    """The same for stock: positions that do not start again."""
    for batch in batches:
        positions = torch.arange(batch.tokens)[None]
        yield batch._replace(inputs={**batch.inputs, "position_ids": positions})


def raises(error):
    def loss(model, batch, num_items):
        raise error

    return loss


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rehearsal")
    return folder, *run(folder)


def test_the_first_steps_agree(rehearsal):
    _, status, document = rehearsal
    rows = document["variants"]
    assert status == 0
    assert document["disagreement"] is None
    assert list(rows) == ["ours, packed", "stock, padded", "ours, padded", "stock, packed"]
    base = rows["stock, padded"]
    for row in rows.values():
        assert row["first_loss"] == pytest.approx(base["first_loss"], rel=1e-5)
        assert row["first_gradient_norm"] == pytest.approx(base["first_gradient_norm"], rel=1e-5)
        assert row["last_loss"] == pytest.approx(base["last_loss"], rel=1e-5)
    assert base["last_loss"] < base["first_loss"]


def test_tokens_are_those_of_the_data(rehearsal):
    _, _, document = rehearsal
    lengths = [min(64, l // 8) for l in lengths_of("mix", 1 << 16, whole_step.SEED_OF_LENGTHS)[:12]]
    tokens, kept = sum(lengths), sum(l // 2 for l in lengths)
    padded = sum(4 * max(lengths[i : i + 4]) for i in range(0, 12, 4))
    data = document["data"]
    assert (data["examples"], data["tokens"], data["kept_tokens"]) == (12, tokens, kept)
    assert data["longest"] == max(lengths)
    assert padded > tokens
    for name, row in document["variants"].items():
        assert row["positions"] == (tokens if "packed" in name else padded)
        assert row["kept_tokens"] == kept
        median = sum(row["seconds"]) / 2  # of two
        assert row["tokens_per_second"] == pytest.approx(tokens / median)
        assert row["kept_tokens_per_second"] == pytest.approx(kept / median)


def test_the_document_holds_what_it_takes_to_judge_it(rehearsal):
    folder, _, document = rehearsal
    (path,) = folder.glob("*.json")
    day = document["date"][:10].replace("-", "")
    assert path.name == f"whole_step_cpu_{torch.__version__.split('+')[0]}_{day}_rehearsal.json"
    assert document["rehearsal"] is True
    assert {"commit", "uncommitted_changes", "command", "tolerance"} <= document.keys()
    assert document["device"]["type"] == "cpu"
    assert {"torch", "transformers"} <= document["versions"].keys()
    assert document["model"]["dtype"] == "float32"
    for row in document["variants"].values():
        assert len(row["seconds"]) == 2
        assert len(row["warm_up_seconds"]) == 1
        assert min(row["seconds"]) > 0
        assert row["peak_bytes"] is None


def test_the_trace_is_one_step_of_ours_packed(rehearsal):
    folder, _, document = rehearsal
    assert document["trace"] == "whole_step_trace.json.gz"
    with gzip.open(folder / document["trace"]) as file:
        names = [event.get("name") for event in json.load(file)["traceEvents"]]
    rows = document["variants"]["ours, packed"]["micro_batches"]
    assert (names.count("forward"), names.count("backward"), names.count("optimizer")) == (rows, rows, 1)
    assert "aten::embedding" in names


def test_a_second_run_of_the_day_keeps_the_first(rehearsal):
    folder, _, document = rehearsal
    (first,) = folder.glob("*.json")
    assert whole_step.new_path(folder, document) == first.with_stem(f"{first.stem}_2")


def test_the_table_names_everyone(rehearsal):
    _, _, document = rehearsal
    lines = whole_step.table(document).splitlines()
    assert "no figure" in lines[1]
    assert [line[:16].strip() for line in lines[3:]] == list(VARIANTS)
    assert "1.00×" in next(line for line in lines if line.startswith("stock, padded"))
    document = {**document, "variants": document["variants"] | {"stock, padded": {"raised": "MemoryError: full"}}}
    assert "stock, padded     raised MemoryError: full" in whole_step.table(document)


@pytest.mark.parametrize("name", ["ours, padded", "stock, packed"])
def test_a_denominator_of_its_own_is_caught(monkeypatch, tmp_path, capsys, name):
    compute = VARIANTS[name].loss
    alter(monkeypatch, name, loss=lambda model, batch, num_items: compute(model, batch, 2 * num_items))
    status, document = run(tmp_path, "--no-trace")
    assert status == 1
    assert "losses of the first step do not agree" in document["disagreement"]
    assert f"FAILED: {document['disagreement']}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "batches", "leak"),
    [
        ("ours, packed", whole_step.packed_batches, one_segment),
        ("stock, packed", whole_step.stock_packed_batches, one_count_of_positions),
    ],
)
def test_a_leak_is_caught(monkeypatch, tmp_path, name, batches, leak):
    alter(monkeypatch, name, batches=lambda setup: list(leak(batches(setup))))
    status, document = run(tmp_path, "--no-trace")
    assert status == 1
    assert "do not agree" in document["disagreement"]


def test_in_bf16_the_gradients_norm_shows_a_leak_that_the_loss_hides():
    setup = Setup.of(tiny=True)._replace(dtype=torch.bfloat16, tolerance=1e-2)
    rows = {name: whole_step.measure(VARIANTS[name], setup, CPU) for name in ("stock, padded", "ours, packed")}
    assert whole_step.disagreement(rows, setup.tolerance) is None
    leaky = VARIANTS["ours, packed"]._replace(batches=lambda setup: [*one_segment(whole_step.packed_batches(setup))])
    rows["ours, packed"] = whole_step.measure(leaky, setup, CPU)
    assert "gradient norms of the first step" in whole_step.disagreement(rows, setup.tolerance)


def test_nan_agrees_with_nothing():
    nan = {"first_loss": float("nan"), "first_gradient_norm": 1.0}
    assert whole_step.disagreement({"a": nan}, 1.0) is not None
    assert whole_step.disagreement({"a": nan, "b": nan}, 1.0) is not None
    assert whole_step.disagreement({"a": {"raised": "MemoryError: full"}}, 1e-5) is None


@pytest.mark.parametrize("name", ["ours, packed", "stock, padded"])
def test_want_of_memory_costs_one_row(monkeypatch, tmp_path, capsys, name):
    alter(monkeypatch, name, loss=raises(torch.OutOfMemoryError("tried to allocate 9 GB\nof nothing")))
    status, document = run(tmp_path, "--no-trace")
    rows = document["variants"]
    assert status == (1 if name in OURS else 0)
    assert rows[name] == {"raised": "OutOfMemoryError: tried to allocate 9 GB"}
    assert all("seconds" in row for other, row in rows.items() if other != name)
    printed = capsys.readouterr().out
    assert ("FAILED" in printed) == (name in OURS)


def test_what_was_measured_is_on_disk_before_the_next_variant(monkeypatch, tmp_path):
    alter(monkeypatch, "ours, padded", loss=raises(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "--no-trace")
    (path,) = tmp_path.glob("*.json")
    assert list(json.loads(path.read_text())["variants"]) == ["ours, packed", "stock, padded"]


def test_a_trace_that_fails_is_said_and_costs_no_row(monkeypatch, tmp_path):
    def fail(*_):
        raise RuntimeError("no CUPTI")

    monkeypatch.setattr(whole_step, "trace", fail)
    status, document = run(tmp_path)
    assert status == 1
    assert document["trace"] == {"raised": "RuntimeError: no CUPTI"}
    assert all("seconds" in row for row in document["variants"].values())


@pytest.fixture(scope="module")
def trained():
    """The parameters before, and after three steps of each variant."""
    setup = Setup.of(tiny=True)
    found = {}
    for name, variant in VARIANTS.items():
        trainer = Trainer(variant, setup, CPU)
        before = [p.detach().clone() for p in trainer.model.parameters()]
        for _ in range(3):
            trainer.step()
        found[name] = before, [p.detach() for p in trainer.model.parameters()]
    return found


@pytest.mark.parametrize("name", [*OURS, "stock, packed"])
def test_parameters_end_where_those_of_stock_padded_do(trained, name):
    base, expected = trained["stock, padded"]
    before, after = trained[name]
    step = 3 * whole_step.LEARNING_RATE
    for start, other, end, target in zip(base, before, after, expected, strict=True):
        assert other.equal(start)
        assert (end - start).abs().max() > 0.9 * step
        # Rounding stays below a fifth of this; without clipping the furthest parameter is 2.5 times as far off.
        torch.testing.assert_close(end, target, rtol=0, atol=1e-3 * step)


def test_every_example_is_in_every_variant_once():
    setup = Setup.of(tiny=True)
    expected = sorted(example.input_ids for example in setup.examples)
    for variant in VARIANTS.values():
        assert sorted(ids for batch in variant.batches(setup) for ids in unpacked(batch)) == expected


def unpacked(batch):
    """The examples of a micro-batch, as lists of tokens."""
    if hasattr(batch, "inputs"):
        if "attention_mask" in batch.inputs:
            rows = zip(batch.inputs["input_ids"], batch.inputs["attention_mask"].bool(), strict=True)
            return [ids[seen].tolist() for ids, seen in rows]
        starts = (batch.inputs["position_ids"][0] == 0).nonzero()[:, 0].tolist()
        return [part.tolist() for part in batch.inputs["input_ids"][0].tensor_split(starts[1:])]
    return [part.tolist() for part in batch.input_ids[0].tensor_split(batch.cu_seqlens[1:-1].tolist())]


def test_the_full_size_is_what_the_comments_say():
    setup = Setup.of(tiny=False)
    assert setup.tokens == 22188
    assert len(setup.examples) == 64
    padded, packed = (
        [b.tokens for b in make(setup)] for make in (whole_step.padded_batches, whole_step.packed_batches)
    )
    assert max(padded) == 15528
    assert sum(padded) / setup.tokens == pytest.approx(2.955, abs=5e-3)
    assert max(packed) <= setup.row_tokens
    assert sum(packed) == setup.tokens


def test_no_gpu_is_refused(tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit, match="2"):
        whole_step.main(["--device", "cuda", "--results", str(tmp_path)])
    assert "sees no CUDA device" in capsys.readouterr().err


@pytest.fixture
def calls(monkeypatch):
    """The calls of ``torch.cuda`` in their order. Trainers of a GPU stay on the CPU and stand among them as "step"."""
    made = []

    def record(name, value=None):
        monkeypatch.setattr(torch.cuda, name, lambda *_: made.append(name) or value)

    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        record(name)
    record("max_memory_allocated", 7 << 30)

    class OnTheCPU(Trainer):
        def __init__(self, variant, setup, device):
            super().__init__(variant, setup, CPU)
            self.update = variant.optimizer(self.model, device)

        def step(self):
            made.append("step")
            return super().step()

    monkeypatch.setattr(whole_step, "Trainer", OnTheCPU)
    return made


@pytest.mark.parametrize("name", STOCK)
def test_a_gpu_is_waited_for_on_either_side_and_its_peak_is_of_the_timed_steps(calls, name):
    row = whole_step.measure(VARIANTS[name], Setup.of(tiny=True), torch.device("cuda"))
    step = ["synchronize", "step", "synchronize"]
    assert calls == ["empty_cache", *step, "reset_peak_memory_stats", *step, *step, "max_memory_allocated"]
    assert row["peak_bytes"] == 7 << 30
    assert "7.5" in whole_step.table(document_of({name: row}))


def document_of(rows):
    data = {"examples": 1, "tokens": 1, "kept_tokens": 1}
    return {"data": data, "variants": rows, "device": {"name": "x"}, "versions": {"torch": "x"}, "rehearsal": False}


def test_a_trace_of_a_gpu_waits_for_it(calls, tmp_path):
    whole_step.trace(Setup.of(tiny=True), torch.device("cuda"), tmp_path / "trace.json.gz")
    assert calls == ["empty_cache", "step", "synchronize", "step", "synchronize"]
    assert (tmp_path / "trace.json.gz").stat().st_size > 0
