"""An evaluation as JSON and as tables in a terminal."""

import math
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from megatron_moe_lpr.data.labels import dataset_labels
from megatron_moe_lpr.data.language_groups import group_name
from megatron_moe_lpr.data.language_names import covered
from megatron_moe_lpr.evaluation.checkpoint import Evaluation
from megatron_moe_lpr.evaluation.losses import DatasetLoss
from megatron_moe_lpr.model.moe.language_groups import LANGUAGE_GROUPS
from megatron_moe_lpr.model.moe.routing_statistics import RoutingReport


def evaluation_record(evaluation: Evaluation) -> dict[str, Any]:
    """Return the evaluation as a JSON object; numbers that were not measured or are not finite are null."""
    card = evaluation.card
    labels = dataset_labels([(result.name, result.language) for result in evaluation.datasets])
    datasets = [
        _dataset_record(result, label, evaluation) for result, label in zip(evaluation.datasets, labels, strict=True)
    ]
    numbers = sorted({one["language_group"] for one in datasets})
    return {
        "checkpoint": str(evaluation.directory.path),
        "iteration": evaluation.directory.iteration,
        "experts_per_layer": card.experts_per_layer,
        "top_k": card.top_k,
        "dtype": evaluation.dtype,
        "sequence_length": evaluation.seq_length,
        "reset_attention_mask": evaluation.reset_attention_mask,
        "original_languages": list(evaluation.original_languages),
        "history": card.history,
        "datasets": datasets,
        "expansions": card.expansions,
        "base_experts": card.base_experts,
        "averages_by_language_group": {
            group_name(number): _averages([one for one in datasets if one["language_group"] == number])
            for number in numbers
        },
        "averages": {group: _averages([one for one in datasets if one["group"] == group]) for group in LANGUAGE_GROUPS},
    }


def _dataset_record(result: DatasetLoss, label: str, evaluation: Evaluation) -> dict[str, Any]:
    group = LANGUAGE_GROUPS[0] if covered([result.language], evaluation.original_languages) else LANGUAGE_GROUPS[1]
    latest = len(evaluation.language_groups)
    numbered = enumerate(evaluation.language_groups)
    number = next((index for index, names in numbered if covered([result.language], names)), latest)
    return {
        "name": label.removeprefix(f"{result.language}/") if label != result.language else Path(result.name).name,
        "language": result.language,
        "group": group,
        "language_group": number,
        "tokens": result.tokens,
        "is_packed": result.is_packed,
        "documents_apart": result.documents_apart,
        "loss": _number(result.loss),
        "perplexity": _number(result.perplexity),
        "bits_per_byte": _number(result.bits_per_byte),
        "new_token_mass": _number(result.new_token_mass),
        "routing": _routing_record(result.routing, group) if result.routing else None,
    }


def record_labels(record: dict[str, Any]) -> list[str]:
    """Return the label of each dataset of an evaluation, see `dataset_labels`."""
    return dataset_labels([(one["name"], one["language"]) for one in record["datasets"]])


def _routing_record(routing: RoutingReport, group: str) -> dict[str, Any]:
    """Return the routing of a dataset, all of one language group; lists have an entry per layer, null if dense."""
    column = LANGUAGE_GROUPS.index(group)
    return {
        "expert0_probability": _numbers(routing.probability[:, column]),
        "expert0_top_k_share": _numbers(routing.top_k_share[:, column]),
        "expert_share": [_numbers(row) for row in routing.expert_share[:, column]],
        "mean_expert0_probability": _number(routing.mean_over_layers(routing.probability, group)),
        "mean_expert0_top_k_share": _number(routing.mean_over_layers(routing.top_k_share, group)),
    }


def _averages(datasets: list[dict[str, Any]]) -> dict[str, float | None]:
    """Return means over datasets, in which each dataset counts the same, of any size."""
    values = {name: [one[name] for one in datasets] for name in ("loss", "bits_per_byte", "new_token_mass")}
    for name in ("mean_expert0_probability", "mean_expert0_top_k_share"):
        values[name.removeprefix("mean_")] = [(one["routing"] or {}).get(name) for one in datasets]
    return {
        name: sum(numbers) / len(numbers) if numbers and None not in numbers else None
        for name, numbers in values.items()
    }


def print_evaluation(record: dict[str, Any], console: Console | None = None) -> None:
    """Print losses of each dataset and their means, and for an MoE the routing to the original experts by layer."""
    console = console or Console()
    console.print(_loss_table(record))
    if any(one["routing"] for one in record["datasets"]):
        console.print(_routing_table(record))


def _loss_table(record: dict[str, Any]) -> Table:
    has_new_tokens = any(one["new_token_mass"] is not None for one in record["datasets"])
    table = Table("language", "", "tokens", "loss", "perplexity", "bits per byte", title_justify="left")
    if has_new_tokens:
        table.add_column("mass on new tokens")
    apart = ", documents apart" if record["reset_attention_mask"] else ""
    length = record["sequence_length"]
    table.title = f"{record['checkpoint']}, sequences of {length} tokens{apart}, {record['dtype']}"
    for one, label in zip(record["datasets"], record_labels(record), strict=True):
        numbers = (_text(one["loss"]), _text(one["perplexity"], 2), _text(one["bits_per_byte"]))
        mass = [_text(one["new_token_mass"])] if has_new_tokens else []
        table.add_row(label, one["group"], f"{one['tokens']:,}", *numbers, *mass)
    means_by_group = record["averages_by_language_group" if record["expansions"] else "averages"]
    for group, means in means_by_group.items():
        if means["loss"] is not None:
            mass = [_text(means["new_token_mass"])] if has_new_tokens else []
            numbers = (_text(means["loss"]), "", _text(means["bits_per_byte"]))
            table.add_row("mean", group, "", *numbers, *mass, style="bold")
    return table


def _routing_table(record: dict[str, Any]) -> Table:
    title = f"Expert 0: share of tokens with it in the top {record['top_k']} (its mean probability)"
    if max(record["base_experts"]) > 1:
        title = f"The base model's experts: share in a token's top {record['top_k']} (their mean probability together)"
    layers = range(len(record["experts_per_layer"]))
    table = Table("language", "", *(f"layer {layer}" for layer in layers), "mean", title=title, title_justify="left")
    for one, label in zip(record["datasets"], record_labels(record), strict=True):
        routing = one["routing"]
        fractions = [*routing["expert0_top_k_share"], routing["mean_expert0_top_k_share"]]
        probabilities = [*routing["expert0_probability"], routing["mean_expert0_probability"]]
        cells = [_fraction_text(fraction, mean) for fraction, mean in zip(fractions, probabilities, strict=True)]
        table.add_row(label, one["group"], *cells)
    return table


def _fraction_text(fraction: float | None, probability: float | None) -> str:
    return "dense" if fraction is None or probability is None else f"{fraction:.1%} ({probability:.2f})"


def _text(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _numbers(values: torch.Tensor) -> list[float | None]:
    return [_number(value) for value in values.tolist()]


def _number(value: float | None) -> float | None:
    """Return None for NaN and infinity, which JSON does not have."""
    return value if value is not None and math.isfinite(value) else None
