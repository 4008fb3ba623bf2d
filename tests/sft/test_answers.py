"""Held-out prompts and greedy answers: what training renders, and what a loop without a cache says."""

import logging
import random
import re
import sys
import warnings

import numpy as np
import pytest
import torch
import transformers
from transformers import GenerationConfig

from sft_kernels.sft.answers import Prompt, answer, prompts_of
from sft_kernels.sft.masking import Encoder, Example
from sft_kernels.sft.rows import IGNORE, Record

from .conftest import TURNS, chat, record
from .test_stock import DYNAMIC

NOWHERE = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
KINDS = {
    "llama": {},
    "gpt2": {"max_position_embeddings": 64},
    "gemma2": {"head_dim": 8, "sliding_window": 8, "attn_logit_softcapping": 5.0},
    "mistral": {"sliding_window": 8},
}
LENGTHS = (3, 20, 7, 40, 7, 1, 12)


class Numbers:
    """A tokenizer whose text shows the tokens, and that has none of its own."""

    pad_token_id = eos_token_id = None

    def decode(self, ids, skip_special_tokens, clean_up_tokenization_spaces):
        assert not skip_special_tokens
        assert not clean_up_tokenization_spaces
        return " ".join(map(str, ids))


def prompts_of_length(*lengths):
    rng = random.Random(0)
    return [Prompt([rng.randrange(1, 250) for _ in range(n)], [1, 2], f"a:{n}") for n in lengths]


@torch.no_grad()
def naive(model, ids, most, ends=()):
    """The tokens that follow ``ids``, each from a forward of everything before it, with no cache."""
    was = model.training, model.config._attn_implementation
    model.eval().set_attn_implementation("eager")
    said = []
    while len(said) < most:
        logits = model(input_ids=torch.tensor([ids + said]), use_cache=False).logits
        said.append(int(logits[0, -1].argmax()))
        if said[-1] in ends:
            break
    model.train(was[0]).set_attn_implementation(was[1])
    return said


def numbers(text):
    return [int(word) for word in text.split()]


def shapes_of(model):
    """The shapes of the tokens that ``model`` is called with, with a cache, from now on."""
    shapes = []

    def see(module, args, kwargs):
        if kwargs["use_cache"]:
            shapes.append(tuple(kwargs["input_ids"].shape))

    model.register_forward_pre_hook(see, with_kwargs=True)
    return shapes


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_of_a_loop_without_a_cache(kind, small_model):
    model, prompts = small_model(kind, **KINDS[kind], **NOWHERE), prompts_of_length(*LENGTHS)
    model.train()
    whole = [naive(model, prompt.ids, 10) for prompt in prompts]
    end = whole[1][4]
    expected = [naive(model, prompt.ids, 10, [end]) for prompt in prompts]
    shapes = shapes_of(model)
    found = answer(model, Numbers(), prompts, end, 10, tokens_at_once=70)
    assert [numbers(text) for text in found.texts] == [[t for t in ids if t != end] for ids in expected]
    assert found.stopped == [end in ids for ids in expected]
    assert set(found.stopped) == {True, False}
    assert len(set(found.texts)) > 4
    assert [numbers(text) for text in found.prompts] == [prompt.ids for prompt in prompts]
    # The prompts at once, the longest first; then a token at a time.
    assert [shape for shape in shapes if shape[1] > 1] == [(1, 40), (2, 20), (4, 7)]
    assert sum(1 for _, width in shapes if width == 1) >= 9
    assert model.training
    assert model.config._attn_implementation == "sft_kernels"


def test_a_batch_has_at_most_so_many_tokens_and_at_least_one_row(small_model):
    model, prompts = small_model(), prompts_of_length(*LENGTHS)
    shapes = shapes_of(model)
    whole = answer(model, Numbers(), prompts, 0, 4)
    assert shapes[0] == (7, 40)
    del shapes[:]
    assert answer(model, Numbers(), prompts, 0, 4, tokens_at_once=1) == whole
    assert [width for _, width in shapes if width > 1] == [40, 20, 12, 7, 7, 3]
    assert {rows for rows, _ in shapes} == {1}
    assert answer(model, Numbers(), [], 0, 4) == ([], [], [], [])
    with pytest.raises(ValueError, match=r"^max_new_tokens: expected at least 1, got 0"):
        answer(model, Numbers(), prompts, 0, 0)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("gpt2", {"max_position_embeddings": 32}),
        ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 32}),
    ],
)
def test_a_table_of_positions_ends_an_answer_and_no_other(kind, options, small_model):
    model = small_model(kind, **options, **NOWHERE)
    prompts = prompts_of_length(10, 29, 32, 31, 33, 29, 26)
    found = answer(model, Numbers(), prompts, None, 5)
    room = [5, 3, 0, 1, 0, 3, 5]
    expected = [naive(model, prompt.ids, n) for prompt, n in zip(prompts, room, strict=True)]
    assert [numbers(text) for text in found.texts] == expected
    assert found.stopped == [False] * 7


