"""Templates that render a turn in another way once others follow, and what else keeps labels from being right."""

import pytest

from sft_kernels.sft import prepare, turns
from sft_kernels.sft.data import DataError
from sft_kernels.sft.masking import IGNORE, Encoder
from sft_kernels.sft.recipe import Recipe

from .conftest import record

START = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
CALLS = "{% for c in m.tool_calls or [] %}{{ '<call>' + (c.function | tojson) + '</call>' }}{% endfor %}"
# Thinking is rendered for what follows the last question alone, and a last turn without it has an empty one (Qwen3).
THINKS_LAST = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}"
    "{% if m.reasoning_content %}{{ '<think>\n' + m.reasoning_content + '\n</think>\n\n' }}"
    "{% elif loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
    "{{ m.content or '' }}" + CALLS + "{{ '<|im_end|>\n' }}{% endfor %}" + START
)
# The prompt opens the thinking unless it is switched off (Nemotron, Qwen3.5).
OPENS_THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{{ '<think>' + (m.reasoning_content or '') + '</think>' }}{% endif %}{{ m.content }}"
    + CALLS
    + "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '</think>' }}{% else %}{{ '\n' }}{% endif %}"
    "{% endif %}"
)
# The last turn ends in a token of its own, a call in another; thinking comes in front, with its own end (gpt-oss).
HARMONY = (
    "{% for m in messages %}{% if m.role != 'assistant' %}"
    "{{ '<|im_start|>' + m.role + ': ' + m.content + '<|im_end|>' }}"
    "{% else %}{% if loop.last and m.reasoning_content %}"
    "{{ '<|im_start|>assistant thinks: ' + m.reasoning_content + '<|im_end|>' }}{% endif %}"
    "{{ '<|im_start|>assistant says: ' + (m.content or '') }}"
    "{% if m.tool_calls %}" + CALLS + "{{ '<|call|>' }}"
    "{% else %}{{ '<|endoftext|>' if loop.last else '<|im_end|>' }}{% endif %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
)
# Only the next message's first token ends a turn (GLM).
NO_END = (
    "{% for m in messages %}{{ {'assistant': '<|im_start|>', 'tool': '<|call|>'}.get(m.role, '<|im_end|>') + '\n' }}"
    "{{ m.content or '' }}" + CALLS + "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>\n' }}{% endif %}"
)
# Tools stand before the last question (Mistral).
TOOLS_LATE = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}"
    "{% if tools and loop.index0 == ns.last %}{{ tools | tojson }}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + (m.content or '') + '<|im_end|>' }}{% endfor %}" + START
)
TEMPLATES = {
    "thinks-last": THINKS_LAST,
    "opens-thinking": OPENS_THINKING,
    "harmony": HARMONY,
    "no-end": NO_END,
    "tools-late": TOOLS_LATE,
}


def user(words):
    return {"role": "user", "content": words}


def said(words, thought=None, **more):
    return {"role": "assistant", "content": words, **({"reasoning_content": thought} if thought else {}), **more}


def call(**arguments):
    return {"type": "function", "id": "call00001", "function": {"name": "look", "arguments": arguments}}


THINKING = [user("Q1?"), said("A1.", "T1."), user("Q2?"), said("A2.", "T2.")]
CHATS = {
    "one turn": [user("Q1?"), said("A1.")],
    "three turns": [user("Q1?"), said("A1."), user("Q2?"), said("A2."), user("Q3?"), said("A3.")],
    "thinking": THINKING,
    "call": [user("Q1?"), said("", tool_calls=[call(at="here")]), {"role": "tool", "content": "R"}, said("A2.")],
}


@pytest.fixture(scope="module")
def base(tokenizer):
    import copy

    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>", "<|call|>"]})
    return tokenizer


@pytest.fixture
def make(base):
    import copy

    def make(template):
        tokenizer = copy.deepcopy(base)
        tokenizer.chat_template = template
        return tokenizer

    return make


def spoken(tokenizer, examples):
    """The text before each run of labels, and the run, of all examples."""
    found = []
    for example in examples:
        kept = [label != IGNORE for label in example.labels]
        starts = [i for i in range(1, len(kept)) if kept[i] and not kept[i - 1]]
        for start in starts:
            stop = next((i for i in range(start, len(kept)) if not kept[i]), len(kept))
            pieces = example.input_ids[:start], example.input_ids[start:stop]
            found.append(tuple(tokenizer.decode(piece, skip_special_tokens=False) for piece in pieces))
    return found


