"""JSON files: what is written can be read again, whatever text is in it; a failure leaves the old file."""

import json
import os
from pathlib import Path

import pytest

from megatron_moe_lpr.files.json_files import read_json, write_json

UNDECODABLE = os.fsdecode(b"caf\xe9")


@pytest.mark.parametrize("text", ["plain", "κόσμε", UNDECODABLE])
def test_any_text_can_be_written(tmp_path: Path, text: str) -> None:
    write_json({"b": text, "a": 1}, tmp_path / "x.json")
    assert json.loads((tmp_path / "x.json").read_bytes()) == {"b": text, "a": 1}
    assert ("κόσμε".encode() in (tmp_path / "x.json").read_bytes()) == (text == "κόσμε")


def test_order_of_the_keys(tmp_path: Path) -> None:
    for sort_keys in (False, True):
        write_json({"b": 0, "a": 1}, tmp_path / "x.json", sort_keys)
        assert list(read_json(tmp_path / "x.json")) == (["a", "b"] if sort_keys else ["b", "a"])


def test_a_failure_keeps_the_old_file(tmp_path: Path) -> None:
    write_json({"a": 1}, tmp_path / "x.json")
    with pytest.raises(TypeError):
        write_json({"a": object()}, tmp_path / "x.json")
    assert read_json(tmp_path / "x.json") == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
