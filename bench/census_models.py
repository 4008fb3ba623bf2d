"""Small random models of every class of transformers that predicts tokens, and batches for them.

A configuration is shrunk by the names of its fields (:data:`SIZES`), down through its nested configurations. A class
for which this is not enough has a line in :data:`OVERRIDES`.
"""

import copy
import dataclasses
import inspect
import re
from typing import NamedTuple

import torch
import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

MAPPINGS = ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ")
ENDINGS = ("ForConditionalGeneration", "LMHeadModel", "CausalLM")

VOCAB, FIRST_WORD = 331, 200  # words are [FIRST_WORD, VOCAB); special tokens stand below
ROWS, TOKENS, PROMPT = 2, 19, 11
WINDOW = 6  # less than TOKENS
FRAMES = 256  # of sound: twice the positions of an encoder
MOST_PARAMETERS = 30_000_000

# The first pattern that matches the whole name of an integer field decides.
SIZES = {
    r"codebook_size": 256,  # some want a power of two
    r"additional_vocab_size": 0,
    r".*(vocab_size|_vocab|vocab_size_per_layer_input)|n_words": VOCAB,
    r"(.*_)?(sliding_window|attention_chunk_size|local_attention)": WINDOW,
    r"max_window_layers": 1,
    r"pad_(token_id|index)": 0,
    r"eos_(token_id|index)": 1,
    r"bos_(token_id|index)|decoder_start_token_id": 2,
    r"num_kv_shared_layers": 0,
    r"first_k_dense_replace|num_dense_layers": 1,
    r"(.*_)?(num_hidden_layers|num_layers|n_layers?|encoder_layers|decoder_layers|layers|depth)": 2,
    r"(.*_)?(num_key_value_heads|num_kv_heads)": 2,
    r"(.*_)?(head_dim|kv_channels|d_kv|dim_head)|rotary_dim": 16,
    r"(.*_)?(attention_heads|num_heads|n_heads?|num_key_heads|num_value_heads)": 4,
    r"n_groups?|topk_group|mamba_n_?groups": 1,
    r"upsample_groups": 8,
    r"num_filters": 4,
    r"num_query_tokens|latent_query_num": 4,
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
    r"sliding_window": WINDOW,
    r"head_dim": 16,
    r"num_key_value_heads": 4,
    r"num_experts_per_tok": 2,
    r"n_routed_experts": 4,
    r"n_shared_experts": 1,
    r"n_group|topk_group": 1,
    r"final_logit_softcapping": 30.0,
}
WIDTH_LISTS = r"(hidden_sizes|embed_dims?|(conv_)?channels|.*_channels|dims)"
NEUTRAL = r"logits?_scal(e|ing)|lm_head_multiplier|output_multiplier|logits_mup_width_multiplier"  # 1.0 would hide it


def _mrope(*sections):
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sections)}}


_BOTH_ATTENTIONS = {"layer_types": ["sliding_attention", "full_attention"]}
_IMAGE_WORDS = {f"IMGIMG{letter}Z": 100 + i for i, letter in enumerate("ABCD")}

