"""How often tokens choose each expert: balanced, or as an evaluation found it."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_moe_lpr.data.language_names import canonical_language, covered
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.files.json_files import read_json
from megatron_moe_lpr.model.configuration.config import ModelShape
from megatron_moe_lpr.model.moe.routing_groups import GROUPS
from megatron_moe_lpr.program import command

Shares = tuple[float, ...]
"""Of the tokens, those with each expert among their top k, the original expert first; they sum to k."""


@dataclasses.dataclass(frozen=True)
class Routing:
    """Shares of the tokens that choose each expert."""

    layers: tuple[Shares, ...] = ()
    """Of one MoE layer after the other, from the first again where a model has more of them. Empty: balanced."""
    original_share: float | None = None
    """Share of the tokens that are of original languages; None where nothing was counted."""

    def shares(self, shape: ModelShape, layer: int) -> Shares:
        """Of a layer. Where it has another number of experts than was counted, the original expert keeps its share and
        the others have the rest in equal parts."""
        experts = shape.experts_per_layer[layer]
        if not self.layers:
            return (shape.top_k / experts,) * experts
        index = sum(count > 1 for count in shape.experts_per_layer[:layer])
        found = self.layers[index % len(self.layers)]
        if len(found) == experts and math.isclose(sum(found), shape.top_k, abs_tol=0.01):
            return found
        return found[0], *((shape.top_k - found[0]) / (experts - 1),) * (experts - 1)


def read_routing(path: Path, original_share: float | None = None) -> Routing:
    """The routing that an evaluation (`tools/evaluate.py --output`) found.

    Args:
        original_share: tokens of original languages among all. None: as in the data of the checkpoint's last stage.

    Raises:
        UserError: not an evaluation of a model with experts, or not known what the checkpoint was trained on.
    """
    record = read_json(path)
    try:
        groups = [_mean_over_languages(record, group) for group in GROUPS]
    except (KeyError, IndexError, TypeError, ValueError):
        groups = []
    if not any(groups):
        raise UserError(f"{path}: no evaluation of a model with experts, as {command('evaluate')} --output writes it")
    share = _original_share(record, path) if original_share is None else original_share
    asked = [(layers, weight) for layers, weight in zip(groups, (share, 1.0 - share), strict=True) if weight > 0]
    if not all(layers for layers, _ in asked):
        raise UserError(f"{path}: {share:.0%} of the tokens are of original languages; it lacks those or the others")
    return Routing(_mixed(asked), share)


def _original_share(record: Mapping[str, Any], path: Path) -> float:
    """Of the data of the checkpoint's last stage, lines that begin with a language and its weight."""
    try:
        names, words = record["original_languages"], [line.split() for line in record["history"][-1]["data"]]
        weights = [(canonical_language(language), float(weight)) for language, weight, *_ in words]
        original = covered((language for language, _ in weights), map(canonical_language, names))
        return sum(weight for language, weight in weights if language in original) / sum(one for _, one in weights)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, ZeroDivisionError):
        raise UserError(
            f"{path}: does not say what its checkpoint was trained on; pass --original-share, the share of tokens of "
            "original languages"
        ) from None


def _mean_over_languages(record: Mapping[str, Any], group: str) -> list[Shares]:
    """Of the MoE layers; each dataset counts the same, whatever its size."""
    found = [one["routing"]["expert_share"] for one in record["datasets"] if one["group"] == group]
    rows = enumerate(record["experts_per_layer"])
    # A row is as long as the largest layer's.
    return [_mean([one[layer][:experts] for one in found]) for layer, experts in rows if experts > 1 and found]


def _mean(rows: Sequence[Sequence[float]]) -> Shares:
    return tuple(sum(column) / len(rows) for column in zip(*rows, strict=True))


def _mixed(parts: Sequence[tuple[list[Shares], float]]) -> tuple[Shares, ...]:
    """Weighted sums, layer by layer."""
    weighted = [[tuple(weight * share for share in row) for row in layers] for layers, weight in parts]
    return tuple(tuple(map(sum, zip(*rows, strict=True))) for rows in zip(*weighted, strict=True))
