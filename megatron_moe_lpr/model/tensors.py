"""The one table of tensor names: which Hugging Face tensors make up which Megatron tensor, read in both directions.

The dense families name their attention, norms and embeddings alike; they differ in which of them exist. What
differs between the dense and the stock MoE architectures is where the feed-forward weights and the router lie: that
is a `Layout`.
"""

import dataclasses
import enum
from collections.abc import Iterator, Sequence

from megatron_moe_lpr.model.configuration.architecture import Architecture

Shape = tuple[int, ...]

EMBEDDING_KEY = "embedding.word_embeddings.weight"
OUTPUT_KEY = "output_layer.weight"
# Their first dimension may be padded in a training checkpoint, for tensor parallelism.
VOCABULARY_KEYS = (EMBEDDING_KEY, OUTPUT_KEY)
EMBEDDING_NAME = "model.embed_tokens.weight"
OUTPUT_NAME = "lm_head.weight"
DENSE_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
MEGATRON_PROJECTIONS = ("linear_fc1.weight_w", "linear_fc1.weight_v", "linear_fc2.weight")


class Role(enum.Enum):
    """What a weight is for; what is not new (experts, routers, inserted blocks) is the dense model's and is frozen."""

    ORIGINAL = "original"
    ORIGINAL_EXPERT = "original expert"
    NEW_EXPERT = "new expert"
    ROUTER = "router"
    INSERTED_BLOCK = "inserted block"

    @property
    def is_original(self) -> bool:
        """The weight belongs to the dense model."""
        return self in (Role.ORIGINAL, Role.ORIGINAL_EXPERT)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where a Hugging Face checkpoint keeps the experts and the router of layer `{layer}`.

    Templates know `{layer}`, `{expert}` (0 is the original one), `{new}` (expert - 1) and `{projection}`.
    """

    name: str
    original: str
    new: str
    projections: tuple[str, str, str] = DENSE_PROJECTIONS
    """Gate, up, down."""
    router: str | None = None
    """None: the checkpoint has no router, one is initialised."""
    shared_expert: bool = False
    """The architecture wants a shared expert, which this method does not have: all its weights are zero."""
    experts_everywhere: bool = False
    """The architecture has experts in every layer: those of a dense layer are all the same (`extra_tensors.py`)."""


_DENSE = "model.layers.{layer}.mlp.{projection}.weight"
_QWEN_EXPERT = "model.layers.{layer}.mlp.experts.{expert}.{projection}.weight"
_QWEN_ROUTER = "model.layers.{layer}.mlp.gate.weight"
_MIXTRAL_EXPERT = "model.layers.{layer}.block_sparse_moe.experts.{expert}.{projection}.weight"
_ADAPTER = "base_model.model.model.layers.{layer}.mlp."

# Upcycling is the layout in which new experts read the dense weights.
DENSE_LAYOUT = Layout("dense", _DENSE, _DENSE)
ADAPTER_LAYOUT = Layout(
    "adapter",
    _DENSE,
    _ADAPTER + "moe_experts.{new}.{projection}.weight",
    router=_ADAPTER + "moe_router_embedding.weight",
)
MOE_LAYOUTS = {
    "mixtral": Layout(
        "mixtral",
        _MIXTRAL_EXPERT,
        _MIXTRAL_EXPERT,
        ("w1", "w3", "w2"),
        router="model.layers.{layer}.block_sparse_moe.gate.weight",
        experts_everywhere=True,
    ),
    "qwen2_moe": Layout("qwen2_moe", _QWEN_EXPERT, _QWEN_EXPERT, router=_QWEN_ROUTER, shared_expert=True),
    "qwen3_moe": Layout("qwen3_moe", _QWEN_EXPERT, _QWEN_EXPERT, router=_QWEN_ROUTER),
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One Megatron tensor and where it comes from."""

    key: str
    """The tensor's key in the checkpoint."""
    names: tuple[str, ...]
    """One Hugging Face tensor, or query, key and value; empty: a router to initialise."""
    shapes: tuple[Shape, ...]
    """The shape of each of `names`; of the tensor itself where there are none."""
    role: Role
    layer: int | None = None
    dense_names: tuple[str, ...] = ()
    """What the dense checkpoint calls them; empty for new experts and routers."""

    @property
    def shape(self) -> Shape:
        """The Megatron tensor's shape: several Hugging Face tensors lie one below the other in it."""
        return (sum(shape[0] for shape in self.shapes), *self.shapes[0][1:])


def model_rows(
    architecture: Architecture,
    experts_per_layer: Sequence[int],
    layout: Layout,
    expansions: Sequence[Sequence[int]] = (),
) -> list[Row]:
    """All tensors of a model, in the order in which they are converted (rows that share a source are neighbours).

    Args:
        expansions: new experts of each layer by expansion; empty: one expansion added them all.
    """
    vocabulary = (architecture.vocab_size, architecture.hidden_size)
    rows = [_plain(EMBEDDING_KEY, EMBEDDING_NAME, vocabulary)]
    for layer, experts in enumerate(experts_per_layer):
        rows += _attention_rows(architecture, layer)
        if experts == 1:
            rows += _dense_rows(architecture, layer, layout)
        else:
            earlier = sum(added[layer] for added in expansions[:-1])
            rows += _moe_rows(architecture, layer, experts, layout, earlier)
    rows.append(_plain("decoder.final_layernorm.weight", "model.norm.weight", (architecture.hidden_size,)))
    if not architecture.tied_embeddings:
        rows.append(_plain(OUTPUT_KEY, OUTPUT_NAME, vocabulary))
    return rows


