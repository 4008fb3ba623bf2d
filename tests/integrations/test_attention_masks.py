"""Masks that only our attention reads, and calls that go to transformers' own attention."""

import copy
import functools
import subprocess
import sys

import pytest
import torch

from bench import census_models
from sft_kernels.integrations import NAME, attention, calls, masks

transformers = pytest.importorskip("transformers")

from transformers import masking_utils  # noqa: E402
from transformers.models.gemma3 import modeling_gemma3  # noqa: E402

LENGTHS = (7, 12, 1, 9)
IDS = torch.randint(200, 331, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(0))
POSITIONS = torch.cat([torch.arange(l) for l in LENGTHS])[None]
BOUNDS = torch.tensor([0, 7, 19, 20, 29], dtype=torch.int32)


def pair(name, overrides=None, ours=NAME):
    """Returns the same model twice: with eager attention, and with ours."""
    stock, model = (census_models.build(name, how, overrides).eval() for how in ("eager", ours))
    model.load_state_dict(stock.state_dict())
    return stock, model


def llama(**options):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=331, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=None, eos_token_id=1, **options,
    )  # fmt: skip
    return transformers.LlamaForCausalLM._from_config(config, attn_implementation=NAME).eval()


# ---- what a mask function says


class Anything(torch.nn.Module):
    """Stands in for a model, or for a layer."""


ROW = torch.tensor([0, 3, 7, 9], dtype=torch.int32)
MODEL = Anything()


def described(function, boundaries=ROW, **options):
    """Returns the mask that a model gets in a call with ``boundaries``."""
    given = {"batch_size": 1, "q_length": 9, "kv_length": 9, "mask_function": function, **options}
    calls._running.calls.append((MODEL, calls.Call(MODEL, 9, boundaries)))
    try:
        return masks.packed_mask(**given)
    finally:
        calls._running.calls.pop()


causal, blocks = masking_utils.causal_mask_function, masking_utils.blockwise_overlay
SEGMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2]])


def packed(function):
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0, 1]])
    if hasattr(masking_utils, "remap_positions_for_packed_sequence"):  # transformers 5.17 has it not
        function = masking_utils.remap_positions_for_packed_sequence(function, positions)
    return masking_utils.and_masks(function, masking_utils.packed_sequence_mask_function(SEGMENTS))


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (causal, (None, 0)),
        (masking_utils.sliding_window_causal_mask_function(4), (3, 0)),
        (masking_utils.sliding_window_overlay(4), (3, None)),
        (masking_utils.bidirectional_mask_function, (None, None)),
        (masking_utils.sliding_window_bidirectional_mask_function(4), (4, 4)),
        (masking_utils.or_masks(causal, lambda *args: torch.tensor(True)), (None, None)),
        (
            masking_utils.or_masks(
                masking_utils.sliding_window_causal_mask_function(5),
                modeling_gemma3._bidirectional_window_overlay(3),
            ),
            (4, 2),
        ),
    ],
    ids=["causal", "window", "one-sided", "bidirectional", "bidirectional window", "all", "union"],
)
@pytest.mark.parametrize("pack", [False, True])
def test_a_mask_function_is_taken_apart(function, expected, pack):
    mask = described(packed(function) if pack else function)
    assert (mask.left, mask.right, mask.reason) == (*expected, None)
    query, key, value = torch.randn(3, 1, 2, 9, 8)
    out, _ = attention.attention_forward(Anything(), query, key, value, mask)
    real = masking_utils.sdpa_mask(1, 9, 9, mask_function=packed(function), allow_is_causal_skip=False)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=real)
    torch.testing.assert_close(out, expected.transpose(1, 2))


