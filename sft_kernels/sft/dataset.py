"""Files of rows as :class:`~.examples.Examples`: read in a stream, tokenised on every core, kept for the next run."""

import os
from contextlib import closing
from functools import partial
from typing import NamedTuple

import numpy as np

from . import cache, workers
from .examples import Examples, PartWriter
from .formats import Unfit
from .progress import bar
from .rows import DataError, record_of
from .sources import Source, check_pipes
from .workers import Died, OutOfTime, Workers, limited

_LINES, _BYTES = 256, 1 << 18  # of a batch
_SHOWN = 1 << 20  # bytes from which a bar is shown
_MOST = 16  # processes
_AT_WORK = "the chat template or the tokenizer"


class Refusals:
    """The lines that were left out of some :class:`~.examples.Examples`: iterates over their :class:`~.rows.DataError`.

    They stay on the disk, however many they are.
    """

    def __init__(self, parts, longer, row_tokens):
        self.parts, self.longer, self.row_tokens = parts, longer, row_tokens

    def __len__(self):
        return sum(part.about["refused"] for part in self.parts) + len(self.longer)

    def __iter__(self):
        for part in self.parts:
            yield from part.refused()
        for example in self.longer:
            yield _too_long(example, self.row_tokens)


def load_examples(paths, encoder, row_tokens, skip_bad=False, *, desc="reading", name="data", cache_folder=None):
    """``(examples, refusals)`` of some files: :class:`~.examples.Examples` and :class:`Refusals`.

    Args:
        paths: of files, or :class:`~.sources.Source` s.
        encoder: a :class:`~.masking.Encoder`; its ``topics`` grow by what the files ask for.
        row_tokens: a line with a longer example is refused.
        skip_bad: leave refused lines out; False raises the :class:`~.rows.DataError` of the first.
        desc: a word for the progress bar.
        name: of the argument that ``paths`` are, for messages.
        cache_folder: see :func:`.cache.part`.

    The files' tokens are kept under everything that they depend on, so that a second run begins at once. Rendering and
    tokenising are bounded in time and memory on Linux; ``ValueError`` says if a chat template needs more.
    """
    check_pipes([path for path in paths if not isinstance(path, Source)])
    sources = [path if isinstance(path, Source) else Source(path) for path in paths]
    parts, known = [], cache.fingerprint(encoder)
    for source in sources:
        build = partial(_build, source, encoder, skip_bad, desc)
        part = cache.part(source, known, build, cache_folder)
        if part.about["refused"] and not skip_bad:
            raise next(part.refused())
        if not part.about["examples"]:
            raise DataError(part.path, None, nothing_usable(part.about["refused"], part.refused()))
        for topic, sentence in part.about["topics"]:
            encoder.topics.setdefault(topic, sentence)
        parts.append(part)
    examples = Examples(parts)
    kept, longer = _fitting(examples, row_tokens)
    if len(longer) and not skip_bad:
        raise _too_long(longer[0], row_tokens)
    refusals = Refusals(parts, longer, row_tokens)
    if not len(kept):
        files = ", ".join(dict.fromkeys(part.path for part in parts))
        raise ValueError(f"{name}: {nothing_usable(len(refusals), iter(refusals), files)}")
    return kept, refusals


def nothing_usable(count, refusals, where="it"):
    """Words for a file without a usable line, of which ``count`` were refused."""
    if not count:
        return f"no conversation in {where}"
    return f"no usable conversation in {where}; refused {count} line{'s' * (count > 1)}, the first: {next(refusals)}"


def end_of_turn(examples):
    """The id of the token that ends an assistant's turn in some :class:`~.examples.Examples`; None if there is none."""
    return next((end for part in examples.parts if (end := part.about["end_of_turn"]) is not None), None)


def _fitting(examples, row_tokens):
    """``(fitting, longer)``: examples of the lines all of whose examples fit; the longest one of each other line."""
    long = np.flatnonzero(examples.lengths > row_tokens)
    if not len(long):
        return examples, examples.choose(long)
    lines = examples.sources()
    by_length = long[np.argsort(-examples.lengths[long], kind="stable")]
    _, first = np.unique(lines[by_length], return_index=True)
    fits = ~np.isin(lines, lines[long])
    return examples.choose(np.flatnonzero(fits)), examples.choose(np.sort(by_length[first]))


