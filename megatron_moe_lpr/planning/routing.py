"""How often tokens choose each expert: equally often, or as an evaluation measured it."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_moe_lpr.data.language_names import canonical_language, covered
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.files.json_files import read_json
from megatron_moe_lpr.model.configuration.config import ModelShape
from megatron_moe_lpr.model.moe.language_groups import LANGUAGE_GROUPS
from megatron_moe_lpr.program import command

Shares = tuple[float, ...]
"""Fraction of tokens that have an expert among their top k, for each expert of a layer, the original one first; the sum
is k."""


@dataclasses.dataclass(frozen=True)
class Routing:
    """How often tokens choose each expert of each MoE layer."""

    layers: tuple[Shares, ...] = ()
    """Fractions of each MoE layer; a model with more layers repeats them from the first. Empty: balanced."""
    original_share: float | None = None
    """Fraction of tokens that are of original languages; None: balanced routing, which measured none."""

    def shares(self, shape: ModelShape, layer: int) -> Shares:
        """Fractions of one layer. If it has another number of experts than the measured layer, the original expert
        keeps its fraction and the others share the rest equally; of a mixture base all share it equally."""
        experts = shape.experts_per_layer[layer]
        if not self.layers:
            return (shape.top_k / experts,) * experts
        index = sum(count > 1 for count in shape.experts_per_layer[:layer])
        found = self.layers[index % len(self.layers)]
        if len(found) == experts and math.isclose(sum(found), shape.top_k, abs_tol=0.01):
            return found
        base = shape.base_experts(layer)
        if base > 1:
            return (shape.top_k / experts,) * experts
        return found[0], *((shape.top_k - found[0]) / (experts - 1),) * (experts - 1)


def read_routing(path: Path, original_share: float | None = None) -> Routing:
    """Read the routing that an evaluation (`moe-lpr evaluate --output`) measured.

    Args:
        original_share: fraction of tokens of original languages. None: as in the data of the checkpoint's last stage.

    Raises:
        UserError: not an evaluation of a model with experts, or the data of the last stage are not recorded in it.
    """
    record = read_json(path)
    try:
        groups = [_mean_over_languages(record, group) for group in LANGUAGE_GROUPS]
    except (KeyError, IndexError, TypeError, ValueError):
        groups = []
    if not any(groups):
        raise UserError(f"{path}: no evaluation of a model with experts, as {command('evaluate')} --output writes it")
    share = _original_share(record, path) if original_share is None else original_share
    weighted = [(layers, weight) for layers, weight in zip(groups, (share, 1.0 - share), strict=True) if weight > 0]
    if not all(layers for layers, _ in weighted):
        raise UserError(f"{path}: {share:.0%} of the tokens are of original languages; it lacks those or the others")
    return Routing(_mixed(weighted), share)


def _original_share(record: Mapping[str, Any], path: Path) -> float:
    """Fraction of original languages in the data of the last stage, recorded in lines of a language and its weight."""
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
    """Fractions of each MoE layer, the mean over the datasets of a language group, whatever their sizes."""
    found = [one["routing"]["expert_share"] for one in record["datasets"] if one["group"] == group]
    rows = enumerate(record["experts_per_layer"])
    # Every layer's row has as many entries as the largest layer has experts.
    return [_mean([one[layer][:experts] for one in found]) for layer, experts in rows if experts > 1 and found]


def _mean(rows: Sequence[Sequence[float]]) -> Shares:
    return tuple(sum(column) / len(rows) for column in zip(*rows, strict=True))


def _mixed(parts: Sequence[tuple[list[Shares], float]]) -> tuple[Shares, ...]:
    """Sum of the language groups' fractions, each times its weight, layer by layer."""
    weighted = [[tuple(weight * share for share in row) for row in layers] for layers, weight in parts]
    return tuple(tuple(map(sum, zip(*rows, strict=True))) for rows in zip(*weighted, strict=True))
