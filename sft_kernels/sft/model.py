"""A Hugging Face causal LM as the trainer uses it, and the tokenizer that is trained here."""

import os
from contextlib import contextmanager

import torch

from . import whole
from .dropout import as_loaded, asks_for_any
from .folders import is_config as is_config
from .loading import load_model as load_model
from .loading import load_tokenizer as load_tokenizer

# What a tokenizer that is trained here renders conversations with. It marks what the assistant says.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] or '' }}"
    "{% for call in message['tool_calls'] or [] %}{{ call | tojson }}{% endfor %}"
    "{{ '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PAD, END_OF_TEXT, START_OF_TURN, END_OF_TURN = "<|pad|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"


def train_tokenizer(texts, vocab_size):
    """A byte-level BPE over ``texts`` with a chat template; padding, end of text and end of turn are four different
    tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = [PAD, END_OF_TEXT, START_OF_TURN, END_OF_TURN]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        eos_token=END_OF_TEXT,
        additional_special_tokens=[START_OF_TURN, END_OF_TURN],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
    )


def causal_lm(model):
    """The transformers model inside a PEFT model; any other model is returned as it is."""
    get_base_model = getattr(model, "get_base_model", None)
    return model if get_base_model is None else get_base_model()


def check_given(model):
    """Raise if ``model`` has nothing to train, or adapters that packed rows or this trainer's loss would leave out."""
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("model: no parameter requires a gradient, so that there is nothing to train")
    if not hasattr(model, "peft_config"):
        return
    name = type(model).__name__
    if not hasattr(model, "get_base_model"):
        raise ValueError(f"model: {name} cannot be saved; use get_peft_model without mixed=True")
    for config in (model.peft_config[adapter] for adapter in model.active_adapters):
        kind = getattr(config.peft_type, "value", config.peft_type)
        if config.is_prompt_learning or config.is_adaption_prompt:
            raise ValueError(
                f"model: the adapter {kind} puts tokens of its own before a row, not before each packed example; "
                "use one that changes layers, such as LoRA"
            )
        if getattr(config, "alora_invocation_tokens", None) or kind == "XLORA":
            raise ValueError(
                f"model: an adapter of the kind {'aLoRA' if kind == 'LORA' else kind} looks at the whole row before it "
                "is computed, so that packed examples would share it; use plain LoRA"
            )
    head(model)


def check_vocabulary(model, tokenizer):
    """Raise where the tokenizer has tokens that the model has no embedding for."""
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ValueError(f"tokenizer: has {len(tokenizer)} tokens, the model embeds {rows}")
    token, number = max(tokenizer.get_vocab().items(), key=lambda item: item[1], default=("", 0))
    if number >= rows:
        raise ValueError(f"tokenizer: {token[:50]!r} has the number {number}, the model embeds {rows} tokens")


def head(model):
    """What :func:`sft_kernels.linear_cross_entropy` has to know of the model's head, as its keyword arguments.

    Weight and bias, and from the config the scale of the logits (Cohere multiplies, Granite divides) and their softcap
    (Gemma 2). That this is all the model does to them, and that hooks behind the head do nothing to them, is for
    :mod:`.stock` to find out.

    Raises ``ValueError`` for a model without a head, for one that is no plain linear layer (adapted or quantised), and
    for one with a hook in front of it, which may compute the weight.
    """
    from ..ops.linear_cross_entropy.head import weight_and_bias

    layer = causal_lm(model).get_output_embeddings()
    if layer is None:
        raise ValueError(f"model: {type(model).__name__} has no output embeddings, so it is no causal LM")
    if hasattr(layer, "base_layer") or hasattr(layer, "token_adapter"):
        raise ValueError(
            "model: an adapter on the head is not supported, since the loss multiplies by the head's weight itself; "
            "leave the head out of target_modules, or train it whole with modules_to_save"
        )
    if hasattr(layer, "modules_to_save"):  # PEFT's copy of the head, which it trains
        active = layer.active_adapters[:1]
        copied = active and not layer.disable_adapters and active[0] in layer.modules_to_save
        layer = layer.modules_to_save[active[0]] if copied else layer.original_module
    try:
        weight, bias = weight_and_bias(layer, f"model: the head of {type(model).__name__}", hooks=True)
    except TypeError as error:
        raise ValueError(str(error)) from error
    config = model.config.get_text_config()
    scale, divisor = (getattr(config, name, None) for name in ("logit_scale", "logits_scaling"))
    return {
        "linear_weight": weight,
        "linear_bias": bias,
        "logit_scale": 1 / divisor if divisor else scale,
        "softcap": getattr(config, "final_logit_softcapping", None),
    }


