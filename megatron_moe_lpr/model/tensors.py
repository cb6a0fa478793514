"""The one table of tensor names: which Hugging Face tensors make up which Megatron tensor, read in both directions.

The dense families name their attention, norms and embeddings alike; they differ in which of them exist. What
differs between the dense and the stock MoE architectures is where the feed-forward weights and the router lie: that
is a `Layout`.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

from megatron_moe_lpr.model.configuration.architecture import Architecture
from megatron_moe_lpr.model.configuration.parameter_kinds import EXTENSION_ROWS, ParameterKind
from megatron_moe_lpr.model.configuration.parameters import (
    EMBEDDING_KEY,
    OUTPUT_KEY,
    Parameter,
    Shape,
    describe_model,
)

EMBEDDING_NAME = "model.embed_tokens.weight"
OUTPUT_NAME = "lm_head.weight"
DENSE_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
EXPERT_GROUPS = {ParameterKind.BASE_EXPERTS: "base", ParameterKind.EARLIER_EXPERTS: "earlier"}
"""Modules of frozen experts beside the newest ones (`model/moe/expert_groups.py`)."""
MEGATRON_PROJECTIONS = ("linear_fc1.weight_w", "linear_fc1.weight_v", "linear_fc2.weight")

NAMES = {
    EMBEDDING_KEY: (EMBEDDING_NAME,),
    "self_attention.linear_qkv.layer_norm_weight": ("input_layernorm.weight",),
    "self_attention.linear_qkv.weight": tuple(f"self_attn.{projection}_proj.weight" for projection in "qkv"),
    "self_attention.linear_qkv.bias": tuple(f"self_attn.{projection}_proj.bias" for projection in "qkv"),
    "self_attention.q_layernorm.weight": ("self_attn.q_norm.weight",),
    "self_attention.k_layernorm.weight": ("self_attn.k_norm.weight",),
    "self_attention.linear_proj.weight": ("self_attn.o_proj.weight",),
    "mlp.linear_fc1.layer_norm_weight": ("post_attention_layernorm.weight",),
    "pre_mlp_layernorm.weight": ("post_attention_layernorm.weight",),
    "post_self_attn_layernorm.weight": ("post_attention_layernorm.weight",),
    "post_mlp_layernorm.weight": ("post_feedforward_layernorm.weight",),
    "shared_layernorm.weight": ("input_layernorm.weight",),
    "decoder.final_layernorm.weight": ("model.norm.weight",),
    OUTPUT_KEY: (OUTPUT_NAME,),
}
"""Hugging Face's names by Megatron's, of a layer's parameters without the layer; FFN and router: see `Layout`. New rows
of the vocabulary lie below the dense model's rows in the same Hugging Face tensor (`Row.rows`)."""


def is_vocabulary_key(key: str) -> bool:
    """Whether a tensor has a row for each token: its rows may be padded in a training checkpoint, for TP."""
    return key in (EMBEDDING_KEY, OUTPUT_KEY) or EXTENSION_ROWS.match(key) is not None


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where a Hugging Face checkpoint keeps the experts and the router of layer `{layer}`.

    Templates know `{layer}`, `{expert}` (0 is the original one; the experts of a mixture base come first), `{new}`
    (expert - 1) and `{projection}`.
    """

    name: str
    original: str
    new: str
    projections: tuple[str, str, str] = DENSE_PROJECTIONS
    """Gate, up, down."""
    router: str | None = None
    """None: the checkpoint has no router, one is initialised."""
    shared_expert: bool = False
    """The architecture wants a shared expert: all its weights are zero where the base model has none."""
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
    "olmoe": Layout("olmoe", _QWEN_EXPERT, _QWEN_EXPERT, router=_QWEN_ROUTER),
    "flex_olmo": Layout("flex_olmo", _QWEN_EXPERT, _QWEN_EXPERT, router=_QWEN_ROUTER, experts_everywhere=True),
    "cohere2_moe": Layout("cohere2_moe", _QWEN_EXPERT, _QWEN_EXPERT, router=_QWEN_ROUTER),
    "granitemoe": Layout(
        "granitemoe",
        _MIXTRAL_EXPERT,
        _MIXTRAL_EXPERT,
        router="model.layers.{layer}.block_sparse_moe.router.layer.weight",
        experts_everywhere=True,
    ),
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One tensor of a checkpoint and the Hugging Face tensors that it is made of."""

    key: str
    """The tensor's key in the checkpoint."""
    names: tuple[str, ...]
    """One Hugging Face tensor, or query, key and value; empty: a router to initialise."""
    shapes: tuple[Shape, ...]
    """The shape of each of `names`; of the tensor itself where there are none."""
    kind: ParameterKind
    layer: int | None = None
    dense_names: tuple[str, ...] = ()
    """Names in the dense checkpoint; empty for new experts, routers and new rows of the vocabulary."""
    rows: tuple[int, int] | None = None
    """First row and the row after the last one in the Hugging Face tensor, which has the base model's rows and the new
    ones of each vocabulary extension; None: the whole tensor."""

    @property
    def shape(self) -> Shape:
        """The Megatron tensor's shape: several Hugging Face tensors lie one below the other in it."""
        return (sum(shape[0] for shape in self.shapes), *self.shapes[0][1:])


def model_rows(
    architecture: Architecture,
    experts_per_layer: Sequence[int],
    layout: Layout,
    expansions: Sequence[Sequence[int]] = (),
    new_tokens: Sequence[int] = (),
) -> list[Row]:
    """All tensors of a model, in the order in which they are converted (rows that share a source are neighbours).

    Args:
        expansions: new experts of each layer by expansion; empty: one expansion added them all.
        new_tokens: rows that each vocabulary extension added, the oldest one first.
    """
    parameters = describe_model(architecture, experts_per_layer, expansions, new_tokens=new_tokens)
    rows: list[Row] = []
    for layer, group in itertools.groupby(parameters, key=lambda parameter: parameter.layer):
        if layer is None:
            rows += _outer_rows(list(group), extended=bool(new_tokens))
        else:
            rows += _layer_rows(list(group), layer, layout)
    return rows


