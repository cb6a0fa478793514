"""Documents apart: against Megatron's own masks and positions, and against text that says where its documents end."""

import numpy as np
import pytest
import torch
from megatron.core.datasets.gpt_dataset import _get_ltor_masks_and_position_ids

from megatron_moe_lpr.data.reading.batches import build_data_iterator, collate
from megatron_moe_lpr.data.reading.config import DataConfig, read_data_sources
from megatron_moe_lpr.data.reading.datasets import build_datasets
from megatron_moe_lpr.data.reading.document_options import DocumentOptions
from megatron_moe_lpr.data.reading.documents import cumulative_lengths, document_keys
from megatron_moe_lpr.errors import UserError
from tests.data.builders import write_dataset

SEQUENCE, SAMPLES = 24, 120
APART = DocumentOptions(reset_attention_mask=True, reset_position_ids=True)


def numbered(path, end: list[int], languages=("el", "en")) -> list[str]:
    """Two datasets of documents of 1 to 40 tokens, all of one document alike and no other's, and `end` after each."""
    random, prefixes = np.random.default_rng(3), []
    for number, language in enumerate(languages):
        first = 1 + 1000 * number
        documents = [[first + index] * int(random.integers(1, 41)) + end for index in range(90)]
        prefixes.append(write_dataset(path / language, language, documents))
    return prefixes


def datasets(path, prefixes, documents=APART, **flags):
    config = DataConfig(data_path=prefixes, valid_data_path=prefixes, data_cache_path=str(path / "cache"), **flags)
    config.documents = documents
    return build_datasets(read_data_sources(config), config, SEQUENCE, SAMPLES)


def every_sample(built) -> dict[str, torch.Tensor]:
    """All samples of the blend and of both validation datasets, as one batch."""
    parts = (built.train, *built.valid)
    return collate([part[index] for part in parts for index in range(len(part))])


@pytest.mark.parametrize("eod_mask_loss", [False, True])
def test_documents_that_end_with_eod_are_apart_as_megatron_s(tmp_path, eod_mask_loss):
    batch = every_sample(datasets(tmp_path, numbered(tmp_path, [0]), eod_mask_loss=eod_mask_loss))
    ends = 0
    for index, tokens in enumerate(batch["tokens"]):
        real = int((batch["language"][index] >= 0).sum())
        mask, loss_mask, positions = _get_ltor_masks_and_position_ids(tokens[:real], 0, True, True, eod_mask_loss, True)
        document = batch["document"][index]
        own = (document[:real, None] == document[:real]).tril()
        assert torch.equal(own, ~mask[0]) and torch.equal(batch["position_ids"][index, :real], positions)
        assert torch.equal(batch["loss_mask"][index, :real], loss_mask) and not batch["loss_mask"][index, real:].any()
        # Padding is one document of its own.
        assert real == 0 or (document[real:] == document[real - 1] + 1).all()
        assert torch.equal(batch["position_ids"][index, real:], torch.arange(SEQUENCE - real))
        ends += int((tokens[:real] == 0).sum())
    assert ends > 100 and batch["document"].dtype == torch.int32 and batch["document"].max() >= 3


def test_documents_without_eod_are_apart_too(tmp_path):
    """`--no-append-eod`: nothing in the text says where they end. The last token of each has no loss either."""
    prefixes = numbered(tmp_path, [])
    batch = every_sample(datasets(tmp_path, prefixes, eod_mask_loss=True))
    for tokens, labels, document, positions, mask, language in zip(
        *(batch[key] for key in ("tokens", "labels", "document", "position_ids", "loss_mask", "language")), strict=True
    ):
        real = language >= 0
        changes = torch.nn.functional.pad((tokens[1:] != tokens[:-1]) & real[1:] | (real[1:] != real[:-1]), (1, 0))
        assert torch.equal(document, changes.cumsum(0).int())
        lengths = torch.bincount(document)
        assert torch.equal(positions, torch.cat([torch.arange(length) for length in lengths]))
        assert torch.equal(mask == 1, real & (tokens == labels))


def test_an_eod_in_a_document_ends_it_as_in_megatron(tmp_path):
    prefix = write_dataset(tmp_path / "x", "el", [[5, 0, 6, 7, 0], [8, 9]] * 9)
    valid = datasets(tmp_path, [prefix]).valid[0]
    # Megatron's rule and the real beginnings, which agree but for the document without an EOD.
    assert valid[0]["document"].tolist()[:14] == [0, 0, 1, 1, 1, 2, 2, 3, 3, 4, 4, 4, 5, 5]
    assert valid[0]["position_ids"].tolist()[:9] == [0, 1, 0, 1, 2, 0, 1, 0, 1]


def test_positions_are_reset_by_their_own_flag_alone(tmp_path):
    prefixes = numbered(tmp_path, [0])
    apart = every_sample(datasets(tmp_path, prefixes))
    mask_alone = every_sample(datasets(tmp_path, prefixes, DocumentOptions(reset_attention_mask=True)))
    neither = every_sample(datasets(tmp_path, prefixes, DocumentOptions()))
    in_order = torch.arange(SEQUENCE).expand_as(apart["tokens"])
    assert torch.equal(mask_alone["position_ids"], in_order) and torch.equal(neither["position_ids"], in_order)
    assert torch.equal(mask_alone["document"], apart["document"])
    assert neither.keys() == apart.keys() - {"document", "cu_seqlens"}
    for key in ("tokens", "labels", "loss_mask", "language"):
        assert torch.equal(apart[key], neither[key])
    with pytest.raises(UserError, match=r"--reset-position-ids.*give --reset-attention-mask too"):
        datasets(tmp_path, prefixes, DocumentOptions(reset_position_ids=True))


def test_boundaries_come_with_each_batch(tmp_path):
    """Also from loader processes; documents of neighbouring samples are never one."""
    train = datasets(tmp_path, numbered(tmp_path, [0])).train
    for batch in build_data_iterator(train, 0, 3, 0, 1, num_workers=1):
        boundaries = batch["cu_seqlens"]
        assert boundaries.dtype == torch.int32 and boundaries[0] == 0 and boundaries[-1] == 3 * SEQUENCE
        numbers = batch["document"] + SEQUENCE * torch.arange(3, dtype=torch.int32)[:, None]
        _, counts = numbers.flatten().unique_consecutive(return_counts=True)
        assert torch.equal(boundaries.diff(), counts.int())
    assert cumulative_lengths(torch.zeros(2, 3, dtype=torch.int32)).tolist() == [0, 3, 6]


def test_the_keys_of_given_beginnings():
    """In any order, twice, outside of the sample."""
    keys = document_keys([7, 2, 2, 0, 8, 20, -3], 8, APART)
    assert keys["document"].tolist() == [0, 0, 1, 1, 1, 1, 1, 2]
    assert keys["position_ids"].tolist() == [0, 1, 0, 1, 2, 3, 4, 0]
    assert document_keys([], 3, DocumentOptions())["position_ids"].tolist() == [0, 1, 2]
