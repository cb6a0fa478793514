"""Tensors that a stock architecture needs and the upcycled model does not have: zeros, or copies of its own tensors.

- Qwen2-MoE's shared expert: all zero, so it adds nothing.
- The experts of a dense layer where the architecture has experts in every layer: each is a copy of the dense FFN, and
  the router is zero. Whichever experts it chooses get equal weights that add up to 1: the sum is the FFN's output.
- Attention biases that a configuration has and no stock MoE architecture of the family: accepted if they are zero.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence

from megatron_moe_lpr.model.configuration.architecture import Architecture
from megatron_moe_lpr.model.configuration.parameters import Shape, projection_shapes
from megatron_moe_lpr.model.tensors import DENSE_LAYOUT, Layout

_SHARED_EXPERT = "a Qwen2-MoE with a real shared expert is not an upcycled dense model; give a dense one"
_ATTENTION_BIAS = "the stock MoE architectures of this family have no place for attention biases"
_DENSE_LAYER = "moe_lpr/card.json says that the layer is dense; the weights are another model's"


@dataclasses.dataclass(frozen=True)
class ExtraTensor:
    """A tensor of the stock architecture that is not the model's own."""

    name: str
    shape: Shape
    otherwise: str
    """The end of the error message where a checkpoint has another value in it."""
    copy_of: str | None = None
    """The tensor of the same checkpoint that it equals; None: all zero."""
    is_router: bool = False


def extra_tensors(
    architecture: Architecture, experts_per_layer: Sequence[int], layout: Layout, shared_expert_width: int
) -> list[ExtraTensor]:
    """All tensors that `layout` needs beyond those of `model_rows`; none for a dense model."""
    extra: list[ExtraTensor] = []
    if layout is DENSE_LAYOUT or architecture.mixture:
        return extra  # A mixture base has tensors of its own for all that its architecture wants.
    for layer, experts in enumerate(experts_per_layer):
        if experts > 1 and layout.shared_expert:
            extra += _shared_expert(architecture, layer, shared_expert_width)
        if experts == 1 and layout.experts_everywhere:
            extra += _equal_experts(architecture, layer, max(experts_per_layer), layout)
    return extra


def equal_expert_bytes(
    architecture: Architecture, experts_per_layer: Sequence[int], layout: Layout, itemsize: int
) -> int:
    """Bytes that equal experts of dense layers add to an export; 0 where the stock architecture allows dense layers."""
    extra = extra_tensors(architecture, experts_per_layer, dataclasses.replace(layout, shared_expert=False), 0)
    return sum(math.prod(tensor.shape) * (4 if tensor.is_router else itemsize) for tensor in extra)


def zero_attention_biases(architecture: Architecture) -> list[ExtraTensor]:
    """Biases that `attention_bias: true` adds to a dense checkpoint of a family without biases; they must be zero."""
    query, group = (
        count * architecture.head_dim for count in (architecture.num_attention_heads, architecture.num_query_groups)
    )
    sizes = {"q": query, "k": group, "v": group, "o": architecture.hidden_size}
    return [
        ExtraTensor(f"model.layers.{layer}.self_attn.{projection}_proj.bias", (size,), _ATTENTION_BIAS)
        for layer in range(architecture.num_layers)
        for projection, size in sizes.items()
    ]


def _shared_expert(architecture: Architecture, layer: int, width: int) -> Iterator[ExtraTensor]:
    hidden = architecture.hidden_size
    shapes = {
        "shared_expert.gate_proj": (width, hidden),
        "shared_expert.up_proj": (width, hidden),
        "shared_expert.down_proj": (hidden, width),
        "shared_expert_gate": (1, hidden),
    }
    for name, shape in shapes.items():
        yield ExtraTensor(f"model.layers.{layer}.mlp.{name}.weight", shape, _SHARED_EXPERT)


def _equal_experts(architecture: Architecture, layer: int, num_experts: int, layout: Layout) -> Iterator[ExtraTensor]:
    router = (num_experts, architecture.hidden_size)
    if layout.router:
        yield ExtraTensor(layout.router.format(layer=layer), router, _DENSE_LAYER, is_router=True)
    for projection, shape in zip(layout.projections, projection_shapes(architecture), strict=True):
        original = layout.original.format(layer=layer, expert=0, projection=projection)
        for expert in range(1, num_experts):
            name = layout.new.format(layer=layer, expert=expert, new=expert - 1, projection=projection)
            yield ExtraTensor(name, shape, _DENSE_LAYER, copy_of=original)
