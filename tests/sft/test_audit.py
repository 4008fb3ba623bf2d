"""Faults of data that training would not show: each check with the fault, and with its twin without."""

import copy
import re
from itertools import groupby, islice

import numpy as np
import pytest

from sft_kernels.sft import faults
from sft_kernels.sft.audit import Audit, Finding, audit, check_audit
from sft_kernels.sft.dataset import load_examples
from sft_kernels.sft.examples import Examples, Part, PartWriter
from sft_kernels.sft.faults import end_tokens
from sft_kernels.sft.masking import IGNORE, Encoder
from sft_kernels.sft.packing import pack
from sft_kernels.sft.recipe import Recipe
from sft_kernels.sft.sources import Source
from sft_kernels.sft.train import train

from .conftest import REAL_DATA, TURNS, chat

CHECKS = [
    "something to learn",
    "end of turn",
    "one shift",
    "beginning of text",
    "prompts",
    "padded batches",
    "packed rows",
]


@pytest.fixture
def audited(write_jsonl, tokenizer):
    """The audit of some files of rows; a list for each further file."""

    def make(*rows, others=(), mask="completion+eot", split=False, row_tokens=64, skip_bad=False, tokenizer=tokenizer):
        files = [write_jsonl(*each, name=f"{i}.jsonl") for i, each in enumerate([rows, *others])]
        encoder = Encoder(tokenizer, mask, split)
        examples, _ = load_examples(files, encoder, row_tokens, skip_bad)
        return audit(examples, encoder, row_tokens)

    return make


def finding(found, name):
    return next(each for each in found.findings if each.name == name)


def tokens(prompt, answer, label_end=True, end=3, labels=None):
    """A row of tokens; by default ``<|im_end|>`` ends it."""
    ids = [*prompt, *answer, end]
    return {"input_ids": ids, "labels": labels or [IGNORE] * len(prompt) + answer + [end if label_end else IGNORE]}


def shifted(row):
    return {**row, "labels": [*row["labels"][1:], IGNORE]}


GOOD = tokens([2, 100, 101], [110, 111, 112, 113])
SILENT = tokens([2, 100, 101], [110, 111, 112], label_end=False)


def assert_no_alarm(found):
    """Nothing failed, and no advice that is not about lengths."""
    levels = {each.name: each.level for each in found.findings}
    assert [*levels] == CHECKS
    assert {levels[name] for name in CHECKS[:5]} == {"ok"}, found.findings


# ---- labels that are shifted already


def test_labels_that_are_shifted_already_fail_and_name_the_line(audited):
    found = audited(GOOD, GOOD, shifted(GOOD), GOOD)
    (failed,) = found.failed
    assert failed.name == "one shift"
    assert "/0.jsonl:3: the labels are those of the next token" in failed.text
    assert_no_alarm(audited(GOOD, GOOD, GOOD, GOOD))
    padded = {**GOOD, "labels": [*GOOD["labels"][1:], 0]}
    assert ":2: " in audited(GOOD, padded, GOOD).failed[0].text


def test_the_file_with_the_shifted_labels_is_named(audited):
    found = audited(chat("How many?", "Two words."), others=[[GOOD, shifted(GOOD)]])
    assert "/1.jsonl:2: " in found.failed[0].text


def test_a_single_shifted_label_fails_if_half_of_the_file_has_it(audited):
    one = tokens([2, 100, 101], [], labels=[IGNORE, IGNORE, IGNORE, 3])
    assert audited(*[one] * 8).failed == []
    found = audited(one, *[shifted(one)] * 4, *[one] * 3)
    assert ":2: " in found.failed[0].text
    found = audited(one, *[shifted(one)] * 3, *[one] * 4)
    assert finding(found, "one shift").level == "advice"
    assert "in 3 examples, the first is" in finding(found, "one shift").text


def test_other_labels_are_advice(audited):
    noisy = {**GOOD, "labels": [*GOOD["labels"][:3], 111, 112, 200, 3, 3]}  # three of four are the next token
    found = audited(GOOD, noisy)
    assert finding(found, "one shift").level == "advice"
    assert "in 1 example, the first is" in finding(found, "one shift").text
    assert ":2;" in finding(found, "one shift").text


def test_repeated_tokens_do_not_pass_for_shifted_labels(audited):
    same = tokens([2, 100], [110] * 12)
    assert_no_alarm(audited(same, tokens([2, 100], [110] * 12 + [111])))
    last_off = {**same, "labels": [*same["labels"][:-2], 3, IGNORE]}
    assert finding(audited(same, last_off), "one shift").level == "advice"


# ---- the end of a turn


def test_a_masked_end_fails_and_names_the_line(audited):
    cut = tokens([2, 100], [110, 111], labels=[IGNORE, IGNORE, 110, 111, IGNORE], end=112)
    found = audited(cut, SILENT, SILENT)
    (failed,) = found.failed
    assert failed.name == "end of turn"
    assert "/0.jsonl:2: <|im_end|> ends an answer and has the label -100" in failed.text
    assert (found.turns, found.ended) == (3, 0)
    assert_no_alarm(audited(GOOD, GOOD))


def test_padding_that_is_the_end_token_and_was_masked_fails(audited, tokenizer):
    """As a collator does that masks every token equal to the padding token."""
    end = tokenizer.eos_token_id
    row = {"input_ids": [100, 110, 111, end, end, end], "labels": [IGNORE, 110, 111, IGNORE, IGNORE, IGNORE]}
    assert "<|endoftext|> ends an answer" in audited(row, row).failed[0].text
    kept = {**row, "labels": [IGNORE, 110, 111, end, IGNORE, IGNORE]}
    assert_no_alarm(audited(kept, kept))


def test_each_file_is_judged_alone(audited):
    conversation = chat("How many?", "Two words.")
    found = audited(conversation, others=[[SILENT]])
    assert "/1.jsonl:1: " in found.failed[0].text
    assert (found.turns, found.ended) == (2, 1)
    found = audited(conversation, SILENT)
    assert finding(found, "end of turn").level == "advice"
    assert "1 of 2 turns train no token that ends them" in finding(found, "end of turn").text


@pytest.mark.parametrize("mask", ["completion+eot", "all"])
def test_a_masked_end_fails_unless_completion_asks_for_it(mask, audited):
    assert audited(SILENT, mask=mask).failed
    found = audited(SILENT, chat("How many?", "Two words."), mask="completion")
    assert finding(found, "end of turn").level == "advice"
    assert (found.turns, found.ended, found.failed) == (2, 0, [])


def test_answers_that_are_cut_short_are_advice(audited):
    cut = {"input_ids": [2, 100, 110, 111], "labels": [IGNORE, IGNORE, 110, 111]}
    found = audited(cut, GOOD)
    assert finding(found, "end of turn").level == "advice"
    assert "/0.jsonl:1" in finding(found, "end of turn").text
    assert finding(audited(cut, cut), "end of turn").text.startswith("no turn trains a token that ends it")


@pytest.mark.parametrize("behind", [[], [198]], ids=["last", "newline-behind"])
def test_a_token_that_ends_turns_needs_no_template(behind, audited, tokenizer, tokenizer_with):
    """Rows for a base model: no template says that ``<|im_end|>`` ends turns, and padding ends the text."""
    bare, pad = tokenizer_with(None), tokenizer.eos_token_id
    answer = [110, 111, 3, *behind]
    row = {"input_ids": [100, *answer, pad, pad], "labels": [IGNORE, *answer, IGNORE, IGNORE]}
    assert_no_alarm(audited(row, row, tokenizer=bare))
    padded = {"input_ids": [100, 110, 0, pad], "labels": [IGNORE, 110, 0, IGNORE]}
    for fault in (padded, {"input_ids": [100, 3, 110, 111, pad], "labels": [IGNORE, 3, 110, 111, IGNORE]}):
        assert audited(fault, fault, tokenizer=bare).failed


