"""What a parameter belongs to, told from its name: stages decide by it what trains."""

import re
from typing import Literal, get_args

ParameterKind = Literal[
    "router", "new experts", "earlier experts", "original expert", "dense FFN", "attention", "norm", "embedding"
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


def kind_of(name: str) -> ParameterKind:
    """Kind of a parameter, from its name in the model or its key in a checkpoint.

    Raises:
        ValueError: a name no kind covers, which training would neither freeze nor train on purpose.
    """
    for pattern, kind in PATTERNS:
        if re.search(pattern, name):
            return kind
    raise ValueError(f"no kind of parameter covers {name}")