def _plain(key: str, name: str, shape: Shape, layer: int | None = None) -> Row:
    return Row(key, (name,), (shape,), Role.ORIGINAL, layer, (name,))


def _attention_rows(architecture: Architecture, layer: int) -> Iterator[Row]:
    hidden, head_dim = architecture.hidden_size, architecture.head_dim
    query, group = architecture.num_attention_heads * head_dim, architecture.num_query_groups * head_dim
    megatron, source = f"decoder.layers.{layer}.self_attention", f"model.layers.{layer}"

    def qkv(kind: str, tail: Shape) -> Row:
        names = tuple(f"{source}.self_attn.{projection}_proj.{kind}" for projection in "qkv")
        shapes = ((query, *tail), (group, *tail), (group, *tail))
        return Row(f"{megatron}.linear_qkv.{kind}", names, shapes, Role.ORIGINAL, layer, names)

    yield _plain(f"{megatron}.linear_qkv.layer_norm_weight", f"{source}.input_layernorm.weight", (hidden,), layer)
    yield qkv("weight", (hidden,))
    if architecture.family.qkv_bias:
        yield qkv("bias", ())
    if architecture.family.qk_norm:
        yield _plain(f"{megatron}.q_layernorm.weight", f"{source}.self_attn.q_norm.weight", (head_dim,), layer)
        yield _plain(f"{megatron}.k_layernorm.weight", f"{source}.self_attn.k_norm.weight", (head_dim,), layer)
    yield _plain(f"{megatron}.linear_proj.weight", f"{source}.self_attn.o_proj.weight", (hidden, query), layer)


def projection_shapes(architecture: Architecture) -> tuple[Shape, Shape, Shape]:
    """Shapes of gate, up and down projection."""
    hidden, width = architecture.hidden_size, architecture.ffn_hidden_size
    return (width, hidden), (width, hidden), (hidden, width)


def _dense_rows(architecture: Architecture, layer: int, layout: Layout) -> Iterator[Row]:
    megatron = f"decoder.layers.{layer}.mlp"
    norm = f"model.layers.{layer}.post_attention_layernorm.weight"
    yield _plain(f"{megatron}.linear_fc1.layer_norm_weight", norm, (architecture.hidden_size,), layer)
    shapes = projection_shapes(architecture)
    projections = layout.projections if layout.experts_everywhere else DENSE_PROJECTIONS
    template = layout.original if layout.experts_everywhere else _DENSE
    for dense, projection, target, shape in zip(
        DENSE_PROJECTIONS, projections, MEGATRON_PROJECTIONS, shapes, strict=True
    ):
        name = template.format(layer=layer, expert=0, projection=projection)
        dense_name = _DENSE.format(layer=layer, projection=dense)
        yield Row(f"{megatron}.{target}", (name,), (shape,), Role.ORIGINAL, layer, (dense_name,))


def new_expert_key(layer: int, expert: int, earlier: int) -> str:
    """Where a new expert (from 1 on) of a layer lies that has `earlier` experts of earlier expansions."""
    mlp = f"decoder.layers.{layer}.mlp.experts"
    if not earlier:
        return f"{mlp}.experts.{expert - 1}"
    if expert <= earlier:
        return f"{mlp}.earlier.experts.{expert - 1}"
    return f"{mlp}.newest.experts.{expert - 1 - earlier}"


def _moe_rows(architecture: Architecture, layer: int, experts: int, layout: Layout, earlier: int) -> Iterator[Row]:
    megatron, hidden = f"decoder.layers.{layer}", architecture.hidden_size
    norm = f"model.layers.{layer}.post_attention_layernorm.weight"
    yield _plain(f"{megatron}.pre_mlp_layernorm.weight", norm, (hidden,), layer)
    router = (layout.router.format(layer=layer),) if layout.router else ()
    yield Row(f"{megatron}.mlp.router.weight", router, ((experts, hidden),), Role.ROUTER, layer)
    targets = zip(
        MEGATRON_PROJECTIONS, DENSE_PROJECTIONS, layout.projections, projection_shapes(architecture), strict=True
    )
    for target, dense, projection, shape in targets:
        name = layout.original.format(layer=layer, expert=0, projection=projection)
        dense_name = _DENSE.format(layer=layer, projection=dense)
        key = f"{megatron}.mlp.original_expert.{target}"
        yield Row(key, (name,), (shape,), Role.ORIGINAL_EXPERT, layer, (dense_name,))
        for expert in range(1, experts):
            name = layout.new.format(layer=layer, expert=expert, new=expert - 1, projection=projection)
            key = f"{new_expert_key(layer, expert, earlier)}.{target}"
            yield Row(key, (name,), (shape,), Role.NEW_EXPERT, layer)
