"""Files are read whole or not at all: streams, tables and pipes of which a part is missing, damaged or odd."""

import bz2
import gzip
import json
import lzma
import tempfile

import pytest

from sft_kernels.sft.data import read_jsonl
from sft_kernels.sft.rows import DataError
from sft_kernels.sft.sources import Source

from .conftest import chat

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

CHATS = [chat(f"How many {i}?", " ".join(str(i * j % 997) for j in range(200))) for i in range(400)]
HALVES = ["".join(json.dumps(row) + "\n" for row in rows).encode() for rows in (CHATS[:200], CHATS[200:])]


def by_arrow(name, data):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, name) as file:
        file.write(data)
    return sink.getvalue().to_pybytes()


COMPRESS = {
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "zstd": lambda data: by_arrow("zstd", data),
    "lz4": lambda data: by_arrow("lz4", data),
}


@pytest.mark.parametrize("kind", COMPRESS)
def test_no_line_of_a_compressed_file_is_lost(kind, tmp_path):
    """The bytes of a file that is larger than any buffer, and holds two streams as parallel compressors write them."""
    path, (first, second) = tmp_path / "chats.data", map(COMPRESS[kind], HALVES)
    path.write_bytes(first + second)
    assert [record.messages for record in read_jsonl(path)] == [row["messages"] for row in CHATS]
    assert 0 <= Source(path).position() <= len(first + second)
    damaged = bytes(byte ^ 0xFF for byte in second[:4]) + second[4:]
    for end in (damaged, second[:1], second[:3], second[:-1], second[: len(second) // 2]):
        path.write_bytes(first + end)
        with pytest.raises(DataError, match=r"chats\.data:\d+: cannot be read"):
            read_jsonl(path, [])  # no line of it is skipped


def read_table(path, **columns):
    pq.write_table(pa.table({"messages": [row["messages"] for row in CHATS[:2]], **columns}), path)
    return [record.messages for record in read_jsonl(path)]


def test_columns_of_a_table_that_json_cannot_hold_do_no_harm(tmp_path):
    columns = {
        "score": [float("nan"), 1.0],
        "far": [float("inf")] * 2,
        "image": [b"\xff\xd8"] * 2,
        "many": [[float("nan")]] * 2,
    }
    assert read_table(tmp_path / "chats.parquet", **columns) == [row["messages"] for row in CHATS[:2]]


def test_text_that_a_table_has_as_bytes_is_text(tmp_path):
    path = tmp_path / "texts.parquet"
    pq.write_table(pa.table({"text": ["Grüße".encode(), b"\xff"]}), path)
    bad = []
    assert [record.text for record in read_jsonl(path, bad)] == ["Grüße"]
    assert [str(error) for error in bad] == [f'{path}:2: "text" is empty or not a string']


def test_a_table_with_checksums_is_checked(tmp_path):
    path = tmp_path / "texts.parquet"
    pq.write_table(pa.table({"text": ["abc " * 50]}), path, compression="none", write_page_checksum=True)
    path.write_bytes(path.read_bytes().replace(b"abc abc", b"abd abc", 1))
    with pytest.raises(DataError, match=r"cannot be read .*CRC"):
        read_jsonl(path)


def test_a_pipe_that_cannot_be_copied_is_not_called_unreadable(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    with pytest.raises(DataError, match=r"cannot be copied to a temporary file \(No space left on device\); TMPDIR"):
        Source("/dev/null")