def to_say(tokenizer, messages, ends, options=()):
    """``(prompt, words)`` of every assistant turn, rendered as the last of its conversation, up to one of ``ends``."""

    def render(messages, **more):
        return tokenizer.apply_chat_template(messages, tokenize=False, **dict(options), **more)

    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt, upto = render(messages[:i], add_generation_prompt=True), render(messages[: i + 1])
            assert upto.startswith(prompt)
            words = upto[len(prompt) :]
            end = next((end for end in ends if words.rstrip().endswith(end)), "")
            yield prompt, words.rstrip() if end else words


@pytest.mark.parametrize("kind", CHATS)
@pytest.mark.parametrize(
    ("name", "ends"), [("thinks-last", ["<|im_end|>"]), ("harmony", ["<|endoftext|>", "<|call|>"])]
)
def test_a_split_conversation_learns_every_turn_as_if_it_were_the_last(make, name, ends, kind):
    tokenizer = make(TEMPLATES[name])
    examples = Encoder(tokenizer, split_turns=True).examples(record(CHATS[kind]))
    assert sorted(spoken(tokenizer, examples)) == sorted(to_say(tokenizer, CHATS[kind], ends))


@pytest.mark.parametrize(
    ("name", "kind", "reason"),
    [
        (
            "thinks-last",
            "thinking",
            r"message 1: .*'A1\..*' once others follow, and as '<think>\\nT1.*' if it is the last",
        ),
        ("harmony", "thinking", r"message 1: .*' says: A1.* once others follow, and as ' thinks: T1"),
        (
            "harmony",
            "three turns",
            r"message 1: only its end token differs: '<\|endoftext\|>' if it is the last, '<\|im_end",
        ),
        ("tools-late", "three turns", "message 1: the chat template renders the messages before it differently once"),
    ],
)
def test_a_conversation_that_does_not_hold_its_turns_is_refused_with_what_differs(make, name, kind, reason):
    tools = [{"type": "function", "function": {"name": "look"}}] if name == "tools-late" else None
    with pytest.raises(DataError, match=rf"chats\.jsonl:7: {reason}.*--split-turns") as caught:
        Encoder(make(TEMPLATES[name]))(record(CHATS[kind], tools=tools))
    assert str(caught.value).endswith("--split-turns makes it an example of its own")


def test_a_prompt_that_changes_once_it_is_answered_is_trained_on_as_it_is(make):
    """The system's words stand in front of a question only while it waits for its answer (Mistral)."""
    tokenizer = make(
        "{% for m in messages %}{% if m.role != 'system' %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{% if loop.last and m.role == 'user' %}{{ messages[0].content + ' ' }}{% endif %}"
        "{{ m.content + '<|im_end|>' }}{% endif %}{% endfor %}" + START
    )
    messages = [{"role": "system", "content": "Be short."}, *CHATS["three turns"]]
    with pytest.raises(DataError, match="message 2: the chat template renders the messages before it differently"):
        Encoder(tokenizer)(record(messages))
    found = spoken(tokenizer, Encoder(tokenizer, split_turns=True).examples(record(messages)))
    assert sorted(found) == sorted(
        (
            tokenizer.apply_chat_template(messages[:i], tokenize=False, add_generation_prompt=True),
            messages[i]["content"] + "<|im_end|>",
        )
        for i in (2, 4, 6)
    )
    assert all("Be short." in prompt for prompt, _ in found)


def test_one_text_serves_all_turns_that_are_right_in_it(make):
    loop = [said("", "T2.", tool_calls=[call(at="b")]), {"role": "tool", "content": "R"}, said("A3.", "T3.")]
    tokenizer = make(THINKS_LAST)
    first, second = Encoder(tokenizer, split_turns=True).examples(record([*THINKING[:2], user("Q2?"), *loop]))
    assert [len(spoken(tokenizer, [example])) for example in (first, second)] == [2, 1]
    assert [words for _, words in spoken(tokenizer, [second])] == ["<think>\nT1.\n</think>\n\nA1.<|im_end|>"]


def test_a_turn_that_loses_an_empty_thought_is_learned_and_noted(make):
    tokenizer = make(THINKS_LAST)
    encoder = Encoder(tokenizer)
    turns = [words for _, words in spoken(tokenizer, encoder.examples(record(CHATS["three turns"])))]
    assert turns == ["A1.<|im_end|>", "A2.<|im_end|>", "<think>\n\n</think>\n\nA3.<|im_end|>"]
    assert [note for note in encoder.notes if "empty thinking block" in note]


