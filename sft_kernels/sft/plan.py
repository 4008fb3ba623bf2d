"""Plans a run before it is paid for: bytes a GPU, tokens and FLOPs a step."""

import math
from dataclasses import dataclass
from typing import Literal

import torch

from . import costs
from .recipe import check_row_tokens

_MOST_TOKENS = 1e18
_MOST = 2e12  # parameters; a plan goes through all layers


@dataclass
class Plan:
    """Print the bytes a GPU, tokens and FLOPs that a run will need. No weights are read or made."""

    model: str = ""
    """A folder with a config.json, or a config (JSON). Its weights need not be there."""
    params: float | None = None
    """Parameters, such as 70e9, in the place of a model: the shape is the nearest of Llama 3."""
    trust_remote_code: bool = False
    """Let Python code run that lies in the model's folder."""
    gpus: int = 8
    """GPUs, each with rows of its own."""
    memory: float = 80.0
    """GB (1e9 bytes) of a GPU."""
    parameters: Literal["fp32", "bf16+master", "bf16+stochastic"] = "fp32"
    """Parameters in fp32; or in bf16 with fp32 masters (split) or with stochastic rounding."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """bf16 autocast of fp32 parameters, or none. Parameters in bf16 compute in bf16."""
    row_tokens: int = 2048
    """Tokens in a packed row."""
    rows: int = 1
    """Rows in a micro-batch."""
    accumulate: int = 1
    """Micro-batches in an optimiser step."""
    example_tokens: int | None = None
    """Tokens of an example; a row holds as many as fit. None: one example fills a row."""
    kept: float = 1.0
    """Share of the tokens that carry loss. The others cost the head nothing."""
    steps: int | None = None
    """Optimiser steps of the run."""
    tokens: float | None = None
    """Tokens of the run, such as 1e9, in the place of steps."""
    tflops: float | None = None
    """TFLOP/s that one GPU sustains: prints times, too."""

    @property
    def casts(self):
        """True if autocast copies fp32 weights to bf16."""
        return self.parameters == "fp32" and self.precision == "bf16"

    @property
    def computed(self):
        """The dtype of products."""
        return torch.float32 if self.precision == "fp32" else torch.bfloat16

    @property
    def example(self):
        return self.example_tokens or self.row_tokens

    @property
    def examples_of_a_row(self):
        return self.row_tokens // self.example

    @property
    def examples_of_a_batch(self):
        """Returns ``{length: number}`` of the examples, padding of rows among them."""
        examples = {self.example: self.examples_of_a_row * self.rows}
        if rest := self.row_tokens % self.example:
            examples[rest] = self.rows
        return examples

    @property
    def tokens_of_a_batch(self):
        """Tokens of one micro-batch."""
        return self.rows * self.row_tokens

    @property
    def kept_of_a_batch(self):
        return max(1, round(self.kept * self.tokens_of_a_batch))

    @property
    def rows_of_a_step(self):
        """Rows of a step of all GPUs."""
        return self.gpus * self.accumulate * self.rows


def check(plan):
    """Raise ``ValueError`` for a value that makes no sense."""
    if bool(plan.model) == (plan.params is not None):
        raise ValueError("params: expected exactly one of --model and --params")
    if plan.params is not None and not 0 < plan.params <= _MOST:
        raise ValueError(f"params: expected more than 0 and at most {_MOST:g}, got {plan.params:g}")
    if plan.params is not None and plan.trust_remote_code:
        raise ValueError("trust_remote_code: is for a model with code of its own; leave it out beside --params")
    if plan.parameters != "fp32" and plan.precision == "fp32":
        raise ValueError(f"precision: parameters {plan.parameters} compute in bf16")
    check_row_tokens(plan.row_tokens)
    for name in ("gpus", "rows", "accumulate", "steps"):
        if (value := getattr(plan, name)) is not None and value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if plan.tokens is not None and not plan.tokens <= _MOST_TOKENS:
        raise ValueError(f"tokens: expected at most {_MOST_TOKENS:g}, got {plan.tokens:g}")
    for name in ("memory", "tokens", "tflops"):
        if (value := getattr(plan, name)) is not None and not 0 < value < math.inf:
            raise ValueError(f"{name}: expected a finite number above 0, got {value}")
    if plan.rows * plan.row_tokens >= 1 << 31:
        raise ValueError("rows: expected fewer than 2³¹ tokens in a micro-batch")
    if plan.example_tokens is not None and not 1 <= plan.example_tokens <= plan.row_tokens:
        raise ValueError(f"example_tokens: expected from 1 to row_tokens {plan.row_tokens}, got {plan.example_tokens}")
    if not 0 < plan.kept <= 1:
        raise ValueError(f"kept: expected a share above 0 and at most 1, got {plan.kept}")
    if plan.steps is not None and plan.tokens is not None:
        raise ValueError("tokens: expected at most one of --steps and --tokens")


def text(plan):
    """Returns the plan as lines for the screen."""
    check(plan)
    shape = costs.shape_of(plan)
    loss = costs.loss_of(plan, shape.counted)
    parts = (_head(plan, shape), _table(plan, shape, loss), _notes(plan, shape, loss), _work(plan, shape))
    return "\n\n".join("\n".join(lines) for lines in parts)


def _head(plan, shape):
    computed = ", computed in bf16" if plan.casts else ""
    return [
        f"{_number(shape.parameters)} parameters ({plan.parameters}{computed}); {shape.name}",
        f"{_many(plan.gpus, 'GPU')} of {plan.memory:g} GB; micro-batches of {plan.rows:,} × {plan.row_tokens:,} tokens "
        f"in examples of {plan.example:,}",
    ]


def _table(plan, shape, loss):
    rows = costs.memory(plan, shape, loss)
    largest = max(bytes for name, column in rows if name == "total" for bytes in column)
    digits = 1 if largest >= 1e10 else 3 if largest >= 1e8 else 6
    lines = [_line("GB a GPU (1 GB = 1e9 bytes)", costs.COLUMNS)]
    for name, column in rows:
        if name == "masters" or any(column):
            lines.append(_line(name, ["–" if each is None else f"{each / 1e9:,.{digits}f}" for each in column]))
        if name.startswith("total"):
            fits = ["yes" if each <= plan.memory * 1e9 else "no" for each in column]
            lines.append(_line(f"  fits in {plan.memory:g} GB", fits))
    return lines


def _line(name, cells):
    return f"{name:<28}" + "".join(f"{cell:>16}" for cell in cells)


def _notes(plan, shape, loss):
    N, (V, _) = shape.parameters, shape.counted.head
    number = "fp32" if plan.precision == "fp32" else "bf16"
    states = ", ".join(f"{mode} {_bytes(sum(each) * N)}" for mode, each in costs.STATES.items())
    plain = _bytes(costs.plain_logits(plan, shape.counted))
    head = "; the head in bf16" if plan.casts else ""
    logits = f"{plan.tokens_of_a_batch:,} × {V:,} in {number}, three times in fp32{head}"
    of = f"{plan.kept_of_a_batch:,} kept rows" if loss.loop == "tokens" else f"{V:,} columns"
    return [
        f"whole model  moments {_bytes(costs.STATES[plan.parameters][2] * N)}; all states: {states}",
        "ZeRO-1       splits moments and masters over the GPUs; parameters and gradients stay whole",
        f"FSDP         splits these, too; gathers in {number} what is outside of the layers, and of the layers",
        "             two with their parameters, one with its gradients",
        f"logits       plain PyTorch {plain}: {logits}",
        f"             here {_bytes(loss.total)}: {loss.chunk:,} of {of} {_bytes(loss.logits)}, "
        f"head {_bytes(loss.head)}, hidden states {_bytes(loss.hidden)}",
        "left out     CUDA, buffers of NCCL, temporaries of backward, fragmentation; adapters are not planned",
    ]


def _work(plan, shape):
    products, attention, again = costs.flops(plan, shape)
    step, rows = products + attention, plan.rows_of_a_step
    tokens = rows * plan.row_tokens
    lines = [
        f"step         {_many(tokens, 'token')} in {_many(rows, 'row')} "
        f"with {_many(rows * plan.examples_of_a_row, 'example')}",
        f"FLOPs        {_flops(step)} a step, with checkpointing {_flops(step + again)}:",
        f"             6 × {_number(products / 6 / tokens)} multiplied parameters × tokens {_flops(products)}, "
        f"attention {_flops(attention)}",
    ]
    steps = plan.steps if plan.tokens is None else math.ceil(plan.tokens / tokens)
    if steps is not None:
        lines.append(
            f"run          {_many(steps, 'step')}, {_many(steps * tokens, 'token')}: {_flops(steps * step)}, "
            f"with checkpointing {_flops(steps * (step + again))}"
        )
    if plan.tflops is not None:
        at = f"time         at {plan.tflops:g} TFLOP/s a GPU"
        for start, each in ((at, step), (f"{'':<13}with checkpointing", step + again)):
            seconds = each / (plan.tflops * 1e12)  # of one GPU for all
            hours = "" if steps is None else f", {_number(seconds * steps / 3600)} GPU hours"
            lines.append(f"{start}: {_number(seconds / plan.gpus)} s a step{hours}")
    return lines


def _many(count, word):
    return f"{count:,} {word}{'s' * (count != 1)}"


def _number(value):
    return _with_unit(value, {1: "", 1e6: " M", 1e9: " B"}, digits=4)


def _bytes(value):
    return _with_unit(value, {1: " bytes", 1e3: " kB", 1e6: " MB", 1e9: " GB", 1e12: " TB"})


def _flops(value):
    prefixes = ("", "k", "M", "G", "T", "P", "E", "Z", "Y")
    return _with_unit(value, {1e3**i: f" {prefix}FLOP" for i, prefix in enumerate(prefixes)})


def _with_unit(value, names, digits=3):
    """``value`` to so many digits, in the largest unit of which there is one."""
    size = max((size for size in names if size <= value), default=1)
    return f"{float(f'{value / size:.{digits}g}'):,g}{names[size]}"
