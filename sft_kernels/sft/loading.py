"""Loads a tokenizer or a causal LM from a folder: without a question, without the hub, and without
code of the folder unless it is trusted."""

import logging
import os
import warnings
from contextlib import contextmanager
from dataclasses import replace

import torch

from .._terminal import reason_of
from . import dropout as dropouts
from . import files, folders, hub
from .endings import is_failure
from .progress import say
from .rows import DataError


def load_tokenizer(path, chat_template=None, trust_remote_code=False):
    """The tokenizer in folder ``path``; ``chat_template`` is a file that replaces its template."""
    template = None if chat_template is None else files.template(chat_template)
    folder = folders.check_tokenizer(path, trust_remote_code)
    tokenizer = _tokenizer_in(folder, trust_remote_code)
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


def load_config(path, trust_remote_code=False):
    """The transformers config of the model at ``path``, looked at as :func:`check_recipe` does."""
    path, settings, _ = folders.check_model(path, trust_remote_code)
    return _config_of(path, settings, trust_remote_code)


def load_model(path, device, trust_remote_code=False, *, dropout=0.0, dtype=torch.float32):
    """The causal LM in ``path``, attending through packed attention. Parameters are in ``dtype``;
    autocast lowers the products of fp32.

    A folder with weights is loaded; a config gives a model with random weights, drawn from torch's
    seed. ``dropout`` is the share on the outputs of attention and FFN. All other dropout that the
    config asks for is off, and a line says so.
    """
    from transformers import AutoModelForCausalLM

    from ..integrations import calls, register

    register()
    path, settings, weights = folders.check_model(path, trust_remote_code)
    as_loaded = _config_of(path, settings, trust_remote_code, dropout, dtype)
    config, off = dropouts.with_dropout(as_loaded, dropout)
    trust = {"trust_remote_code": trust_remote_code}
    options = {"dtype": dtype, "attn_implementation": calls.NAME, **trust}
    if weights:
        model = _with_weights(path, weights, {"config": config, **options})
    else:
        with _guarded("model", path):
            model = AutoModelForCausalLM.from_config(config, **options)
    if weights and not trust_remote_code and (code := folders.code_of(path, "model")):
        say(f"model: {code[0]} does not run; transformers' {type(model).__name__} takes its place")
    if off:
        say(f"model: dropout that its config asks for is off: {', '.join(f'{n}={p}' for n, p in off.items())}")
    model = model.to(device)
    _own_memory(model)
    dropouts.remember(model, as_loaded)
    return model


def _with_weights(path, weights, options):
    from transformers import AutoModelForCausalLM

    def fault():
        from transformers import GenerationConfig

        if (file := path / files.GENERATION).is_file():
            with _line("model", file):
                GenerationConfig.from_pretrained(str(path), local_files_only=True).validate()

    with _guarded("model", path, fault):
        model, found = AutoModelForCausalLM.from_pretrained(
            path, output_loading_info=True, ignore_mismatched_sizes=True, local_files_only=True, **options
        )
        if wrong := sorted(found["mismatched_keys"]):
            name, there, asked = wrong[0]
            many = f"{len(wrong)} weights of {_listed(weights)} do" if len(wrong) > 1 else f"{_listed(weights)} does"
            raise _Refused(
                f"model: {many} not fit {files.CONFIG}: {name} is {list(there)} there, {list(asked)} is asked for"
            )
        if missing := sorted(found["missing_keys"]):  # tied weights are none
            many = f"{len(missing)} weights that its config asks for, such as " if len(missing) > 1 else ""
            raise _Refused(f"model: {path} lacks {many}{missing[0]}")
        if errors := found.get("error_msgs"):
            raise _Refused(f"model: {path} cannot be loaded ({' '.join(str(errors[0]).split())[:300]})")
    return model