def test_an_end_within_the_labels_is_an_end(audited, tokenizer):
    """Labels with the newline behind the end, in front of padding that ends texts, too, and is masked."""
    row = {"input_ids": [2, 100, 110, 3, 198, tokenizer.eos_token_id], "labels": [IGNORE, IGNORE, 110, 3, 198, IGNORE]}
    assert_no_alarm(audited(row, row))


def test_end_tokens_are_those_of_turns_and_of_the_text(tokenizer, tokenizer_with):
    assert end_tokens(tokenizer) == tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    assert end_tokens(tokenizer_with(None)) == [tokenizer.eos_token_id]
    assert end_tokens(tokenizer_with("{{ raise_exception('no') }}")) == [tokenizer.eos_token_id]
    other = tokenizer_with(None)
    other._special_tokens_map["eos_token"] = "<|not there|>"
    assert end_tokens(other) == []
    other.unk_token = "<|pad|>"
    assert end_tokens(other) == []


# ---- what is no fault


def test_what_the_encoder_makes_raises_no_alarm(audited, tokenizer_with):
    switched = [{**message, "weight": 0} if i == 2 else message for i, message in enumerate(TURNS)]
    chats = [{"messages": TURNS}, {"messages": switched}, chat("red", "blue"), GOOD]
    for mask in ("completion+eot", "all"):
        rows = chats if mask == "completion+eot" else [chats[0], chats[2], {"text": "red and blue"}, GOOD]
        assert_no_alarm(audited(*rows, mask=mask, row_tokens=256))
    found = audited(*chats, mask="completion", row_tokens=256)
    assert [each.name for each in found.findings[:5] if each.level != "ok"] == ["end of turn"]
    once = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}Two {% endif %}"
    )
    once += "{{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    found = audited({"messages": TURNS}, tokenizer=tokenizer_with(once), split=True, row_tokens=256)
    assert (found.examples, found.turns, found.ended) == (2, 2, 2)
    assert_no_alarm(found)


def test_several_end_tokens_raise_no_alarm(audited, tokenizer_with):
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|><|endoftext|>{% endfor %}"
    template += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    assert_no_alarm(audited({"messages": TURNS}, tokenizer=tokenizer_with(template), row_tokens=256))


@pytest.mark.parametrize("name", ["gsm8k_test.jsonl", "toolcall_multiturn.jsonl"])
def test_real_conversations_raise_no_alarm(name, audited):
    if not (REAL_DATA / name).exists():
        pytest.skip(f"no {name} in {REAL_DATA}")
    with open(REAL_DATA / name, encoding="utf-8") as file:
        found = audited(*(line.rstrip("\n") for line in islice(file, 150)), row_tokens=16384)
    assert_no_alarm(found)
    assert found.ended == found.turns >= found.examples == 150
    assert finding(found, "padded batches").level == "advice"


# ---- other advice


def test_a_doubled_beginning_is_advice(audited, tokenizer):
    other = copy.deepcopy(tokenizer)
    other.bos_token = "<|im_start|>"
    found = audited(GOOD, tokens([2, 2, 100], [110]), {**GOOD, "input_ids": [100, 2, 2, *GOOD["input_ids"][3:]]})
    assert_no_alarm(found)
    rows = GOOD, tokens([2, 2, 100], [110]), tokens([100, 2, 2], [110])
    said = finding(audited(*rows, tokenizer=other), "beginning of text")
    assert said.level == "advice"
    assert said.text.startswith("<|im_start|> stands twice at the beginning of 1 example, the first is ")
    assert said.text.endswith("/0.jsonl:2")


def test_prompts_with_loss_are_advice(audited):
    row = {"input_ids": [2, 100, 110, 3], "labels": [2, 100, 110, 3]}
    said = finding(audited(GOOD, row), "prompts")
    assert said.level == "advice"
    assert "in 1 of 2 examples, the first is " in said.text
    assert "/0.jsonl:2;" in said.text
    assert_no_alarm(audited(row, mask="all"))


def test_conversations_with_nothing_to_learn_are_counted(audited):
    unanswered = {"messages": TURNS[:2]}
    off = {"messages": [TURNS[1], {**TURNS[4], "weight": 0}]}
    rows = [
        unanswered,
        off,
        tokens([2], [100], labels=[IGNORE] * 3),
        {"text": "red"},
        {"instruction": "a", "output": ""},
    ]
    found = audited(GOOD, "{", *rows, skip_bad=True)
    assert found.unlearned == 5
    assert finding(found, "something to learn").text.startswith("5 conversations have nothing to learn, the first is ")
    assert finding(found, "something to learn").text.endswith("/0.jsonl:3")
    assert audited(GOOD, "{", skip_bad=True).unlearned == 0


# ---- numbers


def part_of(folder, rows, path="a.jsonl"):
    """A part with rows ``(ids, labels)``, whatever they are."""
    folder.mkdir()
    with PartWriter(folder) as writer:
        for line, (ids, labels) in enumerate(rows, 1):
            kept = sum(label != IGNORE for label in labels)
            index = np.array([(len(ids), kept, line)], np.int64)
            writer.add(np.array(ids, np.int32), np.array(labels, np.int32), index)
        writer.finish()
    return Part(folder, path)


def lengths_only(folder, lengths):
    return Examples([part_of(folder, [([9] * n, [IGNORE] + [9] * (n - 1)) for n in lengths])])


def test_numbers_by_hand(tmp_path, tokenizer):
    examples = lengths_only(tmp_path / "part", [4, 2, 6, 3, 3])
    found = audit(examples, Encoder(tokenizer), 8, batch=2)
    assert (found.examples, found.tokens, found.longest, found.kept) == (5, 18, 6, 13)
    assert (found.padded, found.rows, found.packed) == (2 * 4 + 2 * 6 + 3, 3, 24)
    assert found.kept_share == 13 / 18
    assert found.padding_share == pytest.approx(5 / 23)
    assert found.row_padding_share == 0.25
    assert found.packing_gain == 1 - 24 / 23
    assert audit(examples.choose([2, 0, 1]), Encoder(tokenizer), 8, batch=2).padded == 2 * 6 + 2


def test_no_label_at_all_fails(tmp_path, tokenizer):
    rows = [([9, 9], [IGNORE] * 2)] * 3 + [([9, 1], [IGNORE, 1])]
    every = Examples([part_of(tmp_path / "part", rows)])
    examples = every.choose([0, 1, 2])
    assert audit(examples, Encoder(tokenizer), 8).failed[0].text.startswith("a.jsonl:1: no token carries loss")
    assert [audit(every.choose(some), Encoder(tokenizer), 8).unlearned for some in ([3], [0, 3])] == [0, 1]
    with pytest.raises(ValueError, match="examples: expected at least one"):
        audit(examples.choose([]), Encoder(tokenizer), 8)


@pytest.mark.parametrize(("shorter", "level"), [(3, "ok"), (2, "advice")])
def test_padding_above_a_fifth_advises_to_pack(shorter, level, tmp_path, tokenizer):
    examples = lengths_only(tmp_path / "part", [5, shorter] * 4)
    said = finding(audit(examples, Encoder(tokenizer), 14), "padded batches")
    assert said.level == level
    assert f"{1 - (5 + shorter) / 10:.1%} padding" in said.text
    assert ("1.4 times fewer positions), or sort them by length" in said.text) == (level == "advice")


def test_rows_that_stay_empty_are_advice(tmp_path, tokenizer):
    encoder = Encoder(tokenizer)
    said = finding(audit(lengths_only(tmp_path / "a", [10] * 4), encoder, 400), "packed rows")
    assert said.level == "advice"
    assert "fill only 0.1 of them; the longest example has 10 tokens, so a smaller row_tokens would do" in said.text
    said = finding(audit(lengths_only(tmp_path / "b", [60] * 4), encoder, 100), "packed rows")
    assert said.level == "advice"
    assert "few examples (mean 60 tokens) fit together; give a larger row_tokens" in said.text
    assert finding(audit(lengths_only(tmp_path / "c", [45] * 4), encoder, 100), "packed rows").level == "ok"


def test_what_is_found_does_not_depend_on_blocks_nor_on_order(tmp_path, tokenizer, monkeypatch):
    """Random tokens of two files, some of the examples, against a plain loop."""
    random = np.random.default_rng(0)
    parts = []
    for name in ("a", "b"):
        rows = []
        for length in random.integers(2, 12, 40):
            ids = random.choice([1, 2, 3, 50, 51], length)
            labels = np.where(random.random(length) < 0.6, ids, IGNORE)
            rows.append((ids.tolist(), [IGNORE, *labels[1:].tolist()]))
        parts.append(part_of(tmp_path / name, rows, f"{name}.jsonl"))
    examples = Examples(parts).choose(random.permutation(80)[:50])
    turns = ended = silent = 0
    first = None
    for example in (Examples(parts)[number] for number in sorted(examples.chosen)):
        at = 0
        for kept, run in groupby(example.labels, lambda label: label != IGNORE):
            run = [*run]
            at += len(run)
            if kept:
                ends = bool({1, 3} & {*run}) or 2 in run[-2:]  # special tokens; 1 and 3 are known to end turns
                turns, ended = turns + 1, ended + ends
                if not ends and example.input_ids[at : at + 1] in ([1], [3]):
                    silent, first = silent + 1, first or example.source
    assert 0 < silent < turns - ended < turns
    for block in (1, 7, 100, 1 << 20):
        monkeypatch.setattr(faults, "_BLOCK", block)
        found = audit(examples, Encoder(tokenizer), 16)
        files = faults.look_at(examples, tokenizer)
        assert (found.turns, found.ended) == (turns, ended)
        assert sum(file.count["silent end"] for file in files) == silent
        assert found.kept == sum(example.kept for example in examples)
        assert found.rows == len(pack(examples.lengths, 16))
        assert files[0].first["silent end"] == first


# ---- what a run does with it


def test_a_failed_check_is_raised_and_advice_is_printed(capsys):
    found = [
        Finding("advice", "padded batches", "pack them"),
        Finding("ok", "prompts", "fine"),
        Finding("failed", "one shift", "a.jsonl:3: shifted"),
        Finding("failed", "end of turn", "a.jsonl:1: silent"),
    ]
    numbers = Audit(1, 2, 2, 1, 1, 1, 8, 2, 1, 2, found)
    with pytest.raises(ValueError, match=r"^one shift: a\.jsonl:3: shifted$"):
        check_audit(numbers)
    assert capsys.readouterr().out == "padded batches: pack them\n"
    check_audit(numbers._replace(findings=found[:2]))
    assert capsys.readouterr().out == "padded batches: pack them\n"


def test_a_run_does_not_start_on_a_failed_check(folder, write_jsonl, tmp_path):
    row = {"input_ids": [2, 100, 110, 111, 112, 113], "labels": [IGNORE, 110, 111, 112, 113, IGNORE]}
    path, out = write_jsonl(row), tmp_path / "run"
    good = str(write_jsonl(chat("How many?", "Two words."), name="good.jsonl"))
    for data, eval_data in (([str(path)], []), ([good], [str(path)])):
        with pytest.raises(ValueError, match=f"^one shift: {re.escape(str(path))}:1: .*shifted already"):
            train(Recipe(data=data, eval_data=eval_data, model=str(folder), out=str(out), row_tokens=64))
    assert not out.exists()


def test_a_finding_has_no_control_characters(tmp_path, tokenizer):
    path = tmp_path / "a\x1b[2J\n.jsonl"
    path.write_text('{"input_ids": [2, 9, 3], "labels": [-100, 9, -100]}\n')
    examples, _ = load_examples([Source(path)], encoder := Encoder(tokenizer), 16)
    (failed,) = audit(examples, encoder, 16).failed
    assert r"a\x1b[2J .jsonl:1: " in failed.text
    assert failed.text.isprintable()
