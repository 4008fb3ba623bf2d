"""``sft-kernels inspect``: shows what a run of the same recipe would train on."""

from functools import partial

from . import model as models
from . import state
from .audit import audit
from .inspection import findings, label_table, show, summary
from .loading import check_recipe
from .masking import Encoder
from .page import check_page, write_page
from .precision import dtype_of
from .prepare import prepare_model, prepare_tokenizer, read, train_tokenizer_on
from .progress import say
from .recipe import check, recipe_of
from .resume import earlier_model
from .sources import Source, check_pipes

_VOCABULARY = 4096  # of a tokenizer that is trained on the data, if no model says how large it is


def inspect(options):
    """Print some examples, the numbers of all of them, and the findings.

    Returns the exit status: 1 if a check failed.
    """
    recipe = _recipe(options)
    if options.show < 0:
        raise ValueError(f"show: expected 0 or more, got {options.show}")
    if options.html is not None:
        check_page(options.html, recipe.data)
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
    examples, unseen = read(recipe, sources, encoder)
    found = audit(examples, encoder, recipe.row_tokens)

    for example in examples[: options.show]:
        show(partial(label_table, example, tokenizer))
        print()
    print(summary(found))
    if len(unseen):
        say(f"held out        {len(unseen)} examples, not counted here")
    print()
    show(partial(findings, found))
    if options.html is not None:
        model = _model(recipe, tokenizer) if recipe.model else None
        write_page(options.html, recipe, sources, examples, tokenizer, found, shown=options.show, model=model)
        say(f"the page is in {options.html}")
    return 1 if found.failed else 0


def _model(recipe, tokenizer):
    """The recipe's model as a run of it begins with."""
    state.seed(recipe.seed)
    model = prepare_model(recipe)
    models.check_vocabulary(model, tokenizer)
    return model


def _recipe(options):
    """The :class:`~.recipe.Recipe` in these options, checked. It need not name a model."""
    recipe = recipe_of(options)
    recipe.data = options.files or recipe.data
    check(recipe, model_given=not (recipe.model or recipe.init_from))
    if recipe.init_from:
        recipe.model = earlier_model(recipe.init_from)
    return recipe
