"""Block expansion (LLaMA-Pro, arXiv 2401.02415): copies of transformer blocks between those of the dense model.

A copy whose attention output and FFN down projections are zero adds nothing to the residual stream, so that the grown
model computes exactly what the dense one does.
"""

import dataclasses
import re
from collections.abc import Collection, Iterable
from typing import Any

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.model.configuration.architecture import MAX_LAYERS
from megatron_moe_lpr.model.tensors import Role, Row

FLAG = "--expand-blocks"
ZEROED = (".self_attention.linear_proj.weight", ".mlp.linear_fc2.weight")
"""Of an inserted block: what writes to the residual stream."""


def inserted_positions(num_layers: int, added: int) -> list[int]:
    """Layers of the grown model that are new: the dense one's fall into `added` groups, a copy follows each group's
    last block (section 3.2).

    Raises:
        UserError: the groups would not be equal, or too many layers.
    """
    if not 1 <= added <= num_layers or num_layers % added:
        raise UserError(
            f"{FLAG} {added}: one block is added to each of so many equal groups of blocks, so the number must divide "
            f"the model's {num_layers} layers"
        )
    if num_layers + added > MAX_LAYERS:
        raise UserError(f"{FLAG} {added}: {num_layers + added:,} layers in all; at most {MAX_LAYERS:,} can be")
    size = num_layers // added
    return [(group + 1) * size + group for group in range(added)]


def source_layers(num_layers: int, inserted: Collection[int]) -> list[int]:
    """Of each layer of the grown model the dense model's layer that it is, or is a copy of."""
    sources: list[int] = []
    for layer in range(num_layers):
        sources.append(sources[-1] if layer in inserted else layer - sum(block < layer for block in inserted))
    return sources


def mark_inserted(rows: Iterable[Row], num_layers: int, inserted: Collection[int], new: bool = False) -> list[Row]:
    """Rows of the grown model with the role of those in inserted blocks, and the others' names in the dense model.

    Args:
        num_layers: of the grown model.
        new: the source is the dense model, whose names the rows read.
    """
    sources, marked = source_layers(num_layers, inserted), []
    for row in rows:
        if row.layer is not None:
            names = tuple(_of_layer(name, sources[row.layer]) for name in row.names)
            dense_names = tuple(_of_layer(name, sources[row.layer]) for name in row.dense_names)
            row = dataclasses.replace(row, names=names if new else row.names, dense_names=dense_names)
            if row.layer in inserted:
                row = dataclasses.replace(row, role=Role.INSERTED_BLOCK, dense_names=())
        marked.append(row)
    return marked


def grown_config(config: dict[str, Any], num_layers: int, inserted: Collection[int]) -> dict[str, Any]:
    """The dense model's configuration with `num_layers` layers, whatever it says by layer included."""
    grown = config | {"num_hidden_layers": num_layers}
    if config.get("layer_types"):
        grown["layer_types"] = [config["layer_types"][layer] for layer in source_layers(num_layers, inserted)]
    if config.get("max_window_layers") is not None:
        # transformers gives the layers from this one on a window where use_sliding_window says so; none had one.
        grown["max_window_layers"] = max(config["max_window_layers"], num_layers)
    return grown


def _of_layer(name: str, layer: int) -> str:
    return re.sub(r"^model\.layers\.\d+\.", f"model.layers.{layer}.", name)
