"""Files become examples: whichever process reads them, whether or not they were read before."""

import fcntl
import gc
import json
import os
import shutil
import tempfile
import threading
import tracemalloc
import warnings

import numpy as np
import pytest

from sft_kernels.sft import cache, dataset, workers
from sft_kernels.sft import examples as examples_module
from sft_kernels.sft.data import read_jsonl
from sft_kernels.sft.dataset import end_of_turn, load_examples
from sft_kernels.sft.masking import IGNORE, Encoder
from sft_kernels.sft.rows import DataError
from sft_kernels.sft.sources import Source

from .conftest import chat

CHATS = [chat(f"How many {i}?", "Two " * (i % 7) + "words.") for i in range(40)]
KEYED = {"messages": [{"role": "user", "content": "a", "mood": "calm"}, {"role": "assistant", "content": "b"}]}


@pytest.fixture
def kept(tmp_path):
    """The folder of a cache, and the entries in it."""
    folder = tmp_path / "cache"

    class Kept:
        path = folder

        def entries(self):
            return sorted(p for p in folder.iterdir() if p.suffix != ".lock") if folder.exists() else []

    return Kept()


@pytest.fixture
def load(tokenizer, kept):
    def make(*paths, mask="completion+eot", row_tokens=256, **options):
        options = {"cache_folder": kept.path, **options}
        with_tokenizer = options.pop("tokenizer", tokenizer)
        return load_examples(paths, Encoder(with_tokenizer, mask), row_tokens, **options)

    return make


@pytest.fixture
def never_build(monkeypatch):
    def fail(*args):
        raise AssertionError("read again")

    return lambda: monkeypatch.setattr(dataset, "_build", fail)


def test_examples_are_those_of_the_encoder_in_their_order(write_jsonl, tokenizer, load, monkeypatch):
    paths = [write_jsonl(*CHATS), write_jsonl(*CHATS[:3], name="more.jsonl")]
    encoder = Encoder(tokenizer)
    expected = [example for path in paths for record in read_jsonl(path) for example in encoder.examples(record)]
    monkeypatch.setattr(dataset, "_LINES", 3)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(4))
    for _ in range(2):  # read, then from the cache
        examples, refusals = load(*paths)
        assert [*examples] == expected
        assert len(refusals) == 0
        assert examples.lengths.tolist() == [len(e.input_ids) for e in expected]
        assert examples.kept.tolist() == [e.kept for e in expected]
        assert end_of_turn(examples) == encoder.end_of_turn
    chosen = examples.choose(np.array([41, 5, 0]))
    assert [*chosen] == [expected[i] for i in (41, 5, 0)]
    assert [*(chosen + examples[3:5])] == [expected[i] for i in (41, 5, 0, 3, 4)]
    assert [*examples[-2:]] == expected[-2:]
    assert len({*examples.sources().tolist()}) == len(expected)


def test_the_order_does_not_depend_on_the_number_of_processes(write_jsonl, tokenizer, monkeypatch):
    rows = [*CHATS[:5], KEYED, "{", *CHATS[5:], KEYED, "[]"]
    path, seen = write_jsonl(*rows), []
    monkeypatch.setattr(dataset, "_LINES", 2)
    for count in (1, 3):
        monkeypatch.setattr(workers.Workers, "__init__", _with_count(count))
        encoder = Encoder(tokenizer)
        examples, refusals = load_examples([Source(path)], encoder, 256, True, cache_folder=path.parent / str(count))
        seen.append(([*examples], [str(error) for error in refusals], encoder.notes))
    assert seen[0] == seen[1]
    assert [error.split(": ")[0] for error in seen[0][1]] == [f"{path}:7", f"{path}:44"]
    (note,) = seen[0][2]
    assert note.startswith(f"{path}:6: the chat template does not read the message key 'mood'")


def _with_count(count, init=workers.Workers.__init__):
    return lambda self, function, _: init(self, function, count)


