"""Kinds of parameters: a stage freezes or trains a kind as a whole."""

import enum
import re
from collections.abc import Collection


class ParameterKind(str, enum.Enum):
    """What a parameter belongs to. New experts, routers, new rows of the vocabulary and inserted blocks were added to
    the base model; all other parameters are the base model's own."""

    ROUTER = "router"
    """All rows of a router; of a mixture base the rows of new experts alone."""
    NEW_EXPERTS = "new experts"
    """Of the latest expansion; after a single import all but the original expert."""
    EARLIER_EXPERTS = "earlier experts"
    """New experts of expansions before the latest one."""
    ORIGINAL_EXPERT = "original expert"
    BASE_EXPERTS = "base experts"
    """The experts of a base model that is a mixture, all of which are original ones."""
    BASE_ROUTER = "base router rows"
    """The router's rows of the base experts."""
    SHARED_EXPERT = "shared expert"
    """An FFN of a mixture base that every token passes, beside its experts, and its gate."""
    INSERTED_BLOCKS = "inserted blocks"
    DENSE_FFN = "dense FFN"
    """The FFN of a layer without experts."""
    ATTENTION = "attention"
    NORM = "norm"
    EMBEDDING = "embedding"
    """The dense model's rows of the embedding, and of the output layer where the model has one of its own."""
    NEW_ROWS = "new vocabulary rows"
    """Rows of the embedding and of the output layer that the latest vocabulary extension added."""
    EARLIER_ROWS = "earlier vocabulary rows"
    """Rows that vocabulary extensions before the latest one added."""

    # Printed and compared as the plain text, as tables of parameters and tests write it.
    __str__ = str.__str__

    @property
    def is_original(self) -> bool:
        """The parameter is the dense model's."""
        return self not in ADDED

    @property
    def is_expert(self) -> bool:
        """Experts of a layer, of which a token passes only those that its router chose."""
        return self is ParameterKind.ORIGINAL_EXPERT or self.is_expert_parallel

    @property
    def is_router(self) -> bool:
        """Rows of a router, which are float32 whatever the model's dtype is."""
        return self in (ParameterKind.ROUTER, ParameterKind.BASE_ROUTER)

    @property
    def is_expert_parallel(self) -> bool:
        """The parameter is distributed over expert-parallel and expert-TP ranks instead of TP ranks."""
        return self in (ParameterKind.NEW_EXPERTS, ParameterKind.EARLIER_EXPERTS, ParameterKind.BASE_EXPERTS)


ADDED = frozenset(
    {
        ParameterKind.ROUTER,
        ParameterKind.NEW_EXPERTS,
        ParameterKind.EARLIER_EXPERTS,
        ParameterKind.INSERTED_BLOCKS,
        ParameterKind.NEW_ROWS,
        ParameterKind.EARLIER_ROWS,
    }
)
"""Kinds that the dense model does not have."""

VOCABULARY = frozenset({ParameterKind.EMBEDDING, ParameterKind.NEW_ROWS, ParameterKind.EARLIER_ROWS})
"""Kinds of the rows of the embedding and of the output layer."""

IN_INSERTED_BLOCKS = frozenset({ParameterKind.DENSE_FFN, ParameterKind.ATTENTION, ParameterKind.NORM})
"""Kinds of a dense layer's parameters, which in an inserted block are all of the kind INSERTED_BLOCKS."""

# The first pattern that matches decides. Norms come first: Transformer Engine keeps some inside linear layers.
PATTERNS = (
    (r"layernorm|layer_norm", ParameterKind.NORM),
    (r"\.mlp\.router\.base_rows", ParameterKind.BASE_ROUTER),
    (r"\.mlp\.router\.", ParameterKind.ROUTER),
    (r"\.mlp\.shared_experts\.", ParameterKind.SHARED_EXPERT),
    (r"\.mlp\.experts\.base\.", ParameterKind.BASE_EXPERTS),
    (r"\.mlp\.experts\.earlier\.", ParameterKind.EARLIER_EXPERTS),
    (r"\.mlp\.experts\.", ParameterKind.NEW_EXPERTS),
    (r"\.mlp\.original_expert\.", ParameterKind.ORIGINAL_EXPERT),
    (r"\.mlp\.linear_fc", ParameterKind.DENSE_FFN),
    (r"\.self_attention\.", ParameterKind.ATTENTION),
    (r"embedding\.word_embeddings\.|output_layer\.", ParameterKind.EMBEDDING),
)
EXTENSION_ROWS = re.compile(r"\b(embedding\.new_word_embeddings|output_layer\.new_rows)\.(\d+)\.")
"""Parameters of vocabulary extensions; the second group is the extension's number, the oldest one's 0."""


def kind_of(name: str, inserted_blocks: Collection[int] = (), extensions: int = 1) -> ParameterKind:
    """Kind of a parameter, from its name in the model or its key in a checkpoint.

    Args:
        inserted_blocks: layers that block expansion inserted, in the numbers that `name` uses: on a later pipeline
            rank the names in the model begin with 0 again.
        extensions: number of vocabulary extensions of the model; rows of all but the last one are EARLIER_ROWS.

    Raises:
        ValueError: a name no kind covers, which training would neither freeze nor train on purpose, or rows of an
            extension that the model does not have.
    """
    if rows := EXTENSION_ROWS.search(name):
        if int(rows[2]) >= extensions:
            raise ValueError(f"{name} belongs to another vocabulary extension than the {extensions} of the model")
        return ParameterKind.NEW_ROWS if int(rows[2]) == extensions - 1 else ParameterKind.EARLIER_ROWS
    # Not at the beginning: Float16Module puts "module." before the names of a bf16 model.
    layer = re.search(r"\bdecoder\.layers\.(\d+)\.", name)
    if layer and int(layer[1]) in inserted_blocks:
        return ParameterKind.INSERTED_BLOCKS
    for pattern, kind in PATTERNS:
        if re.search(pattern, name):
            return kind
    raise ValueError(f"no kind of parameter covers {name}")


def is_expert_parallel_key(key: str) -> bool:
    """Whether a key of a checkpoint, of a weight or its optimizer state, is of experts that EP ranks share."""
    return ".mlp.experts." in key


def trained_in_layer(trains: Collection[ParameterKind], inserted: bool) -> frozenset[ParameterKind]:
    """Kinds whose parameters train in one layer, an inserted block's by what they were in a dense layer.

    Args:
        trains: kinds that train in the model.
        inserted: the layer is an inserted block.
    """
    if not inserted:
        return frozenset(trains)
    if ParameterKind.INSERTED_BLOCKS in trains:
        return frozenset(trains) | IN_INSERTED_BLOCKS
    return frozenset(trains) - IN_INSERTED_BLOCKS
