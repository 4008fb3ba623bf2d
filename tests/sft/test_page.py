"""The page that ``inspect`` writes: its structure, its numbers, and what a browser shows of it."""

import errno
import json
import math
import os
import re
from html.parser import HTMLParser
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from sft_kernels.sft import page as pages
from sft_kernels.sft.audit import Finding, audit
from sft_kernels.sft.data import read_jsonl
from sft_kernels.sft.dataset import load_examples
from sft_kernels.sft.masking import IGNORE, MODES, Encoder
from sft_kernels.sft.model import train_tokenizer
from sft_kernels.sft.packing import pack
from sft_kernels.sft.page import check_page, write_page
from sft_kernels.sft.page_data import first_step, schedule_of, shown_examples
from sft_kernels.sft.recipe import Recipe
from sft_kernels.sft.sources import Source
from sft_kernels.sft.steps import Steps
from sft_kernels.sft.train import train

from .browser import WIDTHS, look, needs_chromium
from .conftest import TURNS, chat
from .small import model_of, recipe_in, rows_of
from .test_turns import THINKING, THINKS_LAST

HOSTILE = (
    '</bdi></span><script>alert(1)</script> <b title="x\' onload=1"> &amp; \u202eevil\u2066 \x07\x1b[31m\r\n\t'
    "\u05e9\u05dc\u05d5\u05dd e\u0301"
)


FINDINGS = [
    Finding("ok", "end of turn", "All 3 turns end with a token that is trained."),
    Finding("advice", "padding", "Batches of 8 are 31.0% padding."),
    Finding("failed", "labels", "chats.jsonl:2 has no label."),
]
ROWS = [{"messages": TURNS}, chat("How many: red?", "One word."), chat("And blue?", "Two words,\n\nI think.")]


class Data:
    """Rows in a file, as a command has them when it writes the page."""

    def __init__(self, path, tokenizer, recipe):
        self.path, self.tokenizer, self.recipe = path, tokenizer, recipe
        self.sources = [Source(path)]
        encoder = Encoder(tokenizer, recipe.mask, recipe.split_turns)
        self.examples, _ = load_examples(self.sources, encoder, recipe.row_tokens)

    def shown(self, model=None, shown=1):
        return shown_examples(self.recipe, self.sources, self.examples[:shown], self.tokenizer, model)

    def steps(self):
        return Steps(self.examples, self.recipe)

    def write(self, path, findings=FINDINGS, **options):
        found = audit(self.examples, Encoder(self.tokenizer, self.recipe.mask), self.recipe.row_tokens)
        found = found._replace(findings=findings)
        write_page(path, self.recipe, self.sources, self.examples, self.tokenizer, found, **options)
        return path.read_text(encoding="utf-8")


@pytest.fixture
def data(write_jsonl, tokenizer):
    def make(*rows, name="chats.jsonl", tokenizer=tokenizer, **options):
        path = write_jsonl(*rows, name=name)
        return Data(path, tokenizer, Recipe(data=[str(path)], precision="fp32", **{"row_tokens": 256, **options}))

    return make


class Page(HTMLParser):
    """Reads a page strictly: what is opened is closed, in its order.

    ``elements`` are ``(tag, attributes)``; ``views`` has, for each view of an example, its words and its tokens as
    ``(classes, text, title)``.
    """

    VOID = ("meta", "input", "br")

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.views, self.words = [], [], [], ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.elements.append((tag, attributes))
        if tag not in self.VOID:
            self.open.append(tag)
        if attributes.get("class") == "view":
            self.views.append({"words": "", "tokens": []})
        if tag == "bdi":
            self.views[-1]["tokens"].append([attributes.get("class", "").split(), "", attributes["title"]])

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += data if "style" not in self.open else ""
        if "bdi" in self.open:
            self.views[-1]["tokens"][-1][1] += data
        elif "fieldset" in self.open and self.views:
            self.views[-1]["words"] += data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


# Structure


def test_a_page_is_whole_and_needs_nothing_else(data, tmp_path, small_model):
    text = data(*ROWS).write(tmp_path / "page.html", shown=2, model=small_model())
    page = Page(text)
    assert text.startswith("<!doctype html>")
    assert page.all("html") == [{"lang": "en"}]
    assert {"charset": "utf-8"} in page.all("meta")
    policy = next(meta for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy["content"] == "default-src 'none'; style-src 'unsafe-inline'"
    assert not re.search(r"https?:|//|url\(|@import|javascript", text)
    for tag, attributes in page.elements:
        assert tag not in ("script", "link", "img", "iframe", "base", "form")
        assert not any(name in ("src", "href", "srcset", "action") or name.startswith("on") for name in attributes)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len({*ids}) == 6
    assert [label["for"] for label in page.all("label")] == [button["id"] for button in page.all("input")] == ids
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b <= a + 1 for a, b in pairwise(levels))


