"""Options of an expansion, which adds experts for a second group of languages."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.flag_ranges import PositiveInt, Seed


@dataclasses.dataclass(frozen=True)
class ExpandOptions:
    """What an expansion adds to which checkpoint: flags of `moe-lpr expand`."""

    load: Path
    """Checkpoint directory after stage 2, or one iteration in it."""
    add_experts: str
    """New experts: one number for every layer that has experts, or one for each layer (0: none), as in 0,2,2,1."""
    tokenizer: Path | None = None
    """Directory of a tokenizer that `moe-lpr extend-tokenizer` made of the checkpoint's own: its new tokens get rows of
    their own, and rows that an earlier extension added stay frozen."""
    new_experts_from: str | None = None
    """With a mixture as base model: which of its experts the new ones copy: used-most (by the text of --sample), random
    (by --seed), or their numbers, as in 3,17 for all layers or 3,17;0,5;... by layer. Default: used-most with --sample,
    else random."""
    seed: Seed = 1234
    """Seed of the routers' new rows; with a mixture as base model, of the choice by --new-experts-from random."""
    expert_model_parallel_size: PositiveInt = 1
    """Only a check: does this EP size divide the number of experts of each expansion?"""
    base_checkpoint: Path | None = None
    """For a --load of --save-trainable-only: directory of the checkpoint that its run started from, if it has moved."""
    verify: bool = True
    """Compare the checkpoint's files with their checksums before use."""


def added_experts(text: str, experts_per_layer: Sequence[int]) -> list[int]:
    """Return the new experts of each layer.

    Args:
        text: value of --add-experts: one number for every layer that has experts, or one for each layer.
        experts_per_layer: experts that the checkpoint has in each layer; 1: the layer is dense.

    Raises:
        UserError: it is neither of them.
    """
    parts = text.split(",")
    if not all(part.strip().isdecimal() and len(part) < 10 for part in parts):
        raise UserError(f"--add-experts {text}: a number, or one for each layer as in 0,2,2,1")
    numbers = [int(part) for part in parts]
    if len(numbers) == 1:
        return [numbers[0] if experts > 1 else 0 for experts in experts_per_layer]
    return numbers
