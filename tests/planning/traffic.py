"""What ranks really send in a training step: every call of a process group, counted below torch.distributed.

The bytes of a call are those that a rank hands to others, each piece once for every rank that needs it: of a gather its
own piece for all others, of a reduction all pieces but its own, of an all-reduce both. NCCL's rings and gloo's send as
many. A broadcast counts on its source, a reduction to one rank on the others.
"""

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_moe_lpr.evaluation.global_batch import run_schedule
from megatron_moe_lpr.evaluation.routing import collect_routing, reset_routing
from megatron_moe_lpr.model.architecture import read_architecture
from megatron_moe_lpr.model.build import build_model
from megatron_moe_lpr.model.config import ModelShape, transformer_config
from megatron_moe_lpr.parallel.groups import initialize_parallel
from megatron_moe_lpr.parallel.layout import ParallelLayout
from megatron_moe_lpr.platform import select_platform
from megatron_moe_lpr.training.config import GuardOptions, OptimizerOptions, PrecisionOptions
from megatron_moe_lpr.training.finite_steps import FiniteSteps
from megatron_moe_lpr.training.optimizer import build_optimizer, wrap_data_parallel
from megatron_moe_lpr.training.stages import STAGES, freeze

Call = tuple[str, str, torch.dtype, int]
"""Group, operation, dtype and elements."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A step of a small random model."""

    layout: dict[str, Any] = dataclasses.field(default_factory=dict)
    ranks: int = 2
    stage: str = "1"
    experts: tuple[int, ...] = (5, 5)
    """Of each layer."""
    bf16: bool = False
    recompute: dict[str, Any] = dataclasses.field(default_factory=dict)
    optimizer: dict[str, Any] = dataclasses.field(default_factory=dict)
    tied: bool = False
    dispatcher: str = "alltoall"

    @property
    def shape(self) -> ModelShape:
        fields = {
            "model_type": "qwen2",
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 500,
            "num_hidden_layers": len(self.experts),
            "max_position_embeddings": 256,
            "tie_word_embeddings": self.tied,
        }
        return ModelShape(read_architecture(fields), self.experts)


SEQUENCE, MICRO_BATCH, MICRO_BATCHES = 32, 2, 2


@contextlib.contextmanager
def counted() -> Iterator[Counter]:
    """Bytes that this rank sends in the block, by call."""
    sent: Counter = Counter()
    names = {name: _METHODS[name] for name in _METHODS}
    kept = {name: vars(dist.ProcessGroup)[name] for name in names}
    originals = {name: getattr(dist.ProcessGroup, name) for name in names}

    def wrap(name: str) -> Callable:
        def call(group: dist.ProcessGroup, *arguments: Any, **options: Any) -> Any:
            for tensor, number in _METHODS[name](group, *arguments, **options):
                if number:
                    sent[_name_of(group), name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)] += number
            return originals[name](group, *arguments, **options)

        return call

    for name in names:
        setattr(dist.ProcessGroup, name, wrap(name))
    try:
        yield sent
    finally:
        for name, original in kept.items():
            setattr(dist.ProcessGroup, name, original)


def _all_reduce(group, tensors, *_, **__):
    return [(tensor, 2 * tensor.nbytes * (group.size() - 1) / group.size()) for tensor in tensors]


def _all_gather(group, outputs, inputs, *_, **__):
    return [(tensor, tensor.nbytes * (group.size() - 1)) for tensor in inputs]


def _all_gather_base(group, output, tensor, *_, **__):
    return [(tensor, tensor.nbytes * (group.size() - 1))]


def _reduce_scatter(group, outputs, inputs, *_, **__):
    return [
        (piece, piece.nbytes)
        for pieces in inputs
        for rank, piece in enumerate(pieces)
        if rank != group.rank()
    ]


def _reduce_scatter_base(group, output, tensor, *_, **__):
    return [(tensor, tensor.nbytes - output.nbytes)]


def _reduce_scatter_bases(group, outputs, inputs, *_, **__):
    return [(tensor, tensor.nbytes - output.nbytes) for output, tensor in zip(outputs, inputs, strict=True)]


def _all_to_all(group, output, tensor, output_splits, input_splits, *_, **__):
    own = int(input_splits[group.rank()]) if len(input_splits) else len(tensor) // group.size()
    return [(tensor, (len(tensor) - own) * tensor[:1].nbytes)]


def _broadcast(group, tensors, options, *_, **__):
    is_source = options.rootRank == group.rank()
    return [(tensor, tensor.nbytes * (group.size() - 1) * is_source) for tensor in tensors]


