"""The options of a run."""

import math
import os
from dataclasses import dataclass, field, fields
from typing import Literal, get_args, get_origin

NAMES = {str: "text", int: "an integer", float: "a number", bool: "true or false"}
_LONGEST_ROW = 1 << 24  # tokens; a row is padded to its length, which has to fit into memory
_MOST = (1 << 63) - 1  # of an integer; with more digits than 4300 Python does not even print one


@dataclass
class Recipe:
    """One run. Every field can stand in the YAML file and be overridden on the command line."""

    data: list[str] = field(default_factory=list)
    """Files of conversations to train on: JSONL, also compressed, or Parquet; - is standard input."""
    model: str = ""
    """A Hugging Face causal LM: a folder, a config (JSON) for random weights, or hf:owner/name to fetch one."""
    tokenizer: str | None = None
    """Its folder, or hf:owner/name; None: the model's, or for a config a byte-level BPE trained on the data."""
    chat_template: str | None = None
    """A file that replaces the tokenizer's chat template."""
    trust_remote_code: bool = False
    """Let Python code run that lies in the folders of model and tokenizer. Otherwise a folder that needs it is
    refused."""
    cache: str | None = None
    """Folder for tokenised data, which a later run starts from; None: sft_kernels in ~/.cache."""
    init_from: str | None = None
    """An earlier run's folder, checkpoint or model to start a new schedule from, in the place of model."""
    out: str = "out/run"
    """Folder for train.jsonl, speed.jsonl, curves.png, checkpoints/, best/ and model/. Without resume it must not
    hold a run already, nor a link in their place."""
    resume: bool = False
    """Go on from the newest complete checkpoint in out; from the start, if there is none. All else as it was."""
    save_every: int = 0
    """Steps between checkpoints; 0: one only if a signal ends the run."""
    keep: int = 2
    """Checkpoints that stay; the best model is kept apart from them."""
    mask: Literal["all", "completion", "completion+eot"] = "completion+eot"
    """Which tokens carry loss."""
    weigh: Literal["tokens", "examples"] = "tokens"
    """Give each kept token the same weight, or each example."""
    split_turns: bool = False
    """Make an example of its own of an assistant's turn that the chat template renders differently once others
    follow."""
    skip_bad: bool = False
    """Count and report lines that cannot be trained on, instead of stopping at the first."""
    row_tokens: int = 2048
    """Tokens in a packed row."""
    rows: int = 1
    """Rows in a micro-batch."""
    accumulate: int = 1
    """Micro-batches in an optimiser step."""
    epochs: float = 1.0
    """Passes over the data, where steps is None."""
    steps: int | None = None
    """Optimiser steps."""
    lr: float = 2e-5
    """Peak learning rate."""
    warmup: float = 0.03
    """Warm-up, as a share of the steps."""
    weight_decay: float = 0.1
    """On matrices; never on biases, norms and embeddings."""
    max_grad_norm: float = 1.0
    """Clip the global norm to this."""
    max_skips: int = 10
    """Stop after so many skipped steps in a row. A step is skipped if its gradient norm is not finite."""
    spike: float = 0.0
    """Skip a step, too, if its gradient norm is above this many times the running median; 0: never."""
    dropout: float = 0.0
    """On the outputs of attention and FFN, where the model's config offers it; every other dropout is 0."""
    neftune_alpha: float = 0.0
    """NEFTune: noise of up to alpha / √(L · d) on the embeddings in training, L the tokens of the example."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """bf16 autocast; auto: where the device computes in it. Parameters in bf16 always do."""
    parameters: Literal["fp32", "bf16+master", "bf16+stochastic"] = "fp32"
    """Parameters in fp32; or in bf16 with fp32 masters (split) or with stochastic rounding. Moments are fp32."""
    activation_checkpointing: bool = False
    """Compute each layer's activations again in backward instead of keeping them."""
    holdout: float = 0.0
    """Share of the conversations kept out of training to measure the masked loss on."""
    eval_data: list[str] = field(default_factory=list)
    """Files to measure the masked loss on."""
    eval_every: int = 0
    """Steps between measurements; 0: before and after only, and no best model is kept."""
    metric: str = "exact_match"
    """Score of greedy answers to held-out prompts, by which the best model is chosen: exact_match, or the dotted
    name of a Python function of (prompts, answers, references), larger is better."""
    metric_prompts: int = 200
    """At most so many held-out prompts are answered; 0: none, and the best model is chosen on the masked loss."""
    max_new_tokens: int = 256
    """The longest answer."""
    log_every: int = 10
    """Steps between lines on the screen. The host waits for the device there, once, and not between; train.jsonl has
    every step all the same."""
    tensorboard: bool = False
    """Write events for TensorBoard to tensorboard/ in out, too, which needs the extra tensorboard."""
    seed: int = 0
    """The seed of weights, split and order."""

    def __post_init__(self):
        """Paths become text and other sequences lists, as they are in a checkpoint."""
        for name, value in list(vars(self).items()):
            several = isinstance(value, (list, tuple))
            setattr(self, name, [*map(_text, value)] if several else _text(value))


