import json
import os
import threading

import pytest

from sft_kernels.sft import rows
from sft_kernels.sft.data import read_jsonl
from sft_kernels.sft.rows import DataError
from sft_kernels.sft.sources import Source, check_pipes

from .conftest import chat

GOOD = chat("a?", "b.")
USER, REPLY = GOOD["messages"]
CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
NESTED = "[" * 101 + "]" * 101


def beside(json_text):
    """A line that would be good but for what stands beside its messages."""
    return json.dumps(GOOD)[:-1] + f", {json_text}}}"


def reply(**keys):
    return {"messages": [USER, {**REPLY, **keys}]}


def calling(function=None, **call):
    if function is not None:
        call = {**CALL, "function": function, **call}
    return {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [call]}, REPLY]}


def arguments(value):
    return calling({"name": "f", "arguments": value})


NOT_JSON = [
    (beside('"x": ' + "[" * 200_000 + "]" * 200_000), "nested deeper than 100 levels"),
    (beside(f'"x": {NESTED[1:-1]}'), "nested deeper than 100 levels"),
    (beside('"x": ' + "9" * 5000), "an integer of more than 4300 digits"),
    (beside('"x": NaN'), "NaN, which is not JSON"),
    (beside('"x": [-Infinity]'), "-Infinity, which is not JSON"),
    (beside('"x": 1e999'), "the number 1e999 is too large"),
    (beside('"messages": []'), "the key 'messages' stands twice"),
    ('{"messages": [{"role": "user", "role": "user"}]}', "the key 'role' stands twice"),
    (beside('"x": "\\uDC00"'), "half a surrogate pair"),
    (beside('"\\ud83d": 1'), "half a surrogate pair"),
    ('{"text": "a\0b"}', "not JSON .*control character"),
    ("\0\0\0\0", "not JSON"),
    (beside('"x": 1') + beside('"x": 1'), "not JSON .*second value"),
]
MESSAGES = [
    (reply(content=5), r"message 1 \(assistant\) has neither a string as content nor null"),
    (reply(content=5, tool_calls=[CALL]), "message 1 .* a number"),
    (reply(content={"a": 1}, tool_calls=[CALL]), "message 1 .* an object"),
    (reply(content=[{"type": "image"}], tool_calls=[CALL]), "message 1 .* nor text parts alone"),
    (reply(content=["a"], tool_calls=[CALL]), "message 1 .* parts as content; join"),
    (reply(content=None), "message 1 .* neither a string as content nor tool calls"),
    (reply(content=None, tool_calls=[]), "message 1 .* neither a string as content nor tool calls"),
    (reply(role=["assistant"]), "message 1: role is not a string"),
    (reply(role="x" * 999), "unknown role 'x{60}'; expected"),
    (reply(tool_calls={"name": "f"}), "message 1 .*: tool_calls is not a list"),
    (reply(tool_calls="f()"), "message 1 .*: tool_calls is not a list"),
    (reply(tool_calls=["f()"]), "message 1 .*: tool call 0 is not an object"),
    (reply(tool_calls=[CALL, None]), "message 1 .*: tool call 1 is not an object"),
    (calling("f"), 'tool call 0 has a "function" that is not an object'),
    (calling({"arguments": {}}), 'tool call 0 has no "name"'),
    (calling({"name": " ", "arguments": {}}), 'tool call 0 has no "name"'),
    (calling({"name": 5, "arguments": {}}), 'tool call 0 has no "name"'),
    (calling(name="f", parameters={}), 'tool call 0 has no "arguments"'),
    (arguments(None), 'tool call 0 has no "arguments"; write {}'),
    (arguments([1]), 'tool call 0 has "arguments" that are not an object'),
    (arguments("x"), '"arguments" in a string that is not a JSON object .not JSON'),
    (arguments("[]"), '"arguments" in a string that is not a JSON object$'),
    (arguments('"{}"'), '"arguments" in a string that is not a JSON object$'),
    (arguments('{"a": 1, "a": 2}'), "the key 'a' stands twice"),
    (arguments('{"a": NaN}'), "NaN"),
    (arguments('{"a": "\\ud800"}'), "half a surrogate pair"),
    (arguments('{"a": ' + NESTED + "}"), "nested deeper"),
    ({"messages": [{**USER, "tool_calls": [CALL]}, REPLY]}, r"message 0 \(user\) has tool calls"),
    (reply(reasoning_content=["a"]), '"reasoning_content" is not a string'),
    (reply(reasoning={}), '"reasoning" is not a string'),
    (reply(thinking=5), '"thinking" is not a string'),
    (reply(weight=0.5), '"weight" is not 0 or 1'),
    (reply(weight="1"), '"weight" is not 0 or 1'),
    (reply(train="true"), '"train" is not true or false'),
    (reply(training=2), '"training" is not true or false'),
    (reply(loss=[]), '"loss" is not true or false'),
    (reply(loss=True, train=False), "contradicts"),
    (
        {"system": "Be quick.", "messages": [{"role": "system", "content": "Be kind."}, USER, REPLY]},
        '"system" says what',
    ),
    ({**GOOD, "system": [{"type": "text", "text": "Be kind."}]}, '"system" beside "messages" is not a string'),
    ({**GOOD, "prompt": "Another question?"}, '"prompt" beside "messages" says what no message says'),
    ({**GOOD, "documents": [{"text": "d"}]}, '"documents" beside "messages" is not supported'),
    ({"messages": [{**USER, "weight": 1}, REPLY]}, r'message 0 \(user\): "weight" asks for loss'),
    ({"messages": [{**USER, "train": True}, REPLY]}, '"train" asks for loss'),
    (reply(weight=0), "no assistant turn to learn from: every one of them is switched off"),
    ({"messages": [USER, {**REPLY, "train": False}, USER, {**REPLY, "loss": 0}]}, "switched off"),
    ({**GOOD, "tools": ["f"]}, '"tools": entry 0 is not an object'),
    ({**GOOD, "tools": {"name": "f"}}, '"tools" is not a list'),
    ({**GOOD, "tools": "[{]"}, '"tools" is a string but not a JSON list'),
    ({**GOOD, "tools": '{"name": "f"}'}, '"tools" is not a list'),
    ({**GOOD, "chat_template_kwargs": {"enable_thinking": False}}, "chat_template_kwargs"),
]
BAD = [
    ('{"messages": [{"role": "user", "content": "a"}, {"role": "assis', "not JSON"),
    ("[1, 2]", "either"),
    ({}, "either"),
    ({"messages": [], "text": "x"}, "either"),
    ({"messages": []}, "empty"),
    ({"messages": "hello"}, "not a list"),
    ({"messages": ["hello"]}, "message 0 is not an object"),
    ({"messages": [{"role": "human", "content": "a"}]}, "unknown role 'human'"),
    ({"messages": [{"content": "a"}]}, "unknown role None"),
    ({"messages": [{"role": "user", "content": 3}]}, "neither a string"),
    ({"messages": [{"role": "user", "content": "a"}]}, "no assistant turn"),
    ({"messages": [{"role": "assistant", "content": ""}]}, "no assistant turn"),
    ({**GOOD, "tools": "x"}, "tools"),
    ({"text": " "}, "empty"),
    ('{"text": "\\ud800"}', "surrogate"),
    *NOT_JSON,
    *MESSAGES,
]


