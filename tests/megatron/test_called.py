"""What replaces Megatron's code is what Megatron calls: a run of every kind, watched call by call."""

import functools
import inspect
import sys
from pathlib import Path
from types import CodeType, FrameType

import pytest

from megatron_moe_lpr.megatron.overriding import REPLACEMENTS
from megatron_moe_lpr.megatron.versions import has_common_strategies
from tests.distributed import rank_pool
from tests.training.new_rows import extend_checkpoint
from tests.training.runs import make_checkpoint, make_data, train

LIBRARIES = ("/megatron/core/", "/torch/")

SAVER = "megatron_moe_lpr.checkpoint.saving."
ELSEWHERE = {
    "megatron.core.dist_checkpointing.mapping.ShardedTensor.init_data": "where data-parallel ranks read for each other",
    "megatron.core.optimizer.SGD": "never asked for; there so that no other optimizer library is",
    "megatron.core.optimizer.distrib_optimizer.Adam": "compared with, never made",
    "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer._set_main_param_and_optimizer_states": (
        "for states in Megatron's own formats"
    ),
    "megatron.core.optimizer.optimizer.multi_tensor_applier": "for fp16, and gradients in bf16",
    "megatron.core.optimizer.optimizer.multi_tensor_scale_impl": "the same",
    "megatron.core.transformer.mlp.bias_swiglu_impl": "for dense layers, and the original expert with TP",
    "megatron_moe_lpr.model.moe.expert_groups.ExpertGroups.forward": "after a second expansion",
    "megatron_moe_lpr.model.transformer.all_heads_attention.AllHeadsAttention.get_query_key_value_tensors": (
        "in families that normalise all heads together"
    ),
    "megatron_moe_lpr.model.transformer.parallel_layer.ParallelLayer.forward": "in families with a parallel block",
    "megatron_moe_lpr.model.gpt.MoELPRModel.sharded_state_dict": "called by sharded_model_state",
    "megatron_moe_lpr.model.moe.router.LPRRouter.gating": "called by this router's own forward",
    f"{SAVER}background.BackgroundWriter.close": "called by CheckpointSaver.close",
    f"{SAVER}background.BackgroundWriter.__del__": "called by the interpreter",
    f"{SAVER}saver.CallsQueue.schedule_async_request": "called by CheckpointSaver.start",
}
"""Replacements that these runs do not reach, and why."""
if has_common_strategies():
    LOADING = "megatron_moe_lpr.checkpoint.loading.distributed_loading."
    ELSEWHERE[f"{LOADING}_common_strategy.<locals>.CommonStrategy.load_sharded_objects"] = (
        "for checkpoints in an old format, which it refuses"
    )


def code_of(replacement: object) -> CodeType | None:
    """The code that runs when Megatron calls a replacement; None: it is a value, or a function of torch's own."""
    while isinstance(replacement, functools.partial):
        replacement = replacement.func
    if inspect.isclass(replacement):
        replacement = vars(replacement).get("__init__")
    return getattr(replacement, "__code__", None)


def watched(action) -> list[str]:
    """On a rank: what of `REPLACEMENTS` was called by Megatron or torch while `action` ran."""
    called: set[CodeType] = set()

    def watch(frame: FrameType, event: str, argument: object) -> None:
        caller = frame.f_back.f_code.co_filename if event == "call" and frame.f_back else ""
        if any(part in caller for part in LIBRARIES):
            called.add(frame.f_code)

    sys.setprofile(watch)
    try:
        action()
    finally:
        sys.setprofile(None)
    return [name for name, replacement in REPLACEMENTS.items() if code_of(replacement) in called]


def train_twice(load: Path, save: Path, data: dict[str, str]) -> None:
    """Save in the background, resume from that, evaluate nothing."""
    common = {"bf16": True, "fp32": False, "expert_model_parallel_size": 2, "use_distributed_optimizer": True}
    recompute = {"recompute_granularity": "selective", "recompute_modules": ("moe_act", "layernorm")}
    for iterations in (2, 3):
        train(
            load,
            save,
            data,
            train_iters=iterations,
            save_interval=1,
            accept_changes=["train-iters"],
            **common,
            **recompute,
        )


def names_called(load: Path, save: Path, data: dict[str, str]) -> tuple[list[str], list[str]]:
    """On a rank: what was called, and all that has code."""
    called = watched(functools.partial(train_twice, load, save, data))
    return called, [name for name, replacement in REPLACEMENTS.items() if code_of(replacement)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("called")
    checkpoint = make_checkpoint(root)
    extend_checkpoint(checkpoint, (7,))  # what looks up and computes with new rows of the vocabulary runs too
    return rank_pool(2).run(names_called, checkpoint, root / "run", make_data(root))


def test_every_replacement_is_the_one_that_is_called(runs):
    called = {name for rank in runs for name in rank[0]}
    there = {name for rank in runs for name in rank[1] if name.startswith(("megatron.", "megatron_moe_lpr."))}
    assert not there - called - ELSEWHERE.keys(), sorted(there - called - ELSEWHERE.keys())


def test_the_exceptions_are_replacements(runs):
    there = {name for rank in runs for name in rank[0] + rank[1]} | set(REPLACEMENTS)
    assert not ELSEWHERE.keys() - there
