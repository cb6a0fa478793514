"""What the plan says of a checkpoint against what ranks wrote."""

import functools
from collections import Counter

import pytest

from megatron_moe_lpr.checkpoint.format.directory import resolve_checkpoint
from megatron_moe_lpr.checkpoint.format.reader import CheckpointReader, is_model_key
from megatron_moe_lpr.checkpoint.loading.model import model_shape
from megatron_moe_lpr.model.parameter_kinds import KINDS, kind_of
from megatron_moe_lpr.parallel.layout import ParallelLayout
from megatron_moe_lpr.planning.checkpoint_size import save_needs
from megatron_moe_lpr.planning.memory import RunSizes
from megatron_moe_lpr.training.configuration.stages import STAGES
from tests.conversion.helpers import run
from tests.distributed import rank_pool
from tests.training.runs import make_checkpoint, make_data, train

LARGEST_ERROR, UNEVEN = 0.006, 1.25
"""Of the whole, and by how much a rank of a tiny model may exceed an even share: tensors are not cut."""
TP2, EP2, PP2 = ({f"{name}_model_parallel_size": 2} for name in ("tensor", "expert", "pipeline"))
CASES = [
    ({}, "1", {}),
    ({}, "2", {}),
    ({}, "full", {"use_distributed_optimizer": False}),
    (TP2, "1", {}),
    (EP2, "1", {}),
    (PP2, "1", {}),
    ({}, "1", {"save_trainable_only": True}),
    ({}, "blocks", {"save_trainable_only": True}),
    (PP2, "blocks", {}),
    (TP2, "1", {"fp32": False, "bf16": True}),
    ({}, "2", {"fp32": False, "bf16": True}),
]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A checkpoint with experts, one with inserted blocks, and data."""
    root = tmp_path_factory.mktemp("inputs")
    checkpoint = make_checkpoint(root, model="qwen2")
    run("import", "--hf", root / "hf", "--save", root / "grown", "--expand-blocks", 2)
    return checkpoint, root / "grown", make_data(root)


def written(path, kinds=None) -> Counter:
    """Bytes of values by the rank that wrote them: of everything, or of the model's weights of these kinds."""
    reader, ranks = CheckpointReader(path), Counter()
    for index, place in reader.metadata.storage_data.items():
        entry = reader.metadata.state_dict_metadata[index.fqn]
        wanted = kinds is None or (is_model_key(index.fqn) and kind_of(index.fqn) in kinds)
        if index.fqn in reader.tensors and wanted:
            sizes = next(chunk.sizes for chunk in entry.chunks if chunk.offsets == index.offset)
            ranks[int(place.relative_path.split("_")[2])] += sizes.numel() * entry.properties.dtype.itemsize
    return ranks


@pytest.mark.parametrize("layout, stage, options", CASES, ids=str)
def test_bytes(layout, stage, options, inputs, tmp_path):
    upcycled, grown, data = inputs
    checkpoint = grown if stage == "blocks" else upcycled
    job = functools.partial(train, checkpoint, tmp_path / "run", data, stage, train_iters=1)
    rank_pool(2).run(functools.partial(job, **{"use_distributed_optimizer": True} | layout | options))
    found = written(resolve_checkpoint(tmp_path / "run").path)
    sizes = RunSizes(
        STAGES[stage].trains,
        2,
        precision="bf16" if options.get("bf16") else "fp32",
        distributed_optimizer=options.get("use_distributed_optimizer", True),
        stored_dtype="float32",
    )
    shape = model_shape(resolve_checkpoint(checkpoint))
    plan = save_needs(shape, ParallelLayout(**layout), sizes, options.get("save_trainable_only", False))
    print(f"planned {plan.whole:,.0f}, largest rank {plan.largest_rank:,.0f}; written {dict(found)}")
    assert plan.whole == pytest.approx(found.total(), rel=LARGEST_ERROR)
    if options.get("bf16"):
        kept = written(resolve_checkpoint(tmp_path / "run").path, frozenset(KINDS) - STAGES[stage].trains)
        assert plan.largest_kept * (1 - LARGEST_ERROR) <= max(kept.values()) <= plan.largest_kept * UNEVEN
    else:
        assert plan.largest_kept == 0
    assert plan.largest_rank * (1 - LARGEST_ERROR) <= max(found.values()) <= plan.largest_rank * UNEVEN
