"""What a checkpoint knows about itself, so that training, evaluation and export ask for none of it again."""

import dataclasses
import json
import platform
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from megatron_moe_lpr.errors import UserError, naming
from megatron_moe_lpr.files.json_files import checked_integer, is_integer, is_number, read_json, shown
from megatron_moe_lpr.model.configuration.architecture import FAMILIES, MAX_LAYERS

FORMAT_VERSION = 4
MODEL_DTYPES = ("float32", "bfloat16", "float16")
# Far above any model. A card that declares more would take the memory of the machine before a tensor is looked at.
MAX_EXPERTS = 1024
MAX_EXPERTS_TOGETHER = 65_536
RECORDED_PACKAGES = ("megatron-moe-lpr", "megatron-core", "torch", "safetensors")


@dataclasses.dataclass
class Base:
    """The checkpoint that holds the weights which one with only trained weights does not."""

    path: str
    """Where it was when the run started from it."""
    checksum: str
    """What identifies its weights (`trainable_only.weights_checksum`)."""

    def __post_init__(self) -> None:
        if not isinstance(self.path, str) or not isinstance(self.checksum, str):
            raise TypeError("base: path and checksum must be text")


@dataclasses.dataclass
class CheckpointCard:
    """The facts about a checkpoint that its tensors do not tell."""

    family: str
    """The dense family's `model_type`: llama, mistral, qwen2 or qwen3."""
    experts_per_layer: list[int]
    """One entry per layer: the number of experts, the original one included; 1: the layer stayed dense."""
    top_k: int
    """Experts per token in the layers that have a router."""
    dtype: str
    """The dtype of the dense model's matrices in torch's words, for example `float16`, which frozen weights keep. The
    tensors say their own: trained ones have the dtype of their run's arithmetic, and routers are float32."""
    original_fingerprint: str
    """Digest of every weight of the dense model (`conversion/tensors/fingerprint.py`)."""
    router_seed: int | None = None
    """Seed of the routers' initial values; None where they came from elsewhere."""
    tokenizer_files: dict[str, str] = dataclasses.field(default_factory=dict)
    """SHA-256 of each tokenizer file beside the card."""
    tool_versions: dict[str, str] = dataclasses.field(default_factory=dict)
    """Versions of the packages that converted the dense model."""
    history: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """One entry per stage of training: stage, languages, original_languages, iterations, tokens, ..."""
    expansions: list[list[int]] = dataclasses.field(default_factory=list)
    """New experts of each layer by expansion, the first one first; empty: one expansion added them all."""
    openness: float = 1.0
    """Weight of the latest expansion's experts in the routers' softmax; 0: added and not used yet, 1: trained in."""
    inserted_blocks: list[int] = dataclasses.field(default_factory=list)
    """Layers that block expansion inserted, counted from 0 in the grown model; empty: none."""
    base: Base | None = None
    """Only where --save-trainable-only left out what did not train: the checkpoint that has it."""
    format_version: int = FORMAT_VERSION

    @property
    def is_moe(self) -> bool:
        """At least one layer has a router."""
        return any(experts > 1 for experts in self.experts_per_layer)

    @property
    def compute_dtype(self) -> str:
        """What to compute in where nobody says: as the last run did, else in the model's own dtype. Nothing computes in
        float16, whose range is too small for gradients; bfloat16 takes its place."""
        recorded = (entry.get("dtype") for entry in reversed(self.history))
        dtype = next((name for name in recorded if name in MODEL_DTYPES), self.dtype)
        return "bfloat16" if dtype == "float16" else dtype

    @property
    def num_experts(self) -> int:
        """The largest number of experts in any layer; 1 for a dense model."""
        return max(self.experts_per_layer)

    def write(self, path: Path) -> None:
        """Write the card as JSON."""
        content = dataclasses.asdict(self) | {"format_version": FORMAT_VERSION}
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_card(path: Path) -> CheckpointCard:
    """Read a card.

    Raises:
        DamagedFile: not JSON.
        UserError: no such file, a field missing, unknown or of the wrong type or size, or a newer format.
    """
    fields = read_json(path)
    _check_format(fields, path)
    try:
        base = Base(**fields["base"]) if fields.get("base") else None
        card = CheckpointCard(**fields | {"base": base})
    except TypeError as error:
        raise UserError(f"{path}: not a valid card: {error}") from None
    check_experts(card.experts_per_layer, f"{path}: experts_per_layer")
    for name, is_valid in _FIELD_CHECKS.items():
        if not is_valid(getattr(card, name)):
            raise UserError(f"{path}: {name} cannot be {shown(getattr(card, name))}; copy the file again")
    checked_integer(card.top_k, "top_k", str(path), 1, card.num_experts)
    _check_expansions(card, path)
    if card.inserted_blocks and (card.is_moe or card.inserted_blocks[-1] >= len(card.experts_per_layer)):
        raise UserError(f"{path}: inserted_blocks do not belong to experts_per_layer; copy the file again")
    return card


