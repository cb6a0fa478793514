"""What a checkpoint knows about itself, so that training, evaluation and export ask for none of it again."""

import dataclasses
import json
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from megatron_moe_lpr.errors import UserError

FORMAT_VERSION = 2
RECORDED_PACKAGES = ("megatron-moe-lpr", "megatron-core", "torch", "safetensors")


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
    """The model's dtype in torch's words, for example `bfloat16`; routers are float32 whatever it says."""
    original_fingerprint: str
    """Digest of every weight of the dense model (`conversion/fingerprint.py`)."""
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
    format_version: int = FORMAT_VERSION

    @property
    def is_moe(self) -> bool:
        """At least one layer has a router."""
        return any(experts > 1 for experts in self.experts_per_layer)

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
        UserError: no such file, not JSON, a field missing or unknown, or a newer format.
    """
    fields = read_json(path)
    version = fields.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise UserError(
            f"{path}: format_version {version!r} is not known to this version (it reads up to {FORMAT_VERSION}); "
            "install a newer megatron-moe-lpr"
        )
    try:
        card = CheckpointCard(**fields)
    except TypeError as error:
        raise UserError(f"{path}: not a valid card: {error}") from None
    if not card.experts_per_layer or not all(isinstance(count, int) for count in card.experts_per_layer):
        raise UserError(f"{path}: experts_per_layer must be a list of integers, one per layer")
    return card


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        UserError: no such file, or something else than a JSON object in it.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: a JSON object is expected")
    return content


def tool_versions() -> dict[str, str]:
    """Versions of Python and of the packages whose code shapes a checkpoint."""
    versions = {"python": platform.python_version()}
    for package in RECORDED_PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions
