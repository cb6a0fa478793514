"""Memory of one training step, measured on the device and as planned.

On the emulated device storages are followed one by one; on a GPU its allocator is asked (never run).
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import schedules

from megatron_moe_lpr.engine.micro_batches import run_schedule
from megatron_moe_lpr.engine.optimizer import build_optimizer, wrap_data_parallel
from megatron_moe_lpr.engine.options import OptimizerOptions
from megatron_moe_lpr.model.build import build_model, unwrap
from megatron_moe_lpr.model.configuration.architecture import read_architecture
from megatron_moe_lpr.model.configuration.compute import ComputeOptions
from megatron_moe_lpr.model.configuration.config import ModelShape, transformer_config
from megatron_moe_lpr.model.configuration.fp8 import FP8Options
from megatron_moe_lpr.parallel.groups import initialize_parallel
from megatron_moe_lpr.parallel.layout import ParallelLayout
from megatron_moe_lpr.planning.activations import activation_bytes, kept_bytes, logit_bytes
from megatron_moe_lpr.planning.memory import placeholder_bytes, weight_bytes
from megatron_moe_lpr.planning.parameters import rank_parameters
from megatron_moe_lpr.planning.planned_run import PlannedRun
from megatron_moe_lpr.planning.sizes import FP32, RunSizes
from megatron_moe_lpr.platform import Platform, select_platform
from megatron_moe_lpr.training.configuration.stages import STAGES, freeze
from tests.gpu.compute import route_by_position
from tests.gpu.device import EMULATED
from tests.gpu.local_kernels import norm_as_one_kernel

LANGUAGE_GROUP = torch.tensor([0, -1])
RECIPES: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {},
    "delayed": {"fp8_format": "hybrid", "fp8_recipe": "delayed"},
    "tensorwise": {"fp8_format": "hybrid", "fp8_recipe": "tensorwise"},
    "blockwise": {"fp8_format": "e4m3", "fp8_recipe": "blockwise"},
}


@dataclasses.dataclass(frozen=True)
class Model:
    """A tiny model: fields of a Hugging Face configuration, and the length of its sequences."""

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    num_hidden_layers: int
    experts: tuple[int, ...]
    """Of the layers, repeated; 1 is a dense layer."""
    seq_length: int
    micro_batch_size: int = 1
    top_k: int = 2
    inserted_blocks: tuple[int, ...] = ()
    sliding_window: int | None = None
    base: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Of a base model that is a mixture: its fields beside these; `experts` counts its own experts too."""

    @property
    def shape(self) -> ModelShape:
        """As the package takes it."""
        fields = dataclasses.asdict(self) | {"max_position_embeddings": 4096, "tie_word_embeddings": False}
        layers = self.num_hidden_layers
        experts = (self.experts * layers)[:layers]
        if self.base:
            architecture = read_architecture(fields | self.base | {"num_experts_per_tok": self.top_k})
            added = tuple(count - self.base["num_experts"] for count in experts)
            return ModelShape(architecture, experts, self.top_k, (added,))
        return ModelShape(read_architecture(fields), experts, self.top_k, inserted_blocks=self.inserted_blocks)