def check_experts(experts_per_layer: object, place: str) -> None:
    """Refuse counts that no model has before memory is taken for them; `place` names them in the message.

    Raises:
        UserError: not a list of whole numbers, one per layer, or too many layers or experts.
    """
    if not isinstance(experts_per_layer, list) or not 1 <= len(experts_per_layer) <= MAX_LAYERS:
        raise UserError(f"{place}: a list of 1 to {MAX_LAYERS:,} integers is expected, one per layer")
    for experts in experts_per_layer:
        if not is_integer(experts, 1, MAX_EXPERTS):
            raise UserError(f"{place}: a layer has 1 to {MAX_EXPERTS:,} experts, not {shown(experts)}")
    if sum(experts_per_layer) > MAX_EXPERTS_TOGETHER:
        raise UserError(f"{place}: {sum(experts_per_layer):,} experts in all; at most {MAX_EXPERTS_TOGETHER:,} can be")


def _check_expansions(card: CheckpointCard, path: Path) -> None:
    new = [experts - 1 for experts in card.experts_per_layer]
    if card.expansions and [sum(layer) for layer in zip(*card.expansions, strict=True)] != new:
        raise UserError(f"{path}: expansions do not add up to experts_per_layer; copy the file again")
    if card.openness < 1 and len(card.expansions) < 2:
        raise UserError(f"{path}: openness {card.openness:g} without a second expansion; copy the file again")


def _is_text_table(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def _is_history(value: object) -> bool:
    """Entries of training and, in each, languages as lists of names."""
    return isinstance(value, list) and all(
        isinstance(entry, dict)
        and all(
            isinstance(languages, list) and all(isinstance(language, str) for language in languages)
            for name, languages in entry.items()
            if name in ("languages", "original_languages")
        )
        for entry in value
    )


def _is_inserted_blocks(value: object) -> bool:
    """Layers in rising order, none before the first block, which no block could be a copy of."""
    return (
        isinstance(value, list)
        and all(is_integer(layer, 1, MAX_LAYERS) for layer in value)
        and value == sorted(set(value))
    )


def _is_expansions(value: object) -> bool:
    """For each expansion as many numbers of new experts as the first one names."""
    return isinstance(value, list) and all(
        isinstance(added, list)
        and len(added) == len(value[0])
        and all(is_integer(number, 0, MAX_EXPERTS) for number in added)
        for added in value
    )


_FIELD_CHECKS = {
    "family": lambda value: isinstance(value, str) and value in FAMILIES,
    "dtype": lambda value: isinstance(value, str) and value in MODEL_DTYPES,
    "original_fingerprint": lambda value: isinstance(value, str),
    "router_seed": lambda value: value is None or type(value) is int,
    "tokenizer_files": _is_text_table,
    "tool_versions": _is_text_table,
    "history": _is_history,
    "expansions": _is_expansions,
    "inserted_blocks": _is_inserted_blocks,
    "openness": lambda value: is_number(value, 0, 1),
}


def _check_format(fields: dict[str, Any], path: Path) -> None:
    version = fields.get("format_version")
    if not is_integer(version, 1, FORMAT_VERSION):
        raise UserError(
            f"{path}: format_version {shown(version)} is not known to this version (it reads up to {FORMAT_VERSION}); "
            "install a newer megatron-moe-lpr"
        )


def refuse_newer_format(path: Path) -> None:
    """Refuse a card of a newer format, whatever else is in it; one that says nothing of the kind passes.

    For who compares checksums next: what a newer version has written must not be taken for damage.

    Raises:
        UserError: the format is newer.
    """
    try:
        with naming(path):
            fields = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError, RecursionError):
        return
    if isinstance(fields, dict) and is_integer(fields.get("format_version"), FORMAT_VERSION + 1):
        _check_format(fields, path)


def tool_versions(packages: Iterable[str] = RECORDED_PACKAGES) -> dict[str, str]:
    """Versions of Python and of those packages that are installed, by default those whose code shapes a checkpoint."""
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions
