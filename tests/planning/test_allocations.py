"""The plan's weights, gradients and optimizer state against what a rank really allocates."""

import dataclasses
import shutil

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_moe_lpr.checkpoint.format.directory import resolve_checkpoint
from megatron_moe_lpr.checkpoint.loading.model import load_model, model_shape
from megatron_moe_lpr.conversion.import_options import ImportOptions
from megatron_moe_lpr.conversion.importer import import_hf
from megatron_moe_lpr.engine.optimizer import build_optimizer, wrap_data_parallel
from megatron_moe_lpr.engine.options import OptimizerOptions
from megatron_moe_lpr.engine.state_options import OptimizerStateOptions
from megatron_moe_lpr.model.configuration.compute import ComputeOptions
from megatron_moe_lpr.parallel.groups import initialize_parallel
from megatron_moe_lpr.parallel.layout import ParallelLayout
from megatron_moe_lpr.planning.memory import placeholder_bytes, rank_memory
from megatron_moe_lpr.planning.planned_run import PlannedRun
from megatron_moe_lpr.planning.sizes import RunSizes
from megatron_moe_lpr.platform import PlatformName, select_platform
from megatron_moe_lpr.training.configuration.stages import STAGES, freeze
from tests.conversion.tiny_models import COMMON, MIXTURES
from tests.distributed import rank_pool
from tests.launching.builders import prepare_inputs
from tests.training.new_rows import extend_checkpoint

LARGEST_ERROR, PADDING = 0.006, 512
"""Of each part, and the bytes by which Megatron pads small buffers, so that they split over the ranks."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A layout on two ranks."""

    layout: dict
    stage: str = "1"
    dtype: str = "bfloat16"
    distributed: bool = True
    new_tokens: bool = False
    base: str = ""
    """A mixture as base model, by the name of its checkpoint; empty: a dense one."""
    states: OptimizerStateOptions = dataclasses.field(default_factory=OptimizerStateOptions)


CASES = [
    Case({}),
    Case({}, distributed=False),
    Case({}, dtype="float32"),
    Case({}, stage="2"),
    Case({}, stage="full"),
    Case({"tensor_model_parallel_size": 2}),
    Case({"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 2}),
    Case({"expert_model_parallel_size": 2}),
    Case({"pipeline_model_parallel_size": 2}),
    Case({"pipeline_model_parallel_size": 2}, stage="full"),
    Case({}, stage="blocks"),
    Case({"tensor_model_parallel_size": 2}, stage="blocks"),
    Case({"pipeline_model_parallel_size": 2}, stage="blocks"),
    Case({"tensor_model_parallel_size": 2}, new_tokens=True),
    Case({"pipeline_model_parallel_size": 2}, new_tokens=True),
    Case({}, stage="2", new_tokens=True),
    *(Case({}, stage=stage, base="qwen2_moe") for stage in ("1", "2", "full")),
    Case({}, dtype="float32", base="qwen2_moe"),
    Case({"tensor_model_parallel_size": 2}, base="qwen2_moe"),
    Case({"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 2}, base="qwen2_moe"),
    Case({"expert_model_parallel_size": 2}, base="qwen2_moe"),
    Case({"expert_model_parallel_size": 2}, stage="full", base="olmoe"),
    Case({"pipeline_model_parallel_size": 2}, base="olmoe"),
]


def allocated(path, case: Case, platform_name: PlatformName = "cpu") -> dict[str, int]:
    """On every rank: bytes of parameters, gradient buffers and, after a step, optimizer state."""
    platform, layout = select_platform(platform_name), ParallelLayout(**case.layout)
    initialize_parallel(platform, layout)
    options = ComputeOptions().with_dtype(getattr(torch, case.dtype))
    model = load_model(path, layout, platform, options, calculate_per_token_loss=True)
    freeze(model.chunks, STAGES[case.stage], model.shape.inserted_blocks, len(model.shape.new_tokens))
    settings = OptimizerOptions(use_distributed_optimizer=case.distributed, states=case.states)
    chunks = wrap_data_parallel(model.chunks, model.config, settings)
    optimizer = build_optimizer(chunks, model.config, settings, platform)
    weights = sum(weight.nbytes for weight in chunks[0].parameters())
    buffers = chunks[0].buffers + chunks[0].expert_parallel_buffers
    gradients = sum(buffer.grad_data.nbytes for buffer in buffers)
    optimizer.step()
    return {"weights": weights, "gradients": gradients, "optimizer": optimizer_state(optimizer, chunks[0])}


def optimizer_state(optimizer, model) -> int:
    """Bytes of AdamW's moments and of the copies that it updates, other than the model's own weights."""
    own = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    held = {}
    for part in (part.optimizer for part in optimizer.chained_optimizers if part.optimizer is not None):
        for weight in (weight for group in part.param_groups for weight in group["params"]):
            for tensor in (weight, *filter(torch.is_tensor, part.state[weight].values())):
                if tensor.numel() > 1 and tensor.untyped_storage().data_ptr() not in own:
                    held[tensor.data_ptr()] = tensor.nbytes
    return sum(held.values())


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A converted tiny model, upcycled and with inserted blocks."""
    root = prepare_inputs(tmp_path_factory.mktemp("inputs"))
    # Hidden size 64: Megatron pads every gradient to a multiple of 64.
    config = AutoConfig.for_model("llama", **COMMON | {"hidden_size": 64, "num_hidden_layers": 2})
    AutoModelForCausalLM.from_config(config).save_pretrained(root / "wider")
    import_hf(ImportOptions(hf=root / "wider", expand_blocks=2), root / "grown")
    import_hf(ImportOptions(hf=root / "wider", num_experts=5), root / "extended")
    extend_checkpoint(root / "extended", (90, 60))
    for name in ("qwen2_moe", "olmoe"):
        model_type, fields = MIXTURES[name]
        config = AutoConfig.for_model(model_type, **COMMON | fields | {"hidden_size": 64})
        AutoModelForCausalLM.from_config(config).save_pretrained(root / "mixture")
        import_hf(ImportOptions(hf=root / "mixture", add_experts="2,0,4,2"), root / name)
        shutil.rmtree(root / "mixture")
    return root


@pytest.mark.parametrize("case", CASES, ids=str)
def test_allocations(checkpoints, case):
    name = case.base or ("extended" if case.new_tokens else "grown" if case.stage == "blocks" else "moe")
    checkpoint = checkpoints / name
    shape, layout = model_shape(resolve_checkpoint(checkpoint)), ParallelLayout(**case.layout)
    precision = "bf16" if case.dtype == "bfloat16" else "fp32"
    sizes = RunSizes(STAGES[case.stage].trains, 2, precision=precision, distributed_optimizer=case.distributed)
    for rank, real in enumerate(rank_pool(2).run(allocated, checkpoint, case)):
        pipeline_rank = rank if layout.pipeline_model_parallel_size > 1 else 0
        run = PlannedRun(shape, layout, sizes)
        planned = rank_memory(run, pipeline_rank)
        # Transformer Engine's, which the CPU lacks; tests/gpu/test_memory.py compares them.
        planned = dataclasses.replace(planned, gradients=planned.gradients - placeholder_bytes(run, pipeline_rank))
        for part, size in real.items():
            plan = getattr(planned, part)
            print(f"{part}: planned {plan:,.0f}, real {size:,}, error {plan / size - 1:.2%}")
            assert abs(plan - size) <= max(LARGEST_ERROR * size, PADDING), (
                f"rank {rank}, {part}: {plan:,}, real {size:,}"
            )
