import json

import pytest

from sft_kernels.sft.data import DataError, read_jsonl

from .conftest import chat

GOOD = chat("a?", "b.")
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
]


@pytest.mark.parametrize(("line", "reason"), BAD, ids=[reason for _, reason in BAD])
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