def test_the_head_has_counts_and_findings_in_words(data, tmp_path):
    made = data(*ROWS)
    page = Page(made.write(tmp_path / "page.html"))
    tokens, kept = int(made.examples.lengths.sum()), int(made.examples.kept.sum())
    for words in (str(made.path), f"{tokens:,}", f"{kept / tokens:.1%}", "1 check failed", "batches of 8 in its order"):
        assert words in " ".join(page.words.split()), words
    for level, sign in (("ok", "✓ ok"), ("advice", "! advice"), ("failed", "✕ failed")):
        assert {"class": f"level {level}"} in page.all("span")
        assert sign in page.words
    assert "1 check gave advice" in made.write(tmp_path / "page.html", findings=FINDINGS[:2])
    assert "every check passed" in made.write(tmp_path / "page.html", findings=FINDINGS[:1])


def test_what_comes_from_files_is_escaped(data, tmp_path):
    words = {"role": "assistant", "content": HOSTILE}
    findings = [Finding("failed", "a<b", HOSTILE)]
    row = {"messages": [{"role": "user", "content": HOSTILE}, words]}
    made = data(row, name="<script>&'\"\u202e\x1b.jsonl", tokenizer=train_tokenizer([HOSTILE] * 4, 600))
    text = made.write(tmp_path / "page.html", findings)
    assert not [c for c in text if not c.isprintable() and c != "\n"]
    page = Page(text)
    assert not page.all("script")
    assert {tag for tag, _ in page.elements} >= {"bdi", "b", "i"}
    shown = "".join(text for _, text, _ in page.views[2]["tokens"])
    assert '</bdi></span><script>alert(1)</script> <b title="x\' onload=1"> &amp; U+202Eevil' in shown
    assert "U+2066 U+0007U+001B[31mU+000D⏎⇥" in shown
    assert "<script>&'\"\\u202e\\x1b.jsonl" in page.words
    assert page.words.count("alert(1)") == 1 + 3 * 2  # the finding, and two turns in each view


# Tokens and losses


def test_each_view_has_the_labels_of_its_mask(data, tmp_path, tokenizer):
    made = data(*ROWS, mask="completion")
    page = Page(made.write(tmp_path / "page.html"))
    checked = [button["id"] for button in page.all("input") if "checked" in button]
    assert checked == ["example-1-completion"]
    for mode, view in zip(MODES, page.views, strict=True):
        example = Encoder(tokenizer, mode)(read_jsonl(made.path)[0])
        assert len(view["tokens"]) == len(example.input_ids)
        for i, ((classes, _, title), token, label) in enumerate(
            zip(view["tokens"], example.input_ids, example.labels, strict=True)
        ):
            assert ("k" in classes) == (label != IGNORE)
            assert ("s" in classes) == (token in tokenizer.all_special_ids)
            trained = "no loss" if label == IGNORE else "trained: predicted from the token before"
            assert title.startswith(f"position {i}, id {token}, {trained}")
        assert view["tokens"][0][2].endswith("no loss: nothing stands before it")
        assert f"{example.kept} of {len(example.input_ids)} tokens carry loss. With --model" in view["words"]


def test_losses_are_those_of_the_models_own_logits(data, tmp_path, small_model, tokenizer):
    made = data(*ROWS)
    model, own = small_model().double().train(), small_model(attention="sdpa").double().eval()
    views = made.shown(model)[0].views
    assert model.training
    page = Page(made.write(tmp_path / "page.html", model=model))
    seen = set()
    for mode, view, drawn in zip(MODES, views, page.views, strict=True):
        example = Encoder(tokenizer, mode)(read_jsonl(made.path)[0])
        logits = own(torch.tensor([example.input_ids])).logits[0, :-1]
        losses = F.cross_entropy(logits, torch.tensor(example.labels[1:]), reduction="none", ignore_index=IGNORE)
        mean = losses.sum().item() / example.kept
        assert view.loss == pytest.approx(mean, rel=1e-12)
        assert f"loss is {mean:.4f} nats a token" in drawn["words"]
        for loss, label, (_, _, title) in zip(losses.tolist(), example.labels[1:], drawn["tokens"][1:], strict=True):
            assert title.endswith(f", loss {loss:.2f}") == (label != IGNORE)
        seen.add(f"{mean:.4f}")
    assert len(seen) == 3


def test_a_mask_that_refuses_the_line_says_why(data, tmp_path, small_model):
    page = Page(data({"text": "How many words?"}, mask="all").write(tmp_path / "a.html", model=small_model()))
    assert [len(view["tokens"]) > 0 for view in page.views] == [True, False, False]
    assert "Refused under this mask: a \"text\" has no assistant turn: mask='completion'" in page.views[1]["words"]
    quiet = {"role": "assistant", "content": "Let me look.", "weight": 0}
    page = Page(data({"messages": [TURNS[1], quiet, *TURNS[1:]]}).write(tmp_path / "b.html"))
    assert [len(view["tokens"]) > 0 for view in page.views] == [False, True, True]
    assert "message 1 asks for no loss" in page.views[0]["words"]


def test_rows_of_tokens_keep_their_own_labels(data, tmp_path, tokenizer, small_model):
    ids, quote = tokenizer("red blue green")["input_ids"], tokenizer('"')["input_ids"]
    labels = [IGNORE, IGNORE, *ids[2:-1], *quote]
    assert len(labels) == len(ids)
    page = Page(data({"input_ids": ids, "labels": labels}).write(tmp_path / "page.html", model=small_model()))
    assert "brings its own labels" in page.words
    kept = [("k" in classes) for classes, _, _ in page.views[0]["tokens"]]
    assert kept == [label != IGNORE for label in labels]
    assert page.views[0]["tokens"] == page.views[1]["tokens"] == page.views[2]["tokens"]
    title = page.views[0]["tokens"][-1][2]
    assert f'id {ids[-1]}, trained: the token before predicts id {labels[-1]}, “"”, loss ' in title


def test_a_split_turn_is_the_same_one_under_every_mask(data, tokenizer_with):
    made = data({"messages": THINKING}, tokenizer=tokenizer_with(THINKS_LAST), split_turns=True)
    assert len(made.examples) == 2
    for shown, example in zip(made.shown(shown=2), made.examples, strict=True):
        whole, (_, answer, _, _), (_, ended, _, _) = shown.views
        assert ended == shown.example == example
        assert answer.input_ids == example.input_ids
        assert answer.kept == example.kept - (answer.labels != example.labels)
        assert "leaves out" in whole.refused


def test_a_model_with_too_few_positions_gives_no_loss(data, tmp_path, small_model):
    made = data(chat("How many? " * 20, "Two."))
    page = Page(made.write(tmp_path / "page.html", model=small_model("gpt2", max_position_embeddings=16)))
    assert "The model has no more than 16 positions." in page.views[0]["words"]


def test_a_long_example_is_cut_and_its_numbers_are_not(data, tmp_path, small_model, monkeypatch):
    ids = [*range(5, 245)] * 50
    made = data({"input_ids": ids, "labels": [IGNORE] * 11_999 + ids[-1:]}, row_tokens=12_000)
    text = made.write(tmp_path / "page.html")
    page = Page(text)
    assert [len(view["tokens"]) for view in page.views] == [4000] * 3
    assert "1 of 12,000 tokens carry loss." in page.views[0]["words"]
    assert "The first 4,000 tokens are shown. The numbers are of all." in page.views[0]["words"]
    assert len(text.encode()) < 2 << 20
    monkeypatch.setattr(pages, "_MOST_TOKENS", 3)
    made, model = data(*ROWS), small_model()
    for view, drawn in zip(
        made.shown(model)[0].views, Page(made.write(tmp_path / "page.html", model=model)).views, strict=True
    ):
        assert len(drawn["tokens"]) == 3
        assert f"loss is {view.loss:.4f}" in drawn["words"]


# The schedule and the first step


