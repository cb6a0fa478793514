"""Block expansion (LLaMA-Pro, arXiv 2401.02415): copies of transformer blocks between those of the dense model.

A copy whose attention output and FFN down projections are zero adds nothing to the residual stream, so that the grown
model computes exactly what the dense one does.
"""

import dataclasses
import re
from collections.abc import Collection, Iterable
from typing import Any

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.model.configuration.architecture import MAX_LAYERS, layer_kinds
from megatron_moe_lpr.model.configuration.families import FAMILIES
from megatron_moe_lpr.model.configuration.parameter_kinds import ParameterKind
from megatron_moe_lpr.model.tensors import Row

FLAG = "--expand-blocks"
ZEROED = (".self_attention.linear_proj.weight", ".mlp.linear_fc2.weight")
"""Matrices of a block that write to the residual stream; all zero in an inserted block."""


def inserted_positions(num_layers: int, added: int) -> list[int]:
    """Layers of the grown model that are inserted: the dense model's layers are cut into `added` equal runs, and a copy
    of its last layer follows each run (section 3.2).

    Raises:
        UserError: the runs would not be equal, or the model would have too many layers.
    """
    if not 1 <= added <= num_layers or num_layers % added:
        raise UserError(
            f"{FLAG} {added}: one block is added to each of so many equal groups of blocks, so the number must divide "
            f"the model's {num_layers} layers"
        )
    if num_layers + added > MAX_LAYERS:
        raise UserError(f"{FLAG} {added}: {num_layers + added:,} layers in all; at most {MAX_LAYERS:,} can be")
    size = num_layers // added
    return [(run + 1) * size + run for run in range(added)]


def source_layers(num_layers: int, inserted: Collection[int]) -> list[int]:
    """For each layer of the grown model the dense model's layer that it is, or that it is a copy of."""
    sources: list[int] = []
    for layer in range(num_layers):
        sources.append(sources[-1] if layer in inserted else layer - sum(block < layer for block in inserted))
    return sources


def mark_inserted(rows: Iterable[Row], num_layers: int, inserted: Collection[int], new: bool = False) -> list[Row]:
    """Return the rows of a grown model with their kind where a block is inserted, and their names in the dense model.

    Args:
        num_layers: layers of the grown model.
        inserted: its inserted blocks.
        new: the source is the dense model, so that rows are read under its names.
    """
    sources, marked = source_layers(num_layers, inserted), []
    for row in rows:
        if row.layer is not None:
            names = tuple(_renumber(name, sources[row.layer]) for name in row.names)
            dense_names = tuple(_renumber(name, sources[row.layer]) for name in row.dense_names)
            row = dataclasses.replace(row, names=names if new else row.names, dense_names=dense_names)
            if row.layer in inserted:
                row = dataclasses.replace(row, kind=ParameterKind.INSERTED_BLOCKS, dense_names=())
        marked.append(row)
    return marked


def grown_config(config: dict[str, Any], num_layers: int, inserted: Collection[int]) -> dict[str, Any]:
    """The dense model's configuration for `num_layers` layers, with its lists of a value for each layer."""
    grown = config | {"num_hidden_layers": num_layers}
    has_kinds = FAMILIES[config["model_type"]].window == "some layers"
    kinds = layer_kinds(config, "config.json") if has_kinds else config.get("layer_types")
    if kinds:
        grown["layer_types"] = [kinds[layer] for layer in source_layers(num_layers, inserted)]
    if config.get("max_window_layers") is not None:
        # With use_sliding_window, transformers gives a window to the layers from this number on; none may get one here.
        grown["max_window_layers"] = max(config["max_window_layers"], num_layers)
    return grown


def _renumber(name: str, layer: int) -> str:
    return re.sub(r"^model\.layers\.\d+\.", f"model.layers.{layer}.", name)
