"""A training step of a small model in a rank of a pool: what it sends, and what the plan says of it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_moe_lpr.engine.optimizer import build_optimizer, build_schedule, wrap_data_parallel
from megatron_moe_lpr.engine.options import BatchOptions, OptimizerOptions
from megatron_moe_lpr.engine.step import TrainingState, training_step
from megatron_moe_lpr.model.build import build_model, unwrap
from megatron_moe_lpr.model.configuration.architecture import read_architecture
from megatron_moe_lpr.model.configuration.compute import ComputeOptions
from megatron_moe_lpr.model.configuration.config import ModelShape, transformer_config
from megatron_moe_lpr.model.configuration.fp8 import FP8Options
from megatron_moe_lpr.model.moe.router import LPRRouter
from megatron_moe_lpr.parallel.groups import initialize_parallel
from megatron_moe_lpr.parallel.layout import ParallelLayout
from megatron_moe_lpr.planning.communication import rank_traffic
from megatron_moe_lpr.planning.planned_run import PlannedRun
from megatron_moe_lpr.planning.routing import Routing
from megatron_moe_lpr.planning.sizes import RunSizes
from megatron_moe_lpr.planning.traffic import CPU, GPU, LOCAL_GPU
from megatron_moe_lpr.platform import Platform, select_platform
from megatron_moe_lpr.training.configuration.stages import STAGES, freeze
from tests.planning.traffic import counted

MICRO_BATCH, MICRO_BATCHES = 2, 2
CHOICES = torch.tensor([(0, 1), (0, 2), (0, 1), (1, 2), (3, 1), (0, 4), (2, 1), (0, 1)])
"""The experts of a position, again and again: every rank's part of a sequence has them equally often."""
SHARES = tuple(CHOICES.flatten().bincount().div(len(CHOICES)).tolist())
RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "moe": {"recompute_granularity": "selective", "recompute_modules": ("moe",)},
    "mlp": {"recompute_granularity": "selective", "recompute_modules": ("mlp",)},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A step. Dictionaries are fields of the dataclasses that flags fill."""

    layout: dict[str, Any] = dataclasses.field(default_factory=dict)
    ranks: int = 2
    stage: str = "1"
    experts: tuple[int, ...] = (5, 5)
    """Of each layer."""
    expansions: tuple[tuple[int, ...], ...] = ()
    inserted_blocks: tuple[int, ...] = ()
    new_tokens: tuple[int, ...] = ()
    recompute: str = "none"
    optimizer: dict[str, bool] = dataclasses.field(default_factory=dict)
    bf16: bool = False
    fp8: dict[str, Any] = dataclasses.field(default_factory=dict)
    sequence: int = 32
    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of the dense model's configuration."""

    @property
    def shape(self) -> ModelShape:
        """The model, as the package takes it."""
        fields = {
            "model_type": "qwen2",
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 500,
            "num_hidden_layers": len(self.experts),
            "max_position_embeddings": 1024,
            "tie_word_embeddings": False,
        }
        architecture = read_architecture(fields | self.model)
        blocks = self.inserted_blocks
        return ModelShape(
            architecture,
            self.experts,
            expansions=self.expansions,
            inserted_blocks=blocks,
            new_tokens=self.new_tokens,
        )


def sent_and_planned(case: Case, platform_name: str = "cpu") -> tuple[dict[str, float], dict[str, float]]:
    """On every rank: bytes by kind that its second step sends, and those of the plan."""
    layout = ParallelLayout(**case.layout)
    platform = select_platform(platform_name, layout.tensor_model_parallel_size)
    initialize_parallel(platform, layout)
    options = OptimizerOptions(**case.optimizer).with_platform_defaults(platform)
    if case.bf16:
        options = dataclasses.replace(options, use_distributed_optimizer=True)
    step = _step(case, layout, platform, options)
    # The first one gathers parameters that nothing changed yet.
    step()
    with counted() as sent:
        step()
    return dict(sent), planned(case, layout, options, platform)


def _step(case: Case, layout: ParallelLayout, platform: Platform, options: OptimizerOptions) -> Callable[[], None]:
    losses = {"load_balancing_coeff": 0.01, "lpr_loss_coeff": 0.1, "calculate_per_token_loss": True}
    compute = ComputeOptions(bf16=case.bf16, **RECOMPUTE[case.recompute], fp8=FP8Options(**case.fp8))
    config = transformer_config(case.shape, layout, platform, compute, **losses)
    chunks = build_model(case.shape, config, platform)
    torch.manual_seed(5)
    with torch.no_grad():
        for weight in (weight for chunk in chunks for weight in chunk.parameters()):
            weight.copy_(torch.randn(weight.shape) * 0.02)
    for router in (part for chunk in chunks for part in unwrap(chunk).modules() if isinstance(part, LPRRouter)):
        router.routing = chosen(router.routing)
    freeze(chunks, STAGES[case.stage], case.inserted_blocks, len(case.new_tokens))
    chunks = wrap_data_parallel(chunks, config, options)
    optimizer = build_optimizer(chunks, config, options, platform)
    state = TrainingState(chunks, optimizer, build_schedule(optimizer, options, BatchOptions(train_iters=100)))
    language_group = torch.tensor([0, -1, -1]).to(platform.device)

    def step() -> None:
        batches = [_batch(case.sequence, platform.device) for _ in range(MICRO_BATCHES)]
        assert training_step(state, batches, language_group, global_batch_size=1).agreed.not_finite is None

    return step


def chosen(route: Callable[..., Any], choices: torch.Tensor = CHOICES) -> Callable[..., Any]:
    """A router's `routing` over logits in which the experts of a position stand far above the others."""

    def routing(logits: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        rows = logits.view(-1, logits.shape[-1])
        positions = torch.arange(len(rows), device=logits.device) // MICRO_BATCH
        experts = choices.to(logits.device)[positions % len(choices)]
        lowered = torch.full_like(rows, -1e4).scatter(-1, experts, 0.0)
        return route(logits + lowered.view(logits.shape), *arguments, **options)

    return routing


def _batch(sequence: int, device: torch.device) -> dict[str, torch.Tensor]:
    shape = (MICRO_BATCH, sequence)
    tokens = torch.randint(0, 500, shape, device=device)
    return {
        "tokens": tokens,
        "labels": tokens,
        "loss_mask": torch.ones(shape, device=device),
        "position_ids": torch.arange(sequence, device=device).expand(shape),
        "language": torch.tensor([0, 1], device=device)[:, None].expand(shape).contiguous(),
    }


def planned(case: Case, layout: ParallelLayout, options: OptimizerOptions, platform: Platform) -> dict[str, float]:
    """By kind; control beside it."""
    ranks = dist.get_world_size()
    sizes = RunSizes(
        STAGES[case.stage].trains,
        ranks,
        case.sequence,
        MICRO_BATCH,
        MICRO_BATCHES * MICRO_BATCH * layout.data_parallel_size(ranks),
        precision=("fp8" if case.fp8 else "bf16") if case.bf16 else "fp32",
        distributed_optimizer=options.use_distributed_optimizer,
        fp8_recipe=case.fp8.get("fp8_recipe", "delayed"),
        fp8_param_gather=case.fp8.get("fp8_param_gather", False),
    )
    on_gpu = GPU if platform.transformer_engine else LOCAL_GPU
    behaviour = on_gpu if platform.name == "cuda" else CPU
    traffic = rank_traffic(
        PlannedRun(case.shape, layout, sizes, case.recompute),
        Routing((SHARES,)),
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_expert_model_parallel_rank(),
        behaviour=dataclasses.replace(behaviour, overlap_param_gather=options.overlap_param_gather),
    )
    kinds = dataclasses.asdict(traffic) | {"control": _control(case, layout, options.use_distributed_optimizer)}
    return {kind: size for kind, size in kinds.items() if size}


def _control(case: Case, layout: ParallelLayout, distributed: bool) -> float:
    """All-reduces, in the order of a step: tokens of the step, tokens that gradients are divided by (which the last
    stage sends to the others first), what all ranks agree on (two languages' losses and tokens, two flags), norms."""

    def reduced(number_of_ranks: int) -> float:
        return 2 * (number_of_ranks - 1) / number_of_ranks

    ranks, stages = dist.get_world_size(), layout.pipeline_model_parallel_size
    data = layout.data_parallel_size(ranks)
    total = 3 * 8 * reduced(data) + 4 * reduced(data * layout.context_parallel_size) + (2 * 2 + 2) * 8 * reduced(ranks)
    total += 4 * (stages - 1) * parallel_state.is_pipeline_last_stage(ignore_virtual=True)
    if distributed:
        return total + 4 * reduced(ranks)
    total += 4 * reduced(layout.model_parallel_size)
    if "new experts" in STAGES[case.stage].trains and case.shape.num_moe_layers:
        experts = layout.expert_model_parallel_size * layout.expert_tensor_parallel_size * stages
        total += 4 * reduced(experts)
    return total
