"""Each format that is not read is refused with a command. The command is run, its output read."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import pickle
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from sft_kernels.sft.data import read_jsonl
from sft_kernels.sft.rows import DataError

ASK, SAY = "hi?", 'It\'s "yo" é.'


def turns(*said, names=("user", "assistant")):
    return [{"role": names[i % 2], "content": words} for i, words in enumerate(said)]


USER, REPLY = CHAT = turns(ASK, SAY)
ROW, SYSTEM = {"messages": CHAT}, {"role": "system", "content": "Be kind."}
SHARED = [{"from": "human", "value": ASK}, {"from": "gpt", "value": SAY}]
SHAREGPT = {"conversations": SHARED}
ALPACA, ADDED = {"instruction": "Add.", "input": "1 2", "output": SAY}, turns("Add.\n\n1 2", SAY)
FUNCTION = {"name": "f", "arguments": {"a": 1}}
CALL, TOOL = ({"type": "function", "function": f} for f in (FUNCTION, {"name": "f"}))
RESULT = {"role": "tool", "content": "3"}
CHECKED = [USER, RESULT, REPLY]
OLD_CALL = {"role": "assistant", "content": None, "function_call": FUNCTION}
NEW_CALL = {"role": "assistant", "content": None, "tool_calls": [CALL]}
AS_SHARED = {"from": "function_call", "value": json.dumps(FUNCTION)}
THOUGHT = {**REPLY, "reasoning_content": "hm"}
PARTS = [{"type": "text", "text": "hi"}, {"type": "text", "text": "?"}]
SAID_IN_PARTS = [{"role": r, "parts": [{"text": t}]} for r, t in (("user", ASK), ("model", SAY))]


def refusal(path):
    """The refusal of a file, None if it is read."""
    try:
        read_jsonl(path)
    except DataError as error:
        return str(error)
    return None


def converted(path):
    """The records of a file after the commands of its refusals, each run in a shell."""
    for _ in range(4):
        if (said := refusal(path)) is None:
            return read_jsonl(path)
        assert said.startswith(str(path))
        assert "\n" not in said
        _, found, command = said.partition("To convert it: ")
        assert found, f"no command in {said}"
        program = command.split()[0]
        if not shutil.which(program) and program != "python":
            pytest.skip(f"no {program} here")
        before = path.read_bytes()
        shell = f'python() {{ {shlex.quote(sys.executable)} "$@"; }}; {command}'
        done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        assert path.read_bytes() == before  # no command writes over its source
        path = Path(shlex.split(command)[-1])
    raise AssertionError(f"still not read: {said}")


def messages(records):
    return [record.messages for record in records]


def jsonl(*rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


READ = {  # rows in shapes that are read, and their messages
    "ShareGPT": (SHAREGPT, CHAT),
    "ShareGPT with a system prompt": ({"system": "Be kind.", **SHAREGPT}, [SYSTEM, *CHAT]),
    "conversations with roles": ({"conversations": CHAT}, CHAT),
    "Alpaca": (ALPACA, ADDED),
    "Alpaca without input": ({**ALPACA, "input": ""}, turns("Add.", SAY)),
    "Alpaca with history": ({**ALPACA, "history": [["q", "a"]]}, turns("q", "a") + ADDED),
    "prompt and completion": ({"prompt": ASK, "completion": SAY}, CHAT),
    "prompt and completion as messages": ({"prompt": [USER], "completion": [REPLY]}, CHAT),
    "function_call as ShareGPT has it": (
        {"conversations": [SHARED[0], AS_SHARED, {"from": "observation", "value": "3"}, SHARED[1]]},
        [USER, {**NEW_CALL, "content": ""}, RESULT, REPLY],
    ),
    "Alpaca with its text": ({**ALPACA, "text": "### Add."}, ADDED),
    "Alpaca with a system prompt": ({**ALPACA, "system": "Be kind.", "id": 1}, [SYSTEM, *ADDED]),
    "a prompt of several turns": (
        {"prompt": [USER, REPLY, USER], "completion": [REPLY]},
        [USER, {**REPLY, "weight": 0}, USER, REPLY],
    ),
    "a prompt in messages": ({"prompt": [SYSTEM, USER], "completion": SAY}, [SYSTEM, USER, REPLY]),
    "an answer to learn from": ({"prompt": ASK, "completion": SAY, "label": True}, CHAT),
    "no messages": ({"messages": None, **SHAREGPT}, CHAT),
    "a weight": ({"conversations": [SHARED[0], {**SHARED[1], "weight": 1}]}, [USER, {**REPLY, "weight": 1}]),
}
ROWS = {  # rows in other shapes, and the messages that they become
    "another key": ({"id": 5, "spoken": CHAT}, CHAT),
    "a quote in the key": ({"it's \"$(touch x)`": CHAT}, CHAT),
    "a conversation as a string": ({"conversations": json.dumps(SHARED)}, CHAT),
    "messages as a string": ({"messages": json.dumps(CHAT)}, CHAT),
    "question and answer": ({"question": ASK, "answer": SAY}, CHAT),
    "OpenOrca": ({"system_prompt": "Be kind.", "question": ASK, "response": SAY}, [SYSTEM, *CHAT]),
    "input and output": ({"input": ASK, "output": SAY}, CHAT),
    "thinking": ({"question": ASK, "thinking": "hm", "answer": SAY}, [USER, THOUGHT]),
    "a preference": ({"prompt": ASK, "chosen": CHAT, "rejected": CHAT[:1]}, CHAT),
    "a preference in strings": ({"prompt": ASK, "chosen": SAY, "rejected": "no"}, CHAT),
    "a preference of replies": ({"prompt": [USER], "chosen": [REPLY], "rejected": [USER]}, CHAT),
    "a list of messages": (CHAT, CHAT),
    "Gemini": ({"contents": SAID_IN_PARTS}, CHAT),
    "human and gpt": ({"messages": turns(ASK, SAY, names=("human", "gpt"))}, CHAT),
    "model": ({"messages": turns(ASK, SAY, names=("user", "model"))}, CHAT),
    "from and value in messages": ({"messages": SHARED}, CHAT),
    "function": ({"messages": [USER, {**RESULT, "role": "function"}, REPLY]}, CHECKED),
    "ipython": ({"messages": [USER, {**RESULT, "role": "ipython"}, REPLY]}, CHECKED),
    "parts": ({"messages": [{"role": "user", "content": PARTS}, REPLY]}, CHAT),
    "an object": (
        {"messages": [USER, {"role": "tool", "content": {"a": 1}}, REPLY]},
        [USER, {"role": "tool", "content": '{"a": 1}'}, REPLY],
    ),
    "function_call": (
        {"messages": [USER, OLD_CALL, {"role": "function", "content": "3"}, REPLY]},
        [USER, NEW_CALL, RESULT, REPLY],
    ),
    "a system prompt beside messages": ({"system": "Be kind.", **ROW}, [SYSTEM, *CHAT]),
    "a text beside messages": ({**ROW, "text": "hi yo"}, CHAT),
}


@pytest.mark.parametrize("shape", ROWS)
def test_a_row_in_another_shape_becomes_messages(shape, tmp_path):
    row, expected = ROWS[shape]
    path = tmp_path / "it's chats.jsonl"
    path.write_text(jsonl(row, row), encoding="utf-8")
    assert refusal(path).startswith(f"{path}:1: ")
    assert messages(converted(path)) == [expected] * 2
    assert {file.name.split(".")[0] for file in tmp_path.iterdir()} == {"it's chats"}


@pytest.mark.parametrize("shape", READ)
def test_a_row_in_a_common_shape_is_read(shape, tmp_path):
    row, expected = READ[shape]
    path = tmp_path / "chats.jsonl"
    path.write_text(jsonl(row, {**row, "tools": json.dumps([TOOL])}, ROW), encoding="utf-8")
    records = read_jsonl(path)
    assert messages(records) == [expected, expected, CHAT]
    assert [record.tools for record in records] == [None, [TOOL], None]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"conversations": []}, '"conversations" is empty or not a list'),
        ({"conversations": {"from": "human"}}, '"conversations" is empty or not a list'),
        ({"conversations": ["a"]}, "message 0 is not an object"),
        ({"conversations": [{"from": "human", "value": 5}]}, 'message 0: "value" is not a string'),
        ({"conversations": [*SHARED, {"from": "alien", "value": "x"}]}, "message 2 has unknown role 'alien'"),
        ({"conversations": [*SHARED, {"value": "x"}]}, "message 2 has unknown role None"),
        ({"conversations": SHARED[:1]}, "no assistant turn"),
        ({"conversations": [{"from": "function_call", "value": "f()"}]}, "message 0: a function_call is not JSON"),
        (
            {"conversations": [SHARED[0], {"from": "function_call", "value": "[5]"}]},
            ".*tool call 0 has a .function. that is not",
        ),
        ({"prompt": "x", **SHAREGPT}, '"prompt" beside "messages" says what no message says'),
        ({"instruction": "", "input": " ", "output": SAY}, '"instruction" is empty'),
        ({**ALPACA, "input": ["1"]}, '"input" is not a string'),
        ({**ALPACA, "output": None}, '"output" is empty, so there is no answer'),
        ({**ALPACA, "output": 5}, '"output" is not a string'),
        ({**ALPACA, "history": [["q"]]}, '"history" is not a list of pairs'),
        ({"prompt": ASK, "completion": " "}, '"completion" is empty'),
        ({"prompt": [USER], "completion": [USER]}, "no assistant turn"),
    ],
)
def test_a_row_in_a_common_shape_that_makes_no_sense_is_named(row, reason, tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text(jsonl(ROW, row))
    with pytest.raises(DataError, match=f":2: {reason}"):
        read_jsonl(path)


@pytest.mark.parametrize("shape", ["OpenOrca", "question and answer"])
def test_tools_stay_and_rows_that_fit_stay_as_they_are(shape, tmp_path):
    row, expected = ROWS[shape]
    path = tmp_path / "chats.jsonl"
    path.write_text(jsonl(ROW, {**row, "tools": json.dumps([TOOL])}))
    assert refusal(path).startswith(f"{path}:2: ")
    records = converted(path)
    assert messages(records) == [CHAT, expected]
    assert [record.tools for record in records] == [None, [TOOL]]


@pytest.mark.parametrize("row", ["Once.", {"content": "Once."}], ids=["a string", "another key"])
def test_a_row_of_text_becomes_text(row, tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text(jsonl(row))
    assert [record.text for record in converted(path)] == ["Once."]


def test_old_functions_become_tools(tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text(jsonl({**ROW, "functions": [TOOL["function"]]}))
    assert [(r.messages, r.tools) for r in converted(path)] == [(CHAT, [TOOL])]


def table(rows, delimiter=","):
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, [*rows[0]], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


LONG = [('hi?\n"x", y', "yo"), ("a", "b" * 200_000)]  # past the csv module's limit
QA, ANSWERS = [{"question": q, "answer": a} for q, a in LONG], [turns(q, a) for q, a in LONG]
OBJECT, ONE, MANY = json.dumps(ROW), json.dumps(ROW, indent=1), 20_000
YAML = "- messages:\n  - {role: user, content: 'q'}\n  - role: assistant\n    content: a\n"
TEXTS = {  # name, text, messages
    "an array": ("a.json", json.dumps([ROW, ROW]), [CHAT] * 2),
    "an array over lines": ("a.json", json.dumps([ROW, ROW], indent=1), [CHAT] * 2),
    "an array with a row a line": ("a.json", f"[\n{OBJECT},\n{OBJECT}\n]", [CHAT] * 2),
    "an array named jsonl": ("a.jsonl", json.dumps([ROW], indent=1), [CHAT]),
    "ShareGPT": ("a.json", json.dumps([SHAREGPT] * 2), [CHAT] * 2),
    "ShareGPT over lines": ("a.json", json.dumps([SHAREGPT] * 2, indent=1), [CHAT] * 2),
    "Alpaca over lines": ("a.json", json.dumps([ALPACA], indent=4), [ADDED]),
    "messages over lines": ("a.json", json.dumps(CHAT, indent=1), [CHAT]),
    "rows under a key": ("a.json", json.dumps({"data": [ROW, ROW]}), [CHAT] * 2),
    "under a key over lines": ("a.json", json.dumps({"x": [ALPACA] * 2}, indent=1), [ADDED] * 2),
    "many": ("a.json", json.dumps({"data": [SHAREGPT] * MANY}, indent=1), [CHAT] * MANY),
    "an object over lines": ("a.json", ONE, [CHAT]),
    "objects over lines": ("a.json", ONE + ONE, [CHAT] * 2),
    "an object of ShareGPT over lines": ("a.json", json.dumps(SHAREGPT, indent=1), [CHAT]),
    "two objects on a line": ("a.jsonl", OBJECT + OBJECT, [CHAT] * 2),
    "a comma behind each object": ("a.jsonl", f"{OBJECT},\n{OBJECT},\n", [CHAT] * 2),
    "Python's notation": ("a.jsonl", f"{ROW}\n{ROW}\n", [CHAT] * 2),
    "NaN": ("a.jsonl", json.dumps({**ROW, "score": float("nan")}), [CHAT]),
    "CSV": ("a.csv", table(QA), ANSWERS),
    "CSV by another name": ("a.jsonl", table(QA), ANSWERS),
    "TSV": ("a.tsv", table(QA, "\t"), ANSWERS),
    "CSV with semicolons": ("a.csv", table(QA, ";"), ANSWERS),
    "CSV with messages": ("a.csv", table([{"id": 1, "messages": json.dumps(CHAT)}]), [CHAT]),
    "CSV with ShareGPT": ("a.csv", table([{"conversations": json.dumps(SHARED)}]), [CHAT]),
    "YAML": ("a.yaml", YAML, [turns("q", "a")]),
    "YAML documents": ("a.yml", "---\nquestion: q\nanswer: a\n" * 2, [turns("q", "a")] * 2),
}


@pytest.mark.parametrize("kind", TEXTS)
def test_a_text_in_another_format_is_converted(kind, tmp_path):
    name, text, expected = TEXTS[kind]
    (tmp_path / name).write_bytes(text.encode())
    assert refusal(tmp_path / name).startswith(f"{tmp_path / name}:1: ")
    assert messages(converted(tmp_path / name)) == expected


@pytest.mark.parametrize("kind", ["an array over lines", "CSV", "ShareGPT over lines", "NaN"])
def test_a_byte_order_mark_does_not_hide_the_format(kind, tmp_path):
    name, text, expected = TEXTS[kind]
    (tmp_path / name).write_bytes(("\ufeff" + text).encode())
    assert messages(converted(tmp_path / name)) == expected


def archive(name, text):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        file.writestr(name, text)
    return out.getvalue()


def made_by(*command):
    if not shutil.which(command[0]):
        pytest.skip(f"no {command[0]} here")
    line = jsonl(ROW).encode()
    return subprocess.run(command, input=line, capture_output=True, check=True).stdout


def tabular(kind):
    pa = pytest.importorskip("pyarrow")
    rows, sink = pa.Table.from_pylist([ROW]), pa.BufferOutputStream()
    if kind == "orc":
        pytest.importorskip("pyarrow.orc").write_table(rows, sink)
    else:
        with getattr(pa.ipc, kind)(sink, rows.schema) as writer:
            writer.write_table(rows)
    return sink.getvalue().to_pybytes()


def by_arrow(name):
    pa = pytest.importorskip("pyarrow")
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, name) as file:
        file.write(jsonl(ROW, ROW).encode())
    return sink.getvalue().to_pybytes()


COMPRESSED = {
    "gzip": lambda: gzip.compress(jsonl(ROW, ROW).encode()),
    "two of gzip": lambda: gzip.compress(jsonl(ROW).encode()) * 2,
    "bzip2": lambda: bz2.compress(jsonl(ROW, ROW).encode()),
    "xz": lambda: lzma.compress(jsonl(ROW, ROW).encode()),
    "zstd": lambda: by_arrow("zstd"),
    "two of zstd": lambda: by_arrow("zstd") * 2,
    "lz4": lambda: by_arrow("lz4"),
}


@pytest.mark.parametrize("kind", COMPRESSED)
def test_a_compressed_file_is_read_and_a_part_of_it_named(kind, tmp_path):
    path, data = tmp_path / "chats.data", COMPRESSED[kind]()
    path.write_bytes(data)
    found = messages(read_jsonl(path))
    assert found == [CHAT] * len(found)
    assert len(found) >= 2
    path.write_bytes(data[:-5])
    with pytest.raises(DataError, match=r"chats\.data:\d+: (cannot be read|not JSON)"):
        read_jsonl(path)


def test_a_compressed_pipe_is_read():
    read, write = os.pipe()
    os.write(write, gzip.compress(jsonl(ROW).encode()))
    os.close(write)
    assert messages(read_jsonl(f"/dev/fd/{read}")) == [CHAT]
    os.close(read)


def test_a_parquet_table_is_read(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    path = tmp_path / "chats.parquet"
    rows = [{"id": i, "messages": [USER, {**NEW_CALL, "weight": 1}, RESULT, REPLY], "tools": None} for i in range(300)]
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=100)
    records = read_jsonl(path)
    assert [record.line for record in records] == [*range(1, 301)]
    expected = [USER, {**NEW_CALL, "weight": 1}, RESULT, REPLY]
    del expected[1]["content"]  # a table has no difference between null and not there
    assert records[-1].messages == expected
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"chats\.parquet:1: cannot be read"):
        read_jsonl(path)


BINARY = {
    "zip": lambda: archive("chats.jsonl", jsonl(ROW)),
    "tar": lambda: made_by("tar", "-c", "-f", "-", "-C", "/dev", "stdin", "--dereference"),
    "ORC": lambda: tabular("orc"),
    "Arrow": lambda: tabular("new_file"),
    "Arrow (stream)": lambda: tabular("new_stream"),
    **{name: lambda name=name: jsonl(ROW).encode(name) for name in ("UTF-16", "UTF-32")},
    **{name: lambda name=name: jsonl(ROW).encode(name) for name in ("UTF-16LE", "UTF-16BE")},
}


@pytest.mark.parametrize("kind", BINARY)
def test_a_binary_file_is_converted(kind, tmp_path):
    path = tmp_path / "chats.data"
    path.write_bytes(BINARY[kind]())
    name = kind.split()[0].removesuffix("LE").removesuffix("BE")
    with pytest.raises(DataError, match=rf"chats\.data:1: is (a )?{name}"):
        read_jsonl(path, [])  # no line of it is skipped
    if kind != "tar":  # which holds an empty file
        assert messages(converted(path)) == [CHAT]


def test_what_no_command_of_this_machine_converts_is_named(tmp_path):
    path = tmp_path / "chats.bin"
    path.write_bytes(archive("[Content_Types].xml", "<x/>"))
    assert ":1: is Excel" in refusal(path)
    path.write_bytes(pickle.dumps(ROW))
    assert ":1: is binary" in refusal(path)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a pointer of Git LFS"),
        ("<!DOCTYPE html>\n<html>\n", "is HTML or XML"),
        ('{"a": "b", "c": "d"}\n', r".*got the keys 'a', 'c' .*r\[\"QUESTION\"\]"),
        ('{"messages": [{"role": "user", "content": "a"}, {"role": "assis', "not JSON"),
        ('{"text": "a\n', "not JSON"),
        ("5\n", ".*got 5"),
        ("{}\n", ".*got {}"),
        ("[[1]]\n", ".*got an array"),
        ("[1,\n2]\n", ".*got an array"),
        ("{'messages': 1}\n", "not JSON but Python's notation"),
        ("hello\n", "not JSON"),
        ("\u00a0\n", "not JSON"),
    ],
)
def test_what_is_no_conversation_is_named(text, reason, tmp_path):
    (tmp_path / "chats").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=f":1: {reason}"):
        read_jsonl(tmp_path / "chats")


def test_an_input_that_only_later_rows_have_is_kept(tmp_path):
    path = tmp_path / "alpaca.jsonl"
    path.write_text(jsonl({"instruction": "Go.", "output": SAY}, ALPACA))
    assert messages(converted(path)) == [turns("Go.", SAY), ADDED]


@pytest.mark.parametrize(
    "row",
    [
        {"input": {"messages": [USER]}, "preferred_output": [REPLY], "non_preferred_output": [REPLY]},
        {"id": "1", "data": ["a", "b"]},
        {"question": "Go.", "output": ["a", "b"]},
    ],
    ids=["half-a-conversation", "id", "list-of-answers"],
)
def test_no_command_drops_half_of_a_row(row, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(jsonl(row))
    assert 'r["QUESTION"]' in refusal(path)


def test_answers_not_to_learn_from_are_named(tmp_path):
    path = tmp_path / "kto.jsonl"
    good, bad = ({"prompt": ASK, "completion": words, "label": words == SAY} for words in (SAY, "no"))
    path.write_text(jsonl(good, bad))
    assert "label" in refusal(path)
    assert messages(converted(path)) == [CHAT]


def test_another_format_in_some_lines_is_so_many_bad_lines(tmp_path):
    bad, path = [], tmp_path / "chats.jsonl"
    path.write_text(f"[\nquestion,answer\n{OBJECT}\n{{\n{OBJECT}\n")
    assert [record.line for record in read_jsonl(path, bad)] == [3, 5]
    assert [error.line for error in bad] == [1, 2, 4]


def test_a_folder_says_what_to_give(tmp_path):
    assert f"is a folder; give the files in it, for example {tmp_path}/*.jsonl" in refusal(tmp_path)
    (tmp_path / "dataset_info.json").touch()
    (tmp_path / "state.json").touch()
    assert "load_from_disk" in refusal(tmp_path)
    assert refusal(tmp_path).endswith(f"{tmp_path} > {tmp_path}.jsonl")
    (tmp_path / "dataset_dict.json").touch()
    assert "one of the folders in it" in refusal(tmp_path)


def test_the_command_for_a_pipe_has_placeholders():
    read, write = os.pipe()
    os.write(write, archive("chats.jsonl", jsonl(ROW)))
    os.close(write)
    assert refusal(f"/dev/fd/{read}").endswith("To convert it: unzip -p FILE > NEW.jsonl")
    os.close(read)