def _own_memory(model):
    """Give each parameter and buffer memory of its own, of torch's allocator.

    Loaded weights may be views into a mapped file, at any address. Kernels may sum in another order
    there, and a resumed run, whose weights lie elsewhere, would not go on bit for bit. Tied weights
    are one parameter and stay so.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()


def check_recipe(recipe, model_given=False, tokenizer_given=False, dtype=torch.float32):
    """The recipe with paths in the place of names on the hub; what it loads is looked at, before
    any data are read. ``dtype`` is that of the parameters.

    Nothing large is read or made for that: a model is built without memory for its weights.
    """
    changes, trust, dropout = {}, recipe.trust_remote_code, recipe.dropout
    if dropout and model_given:
        raise ValueError("dropout: is for a model that is loaded; set it in the config of the one that is handed in")
    for path in (*recipe.data, *recipe.eval_data):
        if path != "-" and not os.path.exists(path):
            raise DataError(path, None, "no such file")
    if not model_given:
        folders.settings_of(recipe.model, trust)
    if recipe.chat_template is not None and not tokenizer_given:
        files.check_template(recipe.chat_template)
    if not tokenizer_given and (recipe.tokenizer is not None or not folders.is_config(recipe.model)):
        name = recipe.model if recipe.tokenizer is None else recipe.tokenizer
        changes["tokenizer"] = str(folders.check_tokenizer(name, trust))
    if not model_given:
        path, settings, _ = folders.check_model(recipe.model, trust)
        _config_of(path, settings, trust, dropout, dtype)
        changes["model"] = str(path)
    return replace(recipe, **changes)


class _Refused(ValueError):
    """A line for the user already."""


def _tokenizer_in(folder, trust_remote_code):
    from transformers import AutoTokenizer

    code = folders.code_of(folder, "tokenizer", trust_remote_code)

    def fault():
        from tokenizers import Tokenizer

        files.check_tokenizer_files(folder, "tokenizer", in_full=True)
        if (file := folder / "tokenizer.json").is_file():
            with _line("tokenizer", file):
                Tokenizer.from_file(str(file))
            return folder / files.TOKENIZER_CONFIG
        return files.vocabulary_file(folder)

    with _guarded("tokenizer", folder, fault, code):
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=trust_remote_code, local_files_only=True
        )
    for name in ("is_local", "local_files_only"):  # how it was loaded, which would be saved with it
        tokenizer.init_kwargs.pop(name, None)
    if code and not trust_remote_code:
        say(f"tokenizer: {code[0]} does not run; {type(tokenizer).__name__} takes its place")
    return tokenizer


def _config_of(path, settings, trust_remote_code, dropout=0.0, dtype=torch.float32):
    """The config at ``path``, after a model of it was built on the meta device and found to fit."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from ..integrations import calls, register

    register()
    file = path / files.CONFIG if path.is_dir() else path
    code = folders.code_of(path, "model", trust_remote_code)
    with _guarded("model", file, code=code):
        config = AutoConfig.from_pretrained(str(path), trust_remote_code=trust_remote_code, local_files_only=True)
    with _guarded("model", file, code=code):
        text = config.get_text_config()
        _check_text_config(config, text, settings, file)
    dropouts.check(config, dropout)
    with _guarded("model", file, code=code):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                dropouts.with_dropout(config, dropout)[0],
                dtype=dtype,
                attn_implementation=calls.NAME,
                trust_remote_code=trust_remote_code,
            )
        if empty := next((name for name, weight in model.named_parameters() if not weight.numel()), None):
            raise _Refused(f"model: {file} makes a weight without a number, {empty}")
        needed, most = sum(w.numel() * w.element_size() for w in model.parameters()), files.memory()
        if needed > most:
            raise _Refused(
                f"model: {file} asks for {needed / 2**30:.4g} GiB of weights in {dtype}; "
                f"this machine has {most / 2**30:.4g} GiB of memory"
            )
    return config


def _check_text_config(config, text, settings, file):
    from transformers import MODEL_FOR_MASKED_LM_MAPPING

    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise _Refused(f"model: {file}: {kind} has an encoder beside its decoder, so it is no causal LM")
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and getattr(text, "is_decoder", None) is False:
        raise _Refused(f"model: {file}: {kind} is an encoder (is_decoder is false), so it is no causal LM")
    size, heads, pairs = (
        getattr(text, name, None) for name in ("hidden_size", "num_attention_heads", "num_key_value_heads")
    )
    if not isinstance(heads, int):
        return
    if heads < 1:
        raise _Refused(f"model: {file}: num_attention_heads: expected at least 1, got {heads}")
    own = any("head_dim" in key or key == "kv_lora_rank" for key, _ in folders.entries(settings))
    if isinstance(size, int) and size % heads and not own:
        raise _Refused(f"model: {file}: hidden_size {size} is no multiple of num_attention_heads {heads}")
    if isinstance(pairs, int) and (pairs < 1 or heads % pairs):
        raise _Refused(f"model: {file}: num_attention_heads {heads} is no multiple of num_key_value_heads {pairs}")


@contextmanager
def _guarded(argument, path, fault=None, code=()):
    """In the block the hub is not asked and transformers says nothing; every error becomes one line.

    ``fault()`` is called after one. It returns the file at fault or None, or raises a better error.
    What transformers had to say comes after the block, unless it failed.
    """
    with hub.unasked(), _said_later():
        try:
            yield
        except _Refused:
            raise
        except BaseException as error:
            if not is_failure(error):
                raise
            if code and "trust_remote_code" in str(error):
                raise folders.needs_code(path, argument, code) from error
            try:
                file = None if fault is None else fault()
            except ValueError as found:
                raise found from error
            raise ValueError(f"{argument}: {file or path} cannot be loaded ({_reason(error)})") from error


@contextmanager
def _line(argument, file):
    """Turn an error in the block into one line that names ``file``."""
    try:
        yield
    except BaseException as error:
        if not is_failure(error):
            raise
        raise ValueError(f"{argument}: {file} cannot be loaded ({_reason(error)})") from error


def _reason(error):
    """Why a library failed, without what it says about arguments of its own."""
    if isinstance(error, MemoryError):
        return "there is not enough memory"
    if isinstance(error, KeyError):
        return f"it has no {error}"
    if isinstance(error, ZeroDivisionError):
        return "a value is 0 that something is divided by"
    parts = reason_of(error).split(". ")
    kept = [part for part in parts[:2] if "=" not in part and "`" not in part] or parts[:1]
    return ". ".join(kept).rstrip(".")


@contextmanager
def _said_later():
    """Hold back warnings and transformers' log. They come after the block; an error drops them."""
    from transformers.utils import logging as transformers_logging

    logger = transformers_logging.get_logger("transformers")
    handlers, propagate, held = logger.handlers[:], logger.propagate, []
    holder = logging.Handler()
    holder.emit = held.append
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    logger.handlers, logger.propagate = [holder], False
    try:
        with warnings.catch_warnings(record=True) as warned:
            yield
    finally:
        logger.handlers, logger.propagate = handlers, propagate
        if shown:
            transformers_logging.enable_progress_bar()
    for record in held:
        logger.callHandlers(record)
    for warning in warned:
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def _listed(paths):
    return str(paths[0]) if len(paths) == 1 else f"{paths[0].parent} ({len(paths)} files)"
