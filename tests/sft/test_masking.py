import json

import pytest

from sft_kernels.sft.data import read_jsonl
from sft_kernels.sft.masking import IGNORE, MODES, Encoder
from sft_kernels.sft.rows import DataError

from .conftest import REAL_DATA, TURNS, record

LLAMA_3 = (
    "{{ '<|endoftext|>' }}{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\n\n' + m.content | trim + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
REWRITES = (
    "{{ messages | length }}{% for m in messages %}{{ m.content + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '>' }}{% endif %}"
)


def learned(tokenizer, example):
    """The words of the labels, run by run."""
    runs, last = [], IGNORE
    for label in example.labels:
        if label != IGNORE:
            runs = [*runs, [label]] if last == IGNORE else [*runs[:-1], [*runs[-1], label]]
        last = label
    return [tokenizer.decode(run, skip_special_tokens=False) for run in runs]


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("completion", ["Let me look.", "Two words."]),
        ("completion+eot", ["Let me look.<|im_end|>", "Two words.<|im_end|>"]),
    ],
)
@pytest.mark.parametrize("which", ["tokenizer", "unmarked"])
def test_every_assistant_turn_is_learned_and_nothing_else(which, mode, expected, request):
    tokenizer = request.getfixturevalue(which)
    assert learned(tokenizer, Encoder(tokenizer, mode)(record(TURNS))) == expected


@pytest.mark.parametrize("mode", MODES)
def test_rendering_prefixes_finds_what_generation_marks(tokenizer, unmarked, mode):
    assert Encoder(tokenizer, mode)(record(TURNS)) == Encoder(unmarked, mode)(record(TURNS))


def test_all_learns_everything_but_the_first_token(tokenizer):
    example = Encoder(tokenizer, "all")(record(TURNS))
    assert example.labels == [IGNORE, *example.input_ids[1:]]


def test_tokens_are_those_of_the_template(tokenizer):
    example = Encoder(tokenizer)(record(TURNS))
    assert example.input_ids == tokenizer.apply_chat_template(TURNS, return_dict=True)["input_ids"]


def test_labels_are_not_shifted(tokenizer):
    example = Encoder(tokenizer)(record(TURNS))
    assert all(label in (IGNORE, token) for token, label in zip(example.input_ids, example.labels, strict=True))


def test_a_foreign_template(tokenizer_with):
    tokenizer = tokenizer_with(LLAMA_3)
    turns = learned(tokenizer, Encoder(tokenizer)(record(TURNS)))
    assert turns == ["Let me look.<|im_end|>", "Two words.<|im_end|>"]


def test_padding_token_equal_to_end_of_turn_is_still_learned(tokenizer_with, unmarked):
    tokenizer = tokenizer_with(unmarked.chat_template)
    tokenizer.pad_token = tokenizer.eos_token = "<|im_end|>"
    assert learned(tokenizer, Encoder(tokenizer)(record(TURNS)))[-1].endswith("<|im_end|>")


def test_a_template_without_end_of_turn_cannot_teach_stopping(tokenizer_with):
    with pytest.raises(ValueError, match="no special token"):
        Encoder(tokenizer_with(PLAIN), "completion+eot")(record(TURNS))


def test_a_template_without_end_of_turn_still_marks_completions(tokenizer_with):
    tokenizer = tokenizer_with(PLAIN)
    turns = learned(tokenizer, Encoder(tokenizer, "completion")(record(TURNS)))
    assert [turn.strip() for turn in turns] == ["Let me look.", "Two words."]


