"""Runs on an extended vocabulary: what stays to the bit, copies of tied rows, memory, products, resumed runs."""

import functools
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_moe_lpr.checkpoint.loading.model import load_model
from megatron_moe_lpr.engine.optimizer import build_optimizer, build_schedule, wrap_data_parallel
from megatron_moe_lpr.engine.options import BatchOptions, OptimizerOptions
from megatron_moe_lpr.engine.step import TrainingState, training_step
from megatron_moe_lpr.model.build import unwrap
from megatron_moe_lpr.model.configuration.compute import ComputeOptions
from megatron_moe_lpr.model.configuration.parameter_kinds import ParameterKind, kind_of
from megatron_moe_lpr.model.tensors import is_vocabulary_key
from megatron_moe_lpr.parallel.groups import initialize_parallel
from megatron_moe_lpr.parallel.layout import ParallelLayout
from megatron_moe_lpr.platform import select_platform
from megatron_moe_lpr.training.configuration.stages import StageOptions, freeze
from tests.conversion.helpers import checkpoint_tensors
from tests.data.builders import write_dataset
from tests.distributed import rank_pool
from tests.training.new_rows import extend_checkpoint
from tests.training.one_step import LANGUAGE_GROUP, SAMPLES, StepCase, micro_batches, run_step
from tests.training.runs import make_checkpoint, metrics, rewind, train

BASE, NEW_TOKENS = 99, (13, 21)
ALL = BASE + sum(NEW_TOKENS)
TP2 = {"tensor_model_parallel_size": 2}
EP2 = {"expert_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
DISTRIBUTED = {"use_distributed_optimizer": True}
BF16 = {"fp32": False, "bf16": True}
LAYOUTS = {
    "DP2, parameters gathered beside the forward pass": (
        2,
        DISTRIBUTED | {"overlap_grad_reduce": True, "overlap_param_gather": True},
    ),
    "TP2xEP2, distributed optimizer": (2, TP2 | EP2 | DISTRIBUTED),
    "PP2, recompute full": (2, PP2 | {"recompute_granularity": "full"}),
    "PP2xDP2, distributed optimizer, bf16": (4, PP2 | DISTRIBUTED | BF16),
}


def make_data(root: Path) -> dict[str, str]:
    """Text in a pattern that a model can learn: `el` and `hu` of all tokens, `en` of the base model's alone."""
    steps = {"el": (7, ALL), "hu": (11, ALL), "en": (5, BASE)}
    return {
        language: write_dataset(
            root / language,
            language,
            [[1 + (first + place * step) % (tokens - 1) for place in range(80)] for first in range(60)],
        )
        for language, (step, tokens) in steps.items()
    }


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    found = {}
    for name in ("qwen2-tied", "llama"):
        found[name] = make_checkpoint(tmp_path_factory.mktemp(name), name)
        extend_checkpoint(found[name], NEW_TOKENS)
    return found


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, str]:
    return make_data(tmp_path_factory.mktemp("data"))


NO_NEW_ROWS = {"train_new_rows": False}
RUNS = [
    ("DP2, parameters gathered beside the forward pass", "qwen2-tied", "1", {}),
    ("TP2xEP2, distributed optimizer", "qwen2-tied", "1", {}),
    ("PP2, recompute full", "qwen2-tied", "1", {}),
    ("PP2xDP2, distributed optimizer, bf16", "qwen2-tied", "1", {}),
    ("TP2xEP2, distributed optimizer", "llama", "1", {}),
    ("TP2xEP2, distributed optimizer", "qwen2-tied", "2", NO_NEW_ROWS),
    ("PP2, recompute full", "qwen2-tied", "2", {"new_token_loss_coeff": 1.0}),
    ("TP2xEP2, distributed optimizer", "llama", "2", {}),
]


