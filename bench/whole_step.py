"""A whole training step of a 1 B Llama with random weights: stock against ours, padded and packed.

``python -m bench.whole_step --device cuda --results FOLDER`` times four variants over the same examples and the same
initial weights. An optimiser step takes all examples, in micro-batches that share one denominator, so that every
variant computes the same loss. FOLDER gets ``whole_step_<device>_<torch>_<yyyymmdd>.json``, rewritten after every
variant, and ``whole_step_trace.json.gz``, one step of ours packed.

The exit status is 0 if ours ran and the first step of all variants has the same loss and the same gradient norm. It is
1 if these differ, or if a variant of ours or the trace raised. A stock variant that raises, for want of memory say,
costs its row alone.
"""

import argparse
import datetime
import gc
import json
import math
import random
import re
import sys
import time
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile, record_function, supported_activities

from sft_kernels import AdamW, KeptTokens, decay_groups, linear_cross_entropy
from sft_kernels.integrations import attention
from sft_kernels.sft.masking import IGNORE, Example
from sft_kernels.sft.model import boundaries_given, head, hidden_states
from sft_kernels.sft.packing import PackedRows, collate, groups_of
from sft_kernels.sft.plain import pad

from .bench_packed_attention import lengths_of
from .facts import code_state, replace, versions
from .results import device_facts
from .timing import reason, spread

LEARNING_RATE, BETAS, WEIGHT_DECAY, MAX_GRAD_NORM = 1e-4, (0.9, 0.95), 0.1, 1.0
# Of seeds 0 to 199 the one closest to the median in padding (2.96 positions a token) and in tokens (22,188). Its
# largest padded micro-batch, 15,528 positions, should fit 80 GB with stock's logits: counted, 64 GB.
SEED_OF_LENGTHS = 85

LLAMA_1B = {  # Llama 3.2 1B's shape
    "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
}  # fmt: skip
# Weights five times larger than usual, so that a leak moves the loss by a hundred times the tolerance.
LLAMA_TINY = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.1,
    "tie_word_embeddings": True,
}  # fmt: skip