MODELS = {
    # Sequences that give every expert equally many tokens, in multiples of 16 on every rank.
    "grouped heads": Model("qwen2", 256, 512, 4, 2, 64, 1024, 4, (5,), 320),
    "many heads": Model("llama", 128, 384, 8, 8, 16, 512, 4, (3,), 192, micro_batch_size=2),
    "wide FFN": Model("qwen2", 128, 1024, 4, 1, 32, 2000, 2, (9,), 144),
    "some dense": Model("qwen3", 128, 256, 4, 2, 64, 1000, 4, (1, 4), 192),
    "inserted blocks": Model("llama", 192, 512, 6, 6, 32, 512, 4, (1,), 256, inserted_blocks=(1, 3)),
    "sliding window": Model("mistral", 128, 256, 4, 2, 32, 512, 2, (5,), 320, sliding_window=100),
    # Queries and keys are normalised over all heads; a shared expert.
    "olmoe": Model("olmoe", 128, 256, 4, 2, 32, 512, 2, (6,), 192, base={"num_experts": 4}),
    "shared expert": Model(
        "qwen2_moe",
        128,
        256,
        4,
        2,
        32,
        512,
        2,
        (6,),
        192,
        base={"num_experts": 4, "moe_intermediate_size": 256, "shared_expert_intermediate_size": 384},
    ),
    "large vocabulary": Model("llama", 192, 512, 6, 3, 32, 4000, 2, (1,), 256),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A step."""

    model: str = "grouped heads"
    number: str = "bf16"
    stage: str = "1"
    recompute: str = "none"
    layout: tuple[tuple[str, int], ...] = ()
    fp8_parameters: bool = False

    def __str__(self) -> str:
        layout = " ".join(f"{name}={size}" for name, size in self.layout)
        parameters = "fp8-param-gather" if self.fp8_parameters else ""
        words = (self.model, self.number, f"stage {self.stage}", f"recompute {self.recompute}", parameters, layout)
        return ", ".join(filter(None, words))

    @property
    def ranks(self) -> int:
        """Ranks of the layout with nothing in parallel beside it."""
        layout = ParallelLayout(**dict(self.layout))
        copy = layout.model_parallel_size * layout.context_parallel_size
        return max(copy, layout.expert_model_parallel_size * layout.pipeline_model_parallel_size)


@dataclasses.dataclass(frozen=True)
class Bytes:
    """Of one rank."""

    kept: float
    """Between the forward and the backward pass, of all micro-batches in flight, logits left out."""
    logits: float
    """Kept for the loss's backward pass."""
    peak: float
    """Most that lived at once, kept and logits included."""
    weights: float
    """Parameters and their copies in FP8."""
    placeholders: float
    """What autograd is given for weight gradients that Transformer Engine has added to the buffer."""


def measure(model: Model, case: Case, micro_batches: int = 4) -> tuple[Bytes, Bytes]:
    """On every rank: one step's memory as measured and as planned."""
    layout = ParallelLayout(**dict(case.layout))
    platform = select_platform("cuda", layout.tensor_model_parallel_size)
    initialize_parallel(platform, layout)
    chunks, config = _build(model, case, layout, platform)
    batches = [_batch(model, platform.device) for _ in range(micro_batches)]

    def step() -> None:
        for chunk in chunks:
            chunk.zero_grad_buffer()
        run_schedule(chunks, config, batches, LANGUAGE_GROUP.to(platform.device))

    dummies = _placeholders() if platform.transformer_engine else {}
    dummies.clear()  # those of models before
    step()  # makes workspaces, FP8 copies and placeholders that stay
    for chunk in chunks:
        unwrap(chunk).rotary_pos_emb.forward.cache_clear()
    with _meter(chunks) as meter:
        step()
    weights, placeholders = sum(map(_weight_bytes, chunks)), sum(one.nbytes for one in dummies.values())
    found = Bytes(*meter.largest(), meter.peak(), weights, placeholders)
    return found, plan(model, case, layout, micro_batches, platform.transformer_engine)


def _placeholders() -> dict[Any, torch.Tensor]:
    from transformer_engine.pytorch.module.base import _dummy_wgrads

    return _dummy_wgrads


def plan(
    model: Model, case: Case, layout: ParallelLayout, micro_batches: int, transformer_engine: bool = True
) -> Bytes:
    """What the planner says of this rank."""
    shape = model.shape
    pipeline_rank = parallel_state.get_pipeline_model_parallel_rank()
    precision = case.number if case.number in ("fp32", "bf16") else "fp8"
    sizes = RunSizes(
        STAGES[case.stage].trains,
        case.ranks,
        model.seq_length,
        model.micro_batch_size,
        micro_batches * model.micro_batch_size * layout.data_parallel_size(case.ranks),
        precision=precision,
        fp8_recipe=case.number if precision == "fp8" else "delayed",
        fp8_param_gather=case.fp8_parameters,
        transformer_engine=transformer_engine,
    )
    run = PlannedRun(shape, layout, sizes, case.recompute)
    counts, logits = rank_parameters(shape, layout, pipeline_rank), logit_bytes(run, pipeline_rank)
    peak = activation_bytes(run, pipeline_rank) + logits
    # Of logits and softmax only the softmax, in fp32, is there when the backward pass begins.
    kept_logits = logits * FP32 / (sizes.element_bytes + FP32)
    held = weight_bytes(counts, sizes), placeholder_bytes(run, pipeline_rank)
    return Bytes(kept_bytes(run, pipeline_rank), kept_logits, peak, *held)


def _build(model: Model, case: Case, layout: ParallelLayout, platform: Platform) -> tuple[list, Any]:
    shape = model.shape
    selective = {"recompute_granularity": "selective", "recompute_modules": (case.recompute,)}
    recompute = {"none": {}, "full": {"recompute_granularity": "full"}}.get(case.recompute, selective)
    fp8 = FP8Options(**RECIPES[case.number], fp8_param_gather=case.fp8_parameters)
    options = ComputeOptions(bf16=case.number != "fp32", **recompute, fp8=fp8)
    losses = {"load_balancing_coeff": 0.01, "lpr_loss_coeff": 0.1, "calculate_per_token_loss": True}
    config = transformer_config(shape, layout, platform, options, **losses)
    chunks = build_model(shape, config, platform)
    with torch.no_grad():
        for weight in (weight for chunk in chunks for weight in chunk.parameters()):
            weight.copy_(torch.randn(weight.shape) * 0.02)
    route_by_position(chunks, model.seq_length)
    freeze(chunks, STAGES[case.stage], shape.inserted_blocks)
    settings = OptimizerOptions(use_distributed_optimizer=True)
    chunks = wrap_data_parallel(chunks, config, settings)
    build_optimizer(chunks, config, settings, platform)
    for chunk in chunks:
        chunk.train()
    return chunks, config


def _batch(model: Model, device: torch.device) -> dict[str, torch.Tensor]:
    shape = (model.micro_batch_size, model.seq_length)
    tokens = torch.randint(0, model.vocab_size, shape, device=device)
    positions = torch.arange(model.seq_length, device=device).expand(shape)
    ones = torch.ones(shape, device=device)
    languages = torch.zeros(shape, dtype=torch.long, device=device)
    return {"tokens": tokens, "labels": tokens, "loss_mask": ones, "position_ids": positions, "language": languages}


def _weight_bytes(chunk: torch.nn.Module) -> int:
    """Bytes of the parameters, and of the FP8 copies that Transformer Engine's layers keep from step to step."""
    from tests.gpu.storages import storages_of

    own, held = 0, {}
    for module in chunk.modules():
        for copy in getattr(module, "_fp8_workspaces", {}).values():
            held |= storages_of(copy.get_metadata(), depth=0)
    for weight in chunk.parameters():
        if hasattr(weight, "get_metadata"):
            held |= storages_of(weight.get_metadata(), depth=0)
        else:
            own += weight.nbytes  # the storage is a buffer of many
    return own + sum(storage.nbytes() for storage in held.values())


class _Followed:
    """By the storages of the emulated device."""

    def __init__(self, chunks: list[torch.nn.Module]) -> None:
        from tests.gpu.storages import StorageLog

        self.log, self.readings, self.chunks = StorageLog(), [], chunks

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        hooks = []
        for model in map(unwrap, self.chunks):
            hooks.append(model.register_forward_hook(lambda *_: self._label("")))
            if model.post_process:
                hooks.append(model.output_layer.register_forward_pre_hook(lambda *_: self._label("logits")))
        with self.log, self.log.kernels(), norm_as_one_kernel(self.log.as_one):
            yield
        for hook in hooks:
            hook.remove()

    def _label(self, label: str) -> None:
        self.log.label = label

    def read(self) -> None:
        self._label("")
        self.readings.append(self.log.live())

    def largest(self) -> tuple[float, float]:
        most = max(self.readings, key=lambda reading: reading.total())
        return most[""], most["logits"]

    def peak(self) -> float:
        return self.log.peak


class _Allocated:
    """By the allocator of a GPU; logits are not told apart."""

    def __init__(self, chunks: list[torch.nn.Module]) -> None:
        self.before, self.readings = torch.cuda.memory_allocated(), []

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        torch.cuda.reset_peak_memory_stats()
        yield

    def read(self) -> None:
        self.readings.append(torch.cuda.memory_allocated() - self.before)

    def largest(self) -> tuple[float, float]:
        return max(self.readings), 0.0

    def peak(self) -> float:
        return torch.cuda.max_memory_allocated() - self.before


@contextlib.contextmanager
def _meter(chunks: list[torch.nn.Module]) -> Iterator[Any]:
    """Reads the memory whenever a backward pass is about to begin."""
    meter = _Followed(chunks) if EMULATED else _Allocated(chunks)
    backward = schedules.backward_step

    def read_first(*args: Any, **kwargs: Any) -> Any:
        meter.read()
        return backward(*args, **kwargs)

    schedules.backward_step = read_first
    try:
        with meter.active():
            yield meter
    finally:
        schedules.backward_step = backward