def test_a_second_run_reads_nothing_again(write_jsonl, load, never_build, kept, tokenizer):
    path = write_jsonl(*CHATS, KEYED)
    first, _ = load(path)
    never_build()
    second, _ = load(path, row_tokens=128)
    assert [*second] == [*first]
    assert len(kept.entries()) == 1
    encoder = Encoder(tokenizer)
    load_examples([path], encoder, 256, cache_folder=kept.path)
    assert len(encoder.notes) == 1  # what the first run noted


def test_what_the_tokens_depend_on_is_in_the_key(write_jsonl, load, kept, tokenizer_with, tokenizer, monkeypatch):
    path = write_jsonl(*CHATS)

    def count(*paths, **options):
        load(*paths, **options)
        return len(kept.entries())

    assert count(path) == 1
    assert count(path, row_tokens=99) == 1
    assert count(path, mask="completion") == 2
    assert count(path, tokenizer=tokenizer_with("{# #}" + tokenizer.chat_template)) == 3
    other = tokenizer_with(tokenizer.chat_template)
    other.add_tokens(["words"])
    assert count(path, tokenizer=other) == 4
    assert count(write_jsonl(*CHATS[1:])) == 5  # the same name
    copy = path.with_name("copy.jsonl")
    shutil.copy(path, copy)
    assert count(copy) == 6  # whose messages name it
    assert count(path, copy) == 6
    monkeypatch.setattr(cache, "version", lambda library: "0")
    assert count(path) == 7


@pytest.fixture
def dated(tokenizer, tokenizer_with):
    return tokenizer_with("{{ strftime_now('%Y') }}" + tokenizer.chat_template)


def test_a_template_that_prints_the_date_is_rendered_anew_every_day(write_jsonl, load, kept, dated, monkeypatch):
    path = write_jsonl(*CHATS)
    load(path, tokenizer=dated)
    load(path, tokenizer=dated)
    assert len(kept.entries()) == 1

    class Tomorrow(cache.date):
        @classmethod
        def today(cls):
            return cls(2100, 1, 1)

    monkeypatch.setattr(cache, "date", Tomorrow)
    load(path, tokenizer=dated)
    assert len(kept.entries()) == 2


def test_refused_lines_are_kept_with_the_others(write_jsonl, load, never_build):
    path = write_jsonl(CHATS[0], "{", CHATS[1], {"messages": []})
    with pytest.raises(DataError, match=f"{path}:2: not JSON"):
        load(path)
    examples, refusals = load(path, skip_bad=True)
    never_build()
    again, more = load(path, skip_bad=True)
    assert [*again] == [*examples]
    assert [(e.line, str(e)) for e in more] == [(e.line, str(e)) for e in refusals]
    assert [error.line for error in refusals] == [2, 4]
    with pytest.raises(DataError, match=f"{path}:2: not JSON"):
        load(path)


def test_a_line_that_is_too_long_is_left_out_whole(write_jsonl, load):
    path = write_jsonl(CHATS[0], chat("How many?", "Two words. " * 60), CHATS[1])
    with pytest.raises(DataError, match=rf"{path}:2: \d+ tokens, longer than the row of 64"):
        load(path, row_tokens=64)
    examples, refusals = load(path, row_tokens=64, skip_bad=True)
    assert [example.source for example in examples] == [f"{path}:1", f"{path}:3"]
    (refusal,) = refusals
    assert refusal.line == 2


def test_what_an_interrupted_run_leaves_is_not_taken(write_jsonl, load, kept, monkeypatch):
    path = write_jsonl(*CHATS)
    with monkeypatch.context() as patched:
        patched.setattr(dataset, "_encode", _interrupted)
        with pytest.raises((KeyboardInterrupt, RuntimeError)):
            load(path)
    assert kept.entries() == []
    load(path)
    (entry,) = kept.entries()
    partial = entry.with_suffix(".partial")  # of a run that was killed, and one of another file
    for leftover in (partial, entry.with_name("0" * 32 + ".partial")):
        leftover.mkdir()
        (leftover / "ids.int32").write_bytes(b"half")
    shutil.rmtree(entry)
    expected = [*load(path)[0]]
    assert len(expected) == len(CHATS)
    assert kept.entries() == [entry]
    ids = entry / "ids.int32"
    ids.write_bytes(ids.read_bytes()[:-4])  # a disk that lost the end
    assert [*load(path)[0]] == expected
    (entry / "about.json").write_text("{")
    assert [*load(path)[0]] == expected


