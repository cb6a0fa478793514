"""One optimizer step at any layout, with its losses and all its gradients gathered under checkpoint keys."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, apply_factories

from megatron_moe_lpr.checkpoint.loading.model import load_model
from megatron_moe_lpr.checkpoint.loading.model_state import sharded_model_state
from megatron_moe_lpr.engine.gradient_watch import GradientWatch
from megatron_moe_lpr.engine.micro_batches import run_schedule
from megatron_moe_lpr.engine.optimizer import build_optimizer, wrap_data_parallel
from megatron_moe_lpr.engine.options import OptimizerOptions
from megatron_moe_lpr.engine.routing import collect_routing, reset_routing
from megatron_moe_lpr.model.build import unwrap
from megatron_moe_lpr.model.configuration.compute import ComputeOptions
from megatron_moe_lpr.model.configuration.parameter_kinds import EXTENSION_ROWS, kind_of
from megatron_moe_lpr.model.tensors import is_vocabulary_key
from megatron_moe_lpr.parallel.groups import initialize_parallel
from megatron_moe_lpr.parallel.layout import ParallelLayout
from megatron_moe_lpr.platform import select_platform
from megatron_moe_lpr.training.configuration.stages import StageOptions, freeze

SEQUENCE, SAMPLES, VOCABULARY = 32, 8, 99
LANGUAGE_GROUP = torch.tensor([0, -1, -1, -1])  # three languages, the first original; padding


@dataclasses.dataclass(frozen=True)
class StepCase:
    """How to compute the step."""

    layout: dict = dataclasses.field(default_factory=dict)
    stage: str = "1"
    train_embeddings: bool = False
    train_new_rows: bool = True
    train_base_router: bool = False
    micro_batch_size: int = 2
    load_balancing_coeff: float = 0.3
    lpr_loss_coeff: float = 0.5
    new_token_loss_coeff: float = 0.0
    recompute: dict = dataclasses.field(default_factory=dict)
    optimizer: dict = dataclasses.field(default_factory=dict)
    dispatcher: str = "alltoall"
    overlap: bool = False


@dataclasses.dataclass
class StepResult:
    """What came out."""

    loss: float
    lpr: float
    load_balancing: float
    grad_norm: float
    """As the optimizer computes it, to clip by."""
    gradients: dict[str, torch.Tensor]

    def norm(self, kind: str) -> float:
        """Norm of the gradients of one kind of parameter."""
        chosen = [gradient for key, gradient in self.gradients.items() if kind_of(key) == kind]
        return torch.cat([gradient.flatten() for gradient in chosen]).double().norm().item()


def samples(vocabulary: int = VOCABULARY) -> dict[str, torch.Tensor]:
    """The global batch: every sample of one language, some ending in padding, some tokens without loss."""
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(0, vocabulary, (SAMPLES, SEQUENCE + 1), generator=generator)
    language = torch.tensor([0, 1, 2, 0, 1, 0, 2, 2])[:, None].expand(-1, SEQUENCE).clone()
    language[2, 20:] = -1
    language[5, 27:] = -1
    loss_mask = (torch.rand(SAMPLES, SEQUENCE, generator=generator) < 0.9).float() * (language >= 0)
    positions = torch.arange(SEQUENCE).expand(SAMPLES, -1)
    return {
        "tokens": tokens[:, :-1],
        "labels": tokens[:, 1:],
        "loss_mask": loss_mask,
        "position_ids": positions,
        "language": language,
    }


def micro_batches(size: int, vocabulary: int = VOCABULARY) -> list[dict[str, torch.Tensor]]:
    """This data-parallel rank's part of the global batch."""
    rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    whole = samples(vocabulary)
    count = SAMPLES // size
    parts = [{key: value[i * size : (i + 1) * size].contiguous() for key, value in whole.items()} for i in range(count)]
    return parts[rank::ranks]


