"""Messages that ask for something: no loss, calls and thinking to render, keys that nobody reads."""

import json

import pytest

from sft_kernels.sft.data import DataError
from sft_kernels.sft.masking import Encoder
from sft_kernels.sft.spoken import carries_loss

from .conftest import TURNS, record
from .test_masking import learned

HEAD = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{{ m.content or '' }}"
TAIL = "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"


def with_calls(printed):
    return HEAD + "{% for c in m.tool_calls or [] %}" + printed + "{% endfor %}" + TAIL


AS_JSON = with_calls("{{ '<call>' + c.function.name + ' ' + (c.function.arguments | tojson) + '</call>' }}")
JOINED = with_calls("{{ '<call>' + c.function.name + ' ' + c.function.arguments + '</call>' }}")
PRINTED = with_calls("{{ '<call>' + c.function.name + ' ' }}{{ c.function.arguments }}{{ '</call>' }}")


def asks(**reply):
    return [{"role": "user", "content": "Q?"}, {"role": "assistant", "content": "", **reply}]


def call(arguments, name="look"):
    return {"type": "function", "id": "1", "function": {"name": name, "arguments": arguments}}


@pytest.mark.parametrize(
    ("key", "off", "on"), [("weight", 0, 1), ("train", False, True), ("training", 0, 1), ("loss", False, True)]
)
@pytest.mark.parametrize("which", ["tokenizer", "unmarked"])
def test_a_turn_that_asks_for_no_loss_has_none(key, off, on, which, request):
    tokenizer = request.getfixturevalue(which)
    turns = [{**m, key: off} if i == 2 else m for i, m in enumerate(TURNS)]
    encoder = Encoder(tokenizer)
    assert learned(tokenizer, encoder(record(turns))) == ["Two words.<|im_end|>"]
    assert encoder.notes == []
    turns[2] = {**TURNS[2], key: on}
    assert Encoder(tokenizer)(record(turns)) == Encoder(tokenizer)(record(TURNS))
    with pytest.raises(DataError, match="message 2 asks for no loss, and mask='all' labels every token"):
        Encoder(tokenizer, "all")(record([{**m, key: off} if i == 2 else m for i, m in enumerate(TURNS)]))


def test_a_null_asks_for_nothing():
    assert carries_loss({"role": "assistant", "content": "a", "weight": None})
    assert not carries_loss({"role": "user", "content": "a"})


@pytest.mark.parametrize("mode", ["all", "completion+eot"])
@pytest.mark.parametrize(
    ("template", "reply", "part"),
    [
        (HEAD + TAIL, {"tool_calls": [call({})]}, "the tool call's name 'look'"),
        (HEAD + TAIL, {"tool_calls": [call({"at": "here"})]}, "the arguments of 'look'|the tool call's name 'look'"),
        (with_calls("{{ c.function.name }}"), {"tool_calls": [call({"at": "l"})]}, "the arguments of 'look'"),
        (with_calls("{{ c.function.arguments | tojson }}"), {"tool_calls": [call({"at": "x"}, "r")]}, "name 'r'"),
        (
            with_calls("{{ c.function.name + c.function.arguments.a }}"),
            {"tool_calls": [call({"a": "x", "b": 1})]},
            "arguments",
        ),
        (AS_JSON, {"content": "It.", "reasoning_content": "Looked."}, "reasoning_content"),
        (AS_JSON, {"content": "It.", "reasoning": "It"}, "reasoning"),
        (
            HEAD.replace("m.content or ''", "m.content.split('</think>')[-1]") + TAIL,
            {"content": "<think>because</think>b"},
            "content",
        ),
        (
            AS_JSON.replace("m.content or ''", "'' if m.tool_calls else m.content or ''"),
            {"content": "here", "tool_calls": [call({"at": "here"})]},
            "the content",
        ),
    ],
    ids=[
        "name",
        "call",
        "arguments",
        "name-only",
        "one-argument",
        "reasoning",
        "reasoning-in-content",
        "inline",
        "content",
    ],
)
def test_what_the_template_leaves_out_is_refused(tokenizer_with, template, reply, part, mode):
    with pytest.raises(DataError, match=rf"chats\.jsonl:7: .*the chat template leaves out .*({part})"):
        Encoder(tokenizer_with(template), mode)(record(asks(**reply)))


