"""``sft-kernels``: train, inspect, demo, verify."""

import sys
from dataclasses import dataclass
from typing import Annotated, Literal

_USAGE = """usage: sft-kernels COMMAND [options]

  train    --config recipe.yaml --data FILE.jsonl …   fine-tune a model (options override the file)
  inspect  FILE.jsonl …                               tokens beside shifted labels, kept and padding shares
  demo     [--out DIR]                                the whole job on a CPU, before and after
  verify   [--ops …] [--impls …] [--smoke]            is every implementation right on this machine?

sft-kernels COMMAND --help lists a command's options."""


def main(argv=None):
    """Run a command; returns the exit status: 0, 1 where the input was refused, 2 for a wrong call, 130 interrupted,
    143 terminated."""
    argv = sys.argv[1:] if argv is None else argv
    commands = {"train": _train, "inspect": _inspect, "demo": _demo, "verify": _verify}
    if not argv or argv[0] not in commands:
        asked = bool(argv) and argv[0] in ("-h", "--help")
        print(_USAGE, file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    try:
        return commands[argv[0]](argv[1:])
    except ImportError as error:
        if error.name and error.name.startswith("sft_kernels"):
            raise
        print(f"sft-kernels: {error}; pip install 'sft-kernels[train]' brings what the trainer needs", file=sys.stderr)
    except KeyboardInterrupt as stop:
        print(f"sft-kernels: {str(stop) or 'interrupted'}", file=sys.stderr)
        return getattr(stop, "status", 130)
    except (ValueError, OSError) as error:
        print(f"sft-kernels: {error}", file=sys.stderr)
    return 1


def _train(argv):
    import tyro

    from .sft.recipe import Recipe, from_yaml

    recipe = Recipe()
    argv = [part for arg in argv for part in (arg.split("=", 1) if arg.startswith("--config=") else [arg])]
    if "--config" in argv:
        at = argv.index("--config")
        if at + 1 == len(argv):
            raise ValueError("--config: expected a file")
        recipe = from_yaml(argv[at + 1])
        argv = argv[:at] + argv[at + 2 :]
    description = "--config FILE reads options from YAML first."
    recipe = tyro.cli(Recipe, prog="sft-kernels train", args=argv, default=recipe, description=description)

    from .sft.train import train

    _, _, log = train(recipe)
    print(f"{'model, log and curves' if log.curves else 'model and log'} are in {recipe.out}")
    return 0


def _inspect(argv):
    import tyro

    from .sft.dataset import load_examples
    from .sft.inspection import label_table, summary
    from .sft.masking import Encoder
    from .sft.model import load_tokenizer
    from .sft.sources import Source, check_pipes
    from .sft.train import train_tokenizer_on

    @dataclass
    class Inspect:
        """Show what a run would train on."""

        data: Annotated[list[str], tyro.conf.Positional]
        """JSONL files; - is standard input."""
        tokenizer: str | None = None
        """Folder of a tokenizer, or hf:owner/name; None: a byte-level BPE trained on the data."""
        chat_template: str | None = None
        """A file that replaces the tokenizer's chat template."""
        trust_remote_code: bool = False
        """Let Python code run that lies in the tokenizer's folder."""
        mask: Literal["all", "completion", "completion+eot"] = "completion+eot"
        """Which tokens carry loss."""
        split_turns: bool = False
        """Make an example of its own of an assistant's turn that the chat template renders differently once others
        follow."""
        cache: str | None = None
        """Folder for tokenised data, which a later run starts from; None: sft_kernels in ~/.cache."""
        row_tokens: int = 2048
        """Tokens in a packed row."""
        show: int = 1
        """How many examples to print token by token."""
        skip_bad: bool = False
        """Count and report bad lines instead of stopping at the first."""

    options = tyro.cli(Inspect, prog="sft-kernels inspect", args=argv)
    if not options.data:
        raise ValueError("data: expected at least one JSONL file")
    check_pipes(options.data)
    sources = [Source(path) for path in options.data]
    if options.tokenizer:
        tokenizer = load_tokenizer(options.tokenizer, options.chat_template, options.trust_remote_code)
    else:
        tokenizer = train_tokenizer_on(sources, 4096, options.skip_bad, options.chat_template)
        print("no --tokenizer: a byte-level BPE of up to 4096 tokens, trained on the data\n")
    encoder = Encoder(tokenizer, options.mask, options.split_turns)
    examples, bad = load_examples(sources, encoder, options.row_tokens, options.skip_bad, cache_folder=options.cache)
    for example in examples[: max(0, options.show)]:
        print(label_table(example, tokenizer) + "\n")
    print(summary(examples, options.row_tokens))
    for note in encoder.notes:
        print(note)
    for error in bad:
        print(f"skipped {error}")
    if len(bad):
        print(f"skipped {len(bad)} lines")
    return 0


def _demo(argv):
    import tyro

    from .sft import demo

    _, after = tyro.cli(demo.run, prog="sft-kernels demo", args=argv)
    if after["exact match"] < 0.8 or after["answers that stop"] < 0.99:
        print("the fine-tuned model falls short of exact match 0.8 and stops 0.99", file=sys.stderr)
        return 1
    return 0


def _verify(argv):
    from .verify import main

    return main(argv)


if __name__ == "__main__":
    sys.exit(main())
