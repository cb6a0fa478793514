"""One screen about a checkpoint or a Hugging Face directory: its form, its size, its training."""

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_moe_lpr.checkpoint.format.card import MODEL_DTYPES, CheckpointCard
from megatron_moe_lpr.checkpoint.format.chain import resolve_and_hold
from megatron_moe_lpr.checkpoint.format.directory import CONFIG_FILE, LATEST_FILE, is_iteration_directory
from megatron_moe_lpr.checkpoint.loading.verification import open_checkpoint, verify_all
from megatron_moe_lpr.conversion.hugging_face.hf_directory import open_hf_directory
from megatron_moe_lpr.model.configuration.architecture import Architecture
from megatron_moe_lpr.model.configuration.parameter_kinds import ParameterKind
from megatron_moe_lpr.model.configuration.parameters import describe_model
from megatron_moe_lpr.model.parameter_counts import active_parameters, count_parameters

# Fields of a card's history that are for programs, too long for a screen.
LONG_FIELDS = ("data", "copied")
ROWS = (ParameterKind.NEW_ROWS, ParameterKind.EARLIER_ROWS)


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What a model directory's small files say."""

    form: str
    architecture: Architecture
    experts_per_layer: list[int]
    top_k: int
    dtype: str
    card: CheckpointCard | None


def inspect_directory(path: Path, verified: bool = False) -> Inspection:
    """Read the small files of a Megatron checkpoint or of a Hugging Face directory, the former with their checksums.

    Args:
        verified: compare the files of a Megatron checkpoint's tensors with their checksums too.

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
    with resolve_and_hold(path) as iteration:
        checkpoint = open_checkpoint(iteration)
        if verified:
            verify_all(checkpoint.path)
        card, architecture = checkpoint.card(), checkpoint.architecture()
        dtype = _dtypes(card)
    state = "converted" if checkpoint.iteration is None else f"iteration {checkpoint.iteration}"
    form = f"Megatron checkpoint, {state}"
    return Inspection(form, architecture, card.experts_per_layer, card.top_k, dtype, card)


def _dtypes(card: CheckpointCard) -> str:
    """The dense model's dtype, which frozen weights keep, and the dtypes that weights were trained in."""
    trained = sorted({entry["dtype"] for entry in card.history if entry.get("dtype") in MODEL_DTYPES} - {card.dtype})
    return card.dtype + (f"; trained weights {', '.join(trained)}" if trained else "")


def print_inspection(path: Path, inspection: Inspection, console: Console | None = None) -> None:
    """Print one screen about the directory `path`."""
    table = Table(title=str(path), show_header=False, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in [*_model_lines(inspection), *_history_lines(inspection.card)]:
        table.add_row(name, value)
    (console or Console()).print(table)


def _model_lines(inspection: Inspection) -> list[tuple[str, str]]:
    model = inspection.architecture
    added = inspection.card.new_tokens if inspection.card else []
    counts = count_parameters(describe_model(model, inspection.experts_per_layer, new_tokens=added))
    base = model.mixture.num_experts if model.mixture else 1
    active = active_parameters(counts, inspection.top_k, base)
    is_moe = max(inspection.experts_per_layer) > 1
    lines = [
        ("form", inspection.form),
        ("family", f"{model.family.name} ({model.family.architecture})"),
        (
            "sizes",
            f"{model.num_layers} layers, hidden {model.hidden_size}, FFN {model.ffn_hidden_size}, "
            f"{model.num_attention_heads} heads in {model.num_query_groups} groups of dimension {model.head_dim}, "
            f"vocabulary {_vocabulary(model.vocab_size, added)}{', tied' if model.tied_embeddings else ''}",
        ),
        ("experts per layer", _runs(inspection.experts_per_layer) if is_moe else "dense"),
        ("dtype", inspection.dtype),
        ("parameters", f"{_amount(counts.total())} in all, {_amount(active)} active per token"),
    ]
    if inspection.card and inspection.card.inserted_blocks:
        lines.insert(4, ("inserted blocks", "layers " + " ".join(map(str, inspection.card.inserted_blocks))))
    if is_moe:
        if inspection.card and inspection.card.expansions:
            lines.insert(4, ("expansions", "; ".join(_runs(added) for added in inspection.card.expansions)))
            lines.insert(5, ("latest experts", f"weigh {inspection.card.openness:.0%} in the routers"))
        original = sum(count for kind, count in counts.items() if kind.is_original)
        new_experts, routers = counts[ParameterKind.NEW_EXPERTS], counts[ParameterKind.ROUTER]
        parts = {"original": original, "new experts": new_experts, "routers": routers}
        if model.mixture:
            parts["original"] -= counts[ParameterKind.BASE_ROUTER]
            parts["routers"] += counts[ParameterKind.BASE_ROUTER]
            lines.insert(4, ("base experts", _runs(model.mixture.experts)))
        if any(added):
            parts["new rows"] = sum(counts.get(kind, 0) for kind in ROWS)
        lines.insert(4, ("top-k", str(inspection.top_k)))
        lines.append(("of which", ", ".join(f"{name} {_amount(count)}" for name, count in parts.items())))
    return lines


def _vocabulary(size: int, added: Sequence[int]) -> str:
    """`49,152`, or with the rows of each vocabulary extension `49,152 + 4,000 + 500 new`."""
    return " + ".join(f"{rows:,}" for rows in (size, *filter(None, added))) + (" new" if any(added) else "")


def _history_lines(card: CheckpointCard | None) -> list[tuple[str, str]]:
    if card is None:
        return []
    lines = [("fingerprint", card.original_fingerprint)]
    if card.parent:
        lines.append(("holds", f"only what was trained; the other weights are in {card.parent.path}"))
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
