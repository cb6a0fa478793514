"""Damaged datasets and index maps: found, or built again."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_moe_lpr.data.indexed import write_index
from megatron_moe_lpr.data.manifest import bin_path, idx_path, read_manifest, verify_tokens
from megatron_moe_lpr.data.preparation.merging import merge
from megatron_moe_lpr.data.reading.blend import read_blend
from megatron_moe_lpr.data.reading.config import DataConfig, read_data_sources
from megatron_moe_lpr.data.reading.training_dataset import build_training_dataset
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.files.checksums import MANIFEST, write_manifest
from tests.data.builders import make_hf_tokenizer, numbered_dataset, run_plan, write_jsonl

INSPECT = Path(__file__).parents[2] / "tools" / "inspect_data.py"


def flip(path: Path, place: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


class Payload:
    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


@pytest.mark.parametrize("place", [60, -1])
def test_flipped_index_is_refused(place: int, tmp_path: Path) -> None:
    prefix = numbered_dataset(tmp_path / "en", "en", 1000, 20)
    assert len(read_blend([prefix])) == 1
    flip(idx_path(prefix), place)
    os.utime(idx_path(prefix), ns=(1, 1))
    with pytest.raises(UserError, match=r"en\.idx: damaged"):
        read_blend([prefix])
    with pytest.raises(UserError, match=r"en\.idx: damaged"):
        merge([prefix], str(tmp_path / "merged"))


@pytest.mark.parametrize("shuffle_seed", [None, 3])
def test_text_is_summed_while_it_is_written(shuffle_seed, tmp_path: Path) -> None:
    tokenizer = make_hf_tokenizer(tmp_path / "tokenizer")
    text = write_jsonl(tmp_path / "en.jsonl", [f"document {number}" for number in range(50)])
    run_plan(text, tmp_path / "one", tokenizer, shuffle_seed=shuffle_seed)
    merge([str(tmp_path / "one")], str(tmp_path / "merged"), shuffle_seed=shuffle_seed)
    for name in ("one", "merged"):
        prefix = str(tmp_path / name)
        assert verify_tokens(prefix, read_manifest(prefix))
        flip(bin_path(prefix), 7)
        with pytest.raises(UserError, match=rf"{name}\.bin: damaged"):
            verify_tokens(prefix, read_manifest(prefix))
    command = [sys.executable, INSPECT, "--input", str(tmp_path / "one")]
    assert subprocess.run(command, capture_output=True).returncode == 0
    result = subprocess.run([*command, "--verify"], capture_output=True, text=True)
    assert result.returncode == 1 and result.stderr.startswith("error: ") and "one.bin: damaged" in result.stderr


def build(prefix: str, cache: Path) -> list[list[int]]:
    config = DataConfig(data_path=[prefix], data_cache_path=str(cache))
    dataset = build_training_dataset(read_data_sources(config), config, 32, 40)
    return [dataset[index]["tokens"].tolist() for index in range(len(dataset))]


def test_damaged_index_maps_are_built_again(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    prefix, cache = numbered_dataset(tmp_path / "en", "en", 1000, 50), tmp_path / "cache"
    expected = build(prefix, cache)
    (directory,) = cache.iterdir()
    maps = sorted(directory.glob("*.npy"))
    assert len(maps) == 5
    for path in maps:
        flip(path)
        assert build(prefix, cache) == expected
        assert f"warning: {path}: damaged" in capsys.readouterr().err
    (directory / MANIFEST).unlink()
    assert build(prefix, cache) == expected
    assert "without checksums" in capsys.readouterr().err
    assert build(prefix, cache) == expected and not capsys.readouterr().err


def test_a_pickle_among_index_maps_does_not_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    prefix, cache = numbered_dataset(tmp_path / "en", "en", 1000, 50), tmp_path / "cache"
    expected = build(prefix, cache)
    (directory,) = cache.iterdir()
    for number, path in enumerate(sorted(directory.glob("*.npy"))):
        if number % 2:
            path.write_bytes(pickle.dumps(Payload(tmp_path / "mark")))
        else:
            np.save(path, np.array([Payload(tmp_path / "mark")], dtype=object), allow_pickle=True)
        write_manifest(directory, {})
        assert build(prefix, cache) == expected
        assert f"{path}: not an index map" in capsys.readouterr().err
    assert not (tmp_path / "mark").exists()


def test_an_index_of_a_changed_dataset_is_noticed(tmp_path: Path) -> None:
    """Sizes agree, lengths do not: only the checksum tells."""
    prefix = numbered_dataset(tmp_path / "en", "en", 1000, 20)
    manifest = read_manifest(prefix)
    lengths = np.full(manifest.documents, 3, np.int32)
    lengths[-1] = manifest.tokens - 3 * (manifest.documents - 1)
    write_index(idx_path(prefix), lengths, np.dtype(manifest.dtype))
    assert read_manifest(prefix) == manifest
    with pytest.raises(UserError, match=r"en\.idx: damaged"):
        read_blend([prefix])