def test_thinking_under_two_names_has_to_be_rendered_once(tokenizer_with):
    template = AS_JSON.replace("{{ m.content or '' }}", "{{ m.reasoning_content or '' }}{{ m.content or '' }}")
    thoughts = {"reasoning_content": "So.", "reasoning": "So."}
    (turn,) = learned(
        tokenizer_with(template), Encoder(tokenizer_with(template))(record(asks(content="It.", **thoughts)))
    )
    assert turn == "So.It.<|im_end|>"


def test_arguments_given_as_json_are_handed_over_as_an_object(tokenizer_with):
    tokenizer = tokenizer_with(AS_JSON)
    given, text = {"city": "Zürich", "n": [1, None, True]}, '{"city":"Zürich","n":[1,null,true]}'
    examples = [Encoder(tokenizer)(record(asks(tool_calls=[call(x)]))) for x in (given, text)]
    assert examples[0] == examples[1]
    (turn,) = learned(tokenizer, examples[0])
    assert json.loads(turn.removeprefix("<call>look ").removesuffix("</call><|im_end|>")) == given


@pytest.mark.parametrize("template", [JOINED, PRINTED], ids=["joined", "printed"])
def test_a_template_for_strings_gets_the_string(tokenizer_with, template):
    tokenizer = tokenizer_with(template)
    text = '{"city": "Paris"}'
    assert learned(tokenizer, Encoder(tokenizer)(record(asks(tool_calls=[call(text)])))) == [
        f"<call>look {text}</call><|im_end|>"
    ]
    with pytest.raises(DataError, match=r"refuses it|prints the arguments of 'look' as a Python dict"):
        Encoder(tokenizer)(record(asks(tool_calls=[call({"city": "Paris"})])))


@pytest.mark.parametrize("text", ["{", "[1]", '"x"', "9" * 5000])
def test_arguments_that_are_no_object_are_refused(tokenizer_with, text):
    with pytest.raises(DataError, match="in a string that is not a JSON object"):
        Encoder(tokenizer_with(AS_JSON))(record(asks(tool_calls=[call(text)])))


def test_arguments_in_the_users_words_are_not_the_templates(tokenizer_with):
    """A Python dict in a question says nothing about how the template prints calls."""
    tokenizer = tokenizer_with(AS_JSON)
    messages = [
        {"role": "user", "content": "Call it with {'city': 'Paris'}."},
        *asks(tool_calls=[call('{"city":"Paris"}')])[1:],
    ]
    (turn,) = learned(tokenizer, Encoder(tokenizer)(record(messages)))
    assert turn == '<call>look {"city": "Paris"}</call><|im_end|>'


def test_a_template_that_looks_a_name_up_is_not_asked_for_another(tokenizer_with):
    known = "{% if c.function.name != 'look' %}{{ raise_exception('unknown') }}{% endif %}"
    tokenizer = tokenizer_with(AS_JSON.replace("{{ '<call>'", known + "{{ '<call>'"))
    assert "look" in learned(tokenizer, Encoder(tokenizer)(record(asks(tool_calls=[call({"at": "x"})]))))[0]


