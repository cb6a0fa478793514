"""The one description of the model's parameters: shape, kind, how parallel ranks split it.

Operations of a step, FP8 dimensions, checkpoint shapes, the planner's sizes and the table of tensor names
(`model/tensors.py`) derive from it.
"""

import dataclasses
import math
from collections.abc import Collection, Iterator, Sequence

from megatron_moe_lpr.model.configuration.architecture import Architecture
from megatron_moe_lpr.model.configuration.parameter_kinds import ParameterKind
from megatron_moe_lpr.parallel.layout import ParallelLayout

Shape = tuple[int, ...]

EMBEDDING_KEY = "embedding.word_embeddings.weight"
OUTPUT_KEY = "output_layer.weight"
NEW_EMBEDDING_KEY = "embedding.new_word_embeddings.{extension}.weight"
NEW_OUTPUT_KEY = "output_layer.new_rows.{extension}.weight"
"""Rows that a vocabulary extension added, the oldest extension's number is 0. Tied ones have the embedding's key."""


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A parameter of the model, or the equal ones of several experts of a layer."""

    name: str
    """Megatron's name, in a layer without `decoder.layers.N.`; of experts without the expert's number."""
    kind: ParameterKind
    parts: tuple[Shape, ...]
    """Shapes that Hugging Face keeps apart and Megatron one below the other: query, key, value; gate, up."""
    layer: int | None = None
    split: int | None = None
    """The dimension that TP splits (of experts expert TP); None: every rank holds it whole."""
    is_product: bool = False
    """The weight of a matrix product."""
    copies: int = 1
    """Parameters of this shape: one for each expert of the kind."""

    @property
    def shape(self) -> Shape:
        """Shape of one copy on a single rank, [output, input] of a matrix."""
        return (sum(part[0] for part in self.parts), *self.parts[0][1:])

    @property
    def size(self) -> int:
        """Elements of all copies."""
        return self.copies * math.prod(self.shape)

    def rank_shape(self, layout: ParallelLayout) -> Shape:
        """Shape of one copy on a rank of `layout`, without the rows that pad a vocabulary."""
        if self.split is None:
            return self.shape
        expert = self.kind.is_expert_parallel
        ranks = layout.expert_tensor_parallel_size if expert else layout.tensor_model_parallel_size
        return tuple(size // ranks if dim == self.split else size for dim, size in enumerate(self.shape))

    def rank_size(self, layout: ParallelLayout) -> int:
        """Elements of the copies that a rank of `layout` holds."""
        copies = self.copies // layout.expert_model_parallel_size if self.kind.is_expert_parallel else self.copies
        return copies * math.prod(self.rank_shape(layout))


def describe_model(
    architecture: Architecture,
    experts_per_layer: Sequence[int],
    expansions: Sequence[Sequence[int]] = (),
    inserted_blocks: Collection[int] = (),
    new_tokens: Sequence[int] = (),
) -> Iterator[Parameter]:
    """All parameters of a model, in the order of its forward pass.

    Args:
        experts_per_layer: experts of each layer, the original one counted; 1 is a dense layer.
        expansions: new experts of each layer by expansion; empty: one expansion added them all.
        inserted_blocks: dense layers that block expansion inserted.
        new_tokens: rows that each vocabulary extension added, the oldest one first; empty: no extension.
    """
    # A tied embedding is the weight of the output layer's product too; looking up rows is no product.
    tied = architecture.tied_embeddings
    yield from _vocabulary(architecture, EMBEDDING_KEY, NEW_EMBEDDING_KEY, new_tokens, is_product=tied)
    for layer, experts in enumerate(experts_per_layer):
        earlier = sum(added[layer] for added in expansions[:-1])
        base = architecture.base_experts(layer)
        for parameter in describe_layer(architecture, experts, earlier, layer, base):
            inserted = layer in inserted_blocks
            yield dataclasses.replace(parameter, kind=ParameterKind.INSERTED_BLOCKS) if inserted else parameter
    yield Parameter("decoder.final_layernorm.weight", ParameterKind.NORM, ((architecture.hidden_size,),))
    if not tied:
        yield from _vocabulary(architecture, OUTPUT_KEY, NEW_OUTPUT_KEY, new_tokens, is_product=True)


def _vocabulary(
    architecture: Architecture, base: str, extension: str, new_tokens: Sequence[int], is_product: bool
) -> Iterator[Parameter]:
    """The dense model's rows of one matrix over the vocabulary, and those of each extension."""
    hidden, latest = architecture.hidden_size, len(new_tokens) - 1
    yield Parameter(base, ParameterKind.EMBEDDING, ((architecture.vocab_size, hidden),), None, 0, is_product)
    for number, rows in enumerate(new_tokens):
        kind = ParameterKind.NEW_ROWS if number == latest else ParameterKind.EARLIER_ROWS
        if rows:  # An expansion that leaves the vocabulary as it is counts as an extension without new rows.
            yield Parameter(extension.format(extension=number), kind, ((rows, hidden),), None, 0, is_product)