def recipe_of(options):
    """The :class:`Recipe` alone of the options of a command, which extend it."""
    return Recipe(**{option.name: getattr(options, option.name) for option in fields(Recipe)})


def check(recipe, model_given=False):
    """Raise ``ValueError`` for a value that makes no sense, and ``ImportError`` if what it asks for is not installed.
    ``model_given``: the recipe need not name one."""
    for option in fields(recipe):
        value = getattr(recipe, option.name)
        check_kind(option.name, option.type, value)
        if isinstance(value, int) and abs(value) > _MOST:
            raise ValueError(f"{option.name}: expected at most 2⁶³ − 1")
    if not recipe.data:
        raise ValueError("data: expected at least one JSONL file")
    if recipe.init_from is not None and (recipe.model or model_given):
        raise ValueError("init_from: it takes the place of the model; give one of the two")
    if not (model_given or recipe.model or recipe.init_from):
        raise ValueError("model: expected a folder or a config")
    if recipe.parameters != "fp32" and recipe.precision == "fp32":
        raise ValueError(f"precision: parameters {recipe.parameters} compute in bf16; leave it at auto")
    if recipe.split_turns and recipe.mask == "all":
        raise ValueError("split_turns: mask 'all' labels whole conversations, whose turns are not told apart")
    check_row_tokens(recipe.row_tokens)
    for name in ("rows", "accumulate", "log_every", "keep", "max_skips", "max_new_tokens"):
        if getattr(recipe, name) < 1:
            raise ValueError(f"{name}: expected at least 1, got {getattr(recipe, name)}")
    if recipe.steps is not None and recipe.steps < 1:
        raise ValueError(f"steps: expected at least 1, got {recipe.steps}")
    if recipe.steps is None and not 0 < recipe.epochs < math.inf:
        raise ValueError(f"epochs: expected more than 0, got {recipe.epochs}")
    for name in ("lr", "weight_decay", "neftune_alpha"):
        if not 0 <= getattr(recipe, name) < math.inf:
            raise ValueError(f"{name}: expected a finite number from 0 up, got {getattr(recipe, name)}")
    if not recipe.max_grad_norm > 0:
        raise ValueError(f"max_grad_norm: expected more than 0, got {recipe.max_grad_norm}")
    if recipe.spike != 0 and not 1 < recipe.spike < math.inf:
        raise ValueError(f"spike: expected 0, or a finite number above 1, got {recipe.spike}")
    for name in ("eval_every", "save_every", "metric_prompts"):
        if getattr(recipe, name) < 0:
            raise ValueError(f"{name}: expected 0 or more, got {getattr(recipe, name)}")
    if not 0 <= recipe.seed < 1 << 63:
        raise ValueError(f"seed: expected an integer from 0 to 2⁶³ − 1, got {recipe.seed}")
    for name in ("warmup", "holdout", "dropout"):
        if not 0 <= getattr(recipe, name) < 1:
            raise ValueError(f"{name}: expected a share from 0 to 1, got {getattr(recipe, name)}")
    if recipe.tensorboard:
        from . import tensorboard

        tensorboard.check()


def check_kind(name, kind, value):
    """Raise ``ValueError`` for a ``value`` of another type than an option of the type ``kind`` has."""
    kinds = get_args(kind) or (kind,)
    if get_origin(kind) is Literal:
        fits, expected = value in kinds, f"one of {', '.join(kinds)}"
    elif kind == list[str]:
        fits, expected = isinstance(value, list) and all(isinstance(each, str) for each in value), "a list of files"
    elif isinstance(value, bool):
        fits, expected = bool in kinds, NAMES[kinds[0]]
    else:
        fits, expected = isinstance(value, (*kinds, int) if float in kinds else kinds), NAMES[kinds[0]]
    if not fits:
        raise ValueError(f"{name}: expected {expected}, got {value!r:.60}")


def _text(value):
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def check_row_tokens(number):
    """Raise ``ValueError`` for a row that is too short or too long."""
    if not 1 <= number <= _LONGEST_ROW:
        raise ValueError(f"row_tokens: expected from 1 to {_LONGEST_ROW}, got {str(number)[:30]}")
