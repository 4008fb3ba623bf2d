"""``sft-kernels inspect``: shows what a run of the same recipe would train on."""

import os
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Annotated

import torch
from tyro.conf import Positional

from . import model as models
from . import state
from .audit import audit
from .dataset import load_examples
from .inspection import findings, label_table, show, summary
from .loading import check_recipe
from .masking import Encoder
from .precision import dtype_of
from .prepare import prepare_tokenizer, train_tokenizer_on
from .progress import say
from .recipe import Recipe, check
from .resume import earlier_model
from .sources import Source, check_pipes

_VOCABULARY = 4096  # of a tokenizer that is trained on the data, if no model says how large it is


@dataclass
class Inspect(Recipe):
    """A recipe, and how to look at its data.

    Options of the recipe that a look does not need are checked as ``train`` does, and change nothing.
    """

    files: Annotated[list[str], Positional] = field(default_factory=list)
    """The data; the same as --data."""
    show: int = 1
    """How many examples to print token by token."""
    html: str | None = None
    """Write a page to look at into this file. It loads nothing else. With a model it has the model's loss."""

    def recipe(self):
        """The :class:`~.recipe.Recipe` in these options, checked. It need not name a model."""
        recipe = Recipe(**{option.name: getattr(self, option.name) for option in fields(Recipe)})
        recipe.data = self.files or recipe.data
        check(recipe, model_given=not (recipe.model or recipe.init_from))
        if recipe.init_from:
            recipe.model = earlier_model(recipe.init_from)
        return recipe


def inspect(options):
    """Print some examples, the numbers of all of them, and the findings.

    Returns the exit status: 1 if a check failed.
    """
    recipe = options.recipe()
    if options.show < 0:
        raise ValueError(f"show: expected 0 or more, got {options.show}")
    if options.html is not None:
        _check_page(options.html, recipe.data)
        if recipe.model:
            recipe = check_recipe(recipe, dtype=dtype_of(recipe.parameters))
    check_pipes(recipe.data)
    sources = [Source(path) for path in recipe.data]
    if recipe.tokenizer or recipe.model:
        tokenizer = prepare_tokenizer(recipe, sources)
    else:
        tokenizer = train_tokenizer_on(sources, _VOCABULARY, recipe.skip_bad, recipe.chat_template)
        say(f"no tokenizer and no model: a byte-level BPE of up to {_VOCABULARY} tokens, trained on the data")
    encoder = Encoder(tokenizer, recipe.mask, recipe.split_turns)
    examples, bad = load_examples(sources, encoder, recipe.row_tokens, recipe.skip_bad, cache_folder=recipe.cache)
    found = audit(examples, encoder, recipe.row_tokens)

    for example in examples[: options.show]:
        show(partial(label_table, example, tokenizer))
        print()
    print(summary(found))
    for note in encoder.notes:
        say(note)
    for error in bad:
        say(f"skipped {error}")
    if len(bad):
        say(f"skipped {len(bad)} lines")
    if recipe.holdout:
        say(f"holdout: the share {recipe.holdout} that train would keep out of training is counted here")
    if recipe.eval_data:
        say("eval_data: not looked at")
    print()
    show(partial(findings, found))
    if options.html is not None:
        from .page import write_page

        model = _model(recipe, tokenizer) if recipe.model else None
        write_page(options.html, recipe, sources, examples, tokenizer, found, shown=options.show, model=model)
        say(f"the page is in {options.html}")
    return 1 if found.failed else 0


def _check_page(path, data):
    """Raise for a path that no file can be written to, or that is one of the ``data``."""
    folder = os.path.dirname(path) or "."
    if not os.path.basename(path) or "\0" in path:
        raise ValueError("html: expected a file")
    if os.path.isdir(path):
        raise IsADirectoryError(f"html: {path} is a folder, expected a file")
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"html: no such folder: {folder}")
    if os.path.exists(path) and any(os.path.exists(file) and os.path.samefile(path, file) for file in data):
        raise ValueError(f"html: {path} is a file of the data")
    if not os.access(path if os.path.exists(path) else folder, os.W_OK):
        raise PermissionError(f"html: {path} cannot be written to (no permission)")


def _model(recipe, tokenizer):
    """The recipe's model as a run of it begins with."""
    state.seed(recipe.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = models.load_model(
        recipe.model, device, recipe.trust_remote_code, dropout=recipe.dropout, dtype=dtype_of(recipe.parameters)
    )
    models.check_vocabulary(model, tokenizer)
    return model
