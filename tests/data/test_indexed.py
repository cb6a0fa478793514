import itertools

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from megatron_moe_lpr.data.indexed import IndexedWriter, open_tokens, read_lengths, shuffle_documents
from megatron_moe_lpr.errors import UserError

DOCUMENTS = [[1, 2, 3], [65499], [], [7] * 1000, [0]]


def write(prefix, documents, dtype):
    with IndexedWriter(str(prefix), np.dtype(dtype)) as writer:
        for block in (documents[:2], documents[2:]):
            lengths = np.array([len(document) for document in block], np.int32)
            writer.append(np.array(list(itertools.chain(*block)), np.int64), lengths)
        writer.finish()


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_same_bytes_as_megatrons_builder(tmp_path, dtype):
    write(tmp_path / "ours", DOCUMENTS, dtype)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for document in DOCUMENTS:
        builder.add_document(torch.tensor(document, dtype=torch.int64), [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()


def test_megatron_reads_it(tmp_path):
    write(tmp_path / "ours", DOCUMENTS, np.uint16)
    dataset = IndexedDataset(str(tmp_path / "ours"))
    assert [document.tolist() for document in dataset[0 : len(dataset)]] == DOCUMENTS
    assert dataset.document_indices.tolist() == [0, 1, 2, 3, 4, 5]
    assert dataset.index.dtype == np.uint16


def test_dtype_rule_is_megatrons(hf_tokenizer):
    from megatron_moe_lpr.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(hf_tokenizer)
    for size in (800, 65499, 65500, 151936):
        tokenizer.vocab_size = size
        assert tokenizer.dtype == DType.optimal_dtype(size)


def test_shuffle_keeps_every_document(tmp_path):
    documents = [[index] * (index % 7 + 1) for index in range(500)]
    write(tmp_path / "plain", documents, np.int32)
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        shuffle_documents(str(tmp_path / "plain"), str(tmp_path / name), np.dtype(np.int32), seed)
    dataset = IndexedDataset(str(tmp_path / "a"))  # must outlive its arrays: it unmaps the file when it goes
    shuffled = [document.tolist() for document in dataset[0:500]]
    assert shuffled != documents and sorted(shuffled) == documents
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "b.bin").read_bytes()
    assert (tmp_path / "a.bin").read_bytes() != (tmp_path / "c.bin").read_bytes()


def test_empty_dataset_and_damaged_index(tmp_path):
    write(tmp_path / "empty", [], np.int32)
    assert len(read_lengths(str(tmp_path / "empty"))) == len(open_tokens(str(tmp_path / "empty"), np.int32)) == 0
    write(tmp_path / "full", DOCUMENTS, np.int32)
    index = (tmp_path / "full.idx").read_bytes()
    for damaged in (index[:-1], index[:20], b"garbage" + index[7:]):
        (tmp_path / "full.idx").write_bytes(damaged)
        with pytest.raises(UserError, match=r"full\.idx"):
            read_lengths(str(tmp_path / "full"))