def _interrupted(*args):
    raise KeyboardInterrupt


def test_a_file_that_changes_while_it_is_read_is_not_kept(write_jsonl, load, kept, monkeypatch):
    path, build = write_jsonl(*CHATS), dataset._build

    def written_to(source, encoder, skip_bad, desc, folder):
        build(source, encoder, skip_bad, desc, folder)
        write_jsonl(*CHATS, *CHATS)

    monkeypatch.setattr(dataset, "_build", written_to)
    with pytest.raises(DataError, match=f"{path}: changed while it was read"):
        load(path)
    assert kept.entries() == []


def test_a_cache_may_be_emptied_while_it_is_in_use(write_jsonl, load, kept):
    examples, _ = load(write_jsonl(*CHATS))
    shutil.rmtree(kept.path)
    assert len({example.source for example in examples}) == len(CHATS)


def test_a_second_process_waits_for_the_first(write_jsonl, load, kept, capsys):
    path, found = write_jsonl(*CHATS), []
    load(path)
    (entry,) = kept.entries()
    shutil.rmtree(entry)
    with open(f"{entry}.lock", "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        thread = threading.Thread(target=lambda: found.append(load(path)))
        thread.start()
        thread.join(0.5)
        assert thread.is_alive()
        assert kept.entries() == []
    thread.join()
    assert len(found[0][0]) == len(CHATS)
    assert "waiting for it" in capsys.readouterr().err


def test_a_cache_that_cannot_be_written_is_named_or_done_without(write_jsonl, load, tmp_path, monkeypatch, capsys):
    path, file = write_jsonl(*CHATS), tmp_path / "file"
    file.touch()
    with pytest.raises(OSError, match=f"cache: cannot write into {file}/cache"):
        load(path, cache_folder=file / "cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    examples, _ = load(path, cache_folder=None)
    assert len([*examples]) == len(CHATS)
    assert "tokens are not kept for the next run" in capsys.readouterr().err
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    load(path, cache_folder=None)
    assert (tmp_path / "home" / "sft_kernels").is_dir()


def test_a_full_disk_names_the_cache(write_jsonl, load, kept, monkeypatch):
    def full(self, *args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dataset.PartWriter, "add", full)
    with pytest.raises(OSError, match=rf"cache: {kept.path} cannot take .*No space left .*--cache"):
        load(write_jsonl(*CHATS))
    assert kept.entries() == []


def test_a_pipe_and_a_class_of_somebody_elses_are_not_kept(write_jsonl, load, kept, tokenizer):
    read, write = os.pipe()
    os.write(write, (json.dumps(CHATS[0]) + "\n").encode())
    os.close(write)
    assert len(load(f"/dev/fd/{read}")[0]) == 1
    os.close(read)
    assert kept.entries() == []

    class Theirs(type(tokenizer)):
        pass

    theirs = Theirs(tokenizer_object=tokenizer.backend_tokenizer, chat_template=tokenizer.chat_template)
    theirs.add_special_tokens(tokenizer.special_tokens_map)
    assert len(load(write_jsonl(*CHATS), tokenizer=theirs, mask="all")[0]) == len(CHATS)
    assert kept.entries() == []


def test_many_files_need_few_open_ones(write_jsonl, load, monkeypatch):
    monkeypatch.setattr(examples_module, "_MOST_MAPPED", 3)
    paths = [write_jsonl(CHATS[i], name=f"{i}.jsonl") for i in range(8)]
    before = len(os.listdir("/proc/self/fd"))
    examples, _ = load(*paths)
    for _ in range(2):
        assert [example.source for example in examples] == [f"{path}:1" for path in paths]
    assert len(os.listdir("/proc/self/fd")) <= before + 2 * 3


def test_tokens_stay_on_the_disk(write_jsonl, load):
    path = write_jsonl(*(chat("How many words?", f"Two words, {i}. " * 40) for i in range(1000)))
    small = write_jsonl(*CHATS, name="small.jsonl")
    peaks = []
    for part in (small, path):
        load(part, row_tokens=4096)
        tracemalloc.start()
        examples, _ = load(part, row_tokens=4096)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    tokens = int(examples.lengths.sum())
    assert tokens > 300_000
    assert peaks[1] - peaks[0] < 4 * tokens  # bytes; lists of ids and labels have four times as many


GIVEN = {"input_ids": [5, 6, 7, 8], "labels": [5, IGNORE, 9, IGNORE]}


def test_labels_that_the_file_brings_are_taken_as_they_are(write_jsonl, load, tokenizer_with):
    padded = {"input_ids": [0, 5, 6, 0], "labels": [IGNORE, 5, 6, IGNORE], "attention_mask": [0, 1, 1, 0]}
    counted = {**GIVEN, "position_ids": [0, 1, 2, 3], "attention_mask": None, "text": "x", "id": 3}
    examples, _ = load(write_jsonl(GIVEN, padded, counted), tokenizer=tokenizer_with(None))
    assert [(e.input_ids, e.labels) for e in examples] == [
        ([5, 6, 7, 8], [IGNORE, IGNORE, 9, IGNORE]),  # nothing predicts the first token
        ([5, 6], [IGNORE, 6]),
        ([5, 6, 7, 8], [IGNORE, IGNORE, 9, IGNORE]),
    ]
    assert end_of_turn(examples) is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"labels": None}, '"input_ids" without "labels"'),
        ({"labels": [5, 6]}, '"input_ids" has 4 entries, "labels" 2'),
        ({"labels": "5 6 7 8"}, '"labels" is not a list of token ids'),
        ({"input_ids": []}, '"input_ids" is not a list of token ids'),
        ({"input_ids": [5, 6, True, 8]}, '"input_ids" is not a list of token ids'),
        ({"input_ids": [[5], [6], [7], [8]]}, '"input_ids" is not a list of token ids'),
        ({"input_ids": [5, 6, -7, 8]}, "a token id below 0"),
        ({"labels": [5, 6, -1, 8]}, "a token id below 0; only labels may be -100"),
        ({"labels": [5, 6, 7, 1 << 40]}, "a token id of 2³¹ or more"),
        ({"labels": [IGNORE] * 4}, "no token to learn from"),
        ({"labels": [5, IGNORE, IGNORE, IGNORE]}, "no token to learn from"),
        ({"input_ids": [5, 6, 7, 999_999]}, "token 999999 is none of the tokenizer's"),
        ({"attention_mask": [1, 1]}, '"input_ids" has 4 entries, "labels" 4, "attention_mask" 2'),
        ({"attention_mask": [0, 0, 0, 0]}, '"attention_mask" leaves no token'),
        ({"attention_mask": [[1]]}, '"attention_mask" is not a list of 0 and 1'),
        ({"position_ids": [0, 1, 0, 1]}, '"position_ids" do not count from 0 up'),
        ({"completion_mask": [0, 0, 1, 1]}, '"completion_mask" beside "labels" is not supported'),
    ],
)
def test_labels_that_make_no_sense_are_named(changes, reason, write_jsonl, load):
    path = write_jsonl(GIVEN, {**GIVEN, **changes})
    with pytest.raises(DataError, match=f"{path}:2: {reason}"):
        load(path)