def _reduce(group, tensors, options, *_, **__):
    return [(tensor, tensor.nbytes * (options.rootRank != group.rank())) for tensor in tensors]


def _send(group, tensors, *_, **__):
    return [(tensor, tensor.nbytes) for tensor in tensors]


def _refused(group, *_, **__):
    raise AssertionError("a call that is not counted")


_METHODS: dict[str, Callable] = {
    "allreduce": _all_reduce,
    "allreduce_coalesced": _all_reduce,
    "allgather": _all_gather,
    "_allgather_base": _all_gather_base,
    "allgather_into_tensor_coalesced": _all_gather,
    "_reduce_scatter_base": _reduce_scatter_base,
    "reduce_scatter_tensor_coalesced": _reduce_scatter_bases,
    "reduce_scatter": _reduce_scatter,
    "all_gather_single": _all_gather_base,
    "all_gather_single_coalesced": _all_gather,
    "reduce_scatter_single": _reduce_scatter_base,
    "reduce_scatter_single_coalesced": _reduce_scatter_bases,
    "all_to_all_single": _all_to_all,
    "alltoall_base": _all_to_all,
    "broadcast": _broadcast,
    "reduce": _reduce,
    "send": _send,
    **dict.fromkeys(
        (
            "alltoall",
            "gather",
            "scatter",
            "allgather_coalesced",
        ),
        _refused,
    ),
}


def _name_of(group: dist.ProcessGroup) -> str:
    for name in (
        "tensor_model_parallel_group",
        "expert_model_parallel_group",
        "expert_tensor_parallel_group",
        "expert_tensor_and_model_parallel_group",
        "data_parallel_group",
        "data_parallel_group_with_cp",
        "expert_data_parallel_group",
        "pipeline_model_parallel_group",
        "embedding_group",
        "tensor_and_context_parallel_group",
        "model_parallel_group",
        "expert_tensor_model_pipeline_parallel_group",
        "intra_distributed_optimizer_instance_group",
    ):
        short = "_" + name.upper()
        candidates = {
            "data_parallel_group_with_cp": "_DATA_PARALLEL_GROUP_WITH_CP",
        }
        found = getattr(parallel_state, candidates.get(name, short), None)
        if found is group:
            return name.replace("_parallel_group", "").replace("_model", "")
    if group is dist.group.WORLD:
        return "world"
    return f"? {dist.get_process_group_ranks(group)} {group.group_desc}"


def traffic(case: Case, platform_name: str = "cpu"):
    from tests.gpu.compute import route_by_position
    layout = ParallelLayout(**case.layout)
    platform = select_platform(platform_name, layout.tensor_model_parallel_size)
    initialize_parallel(platform, layout)
    precision = PrecisionOptions(
        bf16=case.bf16, fp32=not case.bf16, moe_token_dispatcher_type=case.dispatcher, **case.recompute
    )
    losses = {"load_balancing_coeff": 0.01, "lpr_loss_coeff": 0.1, "calculate_per_token_loss": True}
    config = transformer_config(case.shape, layout, platform, precision.compute_options("float32"), **losses)
    chunks = build_model(case.shape, config, platform)
    torch.manual_seed(5)
    with torch.no_grad():
        for weight in (weight for chunk in chunks for weight in chunk.parameters()):
            weight.copy_(torch.randn(weight.shape) * 0.02)
    route_by_position(chunks, SEQUENCE)
    freeze(chunks, STAGES[case.stage])
    settings = OptimizerOptions(**case.optimizer)
    if case.bf16:
        settings = dataclasses.replace(settings, use_distributed_optimizer=True)
    chunks = wrap_data_parallel(chunks, config, settings)
    optimizer = build_optimizer(chunks, config, settings, platform)
    steps = FiniteSteps(chunks, optimizer, GuardOptions())
    batches = [_batch(platform.device) for _ in range(MICRO_BATCHES)]
    table = torch.tensor([True, False, False]).to(platform.device)

    def step():
        for chunk in chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        run_schedule(chunks, config, batches, table)
        assert steps.step()

    step()
    with counted() as sent:
        step()
    return dict(sent)


def _batch(device: torch.device) -> dict[str, torch.Tensor]:
    shape = (MICRO_BATCH, SEQUENCE)
    tokens = torch.randint(0, 500, shape, device=device)
    positions = torch.arange(SEQUENCE, device=device).expand(shape)
    languages = torch.tensor([0, 1], device=device)[:, None].expand(shape).contiguous()
    return {
        "tokens": tokens,
        "labels": tokens,
        "loss_mask": torch.ones(shape, device=device),
        "position_ids": positions,
        "language": languages,
    }