@pytest.mark.parametrize(
    ("kind", "ends"), [("one turn", ["user"]), ("three turns", ["user"] * 3), ("call", ["call", "user"])]
)
def test_a_turn_that_only_the_next_message_ends_is_learned_with_that_token(make, kind, ends):
    tokenizer = make(NO_END)
    (example,) = Encoder(tokenizer).examples(record(CHATS[kind]))
    tokens = {"user": "<|im_end|>", "call": "<|call|>"}
    turns = [words for _, words in spoken(tokenizer, [example])]
    assert all(turn.endswith(tokens[end]) for turn, end in zip(turns, ends, strict=True))
    assert tokenizer.decode(example.input_ids[-1:], skip_special_tokens=False) == "<|im_end|>"


def test_a_turn_without_thinking_follows_the_prompt_with_thinking_off(make):
    tokenizer = make(OPENS_THINKING)
    encoder = Encoder(tokenizer)
    assert spoken(tokenizer, encoder.examples(record(CHATS["one turn"]))) == list(
        to_say(tokenizer, CHATS["one turn"], ["<|im_end|>"], {"enable_thinking": False}.items())
    )
    assert encoder.notes == [
        "some turns follow the chat template's prompt with enable_thinking=False, not its default prompt"
    ]


def test_a_prompt_that_no_turn_begins_with_is_named(make):
    with pytest.raises(DataError, match=r"only the generation prompt differs: .* prompts with '<\|im_start\|>bot"):
        Encoder(make(THINKS_LAST.replace("<|im_start|>assistant", "<|im_start|>bot")))(record(CHATS["one turn"]))


def test_what_ends_the_conversation_is_not_the_end_of_a_turn(make):
    """As in Phi-3: every turn ends in one token, the conversation in another. A call ends in a third."""
    ends = CALLS + "{{ '<|call|>' if m.tool_calls else '<|im_end|>' }}"
    closing = "{% if not add_generation_prompt %}{{ '<|endoftext|>' }}{% endif %}"
    tokenizer = make(NO_END.replace(CALLS, ends) + closing)
    look, answer = (words for _, words in spoken(tokenizer, Encoder(tokenizer).examples(record(CHATS["call"]))))
    assert look.endswith("</call><|call|>")
    assert answer == "A2.<|im_end|>"


@pytest.mark.parametrize("when", ["true", "loop.last", "loop.index % 6 == 0"], ids=["always", "last", "some"])
def test_words_behind_the_end_token_are_not_learned(make, when):
    """The template says something of its own behind an answer."""
    reminder = (
        "{% if m.role == 'assistant' and " + when + " %}{{ '<|im_start|>system\nBe good.<|im_end|>\n' }}{% endif %}"
    )
    tokenizer = make(PLAIN.replace(SAYS, SAYS + reminder))
    messages = long_chat(12)
    turns = [words for _, words in spoken(tokenizer, Encoder(tokenizer, split_turns=True).examples(record(messages)))]
    assert sorted(turns) == sorted(f"A{i}.<|im_end|>" for i in range(12))


def test_several_end_tokens_are_learned_together_and_completion_has_none_of_them(make):
    tokenizer = make(PLAIN.replace("<|im_end|>\n", "<|call|><|im_end|>\n"))
    (example,) = Encoder(tokenizer).examples(record(CHATS["one turn"]))
    assert [words for _, words in spoken(tokenizer, [example])] == ["A1.<|call|><|im_end|>"]
    (example,) = Encoder(tokenizer, "completion").examples(record(CHATS["one turn"]))
    assert [words for _, words in spoken(tokenizer, [example])] == ["A1."]


def test_a_turn_alone_needs_no_text_but_its_own(make):
    """Switched on, thinking changes the system's words, too."""
    on = "{% if enable_thinking is defined and enable_thinking %}"
    thought = "{% if m.role == 'assistant' %}{{ '<think>' + (m.reasoning_content or '') + '</think>' }}{% endif %}"
    prompt = "{{ '<|im_start|>assistant\n' }}" + on + "{{ '<think>' }}{% else %}{{ '<think></think>' }}{% endif %}"
    tokenizer = make(
        f"{on}{{{{ 'Think.' }}}}{{% endif %}}"
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}" + thought + SAYS + "{% endfor %}"
        "{% if add_generation_prompt %}" + prompt + "{% endif %}"
    )
    (found,) = spoken(tokenizer, Encoder(tokenizer).examples(record(THINKING[:2])))
    assert found == (
        "Think.<|im_start|>user\nQ1?<|im_end|>\n<|im_start|>assistant\n<think>",
        "T1.</think>A1.<|im_end|>",
    )
    reason = "only the generation prompt differs: this turn follows the one with enable_thinking=True"
    with pytest.raises(DataError, match=reason):
        Encoder(tokenizer)(record([*THINKING[:2], user("Q2?"), said("A2.")]))