def run_step(path: Path, case: StepCase, table: torch.Tensor = LANGUAGE_GROUP) -> StepResult:
    """On every rank of a pool: load, forward, backward, reduce."""
    platform, layout = select_platform("cpu"), ParallelLayout(**case.layout)
    initialize_parallel(platform, layout)
    model = load_model(
        path,
        layout,
        platform,
        ComputeOptions(
            moe_token_dispatcher_type=case.dispatcher, original_expert_overlap=case.overlap, **case.recompute
        ),
        load_balancing_coeff=case.load_balancing_coeff,
        lpr_loss_coeff=case.lpr_loss_coeff,
        new_token_loss_coeff=case.new_token_loss_coeff,
        calculate_per_token_loss=True,
    )
    flags = {name: getattr(case, name) for name in ("train_embeddings", "train_new_rows", "train_base_router")}
    stage = StageOptions(stage=case.stage, **flags)
    freeze(model.chunks, stage.resolve(), extensions=len(model.shape.new_tokens))
    options = OptimizerOptions(**case.optimizer)
    chunks = wrap_data_parallel(model.chunks, model.config, options)
    optimizer = build_optimizer(chunks, model.config, options, platform)
    watch = GradientWatch(chunks)
    reset_routing(chunks)
    for chunk in chunks:
        chunk.train()
        chunk.zero_grad_buffer()
    batches = micro_batches(case.micro_batch_size, model.shape.total_vocab_size)
    sums = run_schedule(chunks, model.config, batches, table)
    watch.check()
    routing = collect_routing(chunks, model.shape)
    optimizer.prepare_grads()
    return StepResult(
        loss=sums.mean,
        lpr=routing.mean_over_layers(routing.lpr_loss, "original"),
        load_balancing=routing.load_balancing.nanmean().item(),
        grad_norm=float(optimizer.get_grad_norm()),
        gradients=gather_gradients(chunks, model.shape.architecture.vocab_size, model.shape.new_tokens),
    )


def gather_gradients(chunks, vocabulary: int = VOCABULARY, new_tokens: Sequence[int] = ()) -> dict[str, torch.Tensor]:
    """Every trainable parameter's whole gradient, on every rank, under the parameter's checkpoint key."""
    for chunk in chunks:
        _complete_shards(chunk)
    pieces = []
    for chunk, state in zip(chunks, sharded_model_state(chunks).values(), strict=True):
        _put_gradients(state, chunk)
        apply_factories(state)
        pieces += [
            (part.key, part.global_shape, part.global_offset, part.data.detach().clone())
            for part in nested_values(state)
            if isinstance(part, ShardedTensor)
        ]
    everywhere = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, pieces)
    whole: dict[str, torch.Tensor] = {}
    for key, shape, offset, data in (piece for rank in everywhere for piece in rank):
        target = whole.setdefault(key, torch.full(shape, torch.nan))
        target[tuple(slice(start, start + length) for start, length in zip(offset, data.shape, strict=True))] = data
    # Rows of the padded vocabulary differ in number between layouts.
    whole = {key: _unpadded(key, tensor, vocabulary, new_tokens) for key, tensor in whole.items()}
    return {key: tensor for key, tensor in whole.items() if tensor.abs().sum() > 0}


def _unpadded(key: str, tensor: torch.Tensor, vocabulary: int, new_tokens: Sequence[int]) -> torch.Tensor:
    if not is_vocabulary_key(key):
        return tensor
    extension = EXTENSION_ROWS.search(key)
    return tensor[: new_tokens[int(extension[2])] if extension else vocabulary]


def _put_gradients(state: dict, chunk) -> None:
    """In the place of each parameter of a sharded state its gradient, zeros where it is frozen."""
    gradients = {
        id(parameter): parameter.main_grad.float() if parameter.requires_grad else torch.zeros(parameter.shape)
        for parameter in unwrap(chunk).parameters()
    }
    for part in nested_values(state):
        if isinstance(part, (ShardedTensor, ShardedTensorFactory)):
            part.data = gradients[id(part.data)]


def _complete_shards(chunk) -> None:
    """Under the distributed optimizer a rank holds the reduced values of its own shard alone."""
    if not chunk.ddp_config.use_distributed_optimizer:
        return
    for buffer in chunk.buffers + chunk.expert_parallel_buffers:
        group = buffer.data_parallel_group
        for bucket in buffer.buckets:
            own = bucket.grad_data.view(group.size(), -1)[group.rank()].clone()
            dist.all_gather_into_tensor(bucket.grad_data, own, group=group)
