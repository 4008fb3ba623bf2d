"""The command ``inspect``: tables, numbers and findings, on a terminal and elsewhere."""

import copy
import io
import json
import os
import re
import sys
import threading

import pytest

from sft_kernels import cli
from sft_kernels.sft import inspect_command
from sft_kernels.sft.audit import Audit, Finding
from sft_kernels.sft.inspection import findings, label_table, summary
from sft_kernels.sft.masking import IGNORE, Example

from .conftest import chat
from .small import model_of

GOOD = {"input_ids": [2, 100, 110, 111, 3], "labels": [IGNORE, IGNORE, 110, 111, 3]}
SHIFTED = {"input_ids": [2, 100, 110, 111, 112, 113], "labels": [IGNORE, 110, 111, 112, 113, IGNORE]}
STYLE = re.compile(r"\x1b\[([0-9;]+)m(.*?)\x1b\[0m")


@pytest.fixture
def rows(write_jsonl, tokenizer, tmp_path):
    """The arguments of a look at some rows, with a tokenizer."""

    def make(*rows):
        if not (tmp_path / "tokenizer").exists():
            tokenizer.save_pretrained(tmp_path / "tokenizer")
        return ["inspect", str(write_jsonl(*rows)), "--tokenizer", str(tmp_path / "tokenizer"), "--row-tokens", "64"]

    return make


# ---- the table


def test_the_table_has_the_next_token_and_the_label_trained_there(tokenizer):
    word, space, newline = (tokenizer.convert_tokens_to_ids(token) for token in ("How", "Ġ", "Ċ"))
    ids = [2, word, space, newline, 3]
    example = Example(ids, [IGNORE, IGNORE, space, 3, 3], "a\x1b.jsonl:7")
    said = label_table(example, tokenizer).splitlines()
    assert said[0] == r"a\x1b.jsonl:7: 5 tokens, 3 kept"
    assert said[1].split() == ["token", "next", "token", "label"]
    cells = [[line[:6].strip(), line[7:28].rstrip(), line[28:49].rstrip(), line[49:]] for line in said[2:]]
    assert cells == [
        ["0", "<|im_start|>", "How", "·"],
        ["1", "How", "' '", "' '"],
        ["2", "' '", r"\n", "<|im_end|> !"],
        ["3", r"\n", "<|im_end|>", "<|im_end|>"],
        ["4", "<|im_end|>", "", "·"],
    ]


def test_bytes_that_are_part_of_a_character_are_told_apart(tokenizer):
    ids = tokenizer("é", add_special_tokens=False).input_ids
    said = label_table(Example([2, *ids], [IGNORE, *ids], "a.jsonl:1"), tokenizer).splitlines()
    assert said[3].split() == ["1", r"\xc3", r"\xa9", r"\xa9"]


def test_a_token_wider_than_its_column_is_shown_whole(tokenizer_with):
    other, wide = tokenizer_with(None), "广告" * 11
    other.add_tokens([wide])
    ids = [2, other.convert_tokens_to_ids(wide), 3]
    said = label_table(Example(ids, [IGNORE, *ids[1:]], "a.jsonl:1"), other).splitlines()
    assert said[2].split() == ["0", "<|im_start|>", wide, wide]
    assert said[3].split() == ["1", wide, "<|im_end|>", "<|im_end|>"]


def test_numbers_and_findings_as_lines():
    found = [Finding("ok", "a", "x"), Finding("advice", "b", "y"), Finding("failed", "c", "z"), Finding("ok", "d", "w")]
    numbers = Audit(3, 12, 6, 4, 3, 2, 8, 18, 2, 8, found, 5)
    assert summary(numbers).splitlines() == [
        "examples        3",
        "tokens          12 (mean 4.0, longest 6)",
        "kept            4 (33.3%)",
        "end of turn     trained in 2 of 3 turns",
        "nothing learned from 5 conversations",
        "padded          18 tokens in batches of 8, 33.3% padding",
        "packed          16 tokens in 2 rows of 8, 25.0% padding",
        "packing saves   11.1% of the padded tokens",
    ]
    assert findings(numbers).splitlines() == ["failed  c: z", "advice  b: y", "ok      a: x", "ok      d: w"]


# ---- the status


def test_a_failed_check_is_printed_first_and_the_status_is_1(rows, capsys):
    argv = rows(GOOD, SHIFTED)
    assert cli.main(argv) == 1
    said, complaint = capsys.readouterr()
    assert complaint == ""
    (failed,) = [line for line in said.splitlines() if line.startswith("failed")]
    assert failed.startswith(f"failed  one shift: {argv[1]}:2: the labels are those of the next token")
    assert said.index(failed) < said.index("advice") < said.index("ok      ")
    assert cli.main(rows(GOOD, GOOD)) == 0
    assert not re.search("^failed", capsys.readouterr().out, re.M)