@pytest.mark.parametrize(("name", "model", "stage", "options"), RUNS)
def test_what_is_frozen_stays_to_the_bit_over_20_steps(name, model, stage, options, checkpoints, data, tmp_path):
    """With weight decay: of the base model's rows and the first extension's none changes, in any matrix."""
    (world, layout), trains = LAYOUTS[name], StageOptions(stage=stage, **options).resolve().trains
    changes = {"train_iters": 20, "seq_length": 16, "weight_decay": 0.1, **layout, **options}
    rank_pool(world).run(functools.partial(train, checkpoints[model], tmp_path / "run", data, stage, **changes))
    before, after = checkpoint_tensors(checkpoints[model]), checkpoint_tensors(tmp_path / "run")
    for key, tensor in before.items():
        found = after[key][: len(tensor)] if is_vocabulary_key(key) else after[key]
        assert torch.equal(tensor, found.to(tensor.dtype)) == (kind_of(key, extensions=2) not in trains), key
    losses = [record["lm_loss"] for record in metrics(tmp_path / "run").values()]
    assert len(losses) == 20 and (stage == "2" or losses[-1] < losses[0])


def build(path: Path, layout: dict, dtype: torch.dtype, options: OptimizerOptions, stage: str = "1") -> TrainingState:
    platform, parallel = select_platform("cpu"), ParallelLayout(**layout)
    initialize_parallel(platform, parallel)
    model = load_model(path, parallel, platform, ComputeOptions().with_dtype(dtype), calculate_per_token_loss=True)
    trains = {"train_new_rows": stage != "2, no new rows"}
    freeze(model.chunks, StageOptions(stage[0], **trains).resolve(), extensions=len(NEW_TOKENS))
    chunks = wrap_data_parallel(model.chunks, model.config, options)
    optimizer = build_optimizer(chunks, model.config, options, platform)
    schedule = build_schedule(optimizer, options, BatchOptions(train_iters=20, global_batch_size=SAMPLES))
    return TrainingState(chunks, optimizer, schedule)


def train_copies(path: Path, layout: dict, dtype: torch.dtype, distributed: bool) -> list[list[torch.Tensor]]:
    """Train some steps; the rows of all extensions on the first and on the last pipeline rank."""
    options = OptimizerOptions(lr=1e-2, weight_decay=0.1, use_distributed_optimizer=distributed)
    state = build(path, layout, dtype, options)
    for _ in range(4):
        training_step(state, micro_batches(2, ALL), LANGUAGE_GROUP, SAMPLES)
    rows = [weight.detach().clone() for chunk in state.chunks for weight in unwrap(chunk).new_rows]
    found = [None] * parallel_state.get_pipeline_model_parallel_world_size()
    dist.all_gather_object(found, rows, group=parallel_state.get_pipeline_model_parallel_group())
    return found


@pytest.mark.parametrize(
    ("world", "layout", "dtype", "distributed"),
    [
        (2, PP2, torch.float32, False),
        (2, PP2 | {"num_virtual_stages_per_pipeline_rank": 2}, torch.bfloat16, True),
        (4, PP2 | TP2, torch.float32, False),
        (4, PP2, torch.bfloat16, True),
    ],
    ids=["PP2", "interleaved, bf16", "TP2xPP2", "PP2xDP2, bf16, distributed optimizer"],
)
def test_both_copies_of_tied_rows_stay_equal_to_the_bit(world, layout, dtype, distributed, checkpoints):
    before = checkpoint_tensors(checkpoints["qwen2-tied"])
    for first, last in rank_pool(world).run(train_copies, checkpoints["qwen2-tied"], layout, dtype, distributed):
        assert len(first) == len(last) == 2
        assert all(torch.equal(one, other) for one, other in zip(first, last, strict=True))
        if "tensor_model_parallel_size" not in layout:
            frozen, trained = (before[f"embedding.new_word_embeddings.{number}.weight"].to(dtype) for number in (0, 1))
            assert torch.equal(first[0][:13], frozen) and not torch.equal(first[1][:21], trained)


