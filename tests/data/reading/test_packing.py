"""Best-fit packing: against the plain algorithm, and samples against the stored documents."""

import itertools

import numpy as np
import pytest
import torch

from megatron_moe_lpr.data.indexed import open_tokens, read_lengths
from megatron_moe_lpr.data.reading import packing, training_dataset
from megatron_moe_lpr.data.reading.batches import build_data_iterator, build_validation_iterator, collate
from megatron_moe_lpr.data.reading.config import DataConfig, read_data_sources
from megatron_moe_lpr.data.reading.datasets import build_datasets, build_validation_datasets
from megatron_moe_lpr.data.reading.document_options import DocumentOptions
from megatron_moe_lpr.data.reading.languages import PADDING_LANGUAGE
from megatron_moe_lpr.data.reading.packing import build_packed_index, pack_best_fit
from megatron_moe_lpr.data.reading.training_dataset import build_training_dataset
from megatron_moe_lpr.errors import UserError
from tests.data.builders import numbered_dataset, write_dataset

SEQUENCE = 32


def rooms_by_the_plain_algorithm(lengths, capacity):
    """Each document into the sample with the least room that holds it: the rooms left, sorted."""
    rooms: list[int] = []
    for length in lengths:
        fitting = [room for room in rooms if room >= length]
        rooms.append(capacity) if not fitting else None
        least = min(fitting, default=capacity)
        rooms[rooms.index(least)] -= length
    return sorted(rooms)


def test_samples_are_those_of_the_plain_algorithm():
    random = np.random.default_rng(0)
    for _ in range(200):
        capacity, count = int(random.integers(1, 60)), int(random.integers(1, 80))
        lengths = np.sort(random.integers(1, capacity + 1, count))[::-1]
        numbers = pack_best_fit(lengths, capacity)
        rooms = capacity - np.bincount(numbers, weights=lengths)
        assert np.sort(rooms).tolist() == rooms_by_the_plain_algorithm(lengths.tolist(), capacity)


def test_every_epoch_has_every_document_once_in_another_place():
    lengths = np.random.default_rng(1).integers(0, 40, 300).astype(np.int32)
    documents = np.arange(50, 300, dtype=np.int32)
    one = build_packed_index(lengths, documents, 30, seed=3, num_samples=1)
    per_epoch = len(one.order)
    index = build_packed_index(lengths, documents, 30, seed=3, num_samples=2 * per_epoch + 1)
    epochs = [[index.sample(epoch * per_epoch + place) for place in range(per_epoch)] for epoch in range(3)]
    expected = documents[lengths[50:] >= 2].tolist()
    for samples in epochs:
        assert sorted(np.concatenate(samples).tolist()) == expected
        assert all(np.minimum(lengths[sample], 30).sum() <= 30 for sample in samples)
    assert {tuple(sample.tolist()) for sample in epochs[0]} != {tuple(sample.tolist()) for sample in epochs[1]}
    assert [sample.tolist() for sample in epochs[0]] == [one.sample(place).tolist() for place in range(per_epoch)]
    assert index.order[:per_epoch].tolist() != list(range(per_epoch))
    other = build_packed_index(lengths, documents, 30, seed=4, num_samples=1)
    assert other.order.tolist() != one.order.tolist()


def check_sample(sample, prefix, language, capacity=SEQUENCE + 1):
    """A sample consists of whole stored documents, or the beginnings of longer ones; the numbers of those documents."""
    lengths, tokens = read_lengths(prefix), open_tokens(prefix, np.int32)
    starts = np.cumsum(lengths) - lengths
    stored = {
        tuple(tokens[start : start + min(length, capacity)].tolist()): number
        for number, (start, length) in enumerate(zip(starts, lengths, strict=True))
    }
    real = int((sample["language"] >= 0).sum())
    assert (sample["language"][:real] == language).all() and (sample["language"][real:] == PADDING_LANGUAGE).all()
    text = [*sample["tokens"][:real].tolist(), int(sample["labels"][real - 1])]
    assert torch.equal(sample["tokens"][1:real], sample["labels"][: real - 1])
    begins = [0, *(1 + np.flatnonzero(np.diff(sample["document"][:real].numpy()))).tolist(), len(text)]
    numbers = [stored[tuple(text[first:end])] for first, end in itertools.pairwise(begins)]
    # No loss across documents, nor on padding; within them the even tokens count.
    within = torch.zeros(SEQUENCE, dtype=torch.bool)
    within[:real] = True
    within[[end - 1 for end in begins[1:-1]]] = False
    assert torch.equal(sample["loss_mask"] == 1, within & (sample["labels"] % 2 == 0))
    positions = torch.cat([torch.arange(end - first) for first, end in itertools.pairwise(begins)])
    assert torch.equal(sample["position_ids"][:real], positions[:real])
    assert (sample["document"][real:] == len(numbers)).all()
    return numbers


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    """Two datasets of conversations of 5 to 60 tokens."""
    directory = tmp_path_factory.mktemp("chat")
    return [
        numbered_dataset(directory / name, name, 1000 * number, 40, chat=True)
        for number, name in enumerate(("el", "en"), 1)
    ]


def test_samples_hold_whole_conversations(chat, tmp_path, capsys):
    config = DataConfig(data_path=["3", chat[0], "1", chat[1]], data_cache_path=str(tmp_path / "cache"))
    sources = read_data_sources(config)
    dataset = build_training_dataset(sources, config, SEQUENCE, 80)
    assert len(dataset) == 80
    seen = {0: [], 1: []}
    for index in range(80):
        language = int(dataset[index]["language"][0])
        seen[language] += check_sample(dataset[index], chat[language], language)
    # The first samples are whole epochs of each dataset.
    per_epoch = len(dataset.datasets[0].packed_index.ends) - 1
    first = [check_sample(dataset.datasets[0][index], chat[0], 0) for index in range(per_epoch)]
    assert sorted(number for numbers in first for number in numbers) == list(range(40))
    assert len(seen[0]) > len(seen[1]) > 10
    longer = [int((read_lengths(prefix) > SEQUENCE + 1).sum()) for prefix in chat]
    error = capsys.readouterr().err
    assert f"{chat[0]}: {longer[0]} of 40 documents are longer than 33 tokens" in error and longer[0] > 5
    # Cached: the same samples, and nothing is packed again.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_dataset, "build_packed_index", None)
        again = build_training_dataset(sources, config, SEQUENCE, 80)
    for index in range(80):
        assert all(
            torch.equal(again[index][key], value) for key, value in dataset[index].items() if key != "dataset_id"
        )
    # Resumed in the middle, at another layout.
    whole = collate([dataset[index] for index in range(8, 16)])
    ranks = [next(build_data_iterator(dataset, 8, 4, rank, 2)) for rank in range(2)]
    for key in ("tokens", "loss_mask", "document", "position_ids"):
        assert torch.equal(torch.cat([rank[key] for rank in ranks]), whole[key])


def test_validation_reads_each_conversation_once(chat, tmp_path):
    config = DataConfig(data_path=chat[:1], valid_data_path=chat[:1])
    sources = read_data_sources(config)
    (dataset,) = build_validation_datasets(sources, config, SEQUENCE)
    samples = [dataset[index] for index in range(len(dataset))]
    assert sorted(number for sample in samples for number in check_sample(sample, chat[0], 0)) == list(range(40))
    lengths = np.minimum(read_lengths(chat[0]), SEQUENCE + 1)
    assert dataset.predicted_tokens == (lengths - 1).sum() and dataset.text_bytes is None  # some are cut
    assert build_validation_datasets(sources, config, 64)[0].text_bytes == sources.valid[0].manifest.loss_text_bytes
    batches = [batch for rank in range(2) for batch in build_validation_iterator(dataset, 2, rank, 2)]
    total = sum(sample["loss_mask"].sum() for sample in samples)
    assert sum(batch["loss_mask"].sum() for batch in batches) == total > 0
    assert len(build_validation_datasets(sources, config, SEQUENCE, 2)[0]) == 2


def test_flags_decide_packing_and_keeping_apart(chat, tmp_path):
    plain = write_dataset(tmp_path / "plain", "tr", [[2, 4, 6, 0]] * 32)
    short = write_dataset(tmp_path / "short", "el", [[2], [4], [6]])

    def build(*prefixes, **flags):
        config = DataConfig(data_path=list(prefixes), valid_data_path=list(prefixes), data_cache_path=str(tmp_path))
        config.documents = DocumentOptions(**flags)
        return build_datasets(read_data_sources(config), config, SEQUENCE, 20)

    mixed = build(chat[0], plain)
    assert [one.reader is not None for one in mixed.train.datasets] == [True, False]
    assert all("document" in mixed.train[index] for index in range(20))
    assert ["document" in valid[0] for valid in mixed.valid] == [True, False]
    assert "document" not in build(chat[0], pack_apart=False).train[0]
    assert "document" not in build(chat[0], pack="concatenate").train[0]
    packed = build(plain, pack="best-fit")
    assert packed.train.datasets[0].reader is not None
    sample = packed.train[0]
    # Eight documents of four tokens in 33; plain text counts, but for the step to the next document and padding.
    assert sample["loss_mask"].tolist() == [1, 1, 1, 0] * 8 and sample["document"].max() == 8
    for prefixes in ((short, chat[0]), (chat[0], short)):
        with pytest.raises(UserError, match="short: no document has 2 tokens"):
            build(*prefixes, pack="best-fit")
    with pytest.raises(UserError, match="--reset-position-ids"):
        build(plain, reset_position_ids=True)
    assert "document" not in build(plain).train[0] and packing.cut_documents(np.array([3, 40]), 33) == (1, 7)


@pytest.mark.parametrize("rest", [0, 5])
def test_eod_mask_loss_keeps_the_loss_on_the_end_of_each_document(rest, tmp_path):
    """The last document of a sample too, with padding behind it or not."""
    documents = [[2, 4, 6, 8, 10, 0], [2, 4, 6, 8, 0]] * 3
    plain = write_dataset(tmp_path / "plain", "tr", documents)
    config = DataConfig(data_path=[plain], valid_data_path=[plain], data_cache_path=str(tmp_path), eod_mask_loss=True)
    config.documents = DocumentOptions(pack="best-fit")
    built = build_datasets(read_data_sources(config), config, sum(map(len, documents)) - 1 + rest, 1)
    for sample in (built.train[0], built.valid[0][0]):
        assert sample["loss_mask"].sum() == sum(len(document) - 1 for document in documents)
        assert sample["labels"][sample["loss_mask"] == 1].tolist().count(0) == len(documents)
