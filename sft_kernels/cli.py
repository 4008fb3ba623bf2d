"""``sft-kernels``: train, inspect, plan, demo, verify."""

import os
import shutil
import signal
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path

from . import __version__
from ._signals import Signals
from ._terminal import ForTheUser, coloured, one_line, printable, taken

_USAGE = """usage: sft-kernels COMMAND [options]

  train    --config recipe.yaml --data FILE.jsonl ...  fine-tune a model; options override the file
  inspect  FILE.jsonl ... [options of train]           tokens beside their labels, shares, and faults
  plan     --model DIR | --params 70e9 ...             bytes a GPU, tokens and FLOPs of a run
  demo     [--out DIR]                                 the whole job on a CPU, before and after
  verify   [--ops ...] [--impls ...] [--smoke]         is every implementation right here?

sft-kernels COMMAND --help lists a command's options. sft-kernels --version prints the version."""

# The modules of the extra "train".
_TRAIN = (
    "transformers",
    "tokenizers",
    "huggingface_hub",
    "safetensors",
    "tyro",
    "tqdm",
    "yaml",
    "matplotlib",
    "jinja2",
    "pyarrow",
)


def main(argv=None):
    """Run a command; returns the exit status.

    It is 0, 1 if the input was refused, 2 for a wrong call, 130 if SIGINT ended the command, and
    143 if SIGTERM did. A run that saved its model ends with 0, whatever fails after that.
    """
    last = argv is None  # as the process's own command
    argv = sys.argv[1:] if last else list(argv)
    with taken() as output, Signals(last) as signals:
        asked = None
        try:
            status = _status(argv, signals)
        except SystemExit as end:  # of --help and of a wrong option
            asked, status = end, end.code or 0
        if error := output.lost:
            _complain(f"the output was lost ({error.strerror or error})")
            saved = argv[0] in ("train", "demo") and not asked
            status = status or int(not saved)
    if asked:
        raise SystemExit(status) from asked
    return status


class _AfterSaving(Exception):
    """Something failed after a run had saved its model; the message is one line."""


def _status(argv, signals):
    try:
        return _run(argv)
    except KeyboardInterrupt as stop:
        _complain(one_line(stop) if str(stop) else "interrupted")
        return getattr(stop, "status", 128 + signal.SIGINT)
    except Exception as error:
        if signals.end:  # which a library has made another error of
            _complain(signals.end)
            return signals.end.status
        if isinstance(error, _AfterSaving):
            _complain(f"warning: {error}")
            return 0
        if isinstance(error, ImportError):
            if (error.name or "").startswith("sft_kernels"):
                raise
            _complain(_missing(error))
        elif isinstance(error, (ValueError, OSError, ForTheUser)):
            _complain(one_line(error))
        else:
            raise
    return 1


def _run(argv):
    commands = {"train": _train, "inspect": _inspect, "plan": _plan, "demo": _demo, "verify": _verify}
    if argv and argv[0] in commands:
        return commands[argv[0]](argv[1:])
    if argv and argv[0] == "--version":
        print(f"sft-kernels {__version__}")
        return 0
    asked = bool(argv) and argv[0] in ("-h", "--help")
    print(_USAGE, file=sys.stdout if asked else sys.stderr)
    return 0 if asked else 2


def _complain(message):
    print(f"sft-kernels: {message}", file=sys.stderr)


def _missing(error):
    module = (error.name or "").partition(".")[0]
    if isinstance(error, ModuleNotFoundError) and module:
        message = f"the module {module} is missing"
    else:
        message = str(error)
    if module in _TRAIN:
        install = "pip install --no-build-isolation '.[train]' in a clone"
        message += f'; the extra "train" brings what the trainer needs: {install}'
    return one_line(message)


def _options(kind, command, argv, default=None, **more):
    """Returns the options in ``argv``; --help and a wrong option raise ``SystemExit``."""
    import tyro

    shown = list(argv)
    if default is not None:
        more["default"] = default
        for value in vars(default).values():
            shown += value if isinstance(value, list) else [value]
    with coloured(*shown), _wide_enough():
        return tyro.cli(kind, prog=f"sft-kernels {command}", args=argv, **more)


@contextmanager
def _wide_enough():
    """Let tyro see a terminal of 40 columns at least. In one of 5, its help does not come to an end."""
    before = os.environ.get("COLUMNS")
    if shutil.get_terminal_size().columns < 40:
        os.environ["COLUMNS"] = "40"
    try:
        yield
    finally:
        os.environ.pop("COLUMNS", None)
        if before is not None:
            os.environ["COLUMNS"] = before


def _configured(argv):
    """``(recipe, rest)``: the recipe that ``--config`` names, or the default one, and the other arguments."""
    from .sft.recipe import Recipe
    from .sft.recipe_file import from_yaml

    argv = [part for arg in argv for part in (arg.split("=", 1) if arg.startswith("--config=") else [arg])]
    if "--config" not in argv:
        return Recipe(), argv
    at = argv.index("--config")
    if not argv[at + 1 :] or not argv[at + 1]:
        raise ValueError("--config: expected a file")
    recipe, rest = from_yaml(argv[at + 1]), argv[:at] + argv[at + 2 :]
    if "--config" in rest:
        raise ValueError("--config: expected one file, got two")
    return recipe, rest


def _train(argv):
    from .sft.recipe import Recipe, recipe_of

    @dataclass
    class Train(Recipe):
        compare: bool = False
        """Run the recipe twice, with ours and with plain PyTorch, and compare them; no model is kept."""

    recipe, argv = _configured(argv)
    description = "--config FILE reads options from YAML first."
    options = _options(Train, "train", argv, default=Train(**vars(recipe)), description=description)
    recipe = recipe_of(options)
    if options.compare:
        from .sft.compare import compare

        compare(recipe)
        return 0

    from .sft.saving import NotSaved
    from .sft.train import train

    model = Path(recipe.out, "model").absolute()
    before = os.path.lexists(model)
    try:
        _, _, log = train(recipe)
    except Exception as error:
        if before or isinstance(error, NotSaved) or not os.path.isdir(model):
            raise
        what = f"{type(error).__name__}: {one_line(error)}"
        raise _AfterSaving(f"the model is in {printable(str(model))}, then {what}") from error
    made = "model, log and curves" if log.curves else "model and log"
    print(printable(f"{made} are in {recipe.out}"))
    return 0


def _inspect(argv):
    from .sft.inspect_options import Inspect

    recipe, argv = _configured(argv)
    description = (
        "Show what a run would train on. The options are those of train, so that the same ones show the same data; "
        "those that a look does not need are checked and change nothing. --config FILE reads options from YAML first."
    )
    options = _options(Inspect, "inspect", argv, default=Inspect(**vars(recipe)), description=description)
    if options.files and options.data != recipe.data:
        raise ValueError("data: expected files either alone or behind --data, got both")

    from .sft.inspect_command import inspect

    return inspect(options)


def _plan(argv):
    from .sft.plan import Plan, text

    print(text(_options(Plan, "plan", argv)))
    return 0


def _demo(argv):
    from .sft import demo

    @wraps(demo.run)
    def given(**options):
        return options

    _, after = demo.run(**_options(given, "demo", argv))
    if after["exact match"] < 0.8 or after["answers that stop"] < 0.99:
        print("the fine-tuned model falls short of exact match 0.8 and stops 0.99", file=sys.stderr)
        return 1
    return 0


def _verify(argv):
    from .verify import main

    return main(argv)


if __name__ == "__main__":
    sys.exit(main())
