import gzip
import os

import pytest
import zstandard

from megatron_moe_lpr.data.preparation import sources
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


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "a.parquet").touch()
    with pytest.raises(UserError, match="pip install pyarrow"):
        read(whole(tmp_path / "a.parquet"))