def _row(key: str, names: tuple[str, ...], parameter: Parameter) -> Row:
    """A tensor of the dense model that has the same name in every Hugging Face layout."""
    return Row(key, names, parameter.parts, parameter.kind, parameter.layer, names)


def _outer_rows(parameters: Sequence[Parameter], extended: bool) -> Iterator[Row]:
    """Tensors outside of the layers; with an extended vocabulary several of them share a Hugging Face tensor."""
    names: tuple[str, ...] = ()
    end = 0
    for parameter in parameters:
        is_new = not parameter.kind.is_original
        names, first = (names, end) if is_new else (NAMES[parameter.name], 0)
        end = first + parameter.shape[0]
        row = _row(parameter.name, names, parameter)
        if extended and is_vocabulary_key(parameter.name):
            row = dataclasses.replace(row, rows=(first, end), dense_names=() if is_new else names)
        yield row


def _layer_rows(parameters: Sequence[Parameter], layer: int, layout: Layout) -> Iterator[Row]:
    ffn = []
    base_rows = sum(parameter.shape[0] for parameter in parameters if parameter.kind is ParameterKind.BASE_ROUTER)
    for parameter in parameters:
        key = f"decoder.layers.{layer}.{parameter.name}"
        if parameter.kind.is_router:
            names = (layout.router.format(layer=layer),) if layout.router else ()
            yield _router_row(Row(key, names, parameter.parts, parameter.kind, layer), base_rows)
        elif parameter.kind is ParameterKind.SHARED_EXPERT:
            yield from _parts_apart(key, _shared_expert_names(parameter.name, layer), parameter)
        elif parameter.name in NAMES:
            yield _row(key, tuple(f"model.layers.{layer}.{name}" for name in NAMES[parameter.name]), parameter)
        else:
            ffn.append(parameter)
    yield from _ffn_rows(ffn, layer, layout)


def _router_row(row: Row, base_rows: int) -> Row:
    """A router's row; of a mixture base, whose experts' rows are a tensor of their own, with its place in the whole."""
    if not base_rows:
        return row
    if row.kind is ParameterKind.BASE_ROUTER:
        return dataclasses.replace(row, rows=(0, base_rows), dense_names=row.names)
    return dataclasses.replace(row, rows=(base_rows, base_rows + row.shape[0]))


def _shared_expert_names(parameter: str, layer: int) -> tuple[str, ...]:
    """Hugging Face's names of one of Megatron's parameters of a shared expert."""
    expert = f"model.layers.{layer}.mlp.shared_expert"
    if parameter.endswith("gate_weight"):
        return (f"{expert}_gate.weight",)
    projections = DENSE_PROJECTIONS[:2] if parameter.endswith("linear_fc1.weight") else DENSE_PROJECTIONS[2:]
    return tuple(f"{expert}.{projection}.weight" for projection in projections)


def _parts_apart(key: str, names: tuple[str, ...], parameter: Parameter) -> Iterator[Row]:
    """A tensor of a checkpoint for each Hugging Face tensor, as Megatron saves the parts of a gated FFN."""
    halves = ("_w", "_v") if len(names) > 1 else ("",)
    for name, half, shape in zip(names, halves, parameter.parts, strict=True):
        yield Row(f"{key}{half}", (name,), (shape,), parameter.kind, parameter.layer, (name,))


def _ffn_rows(ffn: Sequence[Parameter], layer: int, layout: Layout) -> Iterator[Row]:
    """Tensors of a layer's FFN or experts by projection: upcycling copies one dense tensor to neighbouring rows."""
    # Parameters come in pairs: the first product, whose parts are gate and up projection, and the second.
    shapes = (*ffn[0].parts, *ffn[1].parts)
    experts = [first.kind for first in ffn[::2] for _ in range(first.copies)]
    for place, shape in enumerate(shapes):
        dense_name = _DENSE.format(layer=layer, projection=DENSE_PROJECTIONS[place])
        for expert, kind in enumerate(experts):
            key = f"{_ffn_key(layer, expert, experts)}.{MEGATRON_PROJECTIONS[place]}"
            template = layout.original if kind.is_original else layout.new
            name = template.format(layer=layer, expert=expert, new=expert - 1, projection=layout.projections[place])
            if kind is ParameterKind.DENSE_FFN and not layout.experts_everywhere:
                name = dense_name
            # The fingerprint knows a tensor of the base model by the name that it has there.
            original_name = name if kind is ParameterKind.BASE_EXPERTS else dense_name
            yield Row(key, (name,), (shape,), kind, layer, (original_name,) if kind.is_original else ())


def _ffn_key(layer: int, expert: int, experts: Sequence[ParameterKind]) -> str:
    """The module that holds an expert's weights (0: the original one, or the FFN of a dense layer)."""
    mlp, kind = f"decoder.layers.{layer}.mlp", experts[expert]
    if kind is ParameterKind.DENSE_FFN:
        return mlp
    if kind is ParameterKind.ORIGINAL_EXPERT:
        return f"{mlp}.original_expert"
    number = expert - experts.index(kind)
    if group := EXPERT_GROUPS.get(kind):
        return f"{mlp}.experts.{group}.experts.{number}"
    # The only group of a layer is not in a module `newest`.
    newest = ".newest" if EXPERT_GROUPS.keys() & set(experts) else ""
    return f"{mlp}.experts{newest}.experts.{number}"