@pytest.mark.parametrize(
    ("printed", "reply"),
    [
        ("{% if c.function.name != 'quit' %}{{ c.function | tojson }}{% endif %}", {"tool_calls": [call({}, "quit")]}),
        (
            "{{ c.function.name + (c.function.arguments.at | truncate(9)) }}",
            {"tool_calls": [call({"at": "a b c d e f g"})]},
        ),
        ("{{ (c.function | tojson) | lower }}", {"tool_calls": [call({"at": "x"}, "Look")]}),
        (
            "{{ c.function.name }}{% if c.function.arguments.on is string %}on{% endif %}",
            {"tool_calls": [call({"on": True})]},
        ),
        ("", {"content": "im", "reasoning_content": "end"}),
    ],
    ids=["one-name", "long-arguments", "case", "keys", "words-of-the-end-token"],
)
def test_what_only_some_messages_lose_is_refused(tokenizer_with, printed, reply):
    said = "{{ m.content or '' }}"
    template = with_calls(printed).replace(said, "{% if not m.reasoning_content %}" + said + "{% endif %}")
    with pytest.raises(DataError, match="the chat template leaves out"):
        Encoder(tokenizer_with(template))(record(asks(**reply)))


def test_no_arguments_are_an_empty_object(tokenizer_with):
    tokenizer = tokenizer_with(AS_JSON)
    assert Encoder(tokenizer)(record(asks(tool_calls=[call("")]))) == Encoder(tokenizer)(
        record(asks(tool_calls=[call({})]))
    )


@pytest.mark.parametrize(
    "reply",
    [
        {"content": "a<|im_end|>b"},
        {"content": "a", "reasoning_content": "b<|im_end|>"},
        {"tool_calls": [call({"at": "<|im_end|>"})]},
        {"tool_calls": [call({"<|im_end|>": "x"})]},
        {"content": "a<|endoftext|>b"},
    ],
    ids=["content", "reasoning", "argument", "key", "end-of-text"],
)
def test_words_that_end_a_turn_are_refused(tokenizer_with, reply):
    template = AS_JSON.replace("{{ m.content or '' }}", "{{ m.reasoning_content or '' }}{{ m.content or '' }}")
    with pytest.raises(
        DataError, match=r"message 1: the assistant's .* contain <\|(im_end|endoftext)\|>, which ends a turn"
    ):
        Encoder(tokenizer_with(template))(record(asks(**reply)))


def test_keys_that_nobody_reads_are_noted_once(tokenizer):
    encoder = Encoder(tokenizer)
    turns = [{**m, "name": "x", "id": i} for i, m in enumerate(TURNS)]
    for _ in range(2):
        encoder(record(turns))
    assert [note.split("key ")[1].split(" here")[0] for note in encoder.notes] == ["'id'", "'name'"]
    assert all(note.startswith("chats.jsonl:7: ") for note in encoder.notes)


def test_a_key_that_the_template_reads_is_not_noted(tokenizer_with):
    encoder = Encoder(tokenizer_with(HEAD.replace("m.role", "(m.name or m.role)") + TAIL))
    encoder(record([{"role": "user", "content": "a", "name": "ann"}, {"role": "assistant", "content": "b"}]))
    assert encoder.notes == []


@pytest.mark.parametrize("error", ["1 + 'a'", "raise_exception('no')", "messages[99].content", "1 / 0"])
@pytest.mark.parametrize("mode", ["all", "completion+eot"])
def test_whatever_a_template_raises_is_that_lines_refusal(tokenizer_with, error, mode):
    encoder = Encoder(tokenizer_with(HEAD + "{% if m.content == 'bad' %}{{ " + error + " }}{% endif %}" + TAIL), mode)
    with pytest.raises(DataError, match=r"chats\.jsonl:7: .*the chat template refuses it: "):
        encoder(record([{"role": "user", "content": "bad"}, {"role": "assistant", "content": "b"}]))
    assert encoder(record([{"role": "user", "content": "good"}, {"role": "assistant", "content": "b"}])).kept


def test_whatever_a_tokenizer_raises_is_that_lines_refusal(tokenizer, monkeypatch):
    encoder = Encoder(tokenizer)
    encoder(record(TURNS))

    class Refuses(type(tokenizer)):
        def __call__(self, *args, **options):
            raise OverflowError("too long")

    monkeypatch.setattr(tokenizer, "__class__", Refuses)
    with pytest.raises(DataError, match=r"chats\.jsonl:7: the tokenizer refuses it: too long"):
        encoder(record(TURNS))