# Marks.

SAYS = "{{ m.content + '<|im_end|>\n' }}"
PLAIN = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}" + SAYS + "{% endfor %}" + START


def marking(inside, condition="m.role == 'assistant'"):
    """PLAIN with ``inside`` in the place of what it says of a message for which the condition holds."""
    return PLAIN.replace(SAYS, "{% if " + condition + " %}" + inside + "{% else %}" + SAYS + "{% endif %}")


@pytest.mark.parametrize(
    "inside",
    [
        "{% generation %}" + SAYS + "{% endgeneration %}",
        "{% generation %}{{ m.content }}{% endgeneration %}{{ '<|im_end|>\n' }}",
        "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}",
    ],
    ids=["with-the-line", "words-alone", "with-the-end"],
)
def test_marks_and_prompts_give_the_same_example(make, inside):
    of_prompts, of_marks = make(PLAIN), make(marking(inside))
    messages = record(CHATS["three turns"])
    assert Encoder(of_marks)(messages) == Encoder(of_prompts)(messages)


def test_marks_say_where_a_turn_begins_that_no_prompt_leads_to(make):
    template = marking("{% generation %}" + SAYS + "{% endgeneration %}").replace(
        "{{ '<|im_start|>assistant\n' }}", "{{ '<|im_start|>assistant\n<think>' }}"
    )
    tokenizer = make(template)
    turns = [words for _, words in spoken(tokenizer, Encoder(tokenizer).examples(record(CHATS["three turns"])))]
    assert turns == ["A1.<|im_end|>", "A2.<|im_end|>", "A3.<|im_end|>"]


def test_marks_around_the_header_do_not_teach_the_header(make):
    wide = PLAIN.replace(
        "{% for m in messages %}", "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
    )
    wide = wide.replace(
        SAYS, SAYS + "{% endgeneration %}{% else %}{{ '<|im_start|>' + m.role + '\n' }}" + SAYS + "{% endif %}"
    )
    tokenizer = make(wide)
    chat = [said("A0."), *CHATS["one turn"]]
    assert [words for _, words in spoken(tokenizer, Encoder(tokenizer).examples(record(chat)))] == [
        "A0.<|im_end|>",
        "A1.<|im_end|>",
    ]
    tokenizer.chat_template = wide.replace("{{ '<|im_start|>assistant\n' }}", "{{ '<|im_start|>assistant\n<think>' }}")
    assert [words for _, words in spoken(tokenizer, Encoder(tokenizer).examples(record(chat[1:])))] == ["A1.<|im_end|>"]


def test_marks_that_leave_out_words_are_refused(make):
    inside = "{{ m.content[:1] }}{% generation %}{{ m.content[1:] + '<|im_end|>\n' }}{% endgeneration %}"
    with pytest.raises(DataError, match=r"message 1: .*{% generation %} leaves out 'A' of this turn"):
        Encoder(make(marking(inside)))(record(CHATS["one turn"]))
    inside = "{% generation %}{{ m.content }}{% endgeneration %}{{ ' Bye.<|im_end|>\n' }}"
    with pytest.raises(DataError, match=r"message 1: .*{% generation %} leaves out 'Bye.' of this turn"):
        Encoder(make(marking(inside)))(record(CHATS["one turn"]))


def test_marks_on_the_last_turn_alone_refuse_the_others(make):
    tokenizer = make(marking("{% generation %}" + SAYS + "{% endgeneration %}", "m.role == 'assistant' and loop.last"))
    with pytest.raises(DataError, match=r"message 1: .* marks it with {% generation %} only if it is the last"):
        Encoder(tokenizer)(record(CHATS["three turns"]))
    examples = Encoder(tokenizer, split_turns=True).examples(record(CHATS["three turns"]))
    assert sorted(words for _, words in spoken(tokenizer, examples)) == [f"A{i}.<|im_end|>" for i in (1, 2, 3)]


# Long conversations.


def long_chat(count):
    return [m for i in range(count) for m in (user(f"Q{i}?"), said(f"A{i}."))]