@pytest.mark.parametrize(("line", "reason"), BAD, ids=range(len(BAD)))
def test_a_bad_line_stops_the_reading_with_file_line_and_reason(write_jsonl, line, reason):
    path = write_jsonl(GOOD, line, GOOD)
    with pytest.raises(DataError, match=reason) as caught:
        read_jsonl(path)
    assert (str(caught.value.path), caught.value.line) == (str(path), 2)
    assert str(caught.value).startswith(f"{path}:2: ")


def test_bad_lines_can_be_counted_instead(write_jsonl):
    bad = []
    records = read_jsonl(write_jsonl(GOOD, *(line for line, _ in BAD), GOOD), bad)
    assert [r.line for r in records] == [1, len(BAD) + 2]
    assert [e.line for e in bad] == list(range(2, len(BAD) + 2))


def test_bytes_that_are_not_utf_8_are_named(tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b'\n{"text": "\xff"}\n')
    with pytest.raises(DataError, match=r"chats\.jsonl:2: not UTF-8"):
        read_jsonl(path)


def test_a_byte_order_mark_and_blank_lines_do_no_harm(tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n\n  \n" + json.dumps(GOOD).encode())
    assert [r.line for r in read_jsonl(path)] == [1, 4]


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_file_is_named(tmp_path, content):
    path = tmp_path / "empty.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=r"empty\.jsonl: no conversation in it"):
        read_jsonl(path)


def test_a_file_with_bad_lines_only_raises_even_when_they_are_counted(write_jsonl):
    with pytest.raises(DataError, match="no usable conversation"):
        read_jsonl(write_jsonl("{"), [])


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_jsonl(tmp_path / "nowhere.jsonl")


GOOD_LINES = [
    beside(f'"x": {NESTED[2:-2]}'),
    beside('"x": "\\uD83D\\uDE00 \\\\uD800", "y": [-1e308, 12345678901234567890]'),
    beside('"weight": 1'),
    calling(CALL["function"]),
    calling(name="f", arguments={}),
    arguments(""),
    arguments('{"a": "\\ud83d\\ude00"}'),
    reply(content="", reasoning_content="hm"),
    reply(weight=1, train=True, loss=1.0, training=None),
    {"messages": [{**USER, "weight": 0}, {**REPLY, "train": 0}, REPLY]},
    reply(tool_calls=None, reasoning=None),
    {"messages": [{"role": "developer", "content": "Be kind."}, USER, REPLY]},
    {"text": None, **GOOD},
    {**GOOD, "prompt": USER["content"], "prompt_id": "1"},
    {"system": "x", "messages": [{"role": "system", "content": "x"}, USER, REPLY]},
]


@pytest.mark.parametrize("line", GOOD_LINES, ids=range(len(GOOD_LINES)))
def test_what_is_allowed_is_read_as_it_is(line, write_jsonl):
    (record,) = read_jsonl(write_jsonl(line))
    expected = (json.loads(line) if isinstance(line, str) else line)["messages"]
    switches = ("weight", "train", "training", "loss")
    for message in expected:  # null is no answer to whether a turn carries loss
        for name in switches:
            if message.get(name, 0) is None:
                del message[name]
    assert record.messages == expected


@pytest.mark.parametrize(
    ("tools", "expected"),
    [([CALL], [CALL]), (json.dumps([CALL]), [CALL]), ([], []), ("[]", []), ("", None), (None, None)],
)
def test_tools_may_be_a_string_of_json(tools, expected, write_jsonl):
    (record,) = read_jsonl(write_jsonl({**GOOD, "tools": tools}))
    assert record.tools == expected


def test_a_line_that_is_too_long_is_named_and_passed_over(write_jsonl, monkeypatch):
    monkeypatch.setattr(rows, "LONGEST", 1 << 20)
    bad = []
    path = write_jsonl(GOOD, beside('"x": "' + "y" * (3 << 20) + '"'), GOOD)
    assert [record.line for record in read_jsonl(path, bad)] == [1, 3]
    assert [str(error) for error in bad] == [f"{path}:2: longer than 1 MiB"]


def test_a_message_is_one_line_without_control_characters():
    error = DataError("a\x1b[2J", 3, "no\n\udcffway\u202e")
    assert str(error) == "a\\x1b[2J:3: no \\udcffway\\u202e"
    assert len(str(DataError("a", 3, "x" * 10**6))) < 5000


def test_the_first_reason_is_told_if_no_line_is_left(write_jsonl):
    path = write_jsonl(*(line for line, _ in MESSAGES))
    reason = f"usable conversation in it; refused {len(MESSAGES)} lines, the first: .*:1: message 1"
    with pytest.raises(DataError, match=reason):
        read_jsonl(path, [])
    with pytest.raises(DataError, match=r"refused 1 line, the first: .*:1: not JSON"):
        read_jsonl(write_jsonl("{"), [])


def piped(*rows):
    """The path of a pipe that holds some lines."""
    read, write = os.pipe()
    os.write(write, "".join(json.dumps(row) + "\n" for row in rows).encode())
    os.close(write)
    return read, f"/dev/fd/{read}"


def test_a_pipe_can_be_read_again_through_its_source():
    read, path = piped(GOOD, GOOD)
    source = Source(path)
    assert source.is_pipe
    for _ in range(2):
        assert [number for number, _ in source.lines()] == [1, 2]
    with pytest.raises(DataError, match="no conversation in it"):
        read_jsonl(path)
    os.close(read)


def test_a_pipe_that_is_given_twice_is_refused_before_it_is_read(write_jsonl):
    read, path = piped(GOOD)
    file = write_jsonl(GOOD)
    for paths in ([path, path], [path, file, f"/proc/self/fd/{read}"]):
        with pytest.raises(DataError, match="given twice, but a pipe can be read only once"):
            check_pipes(paths)
    check_pipes([path, file, file, file.parent, file.parent, "nowhere", "nowhere"])
    assert len(read_jsonl(path)) == 1
    os.close(read)


def test_a_named_pipe_is_read(tmp_path):
    os.mkfifo(path := tmp_path / "pipe")
    writer = threading.Thread(target=path.write_text, args=[json.dumps(GOOD) + "\n"], daemon=True)
    writer.start()
    assert len(read_jsonl(path)) == 1
    writer.join()


@pytest.mark.parametrize(
    ("name", "reason"),
    [("a\0b", "cannot be read"), ("x" * 300, "cannot be read"), ("", "is a folder")],
)
def test_a_name_that_cannot_be_opened_is_named(name, reason):
    with pytest.raises(DataError, match=reason):
        read_jsonl(name)
