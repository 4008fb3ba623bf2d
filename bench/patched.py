"""``patch(model)`` in transformers' Trainer: ``python -m bench.patched``, on a CPU.

A Llama with a 32,000-word vocabulary, three quarters of the labels masked. Measured, stock and patched in turn:

- head and loss, forward and backward, of the model's own code from the last hidden states on;
- a step of ``transformers.Trainer``, and the growth of the peak resident set over one, each in a process of its own;
- the host's time of a lazy tensor beside a direct call of ``linear_cross_entropy``, on tensors of a few tokens.
"""

import argparse
import contextlib
import io
import statistics
import sys
import tempfile
import time

import torch
import torch.nn.functional as F

from sft_kernels import linear_cross_entropy
from sft_kernels.integrations import head_counts, patch

from .timing import Rival, interleaved, peak_extra_bytes

CONFIG = {
    "vocab_size": 32000, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4,
}  # fmt: skip
ROWS, TOKENS, MASKED = 4, 512, 0.75


def llama(patched):
    """The model in training mode; the same weights every time."""
    import transformers

    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG)).train()
    return patch(model) if patched else model


def batch():
    """``(input_ids, labels)`` [ROWS, TOKENS], of each row the first three quarters without loss."""
    ids = torch.randint(0, CONFIG["vocab_size"], (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, : int(TOKENS * MASKED)] = -100
    return ids, labels


def head_and_loss(patched):
    """A :class:`Rival`: from hidden states to the gradients, as ``LlamaForCausalLM.forward`` has it."""
    model, (ids, labels) = llama(patched), batch()
    hidden = model.model(ids).last_hidden_state.detach()

    def run(hidden):
        model.zero_grad()
        logits = model.lm_head(hidden)
        model.loss_function(logits=logits, labels=labels, vocab_size=CONFIG["vocab_size"]).backward()

    return Rival(run, lambda: hidden.clone().requires_grad_())


def trainer_step(patched):
    """``(prepare, run)`` of one step of transformers' Trainer."""
    import transformers

    transformers.logging.set_verbosity_error()
    model, (ids, labels) = llama(patched), batch()
    folder = tempfile.mkdtemp()
    arguments = transformers.TrainingArguments(
        folder, per_device_train_batch_size=ROWS, max_steps=1, report_to=[], disable_tqdm=True, use_cpu=True,
        save_strategy="no", optim="sgd", logging_strategy="no",
    )  # fmt: skip
    data = [{"input_ids": i, "labels": y} for i, y in zip(ids, labels, strict=True)]

    def prepare():
        model.zero_grad()
        return transformers.Trainer(model, arguments, train_dataset=data)

    def run(trainer):
        with contextlib.redirect_stdout(io.StringIO()):
            trainer.train()
        if patched:
            counts = head_counts(model)
            if not counts.fused or counts.materialised:
                raise RuntimeError(f"not fused: {counts}")

    return prepare, run


def overhead(rounds=2000):
    """Median µs of a step through a lazy tensor, and of the same by ``linear_cross_entropy``."""
    torch.set_num_threads(1)
    hidden = torch.randn(1, 8, 16, requires_grad=True)
    labels = torch.randint(0, 64, (1, 8))

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lm_head = torch.nn.Linear(16, 64, bias=False)

        def get_output_embeddings(self):
            return self.lm_head

    head = patch(Model()).lm_head

    def lazy():
        F.cross_entropy(head(hidden).float().view(-1, 64), labels.view(-1)).backward()

    def direct():
        linear_cross_entropy(hidden, head.weight, labels).backward()

    taken = {lazy: [], direct: []}
    for i in range(rounds + 50):
        for function in taken:
            start = time.perf_counter()
            function()
            if i >= 50:
                taken[function].append((time.perf_counter() - start) * 1e6)
    return tuple(statistics.median(taken[function]) for function in (lazy, direct))


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m bench.patched", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=30, help="for each of the two timings (%(default)s)")
    args = parser.parse_args(argv)
    print(f"{ROWS} x {TOKENS} tokens, {MASKED:.0%} masked, {CONFIG['hidden_size']} x {CONFIG['vocab_size']}")
    for name, case in (("head and loss", head_and_loss), ("Trainer step", lambda p: Rival(*reversed(trainer_step(p))))):
        rivals = {label: case(patched) for label, patched in (("stock", False), ("patched", True))}
        samples, failed = interleaved(rivals, [()], torch.device("cpu"), budget=args.seconds)
        if failed:
            raise SystemExit(f"{name}: {failed}")
        stock, ours = (statistics.median(samples[label].called) * 1e3 for label in ("stock", "patched"))
        print(f"{name:<14} stock {stock:8.1f} ms   patched {ours:8.1f} ms   {stock / ours:.2f} x")
    stock, ours = (peak_extra_bytes("bench.patched:trainer_step", patched) for patched in (False, True))
    print(f"peak memory    stock {stock / 2**20:8.1f} MiB  patched {ours / 2**20:8.1f} MiB  {ours / stock:.0%}")
    lazy, direct = overhead()
    print(f"a lazy tensor  {lazy:.0f} µs a step, the op called directly {direct:.0f} µs: {lazy - direct:.0f} µs more")
    return 0


if __name__ == "__main__":
    sys.exit(main())
