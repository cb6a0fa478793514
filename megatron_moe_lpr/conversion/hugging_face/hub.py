"""A model by its name on the Hugging Face hub, downloaded into the cache that all programs of Hugging Face share."""

import contextlib
import dataclasses
import re
import shutil
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.hub_errors import explain_hub_errors, is_client_error

CONFIG_FILE = "config.json"
GGUF_SUFFIX = ".gguf"
REVISION_HINT = "is --revision right?"
NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
FILES = (
    *(CONFIG_FILE, "generation_config.json", "*.safetensors", "*.safetensors.index.json"),
    *("tokenizer*", "*.model", "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json"),
    *("chat_template*", "LICENSE*", "README.md"),
)
"""Weights, configuration and tokenizer; licence and README.md, which the model card of an export quotes."""
NOT_NEEDED = ("*/*", "consolidated*")
"""Folders, and Mistral's second copy of the weights."""


@dataclasses.dataclass(frozen=True)
class _Download:
    """Size of a download."""

    commit: str
    missing_bytes: int


def model_directory(model: Path | str, revision: str | None = None, flag: str = "--hf") -> Path:
    """Return a directory with a model's files: `model` itself, or the snapshot of that name on the hub.

    The hub's own client downloads what its cache lacks, with its settings: HF_HOME, HF_TOKEN, HF_HUB_OFFLINE.

    Args:
        model: a directory, a GGUF file, which is dequantised once into such a directory, or ORGANIZATION/NAME where
            there is neither.
        revision: branch, tag or commit on the hub. Default: its main branch.
        flag: names the model in messages.

    Raises:
        UserError: the hub does not answer, refuses access, or has no safetensors weights under that name; or
            `revision` is given for a directory.
    """
    if _is_local(model, revision):
        return _local_directory(Path(model))
    with _as_hub_name(model, flag):
        return _snapshot(str(model), revision)


def model_config_file(model: Path | str, revision: str | None = None) -> Path:
    """Return the config.json of a model; of one on the hub nothing else is downloaded.

    Args:
        model: a directory, its config.json, a GGUF file, or ORGANIZATION/NAME where there is no such directory.
        revision: branch, tag or commit on the hub. Default: its main branch.

    Raises:
        UserError: the hub does not answer, refuses access, or has no such model; or `revision` is given for a path.
    """
    if _is_local(model, revision):
        place = _local_directory(Path(model))
        return place / CONFIG_FILE if place.is_dir() else place
    from huggingface_hub import constants, hf_hub_download

    name = str(model)
    with _as_hub_name(name), explain_hub_errors(name, f"{constants.ENDPOINT}/{name}", REVISION_HINT):
        return Path(hf_hub_download(name, CONFIG_FILE, revision=revision))


def _is_local(model: Path | str, revision: str | None) -> bool:
    """Whether `model` is a path, and no name on the hub; a revision is then refused."""
    is_local = Path(model).exists() or not NAME.fullmatch(str(model))
    if is_local and revision is not None:
        raise UserError(f"--revision {revision}: --hf {model} is no name on the hub; leave the flag out")
    return is_local


def _local_directory(path: Path) -> Path:
    """Return a path, or the directory that a GGUF file is dequantised into."""
    if not (path.name.endswith(GGUF_SUFFIX) and path.is_file()):
        return path
    from megatron_moe_lpr.conversion.hugging_face.gguf_directory import dequantised_directory  # imports torch

    return dequantised_directory(path)


@contextlib.contextmanager
def _as_hub_name(model: Path | str, flag: str = "--hf") -> Iterator[None]:
    """Say in front of a UserError that there is no such directory either."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{flag} {model}: no such directory, and as a name on the Hugging Face hub: {error}") from None


def _snapshot(name: str, revision: str | None) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    page = f"{constants.ENDPOINT}/{name}"
    with explain_hub_errors(name, page, REVISION_HINT):
        if not constants.HF_HUB_OFFLINE and (download := _look_up(name, revision)):
            _announce(name, download)
        if not sys.stderr.isatty():
            disable_progress_bars()
        found = snapshot_download(name, revision=revision, allow_patterns=list(FILES), ignore_patterns=list(NOT_NEEDED))
        return Path(found)


def _look_up(name: str, revision: str | None) -> _Download | None:
    """Return what is to be downloaded; None if the hub cannot be reached, since the cache may hold the model."""
    from huggingface_hub import HfApi, errors, try_to_load_from_cache

    try:
        info = HfApi().model_info(name, revision=revision, files_metadata=True)
    except errors.HfHubHTTPError:
        raise
    except Exception as error:
        if not is_client_error(error):
            raise
        return None
    sizes = {one.rfilename: one.size or 0 for one in info.siblings or [] if _is_needed(one.rfilename)}
    if not any(file.endswith(".safetensors") for file in sizes):
        raise UserError(
            f"{name} has no safetensors weights on the hub; look for a revision or a copy that has, or convert "
            "it with transformers (save_pretrained) and give the directory"
        )
    commit = info.sha or revision or "main"
    missing = [file for file in sizes if not isinstance(try_to_load_from_cache(name, file, revision=commit), str)]
    return _Download(commit, sum(sizes[file] for file in missing))


def _is_needed(file: str) -> bool:
    return any(fnmatch(file, one) for one in FILES) and not any(fnmatch(file, one) for one in NOT_NEEDED)


def _announce(name: str, download: _Download) -> None:
    """Print what will be downloaded. Raises UserError if the disk is too small."""
    from huggingface_hub import constants

    if not download.missing_bytes:
        return
    cache = Path(constants.HF_HUB_CACHE)
    print(f"{name} at {download.commit[:12]}: downloading {_size(download.missing_bytes)} to {cache}", file=sys.stderr)
    place = next(path for path in (cache.absolute(), *cache.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    if free < download.missing_bytes:
        raise UserError(
            f"{_size(download.missing_bytes)} to download, and {cache} has room for {_size(free)}; "
            "free some, or set HF_HOME to another disk"
        )


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:,.1f} MB"
