"""Makes a generation config that transformers saves, out of one that it does not."""

import copy
import re

# Values that only sampling reads, each with the one that changes nothing.
_SAMPLING = {
    "temperature": 1.0,
    "top_p": 1.0,
    "min_p": None,
    "top_h": None,
    "typical_p": 1.0,
    "top_k": 50,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
}
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def saveable(config, folder, pad_token_id=None):
    """Returns `(config, change)`; `folder` exists, and is written to for the trial.

    A config that transformers saves comes back as it is, with ``None``. Otherwise a changed copy
    comes back, and one line that says what was changed. Values for sampling without ``do_sample``
    mean that answers are sampled, so ``do_sample`` becomes true. Every other value that stands in
    the way is left out.
    """
    reason = _refusal(config, folder)
    if reason is None:
        return config, None
    changed, changes = copy.deepcopy(config), []
    asked = {name: getattr(changed, name, None) for name in _SAMPLING}
    asked = {name: value for name, value in asked.items() if value not in (None, _SAMPLING[name])}
    if asked and changed.do_sample is None and asked.get("temperature") != 0:
        changed.do_sample = True
        changes.append(f"do_sample is now True, because it sets {_listed(asked)}")
        reason = _refusal(changed, folder)
    left_out = {}
    while reason is not None and (name := _culprit(reason, changed)) is not None:
        left_out[name] = getattr(changed, name)
        # A value that is no field of the config is refused even as None.
        setattr(changed, name, None) if hasattr(type(config)(), name) else delattr(changed, name)
        reason = _refusal(changed, folder)
    if reason is not None:
        changed = type(config)(**{name: getattr(config, name, None) for name in _TOKENS})
        if _refusal(changed, folder) is not None:
            changed = type(config)()
        changes.append(f"nothing but its tokens is kept ({reason})")
    elif left_out:
        changes.append(f"{_listed(left_out)} left out")
    if pad_token_id is not None and left_out.get("pad_token_id") is not None:
        changed.pad_token_id = pad_token_id
        changes.append(f"pad_token_id is now {pad_token_id}, the tokenizer's")
    what = "transformers refuses to save it, so it is changed"
    return changed, f"generation config: {what}: {'; '.join(changes)}"


def move_from_model_config(model):
    """Move values of generation from the model's config, which is not saved with them; returns what
    was moved.

    A value that the generation config sets already stays as it is there.
    """
    found = getattr(model.config, "_get_generation_parameters", dict)()
    default = type(model.generation_config)()
    for name, value in found.items():
        if getattr(model.generation_config, name, None) == getattr(default, name, None):
            setattr(model.generation_config, name, value)
        delattr(model.config, name)
    return found and f"model: moved {_listed(found)} from its config to its generation config"


def _refusal(config, folder):
    """Returns the reason why transformers does not save ``config``, or None."""
    try:
        config.save_pretrained(folder)
    except Exception as error:  # whatever it raises, nothing is saved
        return " ".join(str(error).split()) or type(error).__name__
    return None


def _culprit(reason, config):
    """Returns the value that a refusal is about: of those it names in backticks, the first that is
    set."""
    for name in re.findall(r"- `(\w+)`:", reason) or re.findall(r"`(\w+)`", reason):
        if name not in ("do_sample", "num_beams") and getattr(config, name, None) is not None:
            return name
    return None


def _listed(values):
    return ", ".join(f"{name}={value!r}" for name, value in values.items())
