"""Small random models of every class of transformers that predicts tokens, and batches for them.

A configuration is shrunk by the names of its fields (:data:`SIZES`), down through its nested configurations. A class
for which this is not enough has a line in :data:`OVERRIDES`.
"""

import dataclasses
import inspect
import re

import torch
import transformers
from transformers.configuration_utils import SubConfigSpec
from transformers.models.auto import modeling_auto

MAPPINGS = ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ")
ENDINGS = ("ForConditionalGeneration", "LMHeadModel", "CausalLM")

VOCAB, FIRST_WORD = 331, 200  # words are [FIRST_WORD, VOCAB); special tokens stand below
ROWS, TOKENS, PROMPT = 2, 19, 11
MOST_PARAMETERS = 30_000_000

# The first pattern that matches the whole name of an integer field decides.
SIZES = {
    r"codebook_size": 256,  # some want a power of two
    r".*(vocab_size|_vocab|vocab_size_per_layer_input)|n_words": VOCAB,
    r"pad_(token_id|index)": 0,
    r"eos_(token_id|index)": 1,
    r"bos_(token_id|index)|decoder_start_token_id": 2,
    r"(.*_)?(num_hidden_layers|num_layers|n_layers?|encoder_layers|decoder_layers|layers|depth)": 2,
    r"first_k_dense_replace|num_dense_layers|num_kv_shared_layers": 1,
    r"(.*_)?(num_key_value_heads|num_kv_heads)": 2,
    r"(.*_)?(head_dim|kv_channels|d_kv|dim_head)|rotary_dim": 16,
    r"(.*_)?(attention_heads|num_heads|n_heads?|num_key_heads|num_value_heads)": 4,
    r"n_group|topk_group": 1,
    r".*(top_?k|experts_per_tok)|moe_k": 2,
    r"(.*_)?(num_experts|num_local_experts|n_routed_experts|zero_expert_num)": 4,
    r"(.*_)?rank": 16,
    r"(.*_)?(max_position_embeddings|source_positions|target_positions|n_positions|n_ctx)": 128,
    r"image_size|crop_size|resolution": 32,
    r"patch_size": 8,
    r"(.*_)?(state_size|d_state)": 8,
    r"(.*_)?(intermediate_size|ffn_dim|ffn_hidden_size|d_ff|dff|dim_ff|mlp_dim|inner|expert_dim)": 96,
    r"(.*_)?(hidden_size|d_model|n_embd|embed_dim|emb_dim|embedding_size|proj_dims?|projection_dim|output_dim"
    r"|condition_dim|codebook_dim|hidden_dim|latent_channels|base_channels)": 64,
}
# The same for fields that are None by default, and then would be missed.
ABSENT = {
    r"head_dim": 16,
    r"num_key_value_heads": 4,
    r"num_experts_per_tok": 2,
    r"n_routed_experts": 4,
    r"n_group|topk_group": 1,
    r"final_logit_softcapping": 30.0,
}
WIDTH_LISTS = r"(hidden_sizes|embed_dims?|(conv_)?channels|.*_channels|dims)"
NEUTRAL = r"logits?_scal(e|ing)|lm_head_multiplier|output_multiplier|logits_mup_width_multiplier"  # 1.0 would hide it

_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}

OVERRIDES = {}


def names():
    """Returns the names of all classes that generate tokens: those of the mappings, and those so called."""
    found = {name for name in dir(transformers) if name.endswith(ENDINGS) and not name.startswith("Auto")}
    for mapping in MAPPINGS:
        for entry in getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES").values():
            found.update([entry] if isinstance(entry, str) else entry)
    return sorted(found)


def shrunken(config_class, overrides=None):
    """Returns a small configuration of ``config_class`` without dropout and without a cache.

    ``overrides`` replaces fields; a dictionary replaces fields of a nested configuration.
    """
    return config_class(**_fields(config_class, overrides or {}, {}))


def _fields(config_class, overrides, special):
    """The fields of a small ``config_class``; ``special`` collects the ids that special tokens have been given."""
    nested = {**(config_class.sub_configs or {}), **(config_class.sub_configs_defaults or {})}
    defaults = {field.name: _default(field) for field in dataclasses.fields(config_class)}
    found = {name: _small(name, default, special) for name, default in defaults.items() if name not in nested}
    found = {name: value for name, value in found.items() if value is not None}
    if "use_cache" in defaults:
        found["use_cache"] = False
    if defaults.get("is_encoder_decoder") and not nested:
        found["decoder_start_token_id"] = 2
    if "num_key_value_heads" in found and defaults["num_key_value_heads"] == defaults.get("num_attention_heads"):
        found["num_key_value_heads"] = found["num_attention_heads"]
    for name, spec in nested.items():
        given = overrides.get(name, {})
        found[name] = _nested(spec, given, special) if isinstance(given, dict) else given
    return {**found, **{name: value for name, value in overrides.items() if name not in nested}}


def _nested(spec, overrides, special):
    if not isinstance(spec, SubConfigSpec):  # the class itself
        spec = SubConfigSpec(spec)
    model_type = overrides.get("model_type") or spec.model_type
    config_class = spec.config_class
    if not dataclasses.is_dataclass(config_class):  # AutoConfig
        config_class = spec.get_config_class(model_type)
    given = dict(spec.init_kwargs)
    small = {name: _small(name, value, special) for name, value in given.items()}
    given.update({name: value for name, value in small.items() if value is not None})
    return {**_fields(config_class, {**given, **overrides}, special), "model_type": model_type}


def _default(field):
    if field.default is not dataclasses.MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else None


def _small(name, default, special):
    """Returns the small value of a field, or None if it is to keep its default."""
    if isinstance(default, bool):
        return None
    if isinstance(default, float) and re.fullmatch(r".*(drop|jitter).*", name):
        return 0.0
    if default == 1.0 and re.fullmatch(NEUTRAL, name):
        return 1.5
    if default is None:
        return _value(ABSENT, name)
    if isinstance(default, list | tuple) and default and all(type(size) is int for size in default):
        if re.fullmatch(WIDTH_LISTS, name):
            return [max(8, size // 8) for size in default]
        if re.fullmatch(r"depths", name):
            return [1 for _ in default]
        if re.fullmatch(r"eos_token_id", name):
            return 1
        return None
    if not isinstance(default, int):
        return None
    value = _value(SIZES, name)
    if value is None and re.fullmatch(r".*_(token|token_id|token_index|id)", name):
        return special.setdefault(name, 10 + len(special))
    return value


def _value(table, name):
    return next((value for pattern, value in table.items() if re.fullmatch(pattern, name)), None)


def build(name):
    """Returns a small model of the class ``name`` of transformers, in training, in fp32 on the CPU."""
    model_class = getattr(transformers, name)
    config = shrunken(model_class.config_class, OVERRIDES.get(name))
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in model_class(config).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"{size / 1e6:.0f} million parameters are too many: shrink more fields")
    torch.manual_seed(0)
    model = model_class(config).float().train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    _make_telling(model)
    return model


@torch.no_grad()
def _make_telling(model):
    """Replaces weights that would hide a mistake: biases of zero, factors of one, a head that says nothing."""
    biases = [buffer for name, buffer in model.named_buffers() if name.endswith("bias") and buffer.is_floating_point()]
    for tensor in [*model.parameters(), *biases]:
        if tensor.numel() > 1 and (tensor == tensor.flatten()[0]).all():
            tensor += 0.1 * torch.randn_like(tensor)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if isinstance(getattr(head, "weight", None), torch.Tensor):
        head.weight *= 10


def batches(model):
    """Yields ``(kind, inputs)`` for the forward of ``model``, the simplest first."""
    accepted = inspect.signature(model.forward).parameters
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(FIRST_WORD, VOCAB, (ROWS, TOKENS), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 15:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :PROMPT] = -100
    text = {"input_ids": ids, "labels": labels}
    if "attention_mask" in accepted:
        yield "text", {**text, "attention_mask": mask}
    yield "text, no mask", text