def test_a_vision_tower_goes_by_its_own_boundaries_in_a_packed_call():
    tower = Anything()
    tower.is_causal = False
    query, key, value = torch.randn(3, 1, 2, 9, 8)
    own = torch.tensor([0, 2, 9], dtype=torch.int32)
    calls._running.calls.append((MODEL, calls.Call(MODEL, 9, ROW)))
    try:
        out, _ = attention.attention_forward(tower, query, key, value, None, cu_seq_lens_q=own)
    finally:
        calls._running.calls.pop()
    parts = zip(*(t.split((2, 7), dim=2) for t in (query, key, value)), strict=True)
    expected = torch.cat([torch.nn.functional.scaled_dot_product_attention(*part) for part in parts], dim=2)
    torch.testing.assert_close(out, expected.transpose(1, 2))


def of_a_model(batch, head, q, kv):
    return kv <= q


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (masking_utils.chunked_causal_mask_function(4, torch.zeros(1, dtype=int)), "chunked_overlay"),
        (masking_utils.or_masks(causal, blocks(torch.zeros(1, 9, dtype=int))), "blockwise_overlay"),
        (masking_utils.and_masks(causal, functools.partial(of_a_model)), "functools.partial"),
        (masking_utils.and_masks(causal, of_a_model), "of_a_model"),
        (masking_utils.and_masks(causal, masking_utils.packed_sequence_mask_function(3 - SEGMENTS)), "one after"),
    ],
    ids=["chunks", "blocks", "partial", "of the model", "segments"],
)
def test_a_mask_that_says_more_is_refused_for_packed_rows_alone(function, reason):
    mask = described(function, use_vmap=True)
    assert reason in mask.reason
    with pytest.raises(ValueError, match="does not support a mask by"):
        attention.attention_forward(Anything(), *torch.randn(3, 1, 2, 9, 8), mask)
    assert described(function, boundaries=None, allow_is_causal_skip=False).dtype == torch.bool


def test_blocks_that_a_row_does_not_have_change_nothing():
    assert described(masking_utils.or_masks(causal, blocks(torch.full((1, 9), -1)))).reason is None


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 2},
        {"kv_length": 12},
        {"q_offset": 3, "kv_length": 12},
        {"q_offset": torch.tensor(0)},
    ],
    ids=["rows", "keys", "cache", "static cache"],
)
def test_any_other_call_gets_transformers_own_mask(options):
    mask = described(causal, allow_is_causal_skip=False, **options)
    expected = masking_utils.sdpa_mask(
        **{"batch_size": 1, "q_length": 9, "kv_length": 9, "allow_is_causal_skip": False, **options}
    )
    assert mask.equal(expected)


USES = [
    lambda m: m + 1, lambda m: 1 - m, lambda m: ~m, lambda m: m[:, :, :3], lambda m: m == 0, lambda m: m < 0,
    lambda m: bool(m), lambda m: m.to("cpu"), lambda m: m.dtype, lambda m: torch.where(m, 1, 0), lambda m: len(m),
    lambda m: torch.zeros(3) + m, lambda m: torch.zeros(3).masked_fill(m, 1), lambda m: list(m), lambda m: m & m,
    lambda m: torch.nn.functional.scaled_dot_product_attention(*torch.randn(3, 1, 1, 9, 4), attn_mask=m),
]  # fmt: skip


@pytest.mark.parametrize("use", USES)
def test_a_model_that_reads_the_mask_meets_an_error(use):
    with pytest.raises(ValueError, match="reads its attention mask itself"):
        use(described(causal))
    assert not hasattr(described(causal), "device")


# ---- models that the name does not serve


@pytest.mark.parametrize("name", ["BloomForCausalLM", "TrOCRForCausalLM", "MambaForCausalLM", "GitForCausalLM"])
def test_a_model_that_cannot_be_packed_is_refused_as_it_takes_the_name(name):
    with pytest.raises(ValueError, match=f"attn_implementation='{NAME}' does not support"):
        census_models.build(name, NAME)
    model = census_models.build(name, "eager")
    if model._can_set_attn_implementation():
        with pytest.raises(ValueError, match=f"attn_implementation='{NAME}' does not support"):
            model.set_attn_implementation(NAME)