class Setup(NamedTuple):
    """The model, the data and the steps, which all variants share."""

    config: dict[str, Any]
    dtype: torch.dtype
    examples: list[Example]
    row_tokens: int  # the most in a packed row
    batch_examples: int  # in a padded micro-batch
    warm_up: int
    timed: int
    tolerance: float  # relative, between the losses, and between the gradient norms, of the first step

    @classmethod
    def of(cls, tiny):
        """The 1 B model in bf16 over 64 examples; ``tiny`` for a rehearsal."""
        lengths = lengths_of("mix", 1 << 16, SEED_OF_LENGTHS)
        if tiny:
            examples = random_examples([min(64, l // 8) for l in lengths[:12]], LLAMA_TINY["vocab_size"])
            return cls(LLAMA_TINY, torch.float32, examples, 128, 4, warm_up=1, timed=2, tolerance=1e-5)
        examples = random_examples(lengths[:64], LLAMA_1B["vocab_size"])
        return cls(LLAMA_1B, torch.bfloat16, examples, 8192, 8, warm_up=2, timed=5, tolerance=1e-2)

    @property
    def tokens(self):
        return sum(len(example.input_ids) for example in self.examples)

    @property
    def kept(self):
        return sum(example.kept for example in self.examples)


def random_examples(lengths, vocab):
    """Examples of random tokens. The first half of each, rounded up, is its prompt and carries no loss."""
    draw = random.Random(0)
    examples = []
    for length in lengths:
        ids = draw.choices(range(vocab), k=length)
        prompt = (length + 1) // 2
        examples.append(Example(ids, [IGNORE] * prompt + ids[prompt:], "random"))
    return examples


class MicroBatch(NamedTuple):
    """A micro-batch as a transformers model is called with it."""

    inputs: dict[str, torch.Tensor]  # int64 [B, S] each
    labels: torch.Tensor  # int64 [B, S], not yet shifted
    kept: KeptTokens  # shift=True

    @property
    def tokens(self):
        return self.labels.numel()

    def to(self, device):
        inputs = {name: t.to(device, non_blocking=True) for name, t in self.inputs.items()}
        return MicroBatch(inputs, self.labels.to(device, non_blocking=True), self.kept.to(device, non_blocking=True))


def padded_batches(setup):
    """The examples in their order, each micro-batch padded on the right to its longest."""
    return [pad(group, pad_id=0) for group in groups_of(setup.batch_examples, setup.examples)]


def stock_packed_batches(setup):
    """A packed row a micro-batch. transformers makes sdpa's block-diagonal mask where ``position_ids`` start again.

    It does so without an attention mask and without a cache alone.
    """
    return [_packed(row) for row in PackedRows(setup.examples, setup.row_tokens)]


def _packed(examples):
    ids, labels, positions = (
        torch.tensor([[value for example in examples for value in values(example)]])
        for values in (lambda e: e.input_ids, lambda e: e.labels, lambda e: range(len(e.input_ids)))
    )
    kept = KeptTokens.from_labels(labels, IGNORE, shift=True)
    return MicroBatch({"input_ids": ids, "position_ids": positions}, labels, kept)


def packed_batches(setup):
    """The same rows for ours, none of them padded."""
    rows = PackedRows(setup.examples, setup.row_tokens)
    return [collate([row], sum(len(example.input_ids) for example in row), pad_id=0) for row in rows]


def stock_loss(model, batch, num_items):
    """The loss that transformers computes: all logits, in fp32, shifted."""
    return model(**batch.inputs, labels=batch.labels, num_items_in_batch=num_items, use_cache=False).loss


def padded_loss(model, batch, num_items):
    return fused_loss(model, model.base_model(**batch.inputs, use_cache=False).last_hidden_state, batch, num_items)


def packed_loss(model, batch, num_items):
    return fused_loss(model, hidden_states(model, batch), batch, num_items)


def fused_loss(model, hidden, batch, num_items):
    return linear_cross_entropy(hidden, **head(model), shift=True, kept=batch.kept, num_items=num_items)


def stock_optimizer(model, device):
    """Returns a function that clips, updates and forgets the gradients, and returns their norm."""
    fused = True if device.type == "cuda" else None
    groups = decay_groups(model, WEIGHT_DECAY)
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, fused=fused)

    def update():
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return norm

    return update


def our_optimizer(model, device):
    """The same with ours, which clips inside its step."""
    groups = decay_groups(model, WEIGHT_DECAY)
    optimizer = AdamW(groups, lr=LEARNING_RATE, betas=BETAS, max_grad_norm=MAX_GRAD_NORM)

    def update():
        optimizer.step()
        optimizer.zero_grad()
        return optimizer.last_grad_norm

    return update


class Variant(NamedTuple):
    """One way to train."""

    attention: str  # transformers' name of it
    batches: Callable[[Setup], list]
    loss: Callable[..., torch.Tensor]  # of model, micro-batch and the step's denominator
    optimizer: Callable[..., Callable[[], torch.Tensor]]


VARIANTS = {
    "ours, packed": Variant(attention.NAME, packed_batches, packed_loss, our_optimizer),
    "stock, padded": Variant("sdpa", padded_batches, stock_loss, stock_optimizer),
    "ours, padded": Variant("sdpa", padded_batches, padded_loss, our_optimizer),
    "stock, packed": Variant("sdpa", stock_packed_batches, stock_loss, stock_optimizer),
}


class Trainer:
    """A model with random weights that depend on the device alone, its micro-batches on the host, its optimiser."""

    def __init__(self, variant, setup, device):
        self.device, self.compute_loss = device, variant.loss
        self.model = random_model(setup, variant.attention, device)
        self.batches = variant.batches(setup)
        self.num_items = sum(batch.kept.count for batch in self.batches)
        self.update = variant.optimizer(self.model, device)

    def step(self):
        """One optimiser step; returns ``(loss, norm of the gradients)``, tensors on the device."""
        total = torch.zeros((), device=self.device)
        with boundaries_given(self.model):  # as the trainer does: no mask is made for ours, packed
            for batch in self.batches:
                with record_function("forward"):
                    loss = self.compute_loss(self.model, batch.to(self.device), self.num_items)
                with record_function("backward"):
                    loss.backward()
                total += loss.detach()
        with record_function("optimizer"):
            norm = self.update()
        return total, norm


def random_model(setup, implementation, device):
    from transformers import AutoModelForCausalLM, LlamaConfig

    attention.register()
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(
            LlamaConfig(**setup.config), dtype=setup.dtype, attn_implementation=implementation
        )
    return model.train()


def measure(variant, setup, device):
    """A row: everything about one variant, as JSON can carry it."""
    began = time.perf_counter()
    release(device)
    trainer = Trainer(variant, setup, device)
    seconds, losses, norms = [], [], []
    for step in range(setup.warm_up + setup.timed):
        if step == setup.warm_up and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        synchronize(device)
        start = time.perf_counter()
        loss, norm = trainer.step()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
        losses.append(float(loss))
        norms.append(float(norm))
    timed = seconds[setup.warm_up :]
    median = spread(timed)[0]
    return {
        "seconds": timed,
        "warm_up_seconds": seconds[: setup.warm_up],
        "tokens_per_second": setup.tokens / median,
        "kept_tokens_per_second": trainer.num_items / median,
        "positions": sum(batch.tokens for batch in trainer.batches),
        "micro_batches": len(trainer.batches),
        "kept_tokens": trainer.num_items,
        "peak_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "first_gradient_norm": norms[0],
        "seconds_in_all": time.perf_counter() - began,
    }


def release(device):
    """Free what the variant before held; called where an error counts as the next one's."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def trace(setup, device, path):
    """One step of ours packed as a Chrome trace. It comes last, since a profiler that has run once slows launches."""
    release(device)
    trainer = Trainer(VARIANTS["ours, packed"], setup, device)
    trainer.step()
    synchronize(device)
    activities = {ProfilerActivity.CPU}
    if device.type == "cuda":
        activities |= {ProfilerActivity.CUDA} & supported_activities()
    with profile(activities=activities) as profiler:
        trainer.step()
        synchronize(device)
    profiler.export_chrome_trace(str(path))


def disagreement(rows, tolerance):
    """A sentence if the variants that ran differ by more than ``tolerance`` in their first step, or None.

    Their losses show a wrong denominator. In bf16 their gradients' norms show what losses of random weights hide:
    examples that see each other.
    """
    for what, key in (("losses", "first_loss"), ("gradient norms", "first_gradient_norm")):
        found = {name: row[key] for name, row in rows.items() if key in row}
        pairs = combinations(found.values(), 2)
        if not (all(map(math.isfinite, found.values())) and all(abs(a - b) <= tolerance * abs(b) for a, b in pairs)):
            listed = "; ".join(f"{name} {value:.7g}" for name, value in found.items())
            return f"the {what} of the first step do not agree within {tolerance:g}: {listed}"
    return None


def new_document(setup, device, tiny):
    commit, changed = code_state()
    return {
        "op": "whole_step",
        "sample": "one optimiser step",
        "rehearsal": tiny,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "uncommitted_changes": changed,
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "device": {"type": device.type, **device_facts(device)},
        "versions": versions(),
        "model": {**setup.config, "dtype": str(setup.dtype).removeprefix("torch.")},
        "data": {
            "examples": len(setup.examples),
            "tokens": setup.tokens,
            "kept_tokens": setup.kept,
            "longest": max(len(example.input_ids) for example in setup.examples),
            "row_tokens": setup.row_tokens,
            "examples_in_a_padded_batch": setup.batch_examples,
        },
        "tolerance": setup.tolerance,
        "variants": {},
        "disagreement": None,
        "trace": None,
    }


def new_path(folder, document):
    """Named as the suites' files are; an earlier run of the same day stays."""
    device = document["device"]
    name = "cpu" if device["type"] == "cpu" else re.sub(r"[^a-z0-9]+", "-", device["name"].lower())
    day = document["date"][:10].replace("-", "")
    parts = ["whole_step", name, torch.__version__.split("+")[0], day, *["rehearsal"] * document["rehearsal"]]
    path = folder / f"{'_'.join(parts)}.json"
    count = 1
    while path.exists():
        count += 1
        path = folder / f"{'_'.join([*parts, str(count)])}.json"
    return path


def table(document):
    """The rows as text."""
    data, rows = document["data"], document["variants"]
    lines = [
        f"a whole step on {document['device']['name']}, torch {document['versions']['torch']}: {data['examples']} "
        f"examples, {data['tokens']} tokens, {data['kept_tokens']} kept",
        f"{'':<16}{'median ms':>11}{'quartiles':>20}{'speed':>8}{'tokens/s':>10}{'kept/s':>9}{'positions':>11}"
        f"{'peak GB':>9}{'first loss':>12}",
    ]
    if document["rehearsal"]:
        lines.insert(1, "A rehearsal with a tiny model: no figure.")
    base = rows.get("stock, padded", {}).get("seconds")
    for name, row in rows.items():
        if "raised" in row:
            lines.append(f"{name:<16}  raised {row['raised']}")
            continue
        median, low, high = (1e3 * second for second in spread(row["seconds"]))
        speed = f"{1e3 * spread(base)[0] / median:.2f}×" if base else ""
        peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.1f}"
        lines.append(
            f"{name:<16}{median:>11.1f}{f'{low:.1f}–{high:.1f}':>20}{speed:>8}{row['tokens_per_second']:>10.0f}"
            f"{row['kept_tokens_per_second']:>9.0f}{row['positions']:>11}{peak:>9}{row['first_loss']:>12.6f}"
        )
    return "\n".join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m bench.whole_step", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--tiny", action="store_true", help="a rehearsal with a tiny model; its timings are no figures")
    parser.add_argument("--results", type=Path, required=True, help="folder of the JSON file and the trace")
    parser.add_argument("--no-trace", action="store_true", help="leave out the trace")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error(
            f"--device: torch {torch.__version__} sees no CUDA device; use --device cpu --tiny for a rehearsal"
        )
    try:
        args.results.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--results: {error}")
    if args.tiny and args.device == "cpu":
        torch.set_num_threads(1)  # threads that wait for each other took fifty times as long as these tiny ops
    device, setup = torch.device(args.device), Setup.of(args.tiny)
    document = new_document(setup, device, args.tiny)
    path, rows = new_path(args.results, document), document["variants"]

    def write():
        replace(path, json.dumps(document, indent=1) + "\n")

    for name, variant in VARIANTS.items():
        try:
            rows[name] = measure(variant, setup, device)
            print(f"{name} took {rows[name]['seconds_in_all']:.1f} s", flush=True)
        except Exception as error:
            rows[name] = {"raised": reason(error)}
            print(f"{name} raised {reason(error)}", flush=True)
        write()
    document["disagreement"] = disagreement(rows, setup.tolerance)
    failures = [document["disagreement"]] if document["disagreement"] else []
    raised = {name: row["raised"] for name, row in rows.items() if "raised" in row}
    failures += [f"{name} raised {reason}" for name, reason in raised.items() if name.startswith("ours")]
    write()
    if not args.no_trace and "ours, packed" not in raised:
        file = args.results / "whole_step_trace.json.gz"
        try:
            trace(setup, device, file)
            document["trace"] = file.name
        except Exception as error:
            failures.append(f"the trace raised {reason(error)}")
            document["trace"] = {"raised": reason(error)}
        write()
    print(f"\n{table(document)}\n\n{path}")
    for failure in failures:
        print(f"FAILED: {failure}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