def test_the_notes_of_a_file_are_its_own(write_jsonl, tokenizer, kept):
    """Those of the files before it are not in its part, which a run without them may start from."""
    paths = [write_jsonl(KEYED, name=name) for name in ("a.jsonl", "b.jsonl")]
    for files, first in ((paths, paths[0]), (paths[1:], paths[1])):
        encoder = Encoder(tokenizer)
        load_examples(files, encoder, 256, cache_folder=kept.path)
        (note,) = encoder.notes
        assert note.startswith(f"{first}:1: ")
        assert "'mood'" in note


def test_a_cache_may_lie_among_other_files(write_jsonl, load, kept):
    ours, theirs = kept.path / f"{'0a' * 16}.partial", kept.path / "film.partial"
    for folder in (ours, theirs):
        folder.mkdir(parents=True)
        (folder / "half").write_text("of it")
    load(write_jsonl(*CHATS))
    assert (theirs / "half").exists()
    assert not ours.exists()
    assert not (kept.path / "film.lock").exists()


@pytest.mark.parametrize("name", ["refused.jsonl", "about.json", "index.int64", "ids.int32"])
@pytest.mark.parametrize("content", [None, b"", b"[]"], ids=["no file", "empty", "too short"])
def test_a_part_that_lost_something_is_made_again(name, content, write_jsonl, load, kept):
    path = write_jsonl(CHATS[0], "{", "[]")
    first, refusals = load(path, skip_bad=True)
    reasons = [*map(str, refusals)]
    (entry,) = kept.entries()
    (entry / name).unlink()
    if content is not None:
        (entry / name).write_bytes(content)
    again, refusals = load(path, skip_bad=True)
    assert [*again] == [*first]
    assert [*map(str, refusals)] == reasons