def test_rotary_positions_have_no_end(small_model, capfd, logged):
    model, prompts = small_model(max_position_embeddings=16), prompts_of_length(14, 30)
    found = answer(model, Numbers(), prompts, 0, 6)
    expected = [naive(model, prompt.ids, 6, [0]) for prompt in prompts]
    assert [numbers(text) for text in found.texts] == [[t for t in ids if t] for ids in expected]
    nothing_but_the_bar(capfd)
    assert logged == []


def test_the_longest_prompt_leaves_no_frequencies_behind(small_model):
    model, prompts = small_model(**DYNAMIC), prompts_of_length(60, 40)
    (rotary,) = {m for m in model.modules() if hasattr(m, "original_inv_freq")}
    alone = answer(model, Numbers(), prompts[1:], 0, 4)
    assert answer(model, Numbers(), prompts, 0, 4, tokens_at_once=1).texts[1:] == alone.texts
    assert rotary.inv_freq.equal(rotary.original_inv_freq)


@pytest.fixture
def logged():
    """Collects the messages that transformers logs."""
    messages, handler = [], logging.Handler()
    handler.emit = lambda entry: messages.append(entry.getMessage())
    logging.getLogger("transformers").addHandler(handler)
    yield messages
    logging.getLogger("transformers").removeHandler(handler)


def nothing_but_the_bar(capfd):
    out, err = capfd.readouterr()
    assert re.sub(r"answering:[^\r\n]*?\]|[\s\x1b]|\[A", "", err) == ""
    assert out == ""


ODD = {
    "sampling": {"do_sample": True, "temperature": 50.0, "top_k": 0},
    "sampling asked by half": {"temperature": 0.1, "top_p": 0.1, "min_p": 0.5},
    "beams": {"num_beams": 3, "num_return_sequences": 3, "length_penalty": -5.0, "early_stopping": True},
    "repetition": {"repetition_penalty": 9.0},
    "no repetition": {"no_repeat_ngram_size": 1},
    "at least": {"min_new_tokens": 9, "min_length": 60},
    "lengths": {"max_length": 2, "max_time": 0.0},
    "forced": {"forced_bos_token_id": 5, "forced_eos_token_id": 6},
    "decay": {"exponential_decay_length_penalty": (1, 99.0)},
    "output": {"return_dict_in_generate": True, "output_scores": True, "output_attentions": True},
    "cache": {"use_cache": False, "cache_implementation": "offloaded"},
    "drafts": {"prompt_lookup_num_tokens": 2},
    "contrast": {"penalty_alpha": 0.6, "top_k": 4},
    "layers": {"dola_layers": "low"},
    "strings": {"stop_strings": ["a"]},
    "guidance": {"guidance_scale": 5.0},
    "watermark": {"watermarking_config": {"bias": 50.0}},
}


@pytest.fixture(scope="module")
def plain(small_model):
    """Prompts, an end that some answers come to, and the answers without any generation config."""
    prompts = prompts_of_length(*LENGTHS)
    model = small_model(**NOWHERE)
    whole = [naive(model, prompt.ids, 10) for prompt in prompts]
    found = answer(model, Numbers(), prompts, end := whole[1][4], 10)
    return prompts, end, found, sorted({token for ids in whole for token in ids} - {end})


def test_no_generation_config_changes_an_answer(plain, small_model, capfd, logged):
    prompts, end, expected, said = plain
    model = small_model(**NOWHERE)
    odd = {**ODD, "suppressed": {"suppress_tokens": said}, "biased": {"sequence_bias": [[[said[0]], -99.0]]}}
    odd["bad"] = {"bad_words_ids": [[token] for token in said], "begin_suppress_tokens": said}
    for name, options in odd.items():
        own = model.generation_config = GenerationConfig(**options)
        before = own.to_dict()
        capfd.readouterr(), logged.clear()  # of that config
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = answer(model, Numbers(), prompts, end, 10)
        assert (name, found) == (name, expected)
        nothing_but_the_bar(capfd)
        assert logged == []
        assert model.generation_config is own
        assert own.to_dict() == before