def count_bytes(path: Path, stage: str) -> tuple[int, int, int]:
    """Trained parameters outside of the layers, places in gradient buffers for them, and their optimizer states."""
    state = build(path, {}, torch.float32, OptimizerOptions(), stage)
    training_step(state, micro_batches(2, ALL), LANGUAGE_GROUP, SAMPLES)
    named = [
        (name, parameter) for name, parameter in unwrap(state.chunks[0]).named_parameters() if ".layers." not in name
    ]
    places = sum(parameter.main_grad.numel() for _, parameter in named if hasattr(parameter, "main_grad"))
    outer = {id(parameter) for _, parameter in named}
    states = sum(
        value.numel()
        for part in state.optimizer.chained_optimizers
        for parameter, values in part.optimizer.state.items()
        if id(parameter) in outer
        for name, value in values.items()
        if name != "step"
    )
    return sum(parameter.numel() for _, parameter in named if parameter.requires_grad), places, states


@pytest.mark.parametrize(("model", "matrices"), [("qwen2-tied", 1), ("llama", 2)])
def test_no_memory_for_frozen_rows(model, matrices, checkpoints):
    """A gradient and two moments for the 21 rows of the latest extension, padded to 24, and no others."""
    new = 24 * 32 * matrices
    for stage, count in {"1": new, "2": new, "2, no new rows": 0}.items():
        assert rank_pool(1).run(count_bytes, checkpoints[model], stage)[0] == (count, count, 2 * count)


def count_operations(path: Path, case: StepCase) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        run_step(path, case)
    return counter.get_total_flops()


def test_frozen_rows_have_no_weight_gradient_product(checkpoints):
    """In the review the difference between training the new rows and not is their weight gradient alone, as far as
    the output layer goes: the embedding is no product, but its gradient is that of the first layer's input."""
    path, tokens = checkpoints["llama"], 8 * 32
    with_rows, without = (
        rank_pool(1).run(count_operations, path, StepCase(stage="2", train_new_rows=trains))[0]
        for trains in (True, False)
    )
    full = rank_pool(1).run(count_operations, path, StepCase(stage="full"))[0]
    assert with_rows > without
    # Of 99 rows padded to 128, 13 padded to 16, 21 padded to 24: full training has all of them, and every other matrix.
    hidden = 32
    row = 2 * tokens * hidden
    assert (with_rows - without - row * 24) % (2 * tokens) == 0 and full > with_rows + row * (128 + 16)


@pytest.mark.parametrize("changes", [DISTRIBUTED | BF16 | PP2, TP2], ids=["bf16, PP2, distributed optimizer", "TP2"])
def test_a_resumed_run_is_exact(changes, checkpoints, data, tmp_path):
    whole = tmp_path / "whole"
    fields = {"save_interval": 3, "weight_decay": 0.1, **changes}
    rank_pool(2).run(functools.partial(train, checkpoints["qwen2-tied"], whole, data, **fields))
    again = rewind(whole, tmp_path / "again", 3)
    rank_pool(2).run(functools.partial(train, checkpoints["qwen2-tied"], again, data, **fields))
    before, after = checkpoint_tensors(whole), checkpoint_tensors(again)
    assert before.keys() == after.keys() and all(torch.equal(tensor, after[key]) for key, tensor in before.items())


def test_a_run_resumes_at_another_layout(checkpoints, data, tmp_path):
    """Rows are padded otherwise there, and on other ranks; states and rows are the same."""
    whole, fields = tmp_path / "whole", {"save_interval": 3, "weight_decay": 0.1}
    rank_pool(2).run(functools.partial(train, checkpoints["qwen2-tied"], whole, data, **fields, **TP2))
    other = rewind(whole, tmp_path / "other", 3)
    rank_pool(4).run(functools.partial(train, checkpoints["qwen2-tied"], other, data, **fields, **PP2))
    expected, found = (metrics(save)[6]["lm_loss"] for save in (whole, other))
    assert found == pytest.approx(expected, rel=1e-4)


def test_flag_of_the_review_alone():
    """A recipe that an older version wrote of another stage says false, and must mean what it meant."""
    for stage in ("1", "full", "blocks"):
        assert StageOptions(stage, train_new_rows=False).resolve() == StageOptions(stage).resolve()
    frozen = StageOptions("2", train_new_rows=False).resolve()
    assert frozen.trains == {ParameterKind.ROUTER} and frozen.new_token_loss_coeff == 0
    assert StageOptions("2", new_token_loss_coeff=0.5, train_new_rows=False).resolve().new_token_loss_coeff == 0.5
