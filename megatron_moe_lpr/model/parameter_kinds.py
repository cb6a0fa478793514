"""What a parameter belongs to, told from its name: stages decide by it what trains."""

import re
from collections.abc import Collection
from typing import Literal, get_args

ParameterKind = Literal[
    "router",
    "new experts",
    "earlier experts",
    "original expert",
    "inserted blocks",
    "dense FFN",
    "attention",
    "norm",
    "embedding",
]

KINDS: tuple[ParameterKind, ...] = get_args(ParameterKind)

# The first pattern that matches decides. Norms come first: Transformer Engine keeps some inside linear layers.
PATTERNS: tuple[tuple[str, ParameterKind], ...] = (
    (r"layernorm|layer_norm", "norm"),
    (r"\.mlp\.router\.", "router"),
    (r"\.mlp\.experts\.earlier\.", "earlier experts"),
    (r"\.mlp\.experts\.", "new experts"),
    (r"\.mlp\.original_expert\.", "original expert"),
    (r"\.mlp\.linear_fc", "dense FFN"),
    (r"\.self_attention\.", "attention"),
    (r"embedding\.word_embeddings\.|output_layer\.", "embedding"),
)


IN_INSERTED_BLOCKS: frozenset[ParameterKind] = frozenset({"dense FFN", "attention", "norm"})
"""What an inserted block consists of."""


def kind_of(name: str, inserted_blocks: Collection[int] = ()) -> ParameterKind:
    """Kind of a parameter, from its name in the model or its key in a checkpoint.

    Args:
        inserted_blocks: layers that block expansion inserted, in the numbers that `name` uses: on a later pipeline
            stage the names in the model begin with 0 again.

    Raises:
        ValueError: a name no kind covers, which training would neither freeze nor train on purpose.
    """
    # Not at the beginning: Float16Module puts "module." before the names of a bf16 model.
    layer = re.search(r"\bdecoder\.layers\.(\d+)\.", name)
    if layer and int(layer[1]) in inserted_blocks:
        return "inserted blocks"
    for pattern, kind in PATTERNS:
        if re.search(pattern, name):
            return kind
    raise ValueError(f"no kind of parameter covers {name}")


def trained_in_layer(trains: Collection[ParameterKind], inserted: bool) -> frozenset[ParameterKind]:
    """Kinds of one layer's own parts that train, where `trains` says which kinds of the model do."""
    if not inserted:
        return frozenset(trains)
    if "inserted blocks" in trains:
        return frozenset(trains) | IN_INSERTED_BLOCKS
    return frozenset(trains) - IN_INSERTED_BLOCKS