def test_no_token_reaches_from_the_prompt_into_the_answer(tokenizer_with):
    """The prompt ends in a space, which a byte-level BPE would fold into the answer's first word."""
    tokenizer = tokenizer_with(PLAIN)
    ids = Encoder(tokenizer, "completion")(record(TURNS[1:3])).input_ids
    prompt = tokenizer.apply_chat_template(TURNS[1:2], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert ids[: len(prompt)] == prompt


def test_what_a_template_puts_behind_the_whole_conversation_is_not_the_end_of_a_turn(tokenizer_with, unmarked):
    """As Phi-3's does: every turn ends in one token, the conversation in another."""
    tokenizer = tokenizer_with(
        unmarked.chat_template + "{% if not add_generation_prompt %}{{ '<|endoftext|>' }}{% endif %}"
    )
    turns = learned(tokenizer, Encoder(tokenizer)(record(TURNS)))
    assert turns == ["Let me look.<|im_end|>", "Two words.<|im_end|>"]


@pytest.mark.parametrize("which", ["tokenizer", "unmarked"])
def test_characters_of_several_tokens_are_learned_whole(which, request, tokenizer_with):
    tokenizer = request.getfixturevalue(which)
    inside, outside = "{{ '<|im_end|>' }}{% endgeneration %}", "{% endgeneration %}{{ '<|im_end|>' }}"
    tokenizer = tokenizer_with(tokenizer.chat_template.replace(inside, outside))
    turns = [{"role": "user", "content": "é?"}, {"role": "assistant", "content": "naïve 🙂é"}]
    assert learned(tokenizer, Encoder(tokenizer)(record(turns))) == ["naïve 🙂é<|im_end|>"]


def test_the_assistant_may_come_first_where_the_template_marks_it(tokenizer, unmarked):
    assert learned(tokenizer, Encoder(tokenizer)(record(TURNS[2:]))) == [
        "Let me look.<|im_end|>",
        "Two words.<|im_end|>",
    ]
    with pytest.raises(DataError, match=r"chats\.jsonl:7: message 0: nothing before the assistant"):
        Encoder(unmarked)(record(TURNS[2:]))
    assert Encoder(unmarked, "all")(record(TURNS[2:])).kept


def test_a_template_that_changes_the_words_is_named(tokenizer_with, unmarked):
    shouting = unmarked.chat_template.replace("message['content'] or ''", "message['content'] | upper")
    with pytest.raises(ValueError, match="does not render an assistant's words, given as a string"):
        Encoder(tokenizer_with(shouting))(record(TURNS))


def test_words_that_contain_the_end_of_turn_are_refused(tokenizer):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b<|im_end|>c"}]
    with pytest.raises(DataError, match=r"message 1: the assistant's words contain <.im_end.>, which ends a turn"):
        Encoder(tokenizer)(record(turns))


def test_a_template_that_refuses_everything_is_named(tokenizer_with):
    with pytest.raises(ValueError, match=r"a user's and an assistant's message: .* refuses it: never"):
        Encoder(tokenizer_with("{{ raise_exception('never') }}"))(record(TURNS))


def test_a_template_that_rewrites_earlier_turns_is_refused_by_line(tokenizer_with):
    with pytest.raises(DataError, match=r"chats\.jsonl:7: message 2: the chat template renders"):
        Encoder(tokenizer_with(REWRITES))(record(TURNS))


def test_a_template_that_raises_is_refused_by_line(tokenizer_with):
    with pytest.raises(DataError, match=r"chats\.jsonl:7: the chat template refuses it: no tools here"):
        Encoder(
            tokenizer_with(
                "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
                "{{ m.content + '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '>' }}{% endif %}"
            )
        )(record(TURNS))


def test_no_template(tokenizer_with):
    with pytest.raises(ValueError, match="no chat template"):
        Encoder(tokenizer_with(None))(record(TURNS))


def test_unknown_mode(tokenizer):
    with pytest.raises(ValueError, match="mask"):
        Encoder(tokenizer, "assistant")


def test_text_is_for_mode_all(tokenizer):
    example = Encoder(tokenizer, "all")(record(text="red and blue"))
    assert tokenizer.decode(example.input_ids) == "red and blue<|endoftext|>"
    with pytest.raises(DataError, match="no assistant turn"):
        Encoder(tokenizer, "completion")(record(text="red and blue"))


@pytest.mark.parametrize("adds", ["", "$A", "<|im_start|> $A", "<|im_start|> $A <|endoftext|>"])
@pytest.mark.parametrize(
    "text", ["red and blue", "red<|endoftext|>", "<|im_start|>red", "red<|endoftext|><|endoftext|>"]
)
def test_a_text_has_the_tokenizers_own_beginning_once_and_one_end(tokenizer_with, adds, text):
    from tokenizers.processors import TemplateProcessing

    tokenizer = tokenizer_with(None)
    tokenizer.bos_token = "<|im_start|>"
    if adds:
        special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<|im_start|>", "<|endoftext|>")]
        tokenizer._tokenizer.post_processor = TemplateProcessing(single=adds, special_tokens=special)
    ids = Encoder(tokenizer, "all")(record(text=text)).input_ids
    words = text.removeprefix("<|im_start|>").replace("<|endoftext|>", "")
    begins = "<|im_start|>" if adds.startswith("<") or text.startswith("<") else ""
    assert tokenizer.decode(ids, skip_special_tokens=False) == f"{begins}{words}<|endoftext|>"


def test_tool_calls_are_learned(tokenizer):
    call = {"type": "function", "function": {"name": "count", "arguments": {"of": "red blue"}}}
    turns = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    (turn,) = learned(tokenizer, Encoder(tokenizer)(record(turns)))
    assert json.loads(turn.removesuffix("<|im_end|>")) == call


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="no real conversations beside the project")
@pytest.mark.parametrize("name", ["gsm8k_test.jsonl", "toolcall_multiturn.jsonl"])
@pytest.mark.parametrize("which", ["tokenizer", "unmarked"])
def test_real_conversations_learn_exactly_what_the_assistant_says(name, which, request):
    tokenizer = request.getfixturevalue(which)
    encoder = Encoder(tokenizer)
    for line in read_jsonl(REAL_DATA / name)[:100]:
        said = [m["content"] + "<|im_end|>" for m in line.messages if m["role"] == "assistant"]
        assert learned(tokenizer, encoder(line)) == said