def test_values_in_the_models_config_are_no_hindrance(plain, small_model):
    prompts, end, expected, _ = plain
    model = small_model(**NOWHERE)
    model.config.temperature = model.config.repetition_penalty = 7.0
    assert answer(model, Numbers(), prompts, end, 10) == expected


def test_without_an_end_of_turn_the_models_own_ends_an_answer(plain, small_model):
    prompts, end, expected, _ = plain
    model, tokenizer = small_model(**NOWHERE), Numbers()
    for own in (end, [251, end], torch.tensor(end), torch.tensor([251, end])):
        model.generation_config = GenerationConfig(eos_token_id=own)
        assert answer(model, tokenizer, prompts, None, 10) == expected
    model.generation_config = GenerationConfig(eos_token_id=251)
    assert answer(model, tokenizer, prompts, end, 10) == expected
    model.generation_config = GenerationConfig()
    assert not any(answer(model, tokenizer, prompts, None, 10).stopped)
    tokenizer.eos_token_id = end
    assert answer(model, tokenizer, prompts, None, 10) == expected


def test_a_reference_ends_as_an_answer_does(small_model):
    ends = [([5, 6, 9], "5 6"), ([9], ""), ([5, 6], "5 6"), ([5, 9, 6, 9], "5"), ([], "")]
    prompts = [Prompt([1, 2, 3], reference, "a:1") for reference, _ in ends]
    assert answer(small_model(), Numbers(), prompts, 9, 1).references == [text for _, text in ends]


def states():
    numpy = np.random.get_state()  # noqa: NPY002
    return torch.get_rng_state().tolist(), random.getstate(), numpy[1].tolist(), numpy[2]


def test_no_random_number_is_drawn(small_model):
    model, prompts = small_model(attention_dropout=0.5), prompts_of_length(*LENGTHS)
    model.generation_config = GenerationConfig(do_sample=True)
    before = states()
    answer(model.train(), Numbers(), prompts, 0, 4)
    prompts_of([Example([1, 2, 3], [IGNORE, IGNORE, 3], "a:1")], 1, seed=0)
    assert states() == before


@pytest.fixture
def verbosity():
    before = transformers.logging.get_verbosity()
    yield
    transformers.logging.set_verbosity(before)


class Ended(Exception):
    pass


def test_the_work_can_be_ended_and_leaves_everything_as_it_was(small_model, capfd, verbosity):
    model, prompts = small_model().train(), prompts_of_length(*LENGTHS)
    own, answered = model.generation_config, []
    transformers.logging.set_verbosity_info()

    def two(batches):
        for number, batch in enumerate(batches):
            if number == 2:
                raise Ended
            yield batch
            answered.append(batch)

    def fail(module, args, kwargs):
        raise Ended

    with pytest.raises(Ended):
        answer(model, Numbers(), prompts, 0, 4, tokens_at_once=1, each=two)
    assert len(answered) == 2
    hook = model.register_forward_pre_hook(fail, with_kwargs=True)
    with pytest.raises(Ended):
        answer(model, Numbers(), prompts, 0, 4)
    hook.remove()
    assert model.training
    assert model.config._attn_implementation == "sft_kernels"
    assert model.generation_config is own
    assert transformers.logging.get_verbosity() == transformers.logging.INFO
    nothing_but_the_bar(capfd)


class Gone:
    """A screen that can no longer be written to."""

    encoding = "utf-8"

    def write(self, text):
        raise OSError("gone")

    flush = isatty = lambda self: self.write("")


def test_a_screen_that_is_gone_costs_no_answer(plain, small_model, monkeypatch):
    prompts, end, expected, _ = plain
    for name in ("stderr", "stdout"):
        with monkeypatch.context() as patched:
            patched.setattr(sys, name, Gone())
            found = answer(small_model(**NOWHERE), Numbers(), prompts, end, 10)
        assert found == expected


def test_a_peft_model_answers_with_its_adapters(small_model):
    peft = pytest.importorskip("peft")
    options = {"r": 4, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}
    model = peft.get_peft_model(small_model(), peft.LoraConfig(task_type="CAUSAL_LM", **options))
    own = model.generation_config = GenerationConfig(do_sample=True, temperature=50.0)
    inside = model.get_base_model().generation_config = GenerationConfig(do_sample=True, temperature=50.0)
    prompts = prompts_of_length(*LENGTHS)
    found = answer(model, Numbers(), prompts, 0, 5)
    assert model.generation_config is own
    assert model.get_base_model().generation_config is inside
    assert found.texts != answer(small_model(), Numbers(), prompts, 0, 5).texts
    merged = model.merge_and_unload()
    expected = [naive(merged, prompt.ids, 5, [0]) for prompt in prompts]
    assert [numbers(text) for text in found.texts] == [[t for t in ids if t] for ids in expected]


