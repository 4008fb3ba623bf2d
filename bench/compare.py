"""Runs ``sft-kernels train --compare`` on a model with random weights.

``python -m bench.compare --device cuda --results DIR`` takes twenty steps both ways over random tokens in examples of
the lengths of chats. DIR gets the logs, ``compare.json`` and ``compare.png``. The exit status is 1 if the losses part,
or if ours raised. Plain PyTorch that runs out of memory costs its own rows alone.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
from pathlib import Path

import torch

from sft_kernels.sft.compare import compare
from sft_kernels.sft.masking import IGNORE
from sft_kernels.sft.recipe import Recipe

from .bench_packed_attention import lengths_of
from .facts import code_state, replace, versions
from .results import device_facts

# Qwen3 0.6B's shape but for its vocabulary: as wide a head as Llama 3's, which is what the losses are about.
LARGE = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 1024, "intermediate_size": 3072,
    "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}  # fmt: skip
TINY = LARGE | {
    "vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16,
}  # fmt: skip


def recipe_in(folder, out, tiny):
    """The recipe over conversations that are written into ``folder``."""
    draw, row_tokens, data = random.Random(0), 256 if tiny else 4096, folder / "rows.jsonl"
    with data.open("x") as file:
        for length in lengths_of("mix", 1 << 13 if tiny else 1 << 19, seed=0):
            ids = draw.choices(range(4, 250), k=min(length, row_tokens))  # bytes, in any tokenizer of the trainer's
            prompt = (len(ids) + 1) // 2
            file.write(json.dumps({"input_ids": ids, "labels": [IGNORE] * prompt + ids[prompt:]}) + "\n")
    shape = folder / "config.json"
    shape.write_text(json.dumps(TINY if tiny else LARGE))
    return Recipe(
        data=[str(data)],
        model=str(shape),
        row_tokens=row_tokens,
        rows=1 if tiny else 4,
        steps=3 if tiny else 20,
        lr=1e-4,
        precision="fp32" if tiny else "auto",  # a pretended GPU knows no autocast
        log_every=10,
        cache=str(folder / "cache"),
        out=str(out),
    )


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--tiny", action="store_true", help="a rehearsal with a tiny model; its timings are no figures")
    parser.add_argument("--results", type=Path, required=True, help="folder that gets the comparison")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device: torch {torch.__version__} sees no CUDA device; use --device cpu --tiny")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out")
        found = compare(recipe_in(Path(folder), out, args.tiny))
        args.results.mkdir(parents=True, exist_ok=True)
        shutil.copytree(out, args.results, dirs_exist_ok=True)
    path = args.results / "compare" / "compare.json"
    commit, changed = code_state()
    about = {"device": device_facts(torch.device(args.device)), "versions": versions(), "rehearsal": args.tiny}
    about |= {"commit": commit, "uncommitted_changes": changed}
    replace(path, json.dumps(about | json.loads(path.read_text()), indent=1) + "\n")
    if found.parts_at is not None:
        print(f"FAILED: the losses part in step {found.parts_at}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
