import gzip
import json
import os
import tracemalloc
from collections import Counter

import pytest
import zstandard

from megatron_moe_lpr.data.preparation import sources
from megatron_moe_lpr.data.preparation.documents import DocumentOptions, read_documents
from megatron_moe_lpr.data.preparation.sources import Slice, expand_inputs, partition_slices, read_blocks
from megatron_moe_lpr.errors import UserError
from tests.data.builders import run_plan, write_jsonl

LINES = [f"line {index} ".encode() * (index % 5 * 20 + 1) + b"\n" for index in range(200)]
TEXT = b"".join(LINES)


def read(piece):
    return b"".join(block.lines for block in read_blocks(piece, ["text"]))


def whole(path):
    return Slice(str(path), 0, os.path.getsize(path))


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(sources, "BLOCK_BYTES", 300)


def test_every_form_gives_the_same_lines(tmp_path, small_blocks):
    compressor = zstandard.ZstdCompressor()
    forms = {
        "a.jsonl": TEXT,
        "a.jsonl.gz": gzip.compress(TEXT),
        "two-members.jsonl.gz": gzip.compress(TEXT[:999]) + gzip.compress(TEXT[999:]),
        "a.jsonl.zst": compressor.compress(TEXT),
        "two-frames.jsonl.zst": compressor.compress(TEXT[:999]) + compressor.compress(TEXT[999:]),
    }
    for name, content in forms.items():
        (tmp_path / name).write_bytes(content)
        blocks = list(read_blocks(whole(tmp_path / name), ["text"]))
        assert b"".join(block.lines for block in blocks) == TEXT, name
        assert sum(block.disk_bytes for block in blocks) == len(content), name
        number = 1
        for block in blocks:
            assert block.lines.endswith(b"\n") and block.line_number == number
            number += block.lines.count(b"\n")
    assert len(list(read_blocks(whole(tmp_path / "a.jsonl"), ["text"]))) > 5


def test_last_line_without_newline_and_empty_file(tmp_path, small_blocks):
    (tmp_path / "a.txt").write_bytes(TEXT + b"last")
    assert read(whole(tmp_path / "a.txt")) == TEXT + b"last"
    (tmp_path / "b.txt").write_bytes(b"")
    assert read(whole(tmp_path / "b.txt")) == b""


@pytest.mark.parametrize("form", ["gz", "zst"])
def test_truncated_compression_is_named(tmp_path, form):
    noise = os.urandom(200_000).hex().encode()
    content = gzip.compress(noise) if form == "gz" else zstandard.ZstdCompressor().compress(noise)
    path = tmp_path / f"a.jsonl.{form}"
    for damaged in (content[: len(content) // 2], b"garbage" + content):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=rf"a\.jsonl\.{form}: damaged or truncated"):
            read(whole(path))


@pytest.mark.parametrize("count", [1, 2, 3, 7, 500])
def test_partitions_give_every_line_once_and_in_order(tmp_path, count):
    for name, content in {"a.jsonl": TEXT, "b.jsonl.gz": gzip.compress(TEXT), "c.jsonl": TEXT[:700]}.items():
        (tmp_path / name).write_bytes(content)
    names = expand_inputs([str(tmp_path / "*.jsonl*")])
    parts = [partition_slices(names, index, count) for index in range(1, count + 1)]
    assert b"".join(read(piece) for part in parts for piece in part) == TEXT + TEXT + TEXT[:700]
    if count == 3:
        assert all(part for part in parts)


def test_inputs(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "[x].jsonl", "readme.md"):
        (tmp_path / name).touch()
    names = expand_inputs([str(tmp_path / "b.jsonl"), str(tmp_path / "a*"), str(tmp_path / "[x].jsonl")])
    assert [os.path.basename(name) for name in names] == ["b.jsonl", "a.jsonl", "[x].jsonl"]
    for pattern, message in (("none*", "no such file"), ("", "is a directory"), ("readme.md", "unknown suffix")):
        with pytest.raises(UserError, match=message):
            expand_inputs([str(tmp_path / pattern)])
    with pytest.raises(UserError, match="given twice"):
        expand_inputs([str(tmp_path / "a.jsonl"), str(tmp_path / "*.jsonl")])
    with pytest.raises(UserError, match="standard input can't be partitioned"):
        partition_slices(["-"], 1, 2)


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["α\nβ", "x"], "n": [1, 2]}), path)
    assert read(whole(path)).decode() == '{"text": "α\\nβ"}\n{"text": "x"}\n'
    with pytest.raises(UserError, match="no column 'body'; it has text, n"):
        list(read_blocks(whole(path), ["body"]))
    path.write_bytes(b"garbage")
    with pytest.raises(UserError, match="not a readable parquet"):
        read(whole(path))


@pytest.mark.parametrize(("content", "words"), [("text", "not a readable"), ("table", "no column 'text'; it has n")])
def test_parquet_is_looked_at_before_the_work(content, words, hf_tokenizer, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"n": [1, 2]}), tmp_path / "b.parquet")
    if content == "text":
        (tmp_path / "b.parquet").write_text("no table")
    write_jsonl(tmp_path / "a.jsonl", ["one"])
    with pytest.raises(UserError, match=words):
        run_plan([tmp_path / "a.jsonl", tmp_path / "b.parquet"], tmp_path / "out" / "x", hf_tokenizer)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["string", "large_string"])