# Fields, of classes for which the names of the fields do not tell all.
OVERRIDES = {
    "Apertus1p5ForConditionalGeneration": {
        "image_token_offset": 20,
        "audio_token_offset": 276,
        "text_config": {"vocab_size": 600},
    },
    "BambaForCausalLM": {"z_loss_coefficient": 0.01},
    "Blip2ForConditionalGeneration": {"image_token_index": 99},
    "BltForCausalLM": {"encoder_config": {"hidden_size_global": 64}, "decoder_config": {"hidden_size_global": 64}},
    "CanaryForConditionalGeneration": {"decoder_start_token_id": 2},
    "ChameleonForConditionalGeneration": {"vocabulary_map": {"<image>": 99, **_IMAGE_WORDS}},
    "CohereAsrForConditionalGeneration": {"decoder_start_token_id": 2},
    "CohereCompassForCausalLM": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2]}
        }
    },
    "CohereCompassForConditionalGeneration": {
        "text_config": {
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2]}
            }
        }
    },
    "Cosmos3EdgeForConditionalGeneration": {"text_config": _mrope(2, 3, 3)},
    "DbrxForCausalLM": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "DeepseekOcr2ForConditionalGeneration": {"text_config": {"mlp_layer_types": ["dense", "sparse"]}},
    "DiffusionGemmaForBlockDiffusion": {
        "text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32, **_BOTH_ATTENTIONS}
    },
    "Dots3NoteForConditionalGeneration": {"text_config": {"per_layer_config": {}}},
    "Emu3ForConditionalGeneration": {
        "vocabulary_map": {"<image>": 99, "<|extra_200|>": 98, "<|visual token 000000|>": 97}
    },
    "EncoderDecoderModel": {
        "decoder_start_token_id": 2,
        "pad_token_id": 0,
        "encoder": {"model_type": "bert"},
        "decoder": {"model_type": "bert", "is_decoder": True, "add_cross_attention": True},
    },
    "Ernie4_5_VL_MoeForConditionalGeneration": {"text_config": {"moe_intermediate_size": [32, 32], **_mrope(3, 3, 2)}},
    "Ernie4_5_VLMoeForConditionalGeneration": {"text_config": {"moe_intermediate_size": [32, 32], **_mrope(3, 3, 2)}},
    "FunAsrNanoForConditionalGeneration": {"adaptor_config": {"intermediate_size": 16}},
    "Gemma3nForCausalLM": {"num_kv_shared_layers": 0, **_BOTH_ATTENTIONS},
    "Gemma4AssistantForCausalLM": {"text_config": {"hidden_size_per_layer_input": 0}},
    "Gemma4ForCausalLM": _BOTH_ATTENTIONS,
    "Gemma4ForConditionalGeneration": {"text_config": _BOTH_ATTENTIONS},
    "Gemma4UnifiedForCausalLM": _BOTH_ATTENTIONS,
    "Gemma4UnifiedForConditionalGeneration": {"text_config": _BOTH_ATTENTIONS},
    "Glm46VForConditionalGeneration": {"text_config": _mrope(2, 3, 3)},
    "Glm4vForConditionalGeneration": {"text_config": _mrope(2, 3, 3)},
    "Glm4vMoeForConditionalGeneration": {"text_config": _mrope(1, 1, 2)},
    "Glm5NextForConditionalGeneration": {"text_config": {"index_topk": 16, "qk_rope_head_dim": 0}},
    "GlmImageForConditionalGeneration": {"text_config": _mrope(2, 3, 3)},
    "GlmOcrForConditionalGeneration": {"text_config": _mrope(2, 3, 3)},
    "GPTNeoForCausalLM": {"attention_types": [[["global", "local"], 1]]},
    "Granite4VisionForConditionalGeneration": {
        "deepstack_layer_map": [[-1, 0]],
        "spatial_target_layers": [0, 1, 0, 1],
        "downsample_rate": "1/2",
    },
    "HunYuanVLForConditionalGeneration": {"text_config": _mrope(2, 2, 2, 2)},
    "HYV4VLForConditionalGeneration": {"text_config": _mrope(2, 3, 3)},
    "InklingForCausalLM": {"vocab_size": 2 * VOCAB, "unpadded_vocab_size": VOCAB},
    "InstructBlipForConditionalGeneration": {"image_token_index": 99},
    "InstructBlipVideoForConditionalGeneration": {"video_token_index": 99},
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention"]},
    "Mamba2ForCausalLM": {"num_heads": 8},
    "Molmo2ForConditionalGeneration": {"adapter_config": {"vision_feature_layer": [0, 1]}},
    "MoonshineForConditionalGeneration": {"pad_token_id": 0},
    "MoonshineStreamingForConditionalGeneration": {"num_key_value_heads": 4, "decoder_start_token_id": 2},
    "MuseSparkForConditionalGeneration": {"audio_config": {"num_hidden_layers": 4}},
    "MusicgenForConditionalGeneration": {"decoder": {"decoder_start_token_id": 2}},
    "MusicgenMelodyForConditionalGeneration": {"decoder": {"decoder_start_token_id": 2}},
    "NemotronH_Omni_Reasoning_V3": {"audio_config": {"projection_hidden_size": 64, "projection_bias": True}},
    "PaddleOCRVLForConditionalGeneration": {"text_config": _mrope(2, 3, 3)},
    "Qwen2_5_VLForConditionalGeneration": {"text_config": _mrope(2, 3, 3)},
    "Qwen2_5OmniThinkerForConditionalGeneration": {"text_config": _mrope(2, 3, 3), "vision_start_token_id": 98},
    "Qwen2VLForConditionalGeneration": {"text_config": _mrope(2, 3, 3)},
    "Qwen3OmniMoeTalkerForConditionalGeneration": {"text_config": {"shared_expert_intermediate_size": 96}},
    "Qwen3OmniMoeTalkerCodePredictorModelForConditionalGeneration": {"sliding_window": None},
    "ReformerModelWithLMHead": {
        "is_decoder": True,
        "axial_pos_embds": False,
        "attn_layers": ["local", "local"],
        "local_attn_chunk_length": 19,
    },
    "SpeechEncoderDecoderModel": {
        "decoder_start_token_id": 2,
        "pad_token_id": 0,
        "encoder": {"model_type": "wav2vec2"},
        "decoder": {"model_type": "bert", "is_decoder": True, "add_cross_attention": True},
    },
    "Step3p7ForConditionalGeneration": {"text_config": {"sliding_window": 8}},
    "VisionEncoderDecoderModel": {
        "decoder_start_token_id": 2,
        "pad_token_id": 0,
        "encoder": {"model_type": "vit"},
        "decoder": {"model_type": "bert", "is_decoder": True, "add_cross_attention": True},
    },
    "XmodForCausalLM": {"default_language": "en_XX"},
    "Zamba2ForCausalLM": {"layers_block_type": ["mamba", "hybrid"]},
    "ZambaForCausalLM": {"num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "hybrid"]},
    "ZayaForCausalLM": {"num_experts_per_tok": 1},
}


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
    nested = {**config_class.sub_configs, **(getattr(config_class, "sub_configs_defaults", None) or {})}
    defaults = {field.name: _default(field) for field in dataclasses.fields(config_class)}
    found = {name: _small(name, default, special) for name, default in defaults.items() if name not in nested}
    found = {name: value for name, value in found.items() if value is not None}
    found.update({name: False for name in ("use_cache", "apply_spec_augment") if name in defaults})
    if defaults.get("is_encoder_decoder") and not nested:
        found["decoder_start_token_id"] = 2
    if "num_key_value_heads" in found and defaults["num_key_value_heads"] == defaults.get("num_attention_heads"):
        found["num_key_value_heads"] = found["num_attention_heads"]
    for name, spec in nested.items():
        given = overrides.get(name, {})
        if isinstance(given, dict):
            model_type = given.get("model_type") or getattr(spec, "model_type", None)
            model_type = (
                model_type or getattr(config_class(), name).model_type
            )  # transformers 5.17 says it nowhere else
            given = _nested(spec, model_type, given, special)
        found[name] = given
    return {**found, **{name: value for name, value in overrides.items() if name not in nested}}


