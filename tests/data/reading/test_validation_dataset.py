import numpy as np
import pytest
import torch

from megatron_moe_lpr.data.reading.batches import build_validation_iterator, count_validation_micro_batches
from megatron_moe_lpr.data.reading.config import DataConfig, read_data_sources
from megatron_moe_lpr.data.reading.datasets import build_validation_datasets
from megatron_moe_lpr.data.reading.languages import PADDING_LANGUAGE
from tests.data.builders import numbered_dataset, write_dataset

SEQUENCE = 16


def validation(tmp_path, *names, **flags):
    prefixes = [str(tmp_path / name) for name in names]
    config = DataConfig(data_path=prefixes[:1], valid_data_path=prefixes, **flags)
    return build_validation_datasets(read_data_sources(config), config, SEQUENCE)


@pytest.mark.parametrize("tokens", [2, 16, 17, 18, 33, 100])
def test_every_token_is_predicted_once_and_in_order(tmp_path, tokens):
    text = np.arange(1, tokens + 1)
    write_dataset(tmp_path / "x", "el", [text[:2].tolist(), text[2:].tolist()] if tokens > 2 else [text.tolist()])
    (dataset,) = validation(tmp_path, "x")
    samples = [dataset[index] for index in range(len(dataset))]
    real = torch.cat([sample["loss_mask"] for sample in samples]) == 1
    for key, expected in (("tokens", text[:-1]), ("labels", text[1:])):
        assert torch.cat([sample[key] for sample in samples])[real].tolist() == expected.tolist()
    language = torch.cat([sample["language"] for sample in samples])
    assert (language[real] == 0).all() and (language[~real] == PADDING_LANGUAGE).all()
    assert dataset.predicted_tokens == real.sum() == tokens - 1
    assert dataset.text_bytes == 3 * tokens


def test_eod_mask_loss(tmp_path):
    write_dataset(tmp_path / "x", "el", [[5, 6, 0]] * 20)
    (plain,), (masked,) = validation(tmp_path, "x"), validation(tmp_path, "x", eod_mask_loss=True)
    assert plain[0]["loss_mask"].sum() == SEQUENCE
    assert torch.equal(masked[0]["loss_mask"] == 0, masked[0]["tokens"] == 0)


@pytest.mark.parametrize(("micro_batch", "ranks", "multiple"), [(1, 1, 1), (2, 3, 1), (4, 2, 3)])
def test_ranks_together_see_every_sample_once(tmp_path, micro_batch, ranks, multiple):
    for base, name in ((1000, "el"), (2000, "tr")):
        numbered_dataset(tmp_path / name, name, base, 15)
    for language, dataset in enumerate(validation(tmp_path, "el", "tr")):
        assert dataset.language == ("el", "tr")[language]
        count = count_validation_micro_batches(dataset, micro_batch, ranks, multiple)
        batches = [
            list(build_validation_iterator(dataset, micro_batch, rank, ranks, multiple)) for rank in range(ranks)
        ]
        assert {len(rank) for rank in batches} == {count} and count % multiple == 0
        in_order = [batches[rank][index] for index in range(count) for rank in range(ranks)]
        tokens = torch.cat([batch["tokens"] for batch in in_order])
        mask = torch.cat([batch["loss_mask"] for batch in in_order]) == 1
        stored = np.memmap(f"{dataset.name}.bin", dtype=np.int32, mode="r")
        assert tokens[mask].tolist() == stored[:-1].tolist()
        tags = torch.cat([batch["language"] for batch in in_order])
        assert (tags[mask] == language).all() and (tags[~mask] == PADDING_LANGUAGE).all()
