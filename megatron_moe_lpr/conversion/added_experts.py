"""New experts of a base model that is a mixture: how many each layer gets, and which of its experts they copy."""

import dataclasses
import hashlib
from collections.abc import Sequence

import torch

from megatron_moe_lpr.checkpoint.format.card import check_experts
from megatron_moe_lpr.conversion.import_options import ADD_FLAG, FROM_FLAG, RANDOM, USED_MOST
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.model.configuration.mixtures import Mixture
from megatron_moe_lpr.model.configuration.parameter_kinds import ParameterKind
from megatron_moe_lpr.model.tensors import Layout, Row


@dataclasses.dataclass(frozen=True)
class AddedExperts:
    """New experts of every layer, by the experts of the base model that they are copies of."""

    copied: list[list[int]]
    """By layer: the number of the copied expert for each new one."""

    @property
    def counts(self) -> list[int]:
        """New experts of each layer."""
        return [len(experts) for experts in self.copied]


def added_counts(text: str, base: Sequence[int], flag: str = ADD_FLAG) -> list[int]:
    """Read the number of new experts of each layer.

    Args:
        text: one number for every layer that has experts, or one for each layer, as in 0,2,2,1.
        base: experts that each layer has; 1: the layer is dense.

    Raises:
        UserError: it is neither, or does not fit the model.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and len(part) < 10 for part in parts):
        raise UserError(f"{flag} {text}: a number, or one for each layer as in 0,2,2,1")
    counts = [int(part) for part in parts]
    if len(counts) == 1:
        counts = [counts[0] if experts > 1 else 0 for experts in base]
    if len(counts) != len(base) or not any(counts):
        raise UserError(f"{flag} {text}: numbers of 0 or more for {len(base)} layers are expected, not all 0")
    dense = [layer for layer, experts in enumerate(base) if experts == 1 and counts[layer]]
    if dense:
        raise UserError(f"{flag} {text}: layer {dense[0]} of the base model is dense and has no router; give it 0")
    check_experts([experts + count for experts, count in zip(base, counts, strict=True)], flag)
    return counts


def named_experts(text: str, counts: Sequence[int], base: Sequence[int]) -> list[list[int]]:
    """Read the numbers of the base model's experts that the new ones copy.

    Args:
        text: for all layers alike, as in 3,17, or layer by layer, as in `3,17;0,5`; an empty part: no new experts.
        counts: new experts of each layer.
        base: experts that each layer has.

    Raises:
        UserError: not such numbers, or not as many as there are new experts.
    """
    parts = text.split(";")
    if len(parts) == 1:
        parts = [text if count else "" for count in counts]
    if len(parts) != len(counts):
        raise UserError(f"{FROM_FLAG} {text}: names {len(parts)} layers, and the model has {len(counts)}")
    copied = []
    for layer, part in enumerate(parts):
        words = [word.strip() for word in part.split(",") if word.strip()]
        if not all(word.isdecimal() and len(word) < 10 and int(word) < base[layer] for word in words):
            raise UserError(
                f"{FROM_FLAG} {text}: {USED_MOST}, {RANDOM}, or numbers of the {base[layer]} experts of layer {layer}, "
                "from 0 on, as in 3,17"
            )
        if len(words) != counts[layer]:
            raise UserError(
                f"{FROM_FLAG} {text}: names {len(words)} experts for layer {layer}, which gets {counts[layer]} new ones"
            )
        copied.append([int(word) for word in words])
    return copied


def chosen_experts(given: str | None, counts: Sequence[int], base: Sequence[int], seed: int) -> list[list[int]]:
    """Return by layer the experts of the base model that new ones copy.

    Args:
        given: value of --new-experts-from, with the numbers that a sample chose in place of `used-most`; None: random.
        counts: new experts of each layer.
        base: experts that each layer of the base model has.
        seed: of the random choice.

    Raises:
        UserError: `given` is neither `random` nor such numbers.
    """
    if given in (None, RANDOM):
        return random_experts(counts, base, seed)
    return named_experts(given or RANDOM, counts, base)


def format_experts(copied: Sequence[Sequence[int]]) -> str:
    """Numbers of experts by layer, as `named_experts` reads them."""
    return ";".join(",".join(map(str, experts)) for experts in copied)


def random_experts(counts: Sequence[int], base: Sequence[int], seed: int) -> list[list[int]]:
    """Draw the experts that new ones copy, each once before any is drawn again; it depends on seed and layer alone."""
    return [
        _permuted(experts, count, seed, layer) for layer, (count, experts) in enumerate(zip(counts, base, strict=True))
    ]


def most_used(usage: torch.Tensor, count: int) -> list[int]:
    """The experts with the largest usage, [experts], the largest first; again from the first where `count` is more."""
    order = torch.argsort(usage, descending=True, stable=True).tolist()
    return [order[place % len(order)] for place in range(count)]


def _permuted(experts: int, count: int, seed: int, layer: int) -> list[int]:
    digest = hashlib.sha256(f"moe-lpr new experts, seed {seed}, layer {layer}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    order = torch.randperm(experts, generator=generator).tolist()
    return [order[place % experts] for place in range(count)]


def copied_rows(rows: Sequence[Row], added: AddedExperts, mixture: Mixture, layout: Layout) -> list[Row]:
    """Return the tensors of a model that gets new experts, with the names that each is read from.

    New experts are read from those that they copy; router rows of new experts have no names, since they are made of
    rows of a tensor (`initial_rows`).

    Args:
        rows: the tensors under the names that an export writes.
    """
    sources = {
        layout.new.format(layer=layer, expert=mixture.experts[layer] + place, new=0, projection=projection): (
            layout.new.format(layer=layer, expert=expert, new=0, projection=projection)
        )
        for layer, copied in enumerate(added.copied)
        for place, expert in enumerate(copied)
        for projection in layout.projections
    }
    read = []
    for row in rows:
        if row.kind is ParameterKind.ROUTER:
            row = dataclasses.replace(row, names=(), rows=None)
        read.append(dataclasses.replace(row, names=tuple(sources.get(name, name) for name in row.names)))
    return read