def test_the_schedule_is_the_recipes(data, tmp_path):
    made = data(*ROWS, steps=10, warmup=0.2, lr=1e-3)
    schedule = schedule_of(made.steps(), made.recipe)
    assert schedule[:4] == (10, 2, 1e-3, pytest.approx(1e-4, rel=1e-15))
    rates = dict(schedule.points)
    assert [*rates] == [*range(1, 11)]
    assert (rates[1], rates[2], rates[3]) == (0.5e-3, 1e-3, 1e-3)
    assert rates[10] == pytest.approx(1e-3 * (0.1 + 0.45 * (1 + math.cos(math.pi * 7 / 8))), rel=1e-14)
    page = Page(made.write(tmp_path / "page.html"))
    words = " ".join(page.words.split())
    for number in ("Steps in all10", "Warm-up2 steps", "Peak0.001", "Floor0.000110% of the peak", "step 10.0005"):
        assert number in words.replace("step 1 0", "step 10"), number
    assert any(path["class"] == "dot" and path["d"].startswith("M0.000 50.000h0M100.000") for path in page.all("path"))


def test_a_run_has_the_rates_and_the_rows_of_its_page(data, tmp_path, tokenizer):
    recipe = recipe_in(tmp_path, steps=6, warmup=0.5, lr=1e-3, rows=2)
    train(recipe, model=model_of(len(tokenizer)), tokenizer=tokenizer)
    made = Data(recipe.data[0], tokenizer, recipe)
    run = [row for row in rows_of(tmp_path / "run") if "lr" in row]
    assert schedule_of(made.steps(), recipe).points == [(row["step"], row["lr"]) for row in run]
    step = first_step(made.steps())
    assert (run[0]["examples"], run[0]["tokens"]) == (sum(map(len, step.lines)), step.packed)


@pytest.mark.parametrize("steps", [1, 2, 10_000_000])
def test_a_curve_has_its_ends_and_few_points(data, tmp_path, steps):
    made = data(*ROWS, steps=steps)
    points = schedule_of(made.steps(), made.recipe).points
    assert points[0][0] == 1
    assert points[-1][0] == steps
    assert len(points) <= min(steps, 404)
    assert {step for step in (300_000, 300_001) if step <= steps} <= {step for step, _ in points}
    assert all(rate > 0 for _, rate in points)
    page = Page(made.write(tmp_path / "page.html"))
    assert ("It rises" in page.words, "It falls" in page.words) == (steps > 2, steps <= 2)


def test_a_rate_of_zero_is_drawn(data, tmp_path):
    Page(data(*ROWS, lr=0.0).write(tmp_path / "page.html"))


def _of_lengths(*lengths):
    return [{"input_ids": [*range(5, 5 + n)], "labels": [*range(5, 5 + n)]} for n in lengths]


def test_the_first_step_is_counted_by_hand(data, tmp_path):
    made = data(*_of_lengths(5, 3, 4, 2), row_tokens=8, accumulate=2)
    step = first_step(made.steps())
    assert sorted(map(sorted, step.lines)) == [[2, 4], [3, 5]]
    assert (step.tokens, step.padded, step.packed) == (14, 2 * 5 + 2 * 4, 2 * 8)
    page = Page(made.write(tmp_path / "page.html"))
    words = " ".join(page.words.split())
    assert "Padding22.2%Positions18" in words
    assert "Padding12.5%Positions16" in words
    assert "4 examples, 14 tokens, in 2 micro-batches" in words
    drawn = [(path["class"], path["d"]) for path in page.all("path") if path["class"] in ("first", "second", "padding")]
    padded = {
        (5, 3): [("first", "M0 0.5h5M0 1.5h3"), ("padding", "M3 1.5h2")],
        (4, 2): [("first", "M0 0.5h4M0 1.5h2"), ("padding", "M2 1.5h2")],
    }
    packed = {
        (5, 3): [("first", "M0 0.5h5"), ("second", "M5 0.5h3")],
        (4, 2): [("first", "M0 0.5h4"), ("second", "M4 0.5h2"), ("padding", "M6 0.5h2")],
    }
    order = [*map(tuple, step.lines)]
    assert drawn == [path for figure in (padded, packed) for lengths in order for path in figure[lengths]]


def test_many_lines_are_not_all_drawn(data, tmp_path):
    made = data(*_of_lengths(*[2] * 60, *[3] * 40), row_tokens=240, rows=1)
    page = Page(made.write(tmp_path / "page.html"))
    assert "36 more lines are not drawn." in page.words
    lines = max(path["d"].count("M") for path in page.all("path") if path["class"] == "first")
    assert lines == 64
    assert len(pack(made.examples.lengths, 240)) == 1


# The file


