"""One MoE layer on the emulated device, ours or Megatron's own of the same sizes and flags: its launches and memory."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Literal
from unittest.mock import patch

import torch
from megatron.core import parallel_state
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import TEGroupedMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_moe_lpr.engine.optimizer import build_optimizer, wrap_data_parallel
from megatron_moe_lpr.engine.options import OptimizerOptions
from megatron_moe_lpr.model import spec
from megatron_moe_lpr.model.build import build_model, unwrap
from megatron_moe_lpr.model.configuration.compute import ComputeOptions
from megatron_moe_lpr.model.configuration.config import transformer_config
from megatron_moe_lpr.model.configuration.fp8 import FP8Options
from megatron_moe_lpr.model.moe.token_tags import token_tags
from megatron_moe_lpr.parallel.groups import initialize_parallel
from megatron_moe_lpr.parallel.layout import ParallelLayout
from megatron_moe_lpr.platform import select_platform
from megatron_moe_lpr.training.configuration.stages import STAGES, freeze
from tests.gpu.launches import Launches, host_milliseconds
from tests.gpu.memory import RECIPES, Model
from tests.gpu.storages import StorageLog

Owner = Literal["ours", "Megatron's"]
ORIGINAL_SHARE = 0.49
"""Tokens with the original expert among their top 2, of the demo's model after stage 2."""
ROUNDS = 10
"""How often the host's time is taken; the shortest counts."""


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer and how it is computed."""

    owner: Owner = "ours"
    stage: str = "1"
    layout: tuple[tuple[str, int], ...] = ()
    number: str = "bf16"
    recompute: str = "none"
    logs: bool = False
    """Whether the step's routing is logged."""
    hidden: int = 256
    ffn: int = 688
    sequence: int = 256
    options: tuple[tuple[str, Any], ...] = ()
    """Further fields of `ComputeOptions`."""

    @property
    def parallel(self) -> ParallelLayout:
        """As the package takes it."""
        return ParallelLayout(**dict(self.layout))

    @property
    def ranks(self) -> int:
        """Of the layout, with nothing in parallel beside it."""
        return max(self.parallel.model_parallel_size, self.parallel.expert_model_parallel_size)

    @property
    def experts(self) -> int:
        """6, or with EP as many as give a rank of ours and of Megatron's, which has expert 0 among them, equally
        many."""
        ranks = self.parallel.expert_model_parallel_size
        if ranks == 1:
            return 6
        return 1 + 3 * ranks if self.owner == "ours" else 4 * ranks


@dataclasses.dataclass(frozen=True)
class Counts:
    """Of a forward and a backward pass of one layer on a rank."""

    dispatched: int
    launches: int
    others: int
    """Launches that are neither products nor additions to main gradients."""
    collectives: int
    bytes: float
    """Read and written by the others, for each token and unit of the hidden size."""
    kept: float
    """Memory between the passes, the output included: for each token, in 2 * hidden bytes."""
    host: float
    """Milliseconds of the host's CPU time outside of emulated kernels. Of few tokens; comparable in one run only."""
    places: tuple[tuple[int, str, str], ...]
    """Launches, place and operation."""


def count(layer: Layer) -> Counts:
    """On every rank: build the layer and count."""
    run, chunk = _passes(layer)
    launches = Launches()
    with chunk.no_sync():
        run(launches)
        run(launches)
        launches = Launches()
        with launches.active():
            run(launches)
        kept = _kept(run)
        host = min(host_milliseconds(lambda: run(Launches())) for _ in range(ROUNDS))
    tokens = layer.sequence / layer.parallel.tensor_model_parallel_size
    others = [operation for operation in launches.operations if operation.kind == "other"]
    return Counts(
        dispatched=len(launches.operations),
        launches=sum(operation.launches for operation in launches.operations),
        others=sum(operation.launches for operation in others),
        collectives=launches.collectives,
        bytes=sum(operation.bytes for operation in others) / tokens / layer.hidden,
        kept=kept / tokens / layer.hidden / 2,
        host=host,
        places=tuple((number, place, name) for (place, name), number in launches.by_place().items()),
    )


def _passes(layer: Layer) -> tuple[Callable[..., None], Any]:
    """A function that runs both passes, and the model that the layer is in."""
    platform = select_platform("cuda", layer.parallel.tensor_model_parallel_size)
    initialize_parallel(platform, layer.parallel)
    with _owned(layer):
        chunks, config = _build(layer, platform)
    mlp = unwrap(chunks[0]).decoder.layers[1].mlp
    sizes = (layer.sequence // layer.parallel.tensor_model_parallel_size, 1, layer.hidden)
    hidden = torch.randn(sizes, dtype=torch.bfloat16, requires_grad=True)
    gradient = torch.randn(sizes, dtype=torch.bfloat16)
    tags = None
    if layer.owner == "ours":
        everything = torch.ones(1, sizes[0], dtype=torch.bool)
        tags = token_tags(everything, everything, 1.0, torch.tensor(float(layer.sequence)))
        mlp.router.counts_in_training = layer.logs
    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1))  # as Megatron's schedule does
    route = _route_evenly(mlp.router, layer)

    def run(launches: Launches, between: Callable[[], None] = lambda: None) -> None:
        route(launches)
        with get_fp8_context(config) if config.fp8 else contextlib.nullcontext():
            output, _ = mlp(hidden, padding_mask=tags)
        between()
        output.backward(gradient)
        hidden.grad = None

    return run, chunks[0]


