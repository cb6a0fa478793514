"""The checkpoint card (card.json): what training, evaluation and export need to know about a checkpoint."""

import dataclasses
import json
import operator
import platform
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from megatron_moe_lpr.errors import UserError, name_file_in_oserror
from megatron_moe_lpr.files.json_files import abbreviated, checked_integer, is_integer, is_number, read_json, write_json
from megatron_moe_lpr.model.configuration.architecture import MAX_LAYERS, MAX_VOCABULARY
from megatron_moe_lpr.model.configuration.families import FAMILIES, MIXTURES

FORMAT_VERSION = 5
PARENT_KEY = "base"
"""The name of `CheckpointCard.parent` in card.json."""
MODEL_DTYPES = ("float32", "bfloat16", "float16")
# Far above any model. A card with more could exhaust the memory before any tensor is read.
MAX_EXPERTS = 1024
MAX_EXPERTS_TOGETHER = 65_536
RECORDED_PACKAGES = ("megatron-moe-lpr", "megatron-core", "torch", "safetensors")


@dataclasses.dataclass
class ParentCheckpoint:
    """The checkpoint that holds the weights which a checkpoint of only trained weights leaves out."""

    path: str
    """The iteration directory that the run started from."""
    checksum: str
    """Identifies the weights (`chain.weights_checksum`)."""

    def __post_init__(self) -> None:
        if not isinstance(self.path, str) or not isinstance(self.checksum, str):
            raise TypeError("base: path and checksum must be text")


@dataclasses.dataclass
class EarlierTokenizer:
    """A tokenizer from before a vocabulary extension, and whose datasets still have the ids of the present one."""

    fingerprint: str
    """Fingerprint that datasets made with it record."""
    unchanged: list[str]
    """Languages of which the extension changed no document; datasets of them need not be made again."""

    def __post_init__(self) -> None:
        is_list = isinstance(self.unchanged, list) and all(isinstance(name, str) for name in self.unchanged)
        if not isinstance(self.fingerprint, str) or not is_list:
            raise TypeError("earlier_tokenizers: a fingerprint and a list of languages are expected")


@dataclasses.dataclass
class CheckpointCard:
    """Facts about a checkpoint that cannot be read from its tensors."""

    family: str
    """The base model's `model_type`, a name of `model/configuration/families.py`."""
    experts_per_layer: list[int]
    """By layer: the number of experts including the original ones; 1: a dense layer."""
    top_k: int
    """Experts per token in the layers that have a router."""
    dtype: str
    """torch's name of the dtype of the dense model's matrices, for example `float16`, which frozen weights keep.
    Trained tensors have the dtype in which their run computed, and routers float32."""
    original_fingerprint: str
    """Digest of every weight of the dense model (`conversion/tensors/fingerprint.py`)."""
    router_seed: int | None = None
    """Seed of the routers' initial values; None: they were not drawn here."""
    tokenizer_files: dict[str, str] = dataclasses.field(default_factory=dict)
    """By name of each tokenizer file beside the card: its SHA-256."""
    tool_versions: dict[str, str] = dataclasses.field(default_factory=dict)
    """Versions of the packages that converted the dense model."""
    history: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """One entry per training stage: stage, languages, original_languages, iterations, tokens, ..."""
    expansions: list[list[int]] = dataclasses.field(default_factory=list)
    """By expansion, oldest first: new experts of each layer; empty: one expansion added all."""
    openness: float = 1.0
    """Weight of the latest expansion's experts in the routers' softmax, from 0 (not used yet) to 1."""
    inserted_blocks: list[int] = dataclasses.field(default_factory=list)
    """Layers that block expansion inserted, counted from 0 in the expanded model; empty: none."""
    new_tokens: list[int] = dataclasses.field(default_factory=list)
    """By vocabulary extension, oldest first: rows that it added to embedding and output layer; empty: none. 0: an
    expansion that left the vocabulary as it was."""
    earlier_tokenizers: list[EarlierTokenizer] = dataclasses.field(default_factory=list)
    """Tokenizers from before each vocabulary extension, oldest first."""
    parent: ParentCheckpoint | None = None
    """The checkpoint with the weights that --save-trainable-only left out; None: this one holds all. `base` on disk."""
    format_version: int = FORMAT_VERSION

    @property
    def is_moe(self) -> bool:
        """Whether at least one layer has a router."""
        return any(experts > 1 for experts in self.experts_per_layer)

    @property
    def has_mixture_base(self) -> bool:
        """Whether the base model is a mixture, all of whose experts are original ones."""
        return self.family in MIXTURES

    @property
    def base_experts(self) -> list[int]:
        """Original experts of each layer: 1, or those of the mixture base."""
        if not self.has_mixture_base:
            return [1] * len(self.experts_per_layer)
        return [sum(layer) for layer in zip(self.experts_per_layer, *map(_negated, self.expansions), strict=True)]

    @property
    def compute_dtype(self) -> str:
        """The default dtype to compute in: that of the last run, else the model's own. float16, whose range is too
        small for gradients, is replaced by bfloat16."""
        recorded = (entry.get("dtype") for entry in reversed(self.history))
        dtype = next((name for name in recorded if name in MODEL_DTYPES), self.dtype)
        return "bfloat16" if dtype == "float16" else dtype

    @property
    def added_rows(self) -> int:
        """Rows that vocabulary extensions have added to the dense model's embedding."""
        return sum(self.new_tokens)

    @property
    def num_experts(self) -> int:
        """The largest number of experts of any layer; 1 for a dense model."""
        return max(self.experts_per_layer)

    def write(self, path: Path) -> None:
        """Write the card to a JSON file."""
        fields = dataclasses.asdict(self) | {"format_version": FORMAT_VERSION}
        content = {PARENT_KEY if name == "parent" else name: value for name, value in fields.items()}
        write_json(content, path)