def _nested(spec, model_type, overrides, special):
    """The fields of a nested configuration; ``spec`` is its class, or what says its class and first fields."""
    config_class = getattr(spec, "config_class", spec)
    if not dataclasses.is_dataclass(config_class):  # AutoConfig
        config_class = CONFIG_MAPPING[model_type]
    given = dict(getattr(spec, "init_kwargs", {}))
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
        return True if name == "use_sliding_window" else None
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


def build(name, attention=None, overrides=None):
    """Returns a small model of the class ``name`` of transformers, in training, in fp32 on the CPU.

    ``attention`` is its ``attn_implementation``; ``overrides`` replaces the fields of :data:`OVERRIDES`.
    """
    model_class = getattr(transformers, name)
    config = shrunken(model_class.config_class, OVERRIDES.get(name) if overrides is None else overrides)
    if attention is not None:
        config._attn_implementation = attention
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in model_class(copy.deepcopy(config)).parameters())
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


class Words(NamedTuple):
    """Two rows of tokens; the second is shorter."""

    ids: torch.Tensor
    mask: torch.Tensor
    labels: torch.Tensor  # -100 on the prompt and on padding


def batches(model):
    """Yields ``(kind, inputs)`` for the forward of ``model``, the simplest first."""
    accepted = inspect.signature(model.forward).parameters
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(FIRST_WORD, VOCAB, (ROWS, TOKENS), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 15:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :PROMPT] = -100
    words = Words(ids, mask, labels)
    if type(model).__name__ in BATCHES:
        yield BATCHES[type(model).__name__](model.config, words)
        return
    if "input_ids" in accepted:
        if "attention_mask" in accepted:
            yield "text", {"input_ids": ids, "attention_mask": mask, "labels": labels}
        yield "text, no mask", {"input_ids": ids, "labels": labels}
    for name, shapes in MEDIA.items():
        if name not in accepted:
            continue
        for shape in shapes(model.config):
            medium = {name: torch.randn(ROWS, *shape, generator=generator)}
            yield name, {**medium, "labels": labels}
            if "input_ids" in accepted:
                yield f"{name}, text", {**medium, "input_ids": ids, "attention_mask": mask, "labels": labels}


def _first(config, *names):
    """The first of the fields ``names`` that ``config`` or a configuration inside it has."""
    nested = [value for value in vars(config).values() if isinstance(value, transformers.PreTrainedConfig)]
    for name in names:
        if isinstance(vars(config).get(name), int):
            return vars(config)[name]
    return next((value for inner in nested if (value := _first(inner, *names))), None)


def _sounds(config):
    bins = _first(config, "num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim") or 80
    return (bins, FRAMES), (FRAMES, bins)


# The shapes of one row of each medium that a forward may take beside tokens.
MEDIA = {
    "input_features": _sounds,
    "input_values": lambda config: [(3200,)],
    "pixel_values": lambda config: [(3, _first(config, "image_size") or 32, _first(config, "image_size") or 32)],
}


def _random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def _codes(*shape, high=200):
    return torch.randint(3, high, shape, generator=torch.Generator().manual_seed(3))


def _with_placeholders(words, token, count):
    ids = words.ids.clone()
    ids[:, :count] = token
    return {"input_ids": ids, "attention_mask": words.mask, "labels": words.labels}


def _blip2(config, words):
    text = _with_placeholders(words, config.image_token_index, config.num_query_tokens)
    return "image, text", {**text, "pixel_values": _random(ROWS, 3, 32, 32)}


def _instructblip(config, words):
    text = _with_placeholders(words, config.image_token_index, config.num_query_tokens)
    return "image, text", {**text, "pixel_values": _random(ROWS, 3, 32, 32), "qformer_input_ids": words.ids[:, :5]}


def _instructblip_video(config, words):
    text = _with_placeholders(words, config.video_token_index, 2 * config.num_query_tokens)
    return "video, text", {**text, "pixel_values": _random(ROWS, 2, 3, 32, 32), "qformer_input_ids": words.ids[:, :5]}


def _kosmos2(config, words):
    text = {"input_ids": words.ids, "attention_mask": words.mask, "labels": words.labels}
    where = torch.zeros_like(words.ids, dtype=torch.bool)
    where[:, 1 : 1 + config.latent_query_num] = True
    return "image, text", {**text, "pixel_values": _random(ROWS, 3, 32, 32), "image_embeds_position_mask": where}


def _idefics(config, words):
    size = config.vision_config.image_size
    text = {"input_ids": words.ids, "attention_mask": words.mask, "labels": words.labels}
    seen = torch.ones(ROWS, TOKENS, 1, dtype=torch.long)
    return "image, text", {**text, "pixel_values": _random(ROWS, 1, 3, size, size), "image_attention_mask": seen}


def _git(config, words):
    size = config.vision_config.image_size
    text = {"input_ids": words.ids, "attention_mask": words.mask, "labels": words.labels}
    return "image, text", {**text, "pixel_values": _random(ROWS, 3, size, size)}


def _pix2struct(config, words):
    patches = _random(ROWS, 16, 2 + config.vision_config.patch_embed_hidden_size)
    patches[:, :, :2] = torch.arange(1, 17)[:, None]  # row and column
    return "image", {"flattened_patches": patches, "labels": words.labels}


def _kyutai(config, words):
    return "codes", {"input_ids": _codes(ROWS, TOKENS, config.num_codebooks + 1), "labels": words.labels}


def _molmo(config, words):
    text = {"input_ids": words.ids, "attention_mask": words.mask, "labels": words.labels}
    return "text", {**text, "mm_token_type_ids": torch.zeros_like(words.ids)}


def _voxtral(config, words):
    sound = _random(ROWS, config.audio_config.num_mel_bins, TOKENS * config.audio_length_per_tok)
    return "sound, text", {"input_ids": words.ids, "labels": words.labels, "input_features": sound}


def _udop(config, words):
    text = {"input_ids": words.ids, "attention_mask": words.mask, "labels": words.labels}
    return "text, boxes", {**text, "bbox": torch.rand(ROWS, TOKENS, 1).expand(-1, -1, 4).sort().values}


def _codebooks_last(config, words):
    codes = _codes(ROWS, TOKENS, config.num_codebooks)
    return "codes", {"input_ids": codes, "labels": codes}


def _musicgen(config, words):
    codes = _codes(ROWS, TOKENS, config.num_codebooks)
    return "codes", {"input_ids": codes.transpose(1, 2).reshape(-1, TOKENS), "labels": codes}


def _musicgen_from_text(config, words):
    codes = _codes(ROWS, TOKENS, config.decoder.num_codebooks)
    return "text, codes", {"input_ids": words.ids, "attention_mask": words.mask, "labels": codes}


def _dia(config, words):
    channels = config.decoder_config.num_channels
    codes = _codes(ROWS, TOKENS, channels)
    labels = codes.transpose(1, 2).reshape(-1, TOKENS)
    return "text, codes", {"input_ids": words.ids, "decoder_input_ids": codes, "labels": labels}


def _higgs_audio(config, words):
    ids = words.ids.clone()
    ids[:, PROMPT:] = config.audio_token_id
    codes = _codes(ROWS, TOKENS - PROMPT, config.num_codebooks)
    seen = torch.ones(codes.shape[:2], dtype=torch.bool)
    audio = {"audio_input_ids": codes, "audio_input_ids_mask": seen, "audio_labels": codes}
    return "text, codes", {"input_ids": ids, **audio}


def _moshi(config, words):
    codes = {f"{who}_audio_codes": _codes(ROWS, config.num_codebooks, TOKENS) for who in ("user", "moshi")}
    return "text, codes", {"input_ids": words.ids, "text_labels": words.labels, **codes}


def _embedded(config, words):
    embedded = {"inputs_embeds": _random(ROWS, TOKENS, config.hidden_size), "attention_mask": words.mask}
    return "embedded text", {**embedded, "labels": words.labels}


def _code_predictor(config, words):
    return "codes", {"input_ids": words.ids, "labels": words.ids, "generation_steps": 0}


BATCHES = {
    "Blip2ForConditionalGeneration": _blip2,
    "CsmForConditionalGeneration": _codebooks_last,
    "DiaForConditionalGeneration": _dia,
    "GitForCausalLM": _git,
    "HiggsAudioV2ForConditionalGeneration": _higgs_audio,
    "IdeficsForVisionText2Text": _idefics,
    "InstructBlipForConditionalGeneration": _instructblip,
    "InstructBlipVideoForConditionalGeneration": _instructblip_video,
    "Kosmos2ForConditionalGeneration": _kosmos2,
    "KyutaiSpeechToTextForConditionalGeneration": _kyutai,
    "Molmo2ForConditionalGeneration": _molmo,
    "MoshiForConditionalGeneration": _moshi,
    "MusicgenForCausalLM": _musicgen,
    "MusicgenForConditionalGeneration": _musicgen_from_text,
    "MusicgenMelodyForCausalLM": _musicgen,
    "MusicgenMelodyForConditionalGeneration": _musicgen_from_text,
    "Pix2StructForConditionalGeneration": _pix2struct,
    "Qwen3OmniMoeTalkerCodePredictorModelForConditionalGeneration": _code_predictor,
    "SeamlessM4TTextToUnitForConditionalGeneration": _embedded,
    "SeamlessM4Tv2TextToUnitForConditionalGeneration": _embedded,
    "UdopForConditionalGeneration": _udop,
    "VoxtralRealtimeForConditionalGeneration": _voxtral,
}