def test_a_page_is_replaced_whole_or_not_at_all(data, tmp_path, monkeypatch):
    made, path = data(*ROWS), tmp_path / "pages" / "page.html"
    path.parent.mkdir()
    first = made.write(path)
    assert made.write(path, FINDINGS[:1]) != first
    path.write_text("old")

    def full(file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(pages, "sync", full)
    with pytest.raises(OSError, match=r"html: .*page\.html cannot be written \(No space left on device\)"):
        made.write(path)
    assert [file.name for file in path.parent.iterdir()] == ["page.html"]
    assert path.read_text() == "old"


def test_a_path_that_is_no_place_for_a_page_is_refused(data, tmp_path):
    made = data(*ROWS)
    (tmp_path / "link.html").symlink_to(tmp_path / "other.html")
    os.mkfifo(tmp_path / "pipe.html")
    for name, error, reason in (
        ("", IsADirectoryError, "is a folder; give a file"),
        ("link.html", FileExistsError, "is a link, through which nothing is written"),
        ("pipe.html", FileExistsError, "is no file; give a new path"),
        ("missing/page.html", FileNotFoundError, "missing is no folder"),
        ("chats.jsonl/page.html", FileNotFoundError, "chats.jsonl is no folder"),
        ("chats.jsonl", FileExistsError, "is the data; give another path"),
    ):
        with pytest.raises(error, match=f"^html: .*{reason}"):
            made.write(tmp_path / name)
    for name in ("", "a\0b"):
        with pytest.raises(ValueError, match="html: expected a file"):
            check_page(name)
    before = made.path.read_text()
    assert [json.loads(line) for line in before.splitlines()] == ROWS
    assert not (tmp_path / "other.html").exists()


def test_bad_arguments_are_refused(data, tmp_path):
    made = data(*ROWS)
    with pytest.raises(ValueError, match="shown: expected 0 or more, got -1"):
        made.write(tmp_path / "page.html", shown=-1)
    assert not Page(made.write(tmp_path / "page.html", shown=0)).views
    made.path.write_text("")
    made.sources = [Source(made.path)]
    with pytest.raises(ValueError, match=r"sources: .*chats\.jsonl:1 is not there; has the file changed"):
        made.write(tmp_path / "page.html")


def test_a_model_with_fewer_tokens_is_refused(data, tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer: has \d+ tokens, the model embeds 64"):
        data(*ROWS).write(tmp_path / "page.html", model=model_of(64))


# In a browser


@needs_chromium
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_browser_shows_it(data, tmp_path, small_model, dark):
    refused = {"messages": [TURNS[1], {**TURNS[2], "weight": 0}, *TURNS[1:]]}  # under the mask all
    long = chat(HOSTILE + "x" * 300, "Two words. " + "red-blue" * 40 + "\n\n中")
    made = data(long, refused, name=f"{'long-name-' * 12}.jsonl", row_tokens=2048, steps=50)
    text = made.write(tmp_path / "page.html", shown=2, model=small_model(max_position_embeddings=2048))
    page = Page(text)
    frames, complaints = look(text, tmp_path, dark)
    assert not complaints
    assert [frame["width"] for frame in frames] == [*WIDTHS]
    for frame in frames:
        assert not frame["requests"]
        lightness = [sum(map(int, re.findall(r"\d+", frame[name]))) / 765 for name in ("background", "colour")]
        assert (lightness[0] < 0.2 and lightness[1] > 0.8) if dark else (lightness[0] > 0.8 and lightness[1] < 0.2)
        low = {kind: ratio for kind, ratio in frame["contrasts"].items() if ratio < 4.5}
        assert not low
        for kind in ("bdi.k in div", "bdi in div", "b in bdi", "span.level.failed in li", "p.refused.failed in div"):
            assert kind in frame["contrasts"], kind
        assert frame["first"] == ["example-1-completion+eot", "example-2-completion+eot"]
        assert [mode["id"] for mode in frame["modes"]] == [f"example-{i}-{mode}" for i in (1, 2) for mode in MODES]
        for mode, view in zip(frame["modes"], page.views, strict=True):
            assert (mode["checked"], mode["views"]) == (1, 1)
            assert mode["overflow"] <= 0
            assert not mode["wide"]
            assert mode["words"] in view["words"]
            expected = [[" ".join(kinds), "k" in kinds, words, title] for kinds, words, title in view["tokens"]]
            assert mode["tokens"] == expected
        losses = [re.search(r"loss is ([\d.]+)", mode["words"]) for mode in frame["modes"]]
        assert [bool(loss) for loss in losses] == [True, True, True, False, True, True]
        assert len({loss[1] for loss in losses[:3]}) == 3