def test_refused_lines_and_notes_are_told(rows, capsys):
    odd = chat("How many?", "Two words.")
    odd["messages"][0]["mood"] = "kind"
    argv = rows(odd, chat("red", "blue"), {"text": "red"}, "{")
    assert cli.main([*argv, "--skip-bad", "--holdout", "0.5"]) == 0
    said = capsys.readouterr().out
    assert "does not read the message key 'mood'" in said
    assert f"skipped {argv[1]}:4: not JSON" in said
    assert "skipped 2 lines" in said
    assert "nothing learned from 1 conversations" in said
    assert "held out        1 examples, not counted here" in said
    assert "examples        1\n" in said


# ---- the options of train


def test_the_options_of_train_are_taken_and_checked(rows, tmp_path, write_jsonl, capsys):
    argv = rows(chat("How many?", "Two words."))
    run = [
        "--steps",
        "5",
        "--lr",
        "1e-3",
        "--out",
        str(tmp_path / "run"),
        "--metric",
        "nowhere.no",
        "--save-every",
        "2",
    ]
    assert cli.main([*argv, *run]) == 0
    assert not (tmp_path / "run").exists()
    assert cli.main(["inspect", "--data", *argv[1:], *run]) == 0
    capsys.readouterr()
    wrong = {"--steps": "0", "--row-tokens": "0", "--lr": "-1", "--holdout": "1", "--keep": "0", "--show": "-1"}
    for option, value in wrong.items():
        assert cli.main([*argv, option, value]) == 1
        assert capsys.readouterr().err.startswith(f"sft-kernels: {option[2:].replace('-', '_')}: expected ")
    assert cli.main([*argv, "--data", "nowhere"]) == 1
    assert "data: expected files either alone or behind --data, got both" in capsys.readouterr().err
    assert cli.main([*argv, "--init-from", str(tmp_path)]) == 1
    assert "init_from: " in capsys.readouterr().err
    assert cli.main([*argv, "--init-from", "a", "--model", "b"]) == 1
    assert "init_from: it takes the place of the model" in capsys.readouterr().err


def test_a_recipe_file_is_read_and_overridden(rows, tmp_path, capsys):
    argv = rows(chat("How many?", "Two words."))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({"data": ["nowhere"], "tokenizer": argv[3], "row_tokens": 96, "mask": "all"}))
    assert cli.main(["inspect", argv[1], f"--config={recipe}"]) == 0
    said = capsys.readouterr().out
    assert "rows of 96" in said
    assert "mask 'all' trains prompts, too" in said
    recipe.write_text(json.dumps({"data": [argv[1]], "tokenizer": argv[3]}))
    assert cli.main(["inspect", "--config", str(recipe), "--row-tokens", "48"]) == 0
    assert "rows of 48" in capsys.readouterr().out
    assert cli.main(["inspect", "--config"]) == 1
    assert "--config: expected a file" in capsys.readouterr().err


def test_the_tokenizer_is_the_models_or_one_trained_on_the_data(folder, rows, tmp_path, capsys):
    config = tmp_path / "config.json"
    config.write_text(re.sub(r'"vocab_size": \d+', '"vocab_size": 262', (folder / "config.json").read_text()))
    data = rows(chat("How many?", "Two words."))[1]
    counts = []
    for option in (["--model", folder], ["--init-from", folder], ["--model", config], []):
        assert cli.main(["inspect", data, "--row-tokens", "64", *map(str, option)]) == 0
        said = capsys.readouterr().out
        assert said.startswith("no tokenizer and no model: a byte-level BPE of up to 4096 tokens") == (not option)
        counts.append(int(re.search(r"^tokens +(\d+)", said, re.M)[1]))
    assert counts[0] == counts[1] != counts[2] > counts[3]


# ---- colour


class Terminal:
    """A pseudo-terminal in the place of standard output; ``text`` is what came out of it."""

    def __init__(self, monkeypatch, cleared=("NO_COLOR",), **environment):
        for name in cleared:
            monkeypatch.delenv(name, raising=False)
        for name, value in {"TERM": "xterm", **environment}.items():
            monkeypatch.setenv(name, value)
        self.monkeypatch, self.text = monkeypatch, None

    def __enter__(self):
        self.end, other = os.openpty()
        self.file = os.fdopen(other, "w", encoding="utf-8")
        self.chunks = []
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()
        self.monkeypatch.setattr(sys, "stdout", self.file)
        return self

    def _read(self):
        while True:
            try:
                chunk = os.read(self.end, 4096)
            except OSError:  # the other end is closed
                return
            if not chunk:
                return
            self.chunks.append(chunk)

    def __exit__(self, *error):
        self.file.close()
        self.reader.join()
        os.close(self.end)
        self.text = b"".join(self.chunks).decode().replace("\r\n", "\n")


def test_a_terminal_gets_colour(rows, monkeypatch):
    argv = rows(GOOD, SHIFTED)
    with Terminal(monkeypatch) as terminal:
        assert cli.main([*argv, "--show", "2"]) == 1
    styled = [(code, text.strip()) for code, text in STYLE.findall(terminal.text)]
    assert ("2;35", "<|im_start|>") in styled  # dim and special
    assert ("2", "·") in styled
    assert ("1;32;35", "<|im_end|>") in styled
    assert ("1;32", "<|im_end|>") in styled  # the label
    wrong = [text for code, text in styled if code == "1;31"]
    assert any(text.endswith(" !") for text in wrong)
    assert "failed" in wrong
    assert ("33", "advice") in styled
    assert ("32", "ok") in styled