def test_a_parquet_file_that_repeats_a_long_text(kind, tmp_path):
    """300 rows of one text of 200 KB in some KB: one at a time, not all of a batch."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    texts = pyarrow.array(["ab" * 100_000] * 300, type=getattr(pyarrow, kind)())
    parquet.write_table(pyarrow.table({"text": texts, "n": list(range(300))}), path)
    del texts
    rows, allocated = [], []

    def read_all():
        for block in read_blocks(whole(path), ["text", "n"]):
            rows.append(block.lines.count(b"\n"))
            allocated.append(pyarrow.total_allocated_bytes())

    assert peak_of(read_all) < 8 << 20 and max(allocated) < 8 << 20
    assert sum(rows) == 300 and path.stat().st_size < 1 << 16


def test_parquet_columns_that_hold_no_text_and_files_that_hold_no_footer(tmp_path):
    """pyarrow's error of the second is an OSError that names no file."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": pyarrow.array([b"a"]), "n": [1]}), path)
    (block,) = read_blocks(Slice(str(path), 0, 1), ["text", "n"])
    assert json.loads(block.lines) == {"text": None, "n": 1}
    path.write_bytes(b"PAR1" + b"\0" * 100 + b"PAR1")
    with pytest.raises(UserError, match=r"a\.parquet: not a readable parquet file") as caught:
        list(read_blocks(Slice(str(path), 0, 1), ["text"]))
    assert "\n" not in str(caught.value)


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "a.parquet").touch()
    with pytest.raises(UserError, match="pip install pyarrow"):
        read(whole(tmp_path / "a.parquet"))


def rle_frame(blocks, byte, before=b"", after=b""):
    """A zstd frame of `blocks` blocks of 128 KB of one byte, four bytes each (RFC 8878, 3.1.1.2.2)."""

    def block(is_last, kind, size, data):
        return ((size << 3) | (kind << 1) | is_last).to_bytes(3, "little") + data

    frame = b"\x28\xb5\x2f\xfd\x00\x58" + (block(0, 0, len(before), before) if before else b"")
    return frame + block(0, 1, 1 << 17, byte) * blocks + block(1, 0, len(after), after)


def peak_of(function):
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("form", ["zst", "gz", "plain"])
def test_a_line_without_end_is_not_kept(tmp_path, form, monkeypatch):
    """Forty MB of one letter between two lines, of which no more than 1 MB and a few blocks are ever in memory."""
    monkeypatch.setattr(sources, "BLOCK_BYTES", 1 << 16)
    path = tmp_path / ("a.jsonl" if form == "plain" else f"a.jsonl.{form}")
    text = b'"first"\n' + bytes([97]) * (320 << 17) + b'"\n"last"'
    if form == "zst":
        path.write_bytes(rle_frame(320, b"a", b'"first"\n', b'"\n"last"'))
    else:
        path.write_bytes(gzip.compress(text, 1) if form == "gz" else text)
    del text
    blocks = []
    assert peak_of(lambda: blocks.extend(read_blocks(whole(path), ["text"], 1 << 20))) < 8 << 20
    kept = [(block.lines, block.line_number, block.too_long) for block in blocks]
    assert kept == [(b'"first"\n', 1, False), (b"", 2, True), (b'"last"', 3, False)]
    assert sum(block.disk_bytes for block in blocks) == path.stat().st_size


def test_a_last_line_without_end_and_one_that_is_just_short_enough(tmp_path, small_blocks):
    (tmp_path / "a.jsonl").write_bytes(b"b" * 1000 + b"\n" + b"a" * 5000)
    blocks = list(read_blocks(whole(tmp_path / "a.jsonl"), ["text"], 1000))
    assert [(len(block.lines), block.line_number, block.too_long) for block in blocks] == [
        (1001, 1, False),
        (0, 2, True),
    ]


def test_newlines_without_end_take_no_memory(tmp_path):
    """64 MB in 2 KB."""
    (tmp_path / "a.jsonl.zst").write_bytes(rle_frame(512, b"\n"))
    counts = Counter()

    def read_all():
        for block in read_blocks(whole(tmp_path / "a.jsonl.zst"), ["text"]):
            assert not list(read_documents(block, DocumentOptions(language="el"), counts, {}))

    assert peak_of(read_all) < 8 << 20
    assert counts == {"empty": 512 << 17}


def test_a_frame_that_asks_for_gigabytes_is_refused(tmp_path):
    # The window's exponent, of 2^41 bytes, stands in the upper bits of the sixth byte.
    frame = bytearray(rle_frame(1, b"a"))
    frame[5] = 31 << 3
    (tmp_path / "a.jsonl.zst").write_bytes(frame)
    with pytest.raises(UserError, match=r"a\.jsonl\.zst: damaged or truncated"):
        read(whole(tmp_path / "a.jsonl.zst"))


@pytest.mark.parametrize("level", [1, 19, -5])
def test_frames_of_every_form(tmp_path, level):
    """With checksum or without, with or without the size of the content, one of them streamed, one to be skipped."""
    words = os.urandom(180_000).hex().encode() + b"\n" + b"abc\n" * 50_000
    options = [{}, {"write_checksum": True}, {"write_content_size": False}]
    frames = [zstandard.ZstdCompressor(level=level, **each).compress(words) for each in options]
    stream = zstandard.ZstdCompressor(level=level).compressobj()
    frames.append(stream.compress(words) + stream.flush())
    frames.insert(2, b"\x53\x2a\x4d\x18" + (7).to_bytes(4, "little") + b"skipped")
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(b"".join(frames))
    assert read(whole(path)) == words * 4
    for cut in (1, 3, 100, len(frames[-1]) - 2):
        path.write_bytes(b"".join(frames)[:-cut])
        with pytest.raises(UserError, match="damaged or truncated"):
            read(whole(path))


def test_a_partition_of_one_long_line_is_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "BLOCK_BYTES", 1 << 16)
    (tmp_path / "a.jsonl").write_bytes(b"a" * (16 << 20))
    slices = []
    assert peak_of(lambda: slices.extend(partition_slices([str(tmp_path / "a.jsonl")], 2, 3))) < 1 << 20
    assert not slices
