"""One screen about a checkpoint or a Hugging Face directory: what it is, how large, what it was trained on."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_moe_lpr.checkpoint.format.card import MODEL_DTYPES, CheckpointCard
from megatron_moe_lpr.checkpoint.format.directory import CONFIG_FILE, LATEST_FILE, is_iteration_directory
from megatron_moe_lpr.checkpoint.format.trainable_only import kept_for_reading
from megatron_moe_lpr.checkpoint.loading.verification import open_checkpoint, verify_all
from megatron_moe_lpr.conversion.hugging_face.hf_directory import open_hf_directory
from megatron_moe_lpr.model.configuration.architecture import Architecture
from megatron_moe_lpr.model.tensors import DENSE_LAYOUT, Role, model_rows

# Of an entry in a card's history: for programs, not for a screen.
LONG_FIELDS = ("data",)


@dataclasses.dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters."""

    total: int
    active: int
    """Used for one token."""
    original: int
    """Of the dense model."""
    new_experts: int
    routers: int


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What is known about a model directory."""

    form: str
    architecture: Architecture
    experts_per_layer: list[int]
    top_k: int
    dtype: str
    card: CheckpointCard | None


def inspect_directory(path: Path, verified: bool = False) -> Inspection:
    """Read the small files of a Megatron checkpoint or of a Hugging Face directory, the former with their checksums.

    Args:
        verified: compare the tensors' files of a Megatron checkpoint too.

    Raises:
        UserError: it is neither, or damaged.
    """
    path = Path(path)
    is_checkpoint = (path / LATEST_FILE).is_file() or is_iteration_directory(path)
    if not is_checkpoint and (path / CONFIG_FILE).is_file():
        model = open_hf_directory(path)
        dtype = str(model.config.get("dtype") or model.config.get("torch_dtype") or "not said")
        form = f"Hugging Face, {model.layout.name}"
        return Inspection(form, model.architecture, model.experts_per_layer, model.top_k, dtype, model.card)
    with kept_for_reading(path) as iteration:
        checkpoint = open_checkpoint(iteration)
        if verified:
            verify_all(checkpoint.path)
        card, architecture = checkpoint.card(), checkpoint.architecture()
        dtype = _dtypes(card)
    state = "converted" if checkpoint.iteration is None else f"iteration {checkpoint.iteration}"
    form = f"Megatron checkpoint, {state}"
    return Inspection(form, architecture, card.experts_per_layer, card.top_k, dtype, card)


def _dtypes(card: CheckpointCard) -> str:
    """The dense model's dtype, which frozen weights keep, and what trained ones were computed and stored in."""
    trained = sorted({entry["dtype"] for entry in card.history if entry.get("dtype") in MODEL_DTYPES} - {card.dtype})
    return card.dtype + (f"; trained weights {', '.join(trained)}" if trained else "")


def count_parameters(architecture: Architecture, experts_per_layer: Sequence[int], top_k: int) -> ParameterCounts:
    """Count a model's parameters by what they are for."""
    sizes = dict.fromkeys(Role, 0)
    for row in model_rows(architecture, experts_per_layer, DENSE_LAYOUT):
        sizes[row.role] += math.prod(row.shape)
    moe_layers = sum(experts > 1 for experts in experts_per_layer)
    one_choice = sizes[Role.ORIGINAL_EXPERT]  # one expert in each layer that has experts
    return ParameterCounts(
        total=sum(sizes.values()),
        active=sizes[Role.ORIGINAL] + sizes[Role.ROUTER] + (top_k * one_choice if moe_layers else 0),
        original=sizes[Role.ORIGINAL] + sizes[Role.ORIGINAL_EXPERT],
        new_experts=sizes[Role.NEW_EXPERT],
        routers=sizes[Role.ROUTER],
    )


def print_inspection(path: Path, inspection: Inspection, console: Console | None = None) -> None:
    """Print one screen."""
    table = Table(title=str(path), show_header=False, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in [*_model_lines(inspection), *_history_lines(inspection.card)]:
        table.add_row(name, value)
    (console or Console()).print(table)


def _model_lines(inspection: Inspection) -> list[tuple[str, str]]:
    model = inspection.architecture
    counts = count_parameters(model, inspection.experts_per_layer, inspection.top_k)
    is_moe = max(inspection.experts_per_layer) > 1
    lines = [
        ("form", inspection.form),
        ("family", f"{model.family.name} ({model.family.architecture})"),
        (
            "sizes",
            f"{model.num_layers} layers, hidden {model.hidden_size}, FFN {model.ffn_hidden_size}, "
            f"{model.num_attention_heads} heads in {model.num_query_groups} groups of dimension {model.head_dim}, "
            f"vocabulary {model.vocab_size:,}{', tied' if model.tied_embeddings else ''}",
        ),
        ("experts per layer", _runs(inspection.experts_per_layer) if is_moe else "dense"),
        ("dtype", inspection.dtype),
        ("parameters", f"{_amount(counts.total)} in all, {_amount(counts.active)} active per token"),
    ]
    if inspection.card and inspection.card.inserted_blocks:
        lines.insert(4, ("inserted blocks", "layers " + " ".join(map(str, inspection.card.inserted_blocks))))
    if is_moe:
        if inspection.card and inspection.card.expansions:
            lines.insert(4, ("expansions", "; ".join(_runs(added) for added in inspection.card.expansions)))
            lines.insert(5, ("latest experts", f"weigh {inspection.card.openness:.0%} in the routers"))
        parts = {"original": counts.original, "new experts": counts.new_experts, "routers": counts.routers}
        lines.insert(4, ("top-k", str(inspection.top_k)))
        lines.append(("of which", ", ".join(f"{name} {_amount(count)}" for name, count in parts.items())))
    return lines


def _history_lines(card: CheckpointCard | None) -> list[tuple[str, str]]:
    if card is None:
        return []
    lines = [("fingerprint", card.original_fingerprint)]
    if card.base:
        lines.append(("holds", f"only what was trained; the other weights are in {card.base.path}"))
    for entry in card.history or [{"stage": "none yet"}]:
        shown = {name: value for name, value in entry.items() if value not in (None, []) and name not in LONG_FIELDS}
        lines.append(("trained", ", ".join(_field(name, value) for name, value in shown.items())))
    return lines


def _field(name: str, value: Any) -> str:
    if isinstance(value, list):
        value = " ".join(str(item) for item in value)
    if isinstance(value, int) and not isinstance(value, bool):
        value = f"{value:,}"
    return f"{name.replace('_', ' ')} {value}"


def _runs(experts_per_layer: Sequence[int]) -> str:
    """`6 in every layer`, `6 1 6 1 (...)`, or the runs of equal numbers."""
    runs = [(experts, len(list(group))) for experts, group in itertools.groupby(experts_per_layer)]
    if len(runs) == 1:
        return f"{runs[0][0]} in every layer"
    words = " ".join(f"{experts}" if count == 1 else f"{experts}x{count}" for experts, count in runs)
    return f"{words} (1: dense)" if 1 in experts_per_layer else words


def _amount(count: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if count >= size:
            return f"{count / size:.2f}{unit}"
    return str(count)