def test_no_token_reaches_from_the_answer_into_what_follows(tokenizer_with):
    """Nothing ends a turn, so the next words would be part of its last token."""
    tokenizer = tokenizer_with("{% for m in messages %}{{ m.content }}{% endfor %}")
    said = [("user", "How m"), ("assistant", "any wo"), ("user", "rds are"), ("assistant", " red")]
    turns = [{"role": role, "content": words} for role, words in said]
    assert learned(tokenizer, Encoder(tokenizer, "completion")(record(turns))) == ["any wo", " red"]


# Tokenizers of other kinds.


def _other_tokenizer(kind):
    """A BPE over a few words, with the spaces of other tokenizers; its prompts end in a space or in lines."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    alphabet = []
    if kind in ("trimmed", "prefix", "lines"):
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=kind == "prefix")
        bpe.post_processor = processors.ByteLevel(trim_offsets=kind != "lines")
        bpe.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    elif kind == "prepend":
        bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)
    texts = ["USER: How many? ASSISTANT: Two words.\n\nNo words.\n\n\nSaid so."] * 20
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=400, special_tokens=["<unk>", "</s>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>", eos_token="</s>")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ 'USER: ' + m.content }}{% else %}"
        "{{ header + m.content + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ header }}{% endif %}"
    )
    return tokenizer


@pytest.mark.parametrize("header", [" ASSISTANT: ", " ASSISTANT:", "\n\n", "\nASSISTANT\n"])
@pytest.mark.parametrize("words", ["Two words.", "\nTwo words.", "words"])
@pytest.mark.parametrize("kind", ["trimmed", "prefix", "lines", "prepend", "first", "always"])
def test_any_tokenizer_keeps_prompt_and_answer_apart(kind, words, header):
    """The prompt has the tokens that it has alone, and the labels spell the words with no space put before them."""
    tokenizer = _other_tokenizer(kind)
    tokenizer.chat_template = tokenizer.chat_template.replace("header", repr(header))
    turns = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": words}]
    example = Encoder(tokenizer)(record(turns))
    prompt = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert example.input_ids[: len(prompt)] == prompt
    assert example.labels[: len(prompt)] == [IGNORE] * len(prompt)
    assert example.labels[len(prompt) :] == example.input_ids[len(prompt) :]
    pieces = "".join(tokenizer.convert_ids_to_tokens(example.input_ids[len(prompt) :]))
    assert pieces.replace("▁", " ").replace("Ġ", " ").replace("Ċ", "\n") == f"{words}</s>"
