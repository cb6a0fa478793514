import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_moe_lpr.data.indexed import open_tokens
from megatron_moe_lpr.data.reading import training_dataset
from megatron_moe_lpr.data.reading.batches import BATCH_KEYS, collate
from megatron_moe_lpr.data.reading.config import DataConfig, read_data_sources
from megatron_moe_lpr.data.reading.datasets import build_datasets
from megatron_moe_lpr.data.reading.training_dataset import build_training_dataset
from megatron_moe_lpr.errors import UserError
from tests.data.builders import CORPUS, LANGUAGES, numbered_dataset, run_plan

SEQUENCE = 32
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def six(tmp_path_factory):
    """Six datasets; a token's thousands tell which."""
    directory = tmp_path_factory.mktemp("six")
    return [numbered_dataset(directory / name, name, 1000 * (i + 1), 40 + 20 * i) for i, name in enumerate(LANGUAGES)]


def config_of(prefixes, cache, weights=(5, 1, 2, 4, 3, 1), **flags):
    path = [part for pair in zip(weights, prefixes, strict=True) for part in map(str, pair)]
    return DataConfig(data_path=path, data_cache_path=str(cache), **flags)


def build(config, samples=500):
    return build_training_dataset(read_data_sources(config), config, SEQUENCE, samples)


