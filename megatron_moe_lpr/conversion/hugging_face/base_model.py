"""Which model on the Hugging Face hub an imported directory is, for the card of an export."""

import dataclasses
import re
from pathlib import Path
from typing import Any

from huggingface_hub.repocard import metadata_load

from megatron_moe_lpr.checkpoint.format.directory import SIDE_DIRECTORY
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.files.json_files import read_json

BASE_MODEL_FILE = "base_model.json"
MODEL_CARD = "README.md"
OUR_TAG = "moe-lpr"
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
CACHE_PREFIX, SNAPSHOTS = "models--", "snapshots"


@dataclasses.dataclass(frozen=True)
class BaseModel:
    """The dense model whose weights are the original ones of a checkpoint."""

    directory: str
    """The name of the directory it was imported from."""
    name: str | None = None
    """On the hub; None: unknown. Never a configuration's `_name_or_path`: of a fine-tuned model that is its parent."""
    revision: str | None = None
    """The commit on the hub."""

    def as_json(self) -> dict[str, Any]:
        """What `BASE_MODEL_FILE` holds."""
        return dataclasses.asdict(self)


def base_model_of(path: Path, exported: bool) -> BaseModel:
    """The base model of what lies in `path`.

    Args:
        exported: this project's export has written the directory, so its base is the one that was recorded then.

    Raises:
        UserError: the record is damaged.
    """
    if not exported:
        return _in_hub_cache(Path(path).resolve())
    recorded = read_base_model(path / SIDE_DIRECTORY)
    name = named_by_card(path)
    if recorded is None:
        return BaseModel(Path(path).resolve().name, name)
    return recorded if recorded.name else dataclasses.replace(recorded, name=name)


def read_base_model(side_directory: Path) -> BaseModel | None:
    """What an import recorded; None: one of an earlier version.

    Raises:
        UserError: the record is damaged.
    """
    path = side_directory / BASE_MODEL_FILE
    if not path.is_file():
        return None
    fields = read_json(path)
    if not all(value is None or isinstance(value, str) for value in fields.values()) or not fields.get("directory"):
        raise UserError(f"{path}: not the record of a base model; copy the file again")
    return BaseModel(fields["directory"], fields.get("name"), fields.get("revision"))


def named_by_card(directory: Path) -> str | None:
    """The base model that an export's README.md names; None of another model's README.md."""
    metadata = card_metadata(directory)
    tags = metadata.get("tags")
    name = metadata.get("base_model") if isinstance(tags, list) and OUR_TAG in tags else None
    return name if isinstance(name, str) and HUB_NAME.fullmatch(name) else None


def card_metadata(directory: Path) -> dict[str, Any]:
    """The metadata of README.md; empty where there is none or it is damaged, which is no reason to fail."""
    try:
        return metadata_load(directory / MODEL_CARD) or {} if (directory / MODEL_CARD).is_file() else {}
    except Exception:  # whatever yaml finds wrong in a file of the base model's
        return {}


def hub_name(folder: str) -> str | None:
    """`org/name` of a hub cache's folder `models--org--name`; None: not such a folder."""
    parts = folder.removeprefix(CACHE_PREFIX).split("--")
    return "/".join(parts) if folder.startswith(CACHE_PREFIX) and len(parts) <= 2 and all(parts) else None


def _in_hub_cache(path: Path) -> BaseModel:
    """`.../models--org--name/snapshots/COMMIT` says all; another directory its own name alone."""
    name = hub_name(path.parent.parent.name) if path.parent.name == SNAPSHOTS else None
    return BaseModel(name.split("/")[-1], name, path.name) if name else BaseModel(path.name)