def test_a_file_that_is_removed_while_it_is_read_is_named(write_jsonl, load, kept, monkeypatch):
    path = write_jsonl(*CHATS)
    real = dataset._build
    monkeypatch.setattr(dataset, "_build", lambda *args: (real(*args), path.unlink()))
    with pytest.raises(DataError, match=f"{path}: changed while it was read"):
        load(path)
    assert kept.entries() == []


def test_a_temporary_folder_goes_with_its_examples(write_jsonl, load, tmp_path, monkeypatch):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setattr(cache, "_key", lambda *args: None)  # as for a pipe
    with pytest.raises(DataError):
        load(write_jsonl("{"))
    assert not [*temporary.iterdir()]
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        examples, refusals = load(write_jsonl(*CHATS[:3]))
        assert len([*temporary.iterdir()]) == 1
        assert len(examples) == 3
        del examples, refusals
        gc.collect()
    assert not [*temporary.iterdir()]
    assert not [warning for warning in warned if warning.category is ResourceWarning]


DOUBLES = "{% set x = namespace(y='a') %}{% for i in range(60) %}{% set x.y = x.y ~ x.y %}{% endfor %}"


def test_a_tokenizer_that_panics_is_told_by_line(write_jsonl, load, tokenizer, tokenizer_with):
    from tokenizers import normalizers

    broken = tokenizer_with(tokenizer.chat_template)
    broken.backend_tokenizer.normalizer = normalizers.Replace("", "x")
    with pytest.raises(DataError, match=r"chats\.jsonl:1: the tokenizer refuses it: "):
        load(write_jsonl(CHATS[0]), tokenizer=broken)


FOREVER = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("bomb", "reason"),
    [
        (FOREVER, "did not end within 1 s of computing"),
        ("{{ 'a' * (10 ** 6) * (10 ** 5) }}", "took more than 1 GiB of memory"),
        (
            "{% set x = namespace(y='a') %}{% for i in range(60) %}{% set x.y = x.y ~ x.y %}{% endfor %}",
            "more than 1 GiB",
        ),
        ("{{ 7 ** (7 ** 10) }}", "did not end within 1 s of computing"),
    ],
    ids=["loops", "a long string", "doubles", "a large power"],
)
@pytest.mark.parametrize("always", [True, False], ids=["always", "in one line"])
def test_a_template_is_bounded_in_time_and_memory(
    bomb, reason, always, write_jsonl, load, tokenizer, tokenizer_with, monkeypatch
):
    monkeypatch.setattr(workers, "SECONDS", 1 if "1 s" in reason else 30)
    monkeypatch.setattr(workers, "MEMORY", 1 << 30)
    condition = "true" if always else "'bomb' in messages[0].content"
    template = f"{{% if {condition} %}}{bomb}{{% endif %}}" + tokenizer.chat_template
    path = write_jsonl(CHATS[0], CHATS[1], chat("a bomb", "b"), CHATS[2])
    with pytest.raises(ValueError, match=reason) as error:
        load(path, tokenizer=tokenizer_with(template), skip_bad=True)  # no line of it is skipped
    # What is constant is computed when the template is compiled.
    assert str(error.value).startswith(f"{path}:{1 if always or '7 **' in bomb else 3}: ")
