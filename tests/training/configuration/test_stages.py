"""Stages: what trains, what stays, which data they take."""

import functools
import typing

import pytest
import torch

from megatron_moe_lpr.checkpoint.loading.model import load_model
from megatron_moe_lpr.commands import plan
from megatron_moe_lpr.engine.optimizer import build_optimizer, wrap_data_parallel
from megatron_moe_lpr.engine.options import OptimizerOptions
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.model.configuration.parameter_kinds import ParameterKind, kind_of
from megatron_moe_lpr.parallel.groups import initialize_parallel
from megatron_moe_lpr.parallel.layout import ParallelLayout
from megatron_moe_lpr.platform import select_platform
from megatron_moe_lpr.training.configuration.stages import STAGES, StageName, freeze
from megatron_moe_lpr.training.setup import prepare
from tests.conversion.helpers import checkpoint_tensors
from tests.distributed import rank_pool
from tests.training.runs import make_checkpoint, make_data, metrics, train, training_config

TP2 = {"tensor_model_parallel_size": 2}
EP2 = {"expert_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
DISTRIBUTED = {"use_distributed_optimizer": True}
FULL = {"recompute_granularity": "full"}
LAYOUTS = {
    "one process": (1, {}),
    "TP2xEP2, distributed optimizer": (2, TP2 | EP2 | DISTRIBUTED),
    "PP2, recompute full": (2, PP2 | FULL),
    "EP2xPP2": (4, EP2 | PP2),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("stages")
    return make_checkpoint(root), make_data(root)


def test_the_plan_knows_every_stage():
    names = typing.get_args(StageName)
    assert tuple(STAGES) == names == typing.get_args(typing.get_type_hints(plan.Flags)["stage"])
    assert all(stage.name == name for name, stage in STAGES.items())


def test_every_parameter_has_a_kind(inputs):
    kinds = {kind_of(key) for key in checkpoint_tensors(inputs[0])}
    rows = {"new vocabulary rows", "earlier vocabulary rows"}
    mixtures = {"base experts", "base router rows", "shared expert"}
    assert kinds == set(ParameterKind) - {"dense FFN", "earlier experts", "inserted blocks"} - rows - mixtures
    with pytest.raises(ValueError, match="no kind"):
        kind_of("decoder.layers.0.surprise.weight")


@pytest.mark.parametrize("stage", ["1", "2"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_frozen_stays_bit_identical_over_20_steps(name, stage, inputs, tmp_path):
    world, changes = LAYOUTS[name]
    save = tmp_path / "run"
    job = functools.partial(
        train, inputs[0], save, inputs[1], stage, train_iters=20, seq_length=16, weight_decay=0.1, **changes
    )
    rank_pool(world).run(job)
    before, after = checkpoint_tensors(inputs[0]), checkpoint_tensors(save)
    for key, tensor in before.items():
        same = torch.equal(tensor, after[key][: len(tensor)])
        assert same == (kind_of(key) not in STAGES[stage].trains), key
    losses = [record["lm_loss"] for record in metrics(save).values()]
    assert len(losses) == 20


def count_bytes(path, stage: str) -> dict[str, int]:
    """Bytes of parameters, gradient buffers and optimizer state of a built model, after one step."""
    platform, layout = select_platform("cpu"), ParallelLayout()
    initialize_parallel(platform, layout)
    model = load_model(path, layout, platform)
    freeze(model.chunks, STAGES[stage])
    chunks = wrap_data_parallel(model.chunks, model.config, OptimizerOptions())
    optimizer = build_optimizer(chunks, model.config, OptimizerOptions(), platform)
    for parameter in chunks[0].parameters():
        if parameter.requires_grad:
            parameter.main_grad.fill_(1.0)
    optimizer.step()
    buffers = [buffer for chunk in chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    states = [
        state
        for part in getattr(optimizer, "chained_optimizers", [optimizer])
        for parameter_state in part.optimizer.state.values()
        for name, state in parameter_state.items()
        if name != "step"
    ]
    trainable = [parameter.numel() for parameter in chunks[0].parameters() if parameter.requires_grad]
    return {
        "trainable": 4 * sum(trainable),
        "gradients": sum(4 * buffer.numel_unpadded for buffer in buffers),
        "optimizer": sum(4 * state.numel() for state in states),
        "stray": sum(parameter.grad is not None for parameter in chunks[0].parameters()),
    }


@pytest.mark.parametrize("stage", ["1", "2", "full"])
def test_no_memory_for_what_is_frozen(stage, inputs):
    """A gradient and two moments for each trainable parameter, nothing for any other."""
    found = rank_pool(1).run(count_bytes, inputs[0], stage)[0]
    expected = sum(
        tensor.numel() for key, tensor in checkpoint_tensors(inputs[0]).items() if kind_of(key) in STAGES[stage].trains
    )
    padding = (128 - 99) * 32 if stage == "full" else 0  # rows of the padded vocabulary
    assert found["trainable"] == 4 * (expected + padding)
    assert found["gradients"] == found["trainable"]
    assert found["optimizer"] == 2 * found["trainable"]


def count_products(path, stage: str) -> tuple[int, list[int]]:
    """Floating-point operations of forward and backward, counted by torch, and each layer's rows of expert 0."""
    from torch.utils.flop_counter import FlopCounterMode

    from megatron_moe_lpr.model.moe.moe_layer import MoELPRLayer
    from tests.training.one_step import StepCase, run_step

    rows = [0] * 4
    count = MoELPRLayer._original_expert_output

    def counting(layer, tokens, weights, largest):
        rows[layer.layer_number - 1] += len(tokens)
        return count(layer, tokens, weights, largest)

    MoELPRLayer._original_expert_output = counting
    try:
        with FlopCounterMode(display=False) as counter:
            run_step(path, StepCase(stage=stage))
    finally:
        MoELPRLayer._original_expert_output = count
    return counter.get_total_flops(), rows


def test_gradients_that_nothing_needs_are_not_computed(inputs):
    """Each matrix product in a step: forward 1, input gradient 1, weight gradient 1 where it trains. In stages 1 and 2
    no input gradient below the first router, and of the first layer's experts only that of the down projection,
    before which the routing weights are multiplied."""
    found = {stage: rank_pool(1).run(count_products, inputs[0], stage)[0] for stage in ("1", "2", "full")}
    counted, original = {stage: total for stage, (total, _) in found.items()}, found["1"][1]
    tokens, hidden, ffn, head = 8 * 32, 32, 48, 8
    new = [2 * tokens - rows for rows in original]  # two experts a token
    row = 2 * 3 * hidden * ffn
    assert all(0 < rows < 2 * tokens for rows in original)
    assert counted["1"] - counted["2"] == row * sum(new)
    attention = 2 * tokens * hidden * (2 * 4 * head + 2 * 2 * head)
    frozen_weights = 4 * attention + 2 * tokens * 128 * hidden + row * sum(original)
    router = 2 * tokens * hidden * 5
    first_layer = attention + router + row * (original[0] + new[0]) * 2 / 3
    assert counted["full"] - counted["1"] == frozen_weights + first_layer


@pytest.mark.parametrize(
    ("stage", "changes", "words"),
    [
        ("1", {"data_path": "en"}, "en is original; leave it out, or pass --allow-original-languages"),
        ("1", {"data_path": "en", "original_languages": ["EN,es"]}, "en is original"),
        ("1", {"data_path": "en", "original_languages": ["English", "zh_CN"]}, "en is original"),
        ("1", {"data_path": "en", "original_languages": ["en-US"]}, "en is original"),
        ("1", {"data_path": "en", "original_languages": ["Englsh"]}, "write en if you mean en .English."),
        ("2", {"original_languages": []}, "--original-languages: stage 2 replays original languages"),
        ("2", {"data_path": "en"}, "wants text of expanded languages"),
        ("1", {"seq_length": 512}, "--seq-length 512: the model has only 256 positions"),
        ("1", {"global_batch_size": 7}, "--global-batch-size 7 is not a multiple"),
        ("1", {"train_iters": 0}, "--train-iters 0: must be at least 1"),
        ("1", {"pipeline_model_parallel_size": 3}, "3 does not divide 4 layers"),
        ("2", {"train_embeddings": True}, "--train-embeddings is for --stage 1 and sft only"),
        ("1", {"bf16": True}, "--bf16 and --fp32: give one of them"),
        ("1", {"data_path": "nowhere"}, "nowhere"),
    ],
)
def test_bad_input_is_refused_before_building(stage, changes, words, inputs, tmp_path, cpu_platform):
    checkpoint, data = inputs
    if "data_path" in changes:
        changes = changes | {"data_path": [data.get(changes["data_path"], changes["data_path"])]}
    with pytest.raises(UserError, match=words):
        prepare(training_config(checkpoint, tmp_path / "run", data, stage, **changes))
    assert not (tmp_path / "run").exists()


def test_stage_2_from_a_dense_checkpoint(inputs, tmp_path, cpu_platform):
    dense = make_checkpoint(tmp_path, experts=1)
    with pytest.raises(UserError, match="needs experts and the checkpoint is dense"):
        prepare(training_config(dense, tmp_path / "run", inputs[1], "2"))


def test_another_runs_directory_is_refused(inputs, tmp_path, cpu_platform):
    checkpoint, data = inputs
    rank_pool(1).run(functools.partial(train, checkpoint, tmp_path / "run", data, "1"))
    with pytest.raises(UserError, match="holds a checkpoint of another run"):
        prepare(training_config(checkpoint, tmp_path / "run", data, "2"))
    with pytest.raises(UserError, match="holds a checkpoint of another run"):
        prepare(training_config(checkpoint, checkpoint, data, "1"))


def test_embeddings_may_train_in_stage_1(inputs, tmp_path):
    rank_pool(1).run(functools.partial(train, *inputs[:1], tmp_path / "run", inputs[1], "1", train_embeddings=True))
    before, after = checkpoint_tensors(inputs[0]), checkpoint_tensors(tmp_path / "run")
    key = "embedding.word_embeddings.weight"
    assert not torch.equal(before[key], after[key][:99])


def test_dense_model_trains_fully(tmp_path, inputs):
    dense = make_checkpoint(tmp_path, experts=1)
    rank_pool(1).run(functools.partial(train, dense, tmp_path / "run", inputs[1], "full", train_iters=10))
    losses = [record["lm_loss"] for record in metrics(tmp_path / "run").values()]
    assert losses[-1] < losses[0]
