"""Sets the dropout of a model that is loaded: one share on the outputs of attention and FFN.

transformers' models read their dropout from the config, some as they are built and some in each
forward. So the config of a model in memory has the values of the run. A saved config has those that
the folder came with.
"""

import copy
from contextlib import contextmanager
from functools import reduce

# Dropout on what attention and FFN give back to the residual stream. BERT, BioGPT, GPT-NeoX and OPT
# have one value for these outputs and the embeddings.
_OUTPUTS = (
    "dropout",
    "hidden_dropout",
    "hidden_dropout_prob",
    "resid_dropout",
    "resid_pdrop",
    "residual_dropout",
)
_OF_WEIGHTS = ("mllama_text_model",)  # models whose `dropout` is that of attention weights
_OF_OTHER_HEADS = ("classifier", "summary")


def outputs_of(config):
    """The names in ``config`` of dropout on the outputs of attention and FFN."""
    text = config.get_text_config()
    return [] if text.model_type in _OF_WEIGHTS else [name for name in _OUTPUTS if name in vars(text)]


def check(config, dropout):
    """Raise ``ValueError`` for a share that is none, or one that a model of ``config`` cannot have."""
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout: expected a share from 0 to 1, got {dropout}")
    if dropout and not outputs_of(config):
        raise ValueError(
            f"dropout: {type(config.get_text_config()).__name__} offers none on the outputs of attention and FFN, so "
            "that this model has no place for it; leave it at 0"
        )


def asks_for_any(config):
    """Returns True if ``config`` asks for any dropout."""
    return any(share for _, share in _shares(config))


def with_dropout(config, dropout):
    """Returns `(config, off)`: a copy with ``dropout`` on the outputs of attention and FFN and
    nowhere else, and the shares that the config asks for in other places, by name.
    """
    config = copy.deepcopy(config)
    asked = {name: share for name, share in _shares(config) if share}
    for name in asked:
        _set(config, name, 0.0)
    if dropout:
        for name in outputs_of(config):
            setattr(config.get_text_config(), name, dropout)
    return config, {name: share for name, share in asked.items() if not _get(config, name)}


def remember(model, config):
    """Let :func:`as_loaded` know the ``config`` that the model's folder came with."""
    if type(model.config) is not type(config):  # transformers made a model of the text alone
        config = config.get_text_config()
    model.dropout_as_loaded = dict(_shares(config))


@contextmanager
def as_loaded(model):
    """Lets the model's config ask for the dropout that its folder came with, in the block."""
    shares = getattr(model, "dropout_as_loaded", {})
    now = {name: _get(model.config, name) for name in shares}
    try:
        for name, share in shares.items():
            _set(model.config, name, share)
        yield
    finally:
        for name, share in now.items():
            _set(model.config, name, share)


def _shares(config):
    """Yields `(name, share)` of each dropout in ``config``; those of configs inside have dotted names."""
    from transformers import PreTrainedConfig

    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            yield from ((f"{name}.{inner}", share) for inner, share in _shares(value))
        elif "drop" in name and not name.startswith(_OF_OTHER_HEADS) and type(value) in (int, float, type(None)):
            yield name, value


def _get(config, name):
    return reduce(getattr, name.split("."), config)


def _set(config, name, share):
    *path, last = name.split(".")
    setattr(reduce(getattr, path, config), last, share)