def read(tokenizer, prompt):
    return tokenizer.decode(prompt.ids), tokenizer.decode(prompt.reference)


def rendered(tokenizer, messages):
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def test_a_prompt_is_what_training_renders_before_the_last_turn(tokenizer):
    encoder = Encoder(tokenizer)
    (prompt,) = prompts_of([encoder(record(TURNS))], 9, seed=0)
    assert prompt.ids == rendered(tokenizer, TURNS[:-1])
    assert read(tokenizer, prompt)[1] == "Two words.<|im_end|>"
    assert prompt.source == "chats.jsonl:7"
    (prompt,) = prompts_of([Encoder(tokenizer, "completion")(record(TURNS))], 9, seed=0)
    assert read(tokenizer, prompt)[1] == "Two words."
    (prompt,) = prompts_of([encoder(record([*TURNS[:-1], {**TURNS[-1], "weight": 0}]))], 9, seed=0)
    assert prompt.ids == rendered(tokenizer, TURNS[:2])
    assert read(tokenizer, prompt)[1] == "Let me look.<|im_end|>"
    adjacent = [*TURNS[:2], {"role": "assistant", "content": "Let me."}, TURNS[-1]]
    (prompt,) = prompts_of([encoder(record(adjacent))], 9, seed=0)
    assert prompt.ids == rendered(tokenizer, adjacent[:-1])
    assert read(tokenizer, prompt)[1] == "Two words.<|im_end|>"


def test_adjacent_turns_with_nothing_between_are_answered_up_to_the_first_end(tokenizer_with, small_model):
    template = (
        "{% for m in messages %}{{ m['content'] }}{{ '<|im_end|>' if m['role'] == 'assistant' else '\n' }}{% endfor %}"
    )
    tokenizer = tokenizer_with(template)
    encoder = Encoder(tokenizer)
    example = encoder(record([TURNS[1], TURNS[2], TURNS[4]]))
    (prompt,) = prompts_of([example], 9, seed=0)
    whole = ("How many: red blue?\n", "Let me look.<|im_end|>Two words.<|im_end|>")
    assert read(tokenizer, prompt) == whole
    found = answer(small_model(), tokenizer, [prompt], encoder.end_of_turn, 4)
    assert (found.prompts, found.references) == ([whole[0]], ["Let me look."])


def test_each_split_turn_is_a_prompt(tokenizer_with):
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% if m['role'] == 'assistant' and not loop.last %}{{ m['content'] | upper }}"
        "{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = tokenizer_with(template)
    examples = Encoder(tokenizer, split_turns=True).examples(record(TURNS))
    found = [read(tokenizer, prompt)[1] for prompt in prompts_of(examples, 9, seed=0)]
    assert sorted(found) == ["Let me look.<|im_end|>", "Two words.<|im_end|>"]


def test_tokens_and_texts(tokenizer):
    ids, labels = [5, 6, 7, 8, 9], [IGNORE, 6, IGNORE, 18, 19]
    given = Record("a", 1, None, None, None, (ids, labels))
    assert prompts_of([Encoder(tokenizer)(given)], 9, seed=0) == [([5, 6, 7], [18, 19], "a:1")]
    everything = Encoder(tokenizer, "all")
    none = [everything(record(text="How many words?")), everything(record(TURNS))]
    none += [Encoder(tokenizer)(given._replace(tokens=(ids, list(ids))))]
    none += [Example([1, 2, 3], [IGNORE] * 3, "a:1")]
    assert prompts_of(none, 9, seed=0) == []


def test_the_choice_depends_on_the_seed_and_is_in_the_order_of_the_examples(tokenizer):
    encoder, everything = Encoder(tokenizer), Encoder(tokenizer, "all")
    examples = []
    for i in range(40):
        examples += [
            encoder(Record("a", i, chat(f"{i}?", "Two words.")["messages"], None, None)),
            everything(record(text="red")),
        ]
    chosen = {seed: [prompt.source for prompt in prompts_of(examples, 10, seed)] for seed in range(3)}
    assert chosen[0] == [prompt.source for prompt in prompts_of(examples, 10, 0)]
    assert len(chosen[0]) == len({*chosen[0]}) == 10
    assert len({*map(tuple, chosen.values())}) == 3
    for sources in chosen.values():
        assert sources == sorted(sources, key=lambda source: int(source[2:]))
    assert len(prompts_of(examples, 99, 0)) == 40