def _too_long(example, row_tokens):
    reason = f"{len(example.input_ids)} tokens, longer than the row of {row_tokens}"
    path, _, line = example.source.rpartition(":")
    return DataError(path, int(line), reason)


class _Encoded(NamedTuple):
    """A batch of lines as arrays, and why lines are missing in them."""

    ids: np.ndarray  # int32
    labels: np.ndarray  # int32
    index: np.ndarray  # int64 [examples, 3]: length, kept tokens, line
    refused: list  # (line, reason)
    topics: list  # see Encoder.topics; those that this batch added
    end_of_turn: int | None


def _build(source, encoder, skip_bad, desc, folder):
    """Write the part of ``source`` into ``folder``; without ``skip_bad`` the first bad line raises."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    count = min(cores, 1 + (source.size >> 20), _MOST)
    encoder = type(encoder)(encoder.tokenizer, encoder.mode, encoder.split_turns)  # notes what this file alone asks for
    topics, end = {}, None
    read = bar(source.size, desc, "B", source.size >= _SHOWN, unit_scale=True, leave=False)
    with read, PartWriter(folder) as writer, Workers(partial(_encode, encoder, source.path), count) as pool:
        with closing(pool.map(_batches(source))) as results:
            for (lines, position), found in results:
                if isinstance(found, Died):
                    where = _where([number for number, _ in lines], source.path)
                    raise ValueError(f"{where}: the process of {_AT_WORK} ended: {found}")
                if isinstance(found, str):
                    raise ValueError(found)
                for line, reason in found.refused:
                    if not skip_bad:
                        raise DataError(source.path, line, reason)
                    writer.refuse(line, reason)
                writer.add(found.ids, found.labels, found.index)
                for topic, sentence in found.topics:
                    topics.setdefault(topic, sentence)
                end = found.end_of_turn if end is None else end
                read.update(position - read.n)
        writer.finish(topics=list(topics.items()), end_of_turn=end)


def _batches(source):
    """The lines of a source as ``(lines, position)``, each a few hundred lines and as many kilobytes."""
    lines, size = [], 0
    for number, line in source.lines():
        lines.append((number, line))
        size += len(line) if isinstance(line, bytes) else 0
        if len(lines) == _LINES or size >= _BYTES:
            yield lines, source.position()
            lines, size = [], 0
    if lines:
        yield lines, source.position()


def _encode(encoder, path, item):
    """The :class:`_Encoded` of a batch, or the message of an error that ends the run."""
    lines, _ = item
    records, refused, known = [], [], set(encoder.topics)
    for number, line in lines:
        try:
            records.append(record_of(path, number, line))
        except Unfit as unfit:
            refused.append((number, unfit.at(path)))
    try:
        found = _bounded(encoder, records)
    except ValueError as error:
        return str(error)
    examples = []
    for record, made in zip(records, found, strict=True):
        if isinstance(made, DataError):
            refused.append((record.line, made.reason))
        else:
            examples += [(example, record.line) for example in made]
    spoken = any(record.messages is not None for record in records)
    return _Encoded(
        np.array([token for example, _ in examples for token in example.input_ids], np.int32),
        np.array([label for example, _ in examples for label in example.labels], np.int32),
        np.array([(len(e.input_ids), e.kept, line) for e, line in examples], np.int64).reshape(-1, 3),
        sorted(refused),
        [(topic, sentence) for topic, sentence in encoder.topics.items() if topic not in known],
        encoder.end_of_turn if spoken else None,
    )


def _bounded(encoder, records):
    """The results of ``encoder``. ``ValueError`` names the record for which it needs too much time or memory."""
    try:
        with limited():
            return encoder.of(records)
    except (OutOfTime, MemoryError) as error:
        failed = f"did not end within {workers.SECONDS} s of computing"
        if isinstance(error, MemoryError):
            failed = f"took more than {workers.MEMORY >> 30} GiB of memory"
        at = [encoder.drafting] if encoder.drafting else records
        raise ValueError(f"{_where([r.line for r in at], at[0].path)}: {_AT_WORK} {failed}") from error


def _where(lines, path):
    return f"{path}:{lines[0]}" + (f" to {lines[-1]}" if len(lines) > 1 else "")