def test_layers_without_attention_are_refused_for_packed_rows_alone():
    stock, model = pair("Lfm2ForCausalLM", {"layer_types": ["conv", "full_attention"]})
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, stock(IDS).logits)
        for call in ({"cu_seq_lens_q": BOUNDS, "position_ids": POSITIONS}, {"position_ids": POSITIONS}):
            with pytest.raises(ValueError, match=r"layers\.0 mixes tokens without attention"):
                model(IDS, use_cache=False, **call)


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "RobertaForCausalLM", "StableLmForCausalLM"])
@pytest.mark.parametrize("compiled", [False, True])
def test_positions_that_are_missing_beside_boundaries_restart(name, compiled, monkeypatch):
    stock, model = pair(name)
    alone = torch.cat([stock(part).logits[0] for part in IDS.split(LENGTHS, 1)])
    if compiled:
        monkeypatch.setenv("SFT_KERNELS_IMPL", "triton")
        model = torch.compile(model, backend="aot_eager", dynamic=False)
        if name == "StableLmForCausalLM":  # whose layers do not receive boundaries
            with pytest.raises(Exception, match="cu_seq_lens_q"):
                model(IDS, use_cache=False, cu_seq_lens_q=BOUNDS)
            return
    torch.testing.assert_close(model(IDS, use_cache=False, cu_seq_lens_q=BOUNDS).logits[0], alone)


def test_positions_that_the_model_does_not_count_from_are_refused():
    stock, model = pair("RobertaForCausalLM")
    first = calls.first_position(model)
    assert first == 1
    with torch.no_grad():
        with pytest.raises(ValueError, match="counts positions from 1, got 0"):
            model(IDS, position_ids=POSITIONS, use_cache=False)
        packed = model(IDS, position_ids=POSITIONS + first, use_cache=False).logits[0]
        alone = torch.cat([stock(part).logits[0] for part in IDS.split(LENGTHS, 1)])
    torch.testing.assert_close(packed, alone)


def test_positional_arguments_are_checked_too():
    numbers = torch.repeat_interleave(torch.arange(1, 5), torch.tensor(LENGTHS))[None]
    with pytest.raises(ValueError, match="segment numbers"):
        llama()(IDS, numbers)


def test_a_copy_of_a_model_is_checked_as_the_model():
    _, model = pair("Lfm2ForCausalLM", {"layer_types": ["conv", "full_attention"]})
    with pytest.raises(ValueError, match="mixes tokens"):
        copy.deepcopy(model)(IDS, position_ids=POSITIONS)


def test_the_model_inside_is_watched_however_the_name_was_set():
    stock, _ = pair("LlamaForCausalLM")
    model = copy.deepcopy(stock)
    model.set_attn_implementation(NAME)
    alone = torch.cat([stock.model(part)[0][0] for part in IDS.split(LENGTHS, 1)])
    torch.testing.assert_close(model.model(IDS, position_ids=POSITIONS)[0][0], alone)


def test_another_name_is_left_alone():
    model = llama()
    model.set_attn_implementation("sdpa")
    numbers = torch.ones_like(IDS) * 2
    model(IDS, numbers)


def test_positions_that_restart_beside_padding_are_refused():
    """transformers itself looks for packed positions only where there is no mask."""
    mask = torch.ones_like(IDS)
    mask[:, -2:] = 0
    with pytest.raises(ValueError, match="without padding"):
        llama()(IDS, mask, POSITIONS, use_cache=False)


def test_positions_of_images_that_go_back_are_refused():
    _, model = pair("Qwen2VLForConditionalGeneration")
    for mask in (None, torch.ones_like(IDS)):
        with pytest.raises(ValueError, match=r"pass cu_seq_lens_q, or \[4, 1, T\]"):
            model(IDS, mask, position_ids=POSITIONS.expand(3, 1, -1))


