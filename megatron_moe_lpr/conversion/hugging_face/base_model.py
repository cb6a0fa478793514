"""Name of the base model on the Hugging Face hub, for the model card of an export."""

import dataclasses
import re
from pathlib import Path
from typing import Any

from huggingface_hub.repocard import metadata_load

from megatron_moe_lpr.checkpoint.format.directory import SIDE_DIRECTORY
from megatron_moe_lpr.conversion.hugging_face.gguf_record import read_gguf_record
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.files.json_files import read_json

BASE_MODEL_FILE = "base_model.json"
MODEL_CARD_FILE = "README.md"
OUR_TAG = "moe-lpr"
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
CACHE_PREFIX, SNAPSHOTS = "models--", "snapshots"


@dataclasses.dataclass(frozen=True)
class BaseModel:
    """The dense model whose weights are the original ones of a checkpoint."""

    directory: str
    """Name of the directory that the model was imported from."""
    name: str | None = None
    """Name on the hub; None: unknown. Not `_name_or_path` of config.json: in a fine-tuned model that is its parent."""
    revision: str | None = None
    """Commit on the hub."""
    quantised: str | None = None
    """The types of quantisation that the weights had, for example `Q4_1, Q8_0`; None: they had none."""

    def as_json(self) -> dict[str, Any]:
        """Return the content of `BASE_MODEL_FILE`."""
        return dataclasses.asdict(self)


def find_base_model(path: Path, exported: bool) -> BaseModel:
    """Find the base model of a Hugging Face directory.

    Args:
        exported: whether this project's export has written the directory; then its record names the base model.

    Raises:
        UserError: the record is damaged.
    """
    if not exported:
        return from_gguf(path) or _in_hub_cache(Path(path).resolve())
    recorded = read_base_model(path / SIDE_DIRECTORY)
    name = named_by_card(path)
    if recorded is None:
        return BaseModel(Path(path).resolve().name, name)
    return recorded if recorded.name else dataclasses.replace(recorded, name=name)


def from_gguf(path: Path) -> BaseModel | None:
    """Return the GGUF file that a directory was made from; None: it was made from none."""
    record = read_gguf_record(path)
    return BaseModel(record.file, quantised=", ".join(record.quantised) or None) if record else None


def read_base_model(side_directory: Path) -> BaseModel | None:
    """Read the base model that an import recorded; None: imported by a version without the record.

    Raises:
        UserError: the record is damaged.
    """
    path = side_directory / BASE_MODEL_FILE
    if not path.is_file():
        return None
    fields = read_json(path)
    if not all(value is None or isinstance(value, str) for value in fields.values()) or not fields.get("directory"):
        raise UserError(f"{path}: not the record of a base model; copy the file again")
    return BaseModel(fields["directory"], fields.get("name"), fields.get("revision"), fields.get("quantised"))


def named_by_card(directory: Path) -> str | None:
    """Return the base model that the model card of an export names; None for the card of another model."""
    metadata = card_metadata(directory)
    tags = metadata.get("tags")
    name = metadata.get("base_model") if isinstance(tags, list) and OUR_TAG in tags else None
    return name if isinstance(name, str) and HUB_NAME.fullmatch(name) else None


def card_metadata(directory: Path) -> dict[str, Any]:
    """Return the metadata of a model card; empty if there is no card or it is damaged, which is not an error."""
    try:
        return metadata_load(directory / MODEL_CARD_FILE) or {} if (directory / MODEL_CARD_FILE).is_file() else {}
    except Exception:  # errors of yaml about a foreign file
        return {}


def hub_name(folder: str) -> str | None:
    """Return `org/name` for the folder `models--org--name` of a hub cache; None for another folder."""
    parts = folder.removeprefix(CACHE_PREFIX).split("--")
    return "/".join(parts) if folder.startswith(CACHE_PREFIX) and len(parts) <= 2 and all(parts) else None


def _in_hub_cache(path: Path) -> BaseModel:
    """Read name and commit from a path `.../models--org--name/snapshots/COMMIT`; of another path only the last part."""
    name = hub_name(path.parent.parent.name) if path.parent.name == SNAPSHOTS else None
    return BaseModel(name.split("/")[-1], name, path.name) if name else BaseModel(path.name)