def describe_layer(
    architecture: Architecture, experts: int, earlier: int = 0, layer: int | None = None, base: int = 1
) -> Iterator[Parameter]:
    """Parameters of one transformer layer.

    Args:
        experts: of the layer, the original ones counted; 1 is a dense layer.
        earlier: of the new experts those of expansions before the latest one.
        base: original experts of the layer: 1, the dense model's FFN, or all that a mixture base has.
    """
    hidden = architecture.hidden_size
    yield from _attention(architecture, layer)
    yield from (_norm(name, hidden, layer) for name in _norm_names(architecture, is_moe=experts > 1))
    if experts == 1:
        yield from _ffn("mlp", ParameterKind.DENSE_FFN, architecture, layer)
        return
    yield from _router(experts, base, hidden, layer)
    if base > 1:
        yield from _shared_expert(architecture, layer)
        yield from _ffn("mlp.experts.base", ParameterKind.BASE_EXPERTS, architecture, layer, base)
    else:
        yield from _ffn("mlp.original_expert", ParameterKind.ORIGINAL_EXPERT, architecture, layer)
    if earlier:
        yield from _ffn("mlp.experts.earlier", ParameterKind.EARLIER_EXPERTS, architecture, layer, earlier)
    newest = experts - base - earlier
    if newest:
        yield from _ffn("mlp.experts", ParameterKind.NEW_EXPERTS, architecture, layer, newest)


def _router(experts: int, base: int, hidden: int, layer: int | None) -> Iterator[Parameter]:
    """The router's weight; of a mixture base the rows of its experts apart, which stay frozen."""
    if base > 1:
        yield Parameter("mlp.router.base_rows", ParameterKind.BASE_ROUTER, ((base, hidden),), layer, is_product=True)
    rows = experts - base if base > 1 else experts
    if rows:
        yield Parameter("mlp.router.weight", ParameterKind.ROUTER, ((rows, hidden),), layer, is_product=True)


def _shared_expert(architecture: Architecture, layer: int | None) -> Iterator[Parameter]:
    """The FFN that every token passes beside the experts of a mixture base, and its gate; nothing without one."""
    width = architecture.mixture.shared_expert_size if architecture.mixture else 0
    if width:
        module, kind = "mlp.shared_experts", ParameterKind.SHARED_EXPERT
        yield from _ffn(module, kind, dataclasses.replace(architecture, ffn_hidden_size=width), layer)
        yield Parameter(f"{module}.gate_weight", kind, ((1, architecture.hidden_size),), layer, is_product=True)


def projection_shapes(architecture: Architecture) -> tuple[Shape, Shape, Shape]:
    """Shapes of gate, up and down projection."""
    hidden, width = architecture.hidden_size, architecture.ffn_hidden_size
    return (width, hidden), (width, hidden), (hidden, width)


def _norm_names(architecture: Architecture, is_moe: bool) -> tuple[str, ...]:
    """Names of the norms of a layer's residual stream, beside that of the attention's input (`_attention`)."""
    if architecture.family.norms == "after":
        return "post_self_attn_layernorm.weight", "post_mlp_layernorm.weight"
    if architecture.family.norms == "shared":
        return ("shared_layernorm.weight",)
    # Transformer Engine computes a dense layer's norm and first product together, and so names it.
    return ("pre_mlp_layernorm.weight" if is_moe else "mlp.linear_fc1.layer_norm_weight",)


def _norm(name: str, size: int, layer: int | None) -> Parameter:
    return Parameter(name, ParameterKind.NORM, ((size,),), layer)


def _attention(architecture: Architecture, layer: int | None) -> Iterator[Parameter]:
    hidden, head_dim = architecture.hidden_size, architecture.head_dim
    query, key = architecture.num_attention_heads * head_dim, architecture.num_query_groups * head_dim
    kind, attention = ParameterKind.ATTENTION, "self_attention"
    weights = ((query, hidden), (key, hidden), (key, hidden))
    if architecture.family.norms == "before":
        yield _norm(f"{attention}.linear_qkv.layer_norm_weight", hidden, layer)
    yield Parameter(f"{attention}.linear_qkv.weight", kind, weights, layer, split=0, is_product=True)
    if architecture.family.qkv_bias:
        yield Parameter(f"{attention}.linear_qkv.bias", kind, ((query,), (key,), (key,)), layer, split=0)
    if architecture.family.qk_norm:
        yield from _qk_norms(architecture, layer)
    yield Parameter(f"{attention}.linear_proj.weight", kind, ((hidden, query),), layer, split=1, is_product=True)


def _qk_norms(architecture: Architecture, layer: int | None) -> Iterator[Parameter]:
    """Norms of queries and keys: one weight for each dimension of a head, or of all heads together."""
    all_heads = architecture.family.qk_norm == "all heads"
    for part, heads in (("q", architecture.num_attention_heads), ("k", architecture.num_query_groups)):
        size = architecture.head_dim * (heads if all_heads else 1)
        norm = _norm(f"self_attention.{part}_layernorm.weight", size, layer)
        yield dataclasses.replace(norm, split=0 if all_heads else None)


def _ffn(
    module: str, kind: ParameterKind, architecture: Architecture, layer: int | None, copies: int = 1
) -> Iterator[Parameter]:
    gate, up, down = projection_shapes(architecture)
    yield Parameter(f"{module}.linear_fc1.weight", kind, (gate, up), layer, 0, True, copies)
    yield Parameter(f"{module}.linear_fc2.weight", kind, (down,), layer, 1, True, copies)
