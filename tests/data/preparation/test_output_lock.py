"""Two runs with one prefix, and ids beyond a vocabulary."""

import json
import shutil

import pytest

from megatron_moe_lpr.data.manifest import read_manifest
from megatron_moe_lpr.data.preparation.output_lock import output_lock
from megatron_moe_lpr.data.reading.blend import read_blend
from megatron_moe_lpr.data.reading.vocabulary import check_token_ids
from megatron_moe_lpr.errors import UserError
from tests.data.builders import run_plan, write_dataset, write_jsonl


def test_a_second_run_is_refused_and_leaves_nothing(hf_tokenizer, tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", ["one"])
    (tmp_path / "out").mkdir()
    with output_lock(str(tmp_path / "out" / "x")):
        with pytest.raises(UserError, match=r"out/x: another run writes it now \(process \d+ on "):
            run_plan(source, tmp_path / "out" / "x", hf_tokenizer, overwrite=True)
        assert [path.name for path in (tmp_path / "out").iterdir()] == [".x.lock"]
    assert not list((tmp_path / "out").iterdir())
    run_plan(source, tmp_path / "out" / "x", hf_tokenizer)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["x.bin", "x.idx", "x.json"]


def test_ids_beyond_the_models_vocabulary_are_refused_when_preprocessing(hf_tokenizer, tmp_path):
    directory = shutil.copytree(hf_tokenizer, tmp_path / "tokenizer")
    (directory / "config.json").write_text(json.dumps({"vocab_size": 50}))
    source = write_jsonl(tmp_path / "a.jsonl", ["one two three"])
    with pytest.raises(UserError, match=r"tokenizer\.json: gives the token id \d+, .* has 50 ids"):
        run_plan(source, tmp_path / "x", directory)
    assert not list(tmp_path.glob("x*"))


def test_ids_beyond_the_models_vocabulary_are_refused_when_training(hf_tokenizer, tmp_path):
    manifest = run_plan(write_jsonl(tmp_path / "a.jsonl", ["one"]), tmp_path / "new", hf_tokenizer)
    assert manifest.largest_token is not None
    old = write_dataset(tmp_path / "old", "el", [[5, 98, 0]])
    assert read_manifest(old).largest_token is None
    for prefix, largest in ((str(tmp_path / "new"), manifest.largest_token), (old, 98)):
        entries = read_blend([prefix])
        check_token_ids(entries, largest + 1, "model")
        with pytest.raises(UserError, match=rf"{prefix}\.bin: holds the token id {largest}"):
            check_token_ids(entries, largest, "model")