def test_a_model_called_inside_another_changes_nothing():
    stock, model = pair("DistilBertForMaskedLM")
    other = llama()
    model.distilbert.embeddings.register_forward_hook(lambda *_: (other(IDS[:, :4]), None)[1])
    alone = torch.cat([stock(part).logits[0] for part in IDS.split(LENGTHS, 1)])
    torch.testing.assert_close(model(IDS, position_ids=POSITIONS).logits[0], alone)
    with pytest.raises(ValueError, match="segment numbers"):
        model(IDS, torch.full_like(IDS, 2))
    assert calls.current() is None


@pytest.mark.parametrize("name", ["NemotronForCausalLM", "StableLmForCausalLM"])
def test_layers_that_receive_no_boundaries_go_by_those_of_the_call(name):
    stock, model = pair(name)
    alone = torch.cat([stock(part).logits[0] for part in IDS.split(LENGTHS, 1)])
    torch.testing.assert_close(model(IDS, cu_seq_lens_q=BOUNDS).logits[0], alone)


def test_sparse_attention_is_refused():
    model = census_models.build("DeepseekV32ForCausalLM", NAME, {"index_topk": 4})
    with pytest.raises(ValueError, match="does not support sparse attention"):
        model(IDS)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        ({"cu_seq_lens_q": BOUNDS, "input_ids": IDS.expand(2, -1)}, "got 2 rows"),
        ({"position_ids": POSITIONS.expand(2, -1), "input_ids": IDS.expand(2, -1)}, "got 2 rows"),
        ({"cu_seq_lens_q": BOUNDS, "past_key_values": transformers.DynamicCache()}, "without a cache"),
        ({"cu_seq_lens_k": BOUNDS}, "got cu_seq_lens_k"),
        ({"cu_seq_lens_q": [0, 29]}, "expected a tensor"),
        ({"position_ids": torch.arange(29)}, "expected shape"),
    ],
    ids=["rows", "rows by positions", "cache", "keys' boundaries", "a list", "positions of one dimension"],
)
def test_a_packed_call_is_checked_before_anything_is_computed(call, match):
    with pytest.raises(ValueError, match=match):
        llama()(**{"input_ids": IDS, **call})
    assert calls.current() is None


# ---- recomputation


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("given", [{"position_ids": POSITIONS}, {"position_ids": POSITIONS, "cu_seq_lens_q": BOUNDS}])
def test_a_recomputed_layer_sees_the_same_boundaries(reentrant, given):
    gradients = []
    for checkpointing in (False, True):
        model = llama().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        loss = model(IDS, use_cache=False, **given).logits.square().sum()
        with torch.no_grad():
            model(IDS, use_cache=False)  # another call in between
        loss.backward()
        gradients.append(model.model.layers[0].self_attn.k_proj.weight.grad)
    torch.testing.assert_close(*gradients)


# ---- generation and evaluation

TWO = torch.randint(200, 331, (2, 9), generator=torch.Generator().manual_seed(1))
PADDED = {"input_ids": TWO.masked_fill(torch.arange(9) < torch.tensor([[0], [4]]), 0)}
PADDED["attention_mask"] = (PADDED["input_ids"] != 0).long()
GENERATE = {
    "one prompt": {"input_ids": TWO[:1]},
    "prompts of different lengths": PADDED,
    "beams": {**PADDED, "num_beams": 2},
    "a static cache": {**PADDED, "cache_implementation": "static"},
    "no cache": {**PADDED, "use_cache": False},
}


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Gemma2ForCausalLM", "GptOssForCausalLM"])
@pytest.mark.parametrize("how", GENERATE)
def test_it_generates_what_eager_does(name, how):
    answers = [
        model.generate(**GENERATE[how], max_new_tokens=5, do_sample=False, pad_token_id=0) for model in pair(name)
    ]
    assert answers[0].equal(answers[1])


