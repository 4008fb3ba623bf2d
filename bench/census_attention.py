"""Census: ``attn_implementation="sft_kernels"`` on a small model of every class of transformers that predicts tokens.

``python -m bench.census_attention [--out FILE] [--only NAME …] [--jobs N]``. Each model computes four packed examples
in one row, then its stock twin (eager attention) computes each example alone. Windows and chunks are shorter than the
examples. Outputs and gradients must be equal, or the row must be refused. The exit status is 1 if a model differs or
fails in another way, 2 for a wrong call.
"""

import collections
import sys
from typing import NamedTuple

import torch
from transformers.models.auto import modeling_auto

from sft_kernels.integrations import NAME, calls

from . import census, census_models
from .census_compare import TOLERANCE, Row, Step, difference, first_line
from .facts import code_state, versions

LENGTHS = (7, 12, 1, 9)


class Case(NamedTuple):
    """A class of transformers, and fields of its configuration other than the census's."""

    model_class: str
    overrides: dict | None = None


# Beside the classes of the census: kinds of layers that small default configurations leave out.
VARIANTS = {
    "Gemma3TextModel, bidirectional": Case("Gemma3TextModel", {"use_bidirectional_attention": True}),
    "Lfm2ForCausalLM, a convolution": Case("Lfm2ForCausalLM", {"layer_types": ["conv", "full_attention"]}),
    "Lfm2VlForConditionalGeneration, a convolution": Case(
        "Lfm2VlForConditionalGeneration", {"text_config": {"layer_types": ["conv", "full_attention"]}}
    ),
    "Llama4ForCausalLM, chunks": Case("Llama4ForCausalLM", {"layer_types": ["chunked_attention", "full_attention"]}),
    "Qwen2ForCausalLM, both": Case("Qwen2ForCausalLM", {"layer_types": ["sliding_attention", "full_attention"]}),
    "Gemma2ForCausalLM, both": Case("Gemma2ForCausalLM", {"layer_types": ["sliding_attention", "full_attention"]}),
}


def names():
    """Returns the names of all cases: classes that predict tokens, masked ones too, and :data:`VARIANTS`."""
    masked = modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.values()
    return sorted({*census_models.names(), *masked, *VARIANTS})


def examine(name):
    """The :class:`Row` of one case.

    Its verdict is that of a row with ``cu_seq_lens_q`` and ``position_ids``. ``batch`` holds the verdict of the same
    row with ``position_ids`` alone.
    """
    case = VARIANTS.get(name) or Case(name)
    try:
        stock = census_models.build(case.model_class, "eager", case.overrides)
    except Exception as error:
        return Row(name, "not built", reason=first_line(error))
    try:
        high = min(census_models.VOCAB, stock.get_input_embeddings().weight.shape[0])
        seed = torch.Generator().manual_seed(1)
        ids = torch.randint(census_models.FIRST_WORD, high, (1, sum(LENGTHS)), generator=seed)
        alone = _step(stock, [{"input_ids": part} for part in ids.split(LENGTHS, dim=1)])
        again = difference(alone, _step(stock, [{"input_ids": part} for part in ids.split(LENGTHS, dim=1)]))
    except Exception as error:
        return Row(name, "no stock", reason=first_line(error))
    positions = torch.cat([torch.arange(l) for l in LENGTHS])[None] + calls.first_position(stock)
    bounds = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32)
    boundaries = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 12, "max_length_k": 12}
    by_positions = {"input_ids": ids, "position_ids": positions}
    try:
        ours = census_models.build(case.model_class, NAME, case.overrides)
    except ValueError as error:
        return Row(name, "refused", batch="refused", reason=first_line(error))
    ours.load_state_dict(stock.state_dict())
    given, error, reason = _verdict(ours, {**by_positions, **boundaries}, alone, again)
    found, _, why = _verdict(ours, by_positions, alone, again)
    return Row(name, given, "DIFFERENT" if "DIFFERENT" in (given, found) else "", found, error, reason or why)


def _step(model, calls):
    """Returns a :class:`Step`: a random combination of all outputs, and its gradients."""
    torch.manual_seed(2)
    model.zero_grad(set_to_none=True)
    outputs = [model(**call, use_cache=False) for call in calls]
    rows = torch.cat([(out.logits if "logits" in out else out.last_hidden_state)[0] for out in outputs])
    if len(rows) != sum(LENGTHS):
        raise ValueError(f"the output has {len(rows)} rows for {sum(LENGTHS)} tokens")
    weights = torch.randn(rows.shape, generator=torch.Generator().manual_seed(3))
    (rows * weights).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return Step(torch.ones(()), {"the output": rows.detach(), **gradients})


def _verdict(model, call, alone, again):
    """Returns ``(verdict, error, reason)`` of one packed row."""
    try:
        found = _step(model, [call])
    except ValueError as error:
        return "refused", None, first_line(error)
    except Exception as error:
        return "failed", None, first_line(error)
    error, where = difference(alone, found)
    if error <= TOLERANCE:
        return "equal", error, ""
    return "stock varies" if again.error > TOLERANCE else "DIFFERENT", error, f"the largest difference is in {where}"


def summary(rows):
    """The counts of ``rows`` in one line."""
    counts = collections.Counter(row.verdict for row in rows)
    tried = len(rows) - counts["not built"] - counts["no stock"]
    verdicts = ("equal", "refused", "stock varies", "failed", "DIFFERENT")
    alone = sum(row.batch == "equal" for row in rows)
    return f"{tried} tried, {', '.join(f'{counts[v]} {v}' for v in verdicts)}; by positions alone {alone} equal"


def page(rows):
    """The census as Markdown."""
    rows = sorted(rows, key=lambda row: row.name.lower())
    commit, changed = code_state()
    found = versions()
    lines = [
        f'# `attn_implementation="{NAME}"` in transformers {found["transformers"]}',
        "",
        f"{summary(rows)}.",
        "",
        f"Written by `python -m bench.census_attention` at commit {(commit or 'unknown')[:12]}"
        f"{' with changes' if changed else ''}, torch {found['torch']}, CPU, fp32.",
        f"Small random models in training, dropout off; examples of {', '.join(map(str, LENGTHS))} tokens in one row,",
        f"windows and chunks of {census_models.WINDOW}. Equal: outputs and each gradient within {TOLERANCE:g} of those",
        "of the examples alone in eager attention, as the census of `patch` measures it.",
        "",
        "| class | boundaries given | positions alone | error | reason |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        if row.verdict in ("not built", "no stock"):
            continue
        error = "" if row.error is None else f"{row.error:.0e}"
        lines.append(f"| {row.name} | {row.verdict} | {row.batch} | {error} | {census.cell(row.reason)} |")
    left = [row for row in rows if row.verdict in ("not built", "no stock")]
    lines += ["", "## Not tried: not built, or the stock model does not take token ids alone", "", "| class | reason |"]
    lines += ["|---|---|", *(f"| {row.name} | {census.cell(row.reason)} |" for row in left)]
    return "\n".join(lines) + "\n"


def main(argv=None):
    parsed = census.arguments(argv, "python -m bench.census_attention", __doc__, names())
    found = census.report(parsed, names(), "census_attention_transformers", examine, page, summary)
    return int(any(row.agrees == "DIFFERENT" or "failed" in (row.verdict, row.batch) for row in found))


if __name__ == "__main__":
    sys.exit(main())