def read_card(path: Path) -> CheckpointCard:
    """Read a card.

    Raises:
        DamagedFile: the file is not JSON.
        UserError: no such file, a field missing, unknown or of the wrong type or size, or a newer format.
    """
    fields = read_json(path)
    _check_format(fields, path)
    try:
        parent, tokenizers = fields.pop(PARENT_KEY, None), fields.pop("earlier_tokenizers", [])
        card = CheckpointCard(
            **fields,
            parent=ParentCheckpoint(**parent) if parent else None,
            earlier_tokenizers=[EarlierTokenizer(**one) for one in tokenizers],
        )
    except TypeError as error:
        raise UserError(f"{path}: not a valid card: {error}") from None
    check_experts(card.experts_per_layer, f"{path}: experts_per_layer")
    for name, is_valid in _FIELD_CHECKS.items():
        if not is_valid(getattr(card, name)):
            raise UserError(f"{path}: {name} cannot be {abbreviated(getattr(card, name))}; copy the file again")
    checked_integer(card.top_k, "top_k", str(path), 1, card.num_experts)
    _check_expansions(card, path)
    if card.inserted_blocks and (card.is_moe or card.inserted_blocks[-1] >= len(card.experts_per_layer)):
        raise UserError(f"{path}: inserted_blocks do not belong to experts_per_layer; copy the file again")
    return card


def check_experts(experts_per_layer: object, place: str) -> None:
    """Check numbers of experts before memory is allocated for them; `place` names them in messages.

    Raises:
        UserError: not a list of whole numbers, one per layer, or too many layers or experts.
    """
    if not isinstance(experts_per_layer, list) or not 1 <= len(experts_per_layer) <= MAX_LAYERS:
        raise UserError(f"{place}: a list of 1 to {MAX_LAYERS:,} integers is expected, one per layer")
    for experts in experts_per_layer:
        if not is_integer(experts, 1, MAX_EXPERTS):
            raise UserError(f"{place}: a layer has 1 to {MAX_EXPERTS:,} experts, not {abbreviated(experts)}")
    if sum(experts_per_layer) > MAX_EXPERTS_TOGETHER:
        raise UserError(f"{place}: {sum(experts_per_layer):,} experts in all; at most {MAX_EXPERTS_TOGETHER:,} can be")


def _check_expansions(card: CheckpointCard, path: Path) -> None:
    added = [sum(layer) for layer in zip(*card.expansions, strict=True)]
    new = [experts - 1 for experts in card.experts_per_layer]
    fits = added in ([], new)
    if card.has_mixture_base:
        fits = len(added) == len(new) and all(map(operator.le, added, new))
    if not fits:
        raise UserError(f"{path}: expansions do not add up to experts_per_layer; copy the file again")
    if card.openness < 1 and len(card.expansions) < 2 and not card.has_mixture_base:
        raise UserError(f"{path}: openness {card.openness:g} without a second expansion; copy the file again")


def _negated(numbers: list[int]) -> list[int]:
    return [-number for number in numbers]


def _is_text_table(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def _is_history(value: object) -> bool:
    """Whether a value is a list of entries in which languages are lists of names."""
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
    """Whether a value is a list of layers in rising order. Layer 0 cannot be inserted: no layer before it to copy."""
    return (
        isinstance(value, list)
        and all(is_integer(layer, 1, MAX_LAYERS) for layer in value)
        and value == sorted(set(value))
    )


def _is_expansions(value: object) -> bool:
    """Whether a value is a list of expansions, each with a number of new experts for every layer."""
    return isinstance(value, list) and all(
        isinstance(added, list)
        and len(added) == len(value[0])
        and all(is_integer(number, 0, MAX_EXPERTS) for number in added)
        for added in value
    )


_FIELD_CHECKS = {
    "family": lambda value: isinstance(value, str) and value in FAMILIES | MIXTURES,
    "dtype": lambda value: isinstance(value, str) and value in MODEL_DTYPES,
    "original_fingerprint": lambda value: isinstance(value, str),
    "router_seed": lambda value: value is None or type(value) is int,
    "tokenizer_files": _is_text_table,
    "tool_versions": _is_text_table,
    "history": _is_history,
    "expansions": _is_expansions,
    "inserted_blocks": _is_inserted_blocks,
    "new_tokens": lambda value: isinstance(value, list) and all(is_integer(rows, 0, MAX_VOCABULARY) for rows in value),
    "openness": lambda value: is_number(value, 0, 1),
}


def _check_format(fields: dict[str, Any], path: Path) -> None:
    version = fields.get("format_version")
    if not is_integer(version, 1, FORMAT_VERSION):
        raise UserError(
            f"{path}: format_version {abbreviated(version)} is not known to this version (it reads up to "
            f"{FORMAT_VERSION}); install a newer megatron-moe-lpr"
        )


def refuse_newer_format(path: Path) -> None:
    """Refuse a card of a newer format; any other card passes, even a damaged one.

    To be called before checksums are compared, so that what a newer version wrote is not reported as damage.

    Raises:
        UserError: the format is newer.
    """
    try:
        with name_file_in_oserror(path):
            fields = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError, RecursionError):
        return
    if isinstance(fields, dict) and is_integer(fields.get("format_version"), FORMAT_VERSION + 1):
        _check_format(fields, path)


def tool_versions(packages: Iterable[str] = RECORDED_PACKAGES) -> dict[str, str]:
    """Versions of Python and of the installed ones of `packages`, by default those that form a checkpoint."""
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions
