"""Language tags on real ranks: the same on tensor- and pipeline-parallel ranks, disjoint over data-parallel ones."""

import pytest
import torch
from megatron.core import parallel_state

from megatron_moe_lpr.data.reading.batches import build_data_iterator
from megatron_moe_lpr.data.reading.config import DataConfig, read_data_sources
from megatron_moe_lpr.data.reading.datasets import build_datasets
from megatron_moe_lpr.parallel.groups import initialize_parallel
from megatron_moe_lpr.parallel.layout import ParallelLayout
from megatron_moe_lpr.platform import select_platform
from tests.data.builders import LANGUAGES, numbered_dataset
from tests.distributed import rank_pool

SAMPLES, SEQUENCE = 48, 32


def read_on_rank(prefixes, cache, tensor_parallel, pipeline_parallel):
    """One pass over the data: (data-parallel rank, tokens, tags) as lists."""
    layout = ParallelLayout(tensor_model_parallel_size=tensor_parallel, pipeline_model_parallel_size=pipeline_parallel)
    initialize_parallel(select_platform("cpu"), layout)
    config = DataConfig(data_path=prefixes, data_cache_path=cache)
    datasets = build_datasets(read_data_sources(config), config, SEQUENCE, SAMPLES)
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    batches = list(build_data_iterator(datasets.train, 0, 2, rank, size))
    tokens, tags = (torch.cat([batch[key] for batch in batches]).tolist() for key in ("tokens", "language"))
    return {"data_parallel_rank": rank, "tokens": tokens, "tags": tags}


@pytest.mark.parametrize(("tensor_parallel", "pipeline_parallel"), [(2, 1), (1, 2)])
def test_tags_on_every_rank(tmp_path, tensor_parallel, pipeline_parallel):
    prefixes = [numbered_dataset(tmp_path / name, name, 1000 * (i + 1), 60) for i, name in enumerate(LANGUAGES)]
    results = rank_pool(4).run(read_on_rank, prefixes, str(tmp_path / "cache"), tensor_parallel, pipeline_parallel)
    replicas = {}
    for result in results:
        tokens, tags = torch.tensor(result["tokens"]), torch.tensor(result["tags"])
        assert tags.unique().tolist() == list(range(6))
        assert torch.equal((tokens // 1000 - 1)[tokens > 0], tags[tokens > 0])
        first = replicas.setdefault(result["data_parallel_rank"], (tokens, tags))
        assert torch.equal(first[0], tokens) and torch.equal(first[1], tags)
    assert len(replicas) == 4 // (tensor_parallel * pipeline_parallel)
    seen = [tuple(sample) for tokens, _ in replicas.values() for sample in tokens.tolist()]
    assert len(set(seen)) == len(seen) == SAMPLES


def fail_to_build(prefixes, cache):
    """Build with a cache that can't be written; the error's text."""
    config = DataConfig(data_path=prefixes, data_cache_path=cache)
    try:
        build_datasets(read_data_sources(config), config, SEQUENCE, SAMPLES)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "built"


def shorten_the_wait():
    from megatron_moe_lpr.data.reading import training_dataset

    training_dataset.SHARED_FILE_SYSTEM_SECONDS = 0.1


def test_a_failure_on_rank_0_reaches_every_rank(tmp_path):
    prefixes = [numbered_dataset(tmp_path / "en", "en", 1000, 30)]
    (tmp_path / "file").touch()
    rank_pool(4).run(shorten_the_wait)
    first, *others = rank_pool(4).run(fail_to_build, prefixes, str(tmp_path / "file" / "cache"))
    assert first.startswith(f"UserError: {tmp_path / 'file' / 'cache'}/") and "--data-cache-path" in first
    assert "Not a directory" in first or "File exists" in first
    assert set(others) == {first}


class FullDisk:
    """Stands for numpy.save on a full disk, which gives no errno."""

    def __init__(self, *_, **__):
        raise OSError("40 requested and 20 written")


def fail_on_a_full_disk(prefixes, cache):
    from megatron_moe_lpr.data.reading import training_dataset

    kept, training_dataset.TaggedGPTDataset = training_dataset.TaggedGPTDataset, FullDisk
    try:
        return fail_to_build(prefixes, cache)
    finally:
        training_dataset.TaggedGPTDataset = kept


def test_a_full_disk_of_the_cache_is_named_on_every_rank(tmp_path):
    prefixes = [numbered_dataset(tmp_path / "en", "en", 1000, 30)]
    found = rank_pool(4).run(fail_on_a_full_disk, prefixes, str(tmp_path / "cache"))
    assert len(set(found)) == 1
    assert str(tmp_path / "cache") in found[0] and "40 requested" in found[0] and "--data-cache-path" in found[0]
    assert not list((tmp_path / "cache").iterdir())