@pytest.mark.parametrize("side", ["left", "right"])
def test_it_evaluates_padded_batches(side):
    stock, model = pair("Gemma2ForCausalLM")
    ids = PADDED["input_ids"] if side == "left" else PADDED["input_ids"].flip(1)
    call = {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": ids.masked_fill(ids == 0, -100)}
    with torch.no_grad():
        torch.testing.assert_close(model(**call).loss, stock(**call).loss)


def test_it_trains_packed_after_it_has_generated():
    stock, model = pair("LlamaForCausalLM")
    model.generate(**PADDED, max_new_tokens=3, do_sample=False, pad_token_id=0)
    with torch.no_grad():
        packed = model(IDS, position_ids=POSITIONS, use_cache=False).logits[0]
        torch.testing.assert_close(packed, torch.cat([stock(part).logits[0] for part in IDS.split(LENGTHS, 1)]))


# ---- torch.compile


def test_a_length_that_changes_compiles_once(monkeypatch):
    monkeypatch.setenv("SFT_KERNELS_IMPL", "triton")  # the torch implementation reads the boundaries
    if torch.cuda.is_available():
        pytest.skip("Triton is interpreted only where there is no GPU")
    model = llama()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        for longest in (15, 16, 19, 25):
            bounds = torch.tensor([0, longest, 29], dtype=torch.int32)
            positions = torch.cat([torch.arange(longest), torch.arange(29 - longest)])[None]
            call = {"position_ids": positions, "cu_seq_lens_q": bounds, "max_length_q": longest, "use_cache": False}
            call.update(cu_seq_lens_k=bounds, max_length_k=longest)
            torch.testing.assert_close(compiled(IDS, **call).logits, model(IDS, **call).logits)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "MistralForCausalLM", "ModernBertForMaskedLM"])
def test_compiled_positions_that_restart_beside_a_mask_of_ones_are_kept_apart(name, monkeypatch):
    """If torch.compile gives up, the hook runs as it is written, and the rest is compiled."""
    monkeypatch.setenv("SFT_KERNELS_IMPL", "triton")
    stock, model = pair(name)
    alone = torch.cat([stock(part).logits[0] for part in IDS.split(LENGTHS, 1)])
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(IDS, torch.ones_like(IDS), position_ids=POSITIONS).logits[0], alone)


CHECKED_IN_A_GRAPH = {
    "layers without attention": ("Lfm2ForCausalLM", {"layer_types": ["conv", "full_attention"]}, {}, "mixes tokens"),
    "a copy": ("LlamaForCausalLM", None, {}, "does not know this copy"),
    "positions": ("RobertaForCausalLM", None, {"position_ids": POSITIONS}, "counts positions from 1"),
    "segment numbers": ("LlamaForCausalLM", None, {"attention_mask": torch.full_like(IDS, 2)}, "segment numbers"),
    "a mask": ("LlamaForCausalLM", None, {"attention_mask": torch.ones_like(IDS)}, "leave it out"),
    "weights": ("LlamaForCausalLM", None, {"output_attentions": True}, "output_attentions"),
    "lost boundaries": ("StableLmForCausalLM", None, {}, "needs the packed examples' boundaries"),
}


@pytest.mark.parametrize("what", CHECKED_IN_A_GRAPH)
def test_a_call_inside_a_graph_is_checked_too(what, monkeypatch):
    monkeypatch.setenv("SFT_KERNELS_IMPL", "triton")
    name, overrides, given, match = CHECKED_IN_A_GRAPH[what]
    _, model = pair(name, overrides)
    if what == "a copy":
        model = copy.deepcopy(model)
    given = dict(given)
    if what != "segment numbers":
        given["cu_seq_lens_q"] = BOUNDS
    torch._dynamo.reset()
    step = torch.compile(lambda **call: model(IDS, use_cache=False, **call).logits, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=match):
        step(**given)
    assert calls.current() is None


# ---- versions


def test_a_transformers_that_is_too_old_is_told_which_is_wanted():
    code = """
import importlib.metadata
import warnings
found = importlib.metadata.version
importlib.metadata.version = lambda name: "4.46.0" if name == "transformers" else found(name)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    import sft_kernels.integrations as ours
print([str(w.message) for w in said if "needs transformers" in str(w.message)])
try:
    ours.register()
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.count("needs transformers >= 5.17, found 4.46.0") == 2, done.stderr