@pytest.mark.parametrize("environment", [{"TERM": "dumb"}, {"NO_COLOR": "1"}], ids=lambda each: "-".join(each))
def test_a_terminal_that_wants_no_colour_gets_none(environment, rows, monkeypatch):
    argv = rows(GOOD)
    with Terminal(monkeypatch, **environment) as terminal:
        assert cli.main(argv) == 0
    assert "tokens, 3 kept" in terminal.text
    assert "\x1b" not in terminal.text


def test_a_pipe_gets_no_colour(rows, monkeypatch, capfd):
    monkeypatch.setenv("TERM", "xterm")
    assert cli.main(rows(GOOD)) == 0
    said = capfd.readouterr().out
    assert "tokens, 3 kept" in said
    assert "\x1b" not in said


def test_a_closed_stream_is_no_error(rows, monkeypatch):
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stdout", closed)
    assert cli.main(rows(GOOD)) == 0


def test_a_hostile_token_or_name_moves_no_cursor(tokenizer, tmp_path, monkeypatch):
    hostile = ["\x1b[2J", "\x1b[31m", "\x9b5A", "\u202e", "\x07"]
    other = copy.deepcopy(tokenizer)
    other.add_special_tokens({"extra_special_tokens": hostile})
    other.save_pretrained(tmp_path / "other")
    path = tmp_path / "a\x1b[2J.jsonl"
    words = "".join(hostile)
    path.write_text(json.dumps(chat(f"How many {words}?", f"Two {words} words.")) + "\n")
    ids = other.convert_tokens_to_ids(hostile)
    silent = {"input_ids": [2, *ids, 100, 3], "labels": [IGNORE, *ids, 100, IGNORE]}
    with path.open("a") as file:
        file.write(json.dumps(silent) + "\n")
    for option in (["--tokenizer", str(tmp_path / "other")], ["--skip-bad"]):
        with Terminal(monkeypatch) as terminal:
            cli.main(["inspect", str(path), "--row-tokens", "512", "--show", "2", *option])
        assert r"a\x1b[2J.jsonl:1: " in terminal.text
        found = STYLE.findall(terminal.text)
        assert {code for code, _ in found} <= {"2", "2;35", "1;32", "1;32;35", "1;31", "32", "33"}
        assert terminal.text.count("\x1b") == 2 * len(found)
        assert all(c.isprintable() or c == "\n" for c in STYLE.sub(r"\2", terminal.text))


# ---- the page


@pytest.fixture
def page(monkeypatch):
    """Stands for the function that writes pages; holds the calls."""
    calls = []
    monkeypatch.setattr(inspect_command, "write_page", lambda *args, **options: calls.append((args, options)))
    return calls


def test_a_page_gets_what_was_looked_at(page, rows, folder, tmp_path, capsys):
    argv = rows(GOOD, SHIFTED)
    html = str(tmp_path / "page.html")
    assert cli.main([*argv, "--html", html, "--show", "2", "--lr", "1e-3"]) == 1
    assert capsys.readouterr().out.endswith(f"the page is in {html}\n")
    ((path, recipe, sources, examples, tokenizer, audit), options) = page.pop()
    assert (path, recipe.lr, recipe.data) == (html, 1e-3, [argv[1]])
    assert [source.path for source in sources] == [argv[1]]
    assert (len(examples), audit.examples, len(tokenizer)) == (2, 2, 296)
    assert options == {"shown": 2, "model": None}
    assert cli.main([*argv, "--html", html, "--model", str(folder)]) == 1
    assert page.pop()[1]["model"].config.model_type == "llama"
    model_of(290).save_pretrained(folder)
    assert cli.main([*argv, "--html", html, "--model", str(folder)]) == 1
    assert "tokenizer: has 296 tokens, the model embeds 290" in capsys.readouterr().err
    assert cli.main([*argv, "--html", html, "--model", str(tmp_path / "nowhere")]) == 1
    assert "model: no such folder" in capsys.readouterr().err


def test_a_page_that_cannot_be_written_is_refused_before_data_are_read(page, tmp_path, capsys):
    data = tmp_path / "chats.jsonl"
    data.write_text("{\n")
    os.symlink(data, tmp_path / "link.html")
    cases = {
        tmp_path: "is a folder; give a file",
        tmp_path / "none" / "page.html": f"{tmp_path / 'none'} is no folder",
        "": "expected a file",
        "a\0b": "expected a file",
        tmp_path / "link.html": "is a link",
        data: "is the data; give another path",
    }
    for path, reason in cases.items():
        assert cli.main(["inspect", str(data), f"--html={path}"]) == 1
        said = capsys.readouterr().err
        assert said.startswith("sft-kernels: html: ")
        assert reason in said
    assert page == []