def hidden_states(model, batch):
    """``[1, T, D]`` of a packed :class:`~.packing.Batch`, every example seeing itself alone."""
    return (
        causal_lm(model)
        .base_model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            cu_seq_lens_q=batch.cu_seqlens,
            cu_seq_lens_k=batch.cu_seqlens,
            max_length_q=batch.max_seqlen,
            max_length_k=batch.max_seqlen,
            use_cache=False,
        )
        .last_hidden_state
    )


@contextmanager
def boundaries_given(model):
    """Packed attention without transformers' masks, as long as the block runs.

    By default transformers makes masks. For that it looks at ``position_ids``, and the host waits for the device in
    every forward. :func:`hidden_states` passes boundaries, so there is no mask to make. A model with another attention
    is left alone.
    """
    from ..integrations import calls

    model = causal_lm(model)
    if model.config._attn_implementation != calls.NAME:
        yield
        return
    model.set_attn_implementation(calls.GIVEN)
    try:
        yield
    finally:
        model.set_attn_implementation(calls.NAME)


def checkpoint_activations(model):
    """Keep the inputs of layers alone for backward, which computes each layer again.

    Numbers and gradients stay the same to the bit, with dropout, too. It is done in training only.

    Raises:
        ValueError: transformers cannot do it with this model.
    """
    from ..integrations import calls

    model = causal_lm(model)
    enable = getattr(model, "activation_checkpointing_enable", None)
    enable = enable or model.gradient_checkpointing_enable  # of transformers before 5.24
    try:
        enable({"use_reentrant": False, "context_fn": calls.for_recomputation})
    except ValueError as error:
        raise ValueError(
            f"activation_checkpointing: {type(model).__name__} does not support it; leave it off"
        ) from error
    model.disable_input_require_grads()  # only reentrant checkpoints need gradients of frozen embeddings


def checkpoint_in_evaluation(model):
    """Let a model in evaluation mode checkpoint its activations, too, if it does in training.

    Not if its config asks for dropout, which a layer may apply itself.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    if asks_for_any(model.config):
        return
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
            module.training = True  # of the layer alone, not of those inside


@contextmanager
def stock_attention(model):
    """The model in evaluation with attention of transformers' own, as decoding with a cache needs; both are put back
    after."""
    was_training, implementation = model.training, model.config._attn_implementation
    model.eval()
    causal_lm(model).set_attn_implementation(stock_implementation(model))
    try:
        yield
    finally:
        causal_lm(model).set_attn_implementation(implementation)
        model.train(was_training)


def stock_implementation(model):
    """The name of the attention under :func:`stock_attention`."""
    capped = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)  # which sdpa leaves out
    return "sdpa" if causal_lm(model)._supports_sdpa and not capped else "eager"


def stop_at(model, token):
    """Let ``generate`` end an answer at ``token``, beside whatever ended one before."""
    model = causal_lm(model)
    known = model.generation_config.eos_token_id
    known = known.tolist() if isinstance(known, torch.Tensor) else known
    known = [] if known is None else list(known) if isinstance(known, (list, tuple)) else [known]
    model.generation_config.eos_token_id = list(dict.fromkeys([*known, token]))


def save(model, tokenizer, path, replace=False):
    """A folder that ``from_pretrained`` loads, there in whole or not at all."""

    def fill(folder):
        save_model(model, folder)
        tokenizer.save_pretrained(folder)

    whole.write(path, fill, replace)


def save_model(model, folder):
    """The model's files in ``folder``; of a PEFT model its adapters, and what ends an answer.

    Its config asks for the dropout that its folder came with. It is written without transformers' progress bar, which
    raises if the screen is gone.
    """
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        inside = causal_lm(model)
        with as_loaded(inside):
            model.save_pretrained(folder)
        if inside is not model and getattr(inside, "generation_config", None) is not None:
            inside.generation_config.save_pretrained(folder)
    finally:
        if shown:
            logging.enable_progress_bar()