def test_every_token_carries_the_language_of_its_source(six, tmp_path):
    dataset = build(config_of(six, tmp_path))
    batch = collate([dataset[index] for index in range(500)])
    assert batch.keys() == set(BATCH_KEYS)
    assert all(tensor.shape == (500, SEQUENCE) for tensor in batch.values())
    text = torch.cat([batch["tokens"], batch["labels"]], dim=1)
    language = torch.cat([batch["language"], batch["language"]], dim=1)
    is_eod = text == 0
    assert torch.equal((text // 1000 - 1)[~is_eod], language[~is_eod])
    assert is_eod.any() and torch.equal(language, language[:, :1].expand_as(language))
    assert torch.equal(batch["tokens"][:, 1:], batch["labels"][:, :-1])
    assert torch.equal(batch["position_ids"], torch.arange(SEQUENCE).expand(500, -1))
    assert batch["loss_mask"].min() == 1
    shares = torch.bincount(batch["language"][:, 0]) / 500
    assert torch.allclose(shares, torch.tensor([5, 1, 2, 4, 3, 1]) / 16, atol=0.01)


def test_real_text_comes_from_the_tagged_prefix(hf_tokenizer, tmp_path):
    prefixes = [str(tmp_path / name) for name in LANGUAGES]
    for name, prefix in zip(LANGUAGES, prefixes, strict=True):
        run_plan(CORPUS / "valid" / f"{name}.jsonl.zst", prefix, hf_tokenizer, language=name)
    streams = [open_tokens(prefix, np.uint16).tobytes() for prefix in prefixes]
    dataset = build(config_of(prefixes, tmp_path / "cache"), 120)
    seen = set()
    for index in range(120):
        sample = dataset[index]
        (language,) = sample["language"].unique().tolist()
        text = np.append(sample["tokens"].numpy(), sample["labels"][-1]).astype(np.uint16)
        for piece in np.split(text, np.flatnonzero(text == 0) + 1):
            assert piece.tobytes() in streams[language]
            if len(piece) > 20:
                assert [piece.tobytes() in stream for stream in streams].count(True) == 1
        seen.add(language)
    assert seen == set(range(6))


def test_each_document_once_an_epoch(six, tmp_path):
    tokens = read_data_sources(config_of(six[:1], tmp_path, [1])).train[0].tokens
    samples = (tokens - 1) // SEQUENCE
    dataset = build(config_of(six[:1], tmp_path, [1]), samples // 2)
    seen = torch.cat([dataset.datasets[0][index]["tokens"] for index in range(samples)])
    stored = torch.from_numpy(open_tokens(six[0], np.int32).astype(np.int64))
    counts = torch.bincount(stored, minlength=3000) - torch.bincount(seen, minlength=3000)
    assert len(seen) == samples * SEQUENCE and (counts >= 0).all()
    assert counts.sum() == tokens - samples * SEQUENCE


def test_order_is_decided_by_the_seed(six, tmp_path):
    def tokens(seed, cache):
        dataset = build(config_of(six, tmp_path / cache, seed=seed))
        return torch.stack([dataset[index]["tokens"] for index in range(100)])

    first = tokens(1, "a")
    assert torch.equal(first, tokens(1, "a")) and torch.equal(first, tokens(1, "b"))
    assert not torch.equal(first, tokens(2, "a"))


def test_more_than_one_epoch_and_tiny_blends(six, tmp_path):
    for samples in (1, 7, 3000):
        dataset = build(config_of(six, tmp_path), samples)
        assert len(dataset) == samples
        assert len({dataset[index]["tokens"].numpy().tobytes() for index in range(samples)}) > samples * 0.9


def test_random_blends_never_ask_for_more_than_there_is(six, tmp_path):
    random = np.random.default_rng(0)
    for trial in range(10):
        weights = np.round(random.dirichlet(np.full(6, 0.3)) + 1e-4, 5)
        samples = int(random.integers(1, 400))
        dataset = build(config_of(six, tmp_path / str(trial), weights), samples)
        assert dataset[samples - 1]["language"].shape == (SEQUENCE,)


def test_split_keeps_training_and_validation_apart(six, tmp_path):
    config = config_of(six, tmp_path, split="70,30")
    sources = read_data_sources(config)
    datasets = build_datasets(sources, config, SEQUENCE, 400)
    assert [valid.language for valid in datasets.valid] == list(LANGUAGES)
    for entry, part, valid in zip(sources.train, datasets.train.datasets, datasets.valid, strict=True):
        stored = open_tokens(entry.prefix, np.int32)
        assert sorted(np.unique(part.document_index)) == list(range(entry.end_document))
        end = np.concatenate([valid[index]["tokens"] for index in range(len(valid))])
        assert np.array_equal(end[: valid.predicted_tokens], stored[entry.tokens : -1])


def test_eod_mask_loss(six, tmp_path):
    sample = collate([build(config_of(six, tmp_path, eod_mask_loss=True))[index] for index in range(50)])
    assert torch.equal(sample["loss_mask"] == 0, sample["tokens"] == 0)
    plain = collate([build(config_of(six, tmp_path))[index] for index in range(50)])
    assert torch.equal(plain["tokens"], sample["tokens"]) and plain["loss_mask"].min() == 1


def test_data_made_anew_gets_new_index_maps(tmp_path):
    prefix = numbered_dataset(tmp_path / "x", "en", 1000, 50)
    old = build(config_of([prefix], tmp_path / "cache", [1]))
    numbered_dataset(tmp_path / "x", "en", 1000, 20, seed=9)
    new = build(config_of([prefix], tmp_path / "cache", [1]))
    assert len(list((tmp_path / "cache").iterdir())) == 2
    assert new.datasets[0].document_index.max() == 19 and old.datasets[0].document_index.max() == 49


def test_kill_while_building_leaves_no_index_maps(six, tmp_path, monkeypatch):
    config = config_of(six, tmp_path / "cache")

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training_dataset, "BlendedDataset", killed)
        with pytest.raises(KeyboardInterrupt):
            build(config)
    assert list((tmp_path / "cache").glob("*")) == []
    assert len(build(config)) == 500


def test_missing_compiled_helpers_are_said_clearly(six, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "megatron.core.datasets.helpers", None)
    monkeypatch.delattr("megatron.core.datasets.helpers", raising=False)
    with pytest.raises(UserError, match="compiled data helpers are missing"):
        build(config_of(six, tmp_path / "cache"))


def test_built_beforehand_by_the_command_line(six, tmp_path):
    config = config_of(six, tmp_path / "cache", original_languages=["en", "zh"])
    command = [sys.executable, str(ROOT / "tools" / "build_index.py"), "--data-path", *config.data_path]
    command += ["--data-cache-path", str(tmp_path / "cache"), "--original-languages", "en", "zh"]
    command += ["--seq-length", str(SEQUENCE), "--train-samples", "500"]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert result.returncode == 0, result.stderr
    assert "en (original): 6.25% of the samples" in result.stdout and "500 samples" in result.stdout
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")}
    assert len(build(config)) == 500
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")} == before


def test_moved_data_finds_its_index_maps(six, tmp_path):
    build(config_of(six, tmp_path / "cache"))
    moved = [numbered_dataset(tmp_path / name, name, 1000 * (i + 1), 40 + 20 * i) for i, name in enumerate(LANGUAGES)]
    assert len(build(config_of(moved, tmp_path / "cache"))) == 500
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_more_samples_than_memory_has_room_for_are_refused(six, tmp_path):
    with pytest.raises(UserError, match=r"--train-iters x --global-batch-size.*index maps take .* GB or more"):
        build(config_of(six, tmp_path), 2**53)