def tool_loop(count):
    steps = [
        m for i in range(count) for m in (said("", tool_calls=[call(at=f"p{i}")]), {"role": "tool", "content": "R"})
    ]
    return [user("Q?"), *steps, said("Done.")]


@pytest.mark.parametrize("messages", [long_chat(40), tool_loop(40)], ids=["chat", "tool-loop"])
@pytest.mark.parametrize("name", ["plain", "thinks-last", "no-end"])
def test_windows_find_what_whole_prompts_find(make, monkeypatch, name, messages):
    tokenizer = make({"plain": NO_END.replace(CALLS, CALLS + "{{ '<|im_end|>' }}"), **TEMPLATES}[name])
    found = Encoder(tokenizer)(record(messages))
    monkeypatch.setattr(turns, "_EXACT", 10**6)
    assert found == Encoder(tokenizer)(record(messages))


@pytest.mark.parametrize("chat", [long_chat, tool_loop])
@pytest.mark.parametrize("name", ["thinks-last", "no-end", "opens-thinking"])
def test_the_work_is_linear_in_the_number_of_turns(make, monkeypatch, name, chat):
    """Counts the messages that the template is given. Whole prompts alone would make it sixteen times as many."""
    tokenizer = make(TEMPLATES[name])
    rendered, render = [0], tokenizer.apply_chat_template

    def counting(messages, **options):
        rendered[0] += len(messages)
        return render(messages, **options)

    monkeypatch.setattr(tokenizer, "apply_chat_template", counting)
    counts = []
    for length in (50, 200):
        rendered[0] = 0
        Encoder(tokenizer)(record(chat(length)))
        counts.append(rendered[0])
    assert counts[1] < 6 * counts[0]


def test_a_template_that_numbers_its_rounds_is_compared_with_whole_prompts(make):
    tokenizer = make("{% for m in messages %}{{ '[' ~ loop.index ~ '] ' + m.content + '<|im_end|>' }}{% endfor %}")
    turns = [words for _, words in spoken(tokenizer, Encoder(tokenizer).examples(record(long_chat(20))))]
    assert turns == [f"[{2 * i + 2}] A{i}.<|im_end|>" for i in range(20)]


def test_a_question_that_is_hidden_later_is_found_in_the_middle_of_a_long_chat(make):
    hidden = "{% if m.content == 'Q20?' and loop.revindex > 2 %}{{ '****' }}{% else %}{{ m.content }}{% endif %}"
    tokenizer = make(PLAIN.replace(SAYS, hidden + "{{ '<|im_end|>\n' }}"))
    with pytest.raises(DataError, match="message 41: the chat template renders the messages before it differently"):
        Encoder(tokenizer)(record(long_chat(40)))
    assert Encoder(tokenizer)(record(long_chat(20))).kept


def test_the_last_prompt_serves_all_turns_if_it_has_them(make):
    """The first answer is shortened only once the last question has been answered."""
    short = "{% if loop.revindex == 3 and m.role == 'assistant' %}-{% else %}{{ m.content }}{% endif %}"
    tokenizer = make(PLAIN.replace(SAYS, short + "{{ '<|im_end|>\n' }}"))
    messages = CHATS["three turns"][:4]
    (example,) = Encoder(tokenizer).examples(record(messages))
    assert [words for _, words in spoken(tokenizer, [example])] == ["A1.<|im_end|>", "A2.<|im_end|>"]


@pytest.mark.parametrize("keeps", [1, 3, 12])
def test_a_template_that_shortens_old_turns_is_refused_however_far_back(make, keeps):
    """Only the last ``keeps`` answers are rendered in full."""
    tokenizer = make(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        f"{{{{ m.content if m.role == 'user' or loop.revindex <= {2 * keeps} else '-' }}}}"
        "{{ '<|im_end|>' }}{% endfor %}" + START
    )
    with pytest.raises(DataError, match="once others follow"):
        Encoder(tokenizer)(record(long_chat(keeps + 2)))


def test_the_turns_of_one_conversation_are_held_out_together(make, write_jsonl, tmp_path):
    path = write_jsonl(*({"messages": THINKING} for _ in range(6)))
    recipe = Recipe(data=[str(path)], out=str(tmp_path / "run"), holdout=0.4, split_turns=True)
    encoder = Encoder(make(THINKS_LAST), split_turns=True)
    examples, held_out = prepare.read(recipe, recipe.data, encoder)
    assert (len(held_out), len(examples)) == (4, 8)
    assert not {example.source for example in held_out} & {example.source for example in examples}