def _build(layer: Layer, platform: Any) -> tuple[list, Any]:
    model = Model("qwen2", layer.hidden, layer.ffn, 4, 4, 64, 512, 2, (_shaped(layer),), layer.sequence)
    recompute = {"none": {}}.get(
        layer.recompute, {"recompute_granularity": "selective", "recompute_modules": (layer.recompute,)}
    )
    options = ComputeOptions(bf16=True, fp8=FP8Options(**RECIPES[layer.number]), **recompute, **dict(layer.options))
    stage = STAGES[layer.stage]
    fields: dict[str, Any] = {"calculate_per_token_loss": True}
    if layer.owner == "ours":
        fields |= stage.coefficients
    else:
        balance = stage.coefficients["load_balancing_coeff"]
        fields |= {"moe_router_load_balancing_type": "aux_loss" if balance else "none", "moe_aux_loss_coeff": balance}
        fields["num_moe_experts"] = layer.experts
    config = transformer_config(model.shape, layer.parallel, platform, options, **fields)
    chunks = build_model(model.shape, config, platform)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in chunks[0].parameters():
            weight.copy_(torch.randn(weight.shape) * 0.02)
    freeze(chunks, stage)
    settings = OptimizerOptions(use_distributed_optimizer=True)
    chunks = wrap_data_parallel(chunks, config, settings)
    build_optimizer(chunks, config, settings, platform)
    for chunk in chunks:
        chunk.train()
    return chunks, config


def _shaped(layer: Layer) -> int:
    """Experts of our layer: what layout and sizes are checked with."""
    return dataclasses.replace(layer, owner="ours").experts


@contextlib.contextmanager
def _owned(layer: Layer) -> Iterator[None]:
    """Build Megatron's MoE layer, with the original expert as one of its experts, in the place of ours."""

    def with_experts(block: ModuleSpec, experts: int, dense: MLPSubmodules, grouped: MLPSubmodules) -> ModuleSpec:
        parts = MoESubmodules(router=TopKRouter, experts=ModuleSpec(module=TEGroupedMLP, submodules=grouped))
        submodules = dataclasses.replace(block.submodules, mlp=ModuleSpec(module=MoELayer, submodules=parts))
        return ModuleSpec(module=block.module, submodules=submodules)

    with patch.object(spec, "_with_experts", with_experts) if layer.owner != "ours" else contextlib.nullcontext():
        yield


class _Lifted(torch.autograd.Function):
    """Logits plus a constant; not counted."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, constant: torch.Tensor) -> torch.Tensor:
        return logits + constant.view(logits.shape)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


def _route_evenly(router: TopKRouter, layer: Layer) -> Callable[[Launches], None]:
    """Route the same way in either layer: the original expert to its share of tokens, the others equally often.

    Returns:
        A function that is given the log to leave the change of the logits out of.
    """
    constant = _chosen(layer.sequence, layer.experts)
    ranks = layer.parallel.tensor_model_parallel_size
    constant = constant.chunk(ranks)[parallel_state.get_tensor_model_parallel_rank()]
    gating, logs = router.gating, []

    def lifted(hidden: torch.Tensor) -> Any:
        found = gating(hidden)  # logits, and in our router the hidden states
        logits, others = (found[0], found[1:]) if isinstance(found, tuple) else (found, ())
        with logs[-1].leave_out():
            lifted = _Lifted.apply(logits, constant)
        return (lifted, *others) if others else lifted

    router.gating = lifted
    return logs.append


def _chosen(tokens: int, experts: int) -> torch.Tensor:
    constant = torch.full((tokens, experts), -1e4)
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(1)).tolist()
    for number, token in enumerate(order):
        first = number % (experts - 1) + 1
        other = (first + number // (experts - 1) % (experts - 2)) % (experts - 1) + 1
        constant[token, first] = 0.3
        constant[token, 0 if number < ORIGINAL_SHARE * tokens else other] = 0.0
    return constant


def _kept(run: Callable[..., None]) -> int:
    log, found = StorageLog(), []
    with log, log.kernels():
        run(Launches(), between=lambda: found.append(sum(log.live().values())))
    return found[0]
