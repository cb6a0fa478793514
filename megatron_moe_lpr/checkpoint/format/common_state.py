"""What all ranks of a run have in common: in common.pt, or among the tensors, where megatron-core 0.19 saves it."""

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from torch.distributed.checkpoint.metadata import MetadataIndex

from megatron_moe_lpr.checkpoint.format.reader import check_index, read_index
from megatron_moe_lpr.checkpoint.untrusted.torch_files import load_file, reason_in_one_line
from megatron_moe_lpr.errors import UserError

COMMON_FILE = "common.pt"
COMMON_KEY = "common_state"
COMMON_ENTRY = f"{COMMON_KEY}/shard_0_1"
"""Name in the index: an object of one shard, which holds a list of one value (serialization.py `save`)."""


def read_common(directory: Path) -> dict[str, Any]:
    """The common state of an iteration directory: plain values and tensors alone.

    Nothing in it is run, whatever TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD says.

    Raises:
        UserError: it is missing, damaged, or holds something that no checkpoint needs.
    """
    path = directory / COMMON_FILE
    try:
        with _stream(path) as stream:
            content = load_file(stream)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; copy the checkpoint again") from None
    except Exception as error:  # damaged pickles and archives raise almost anything
        raise UserError(f"{path}: damaged, or not of a checkpoint: {reason_in_one_line(error)}") from None
    if isinstance(content, list) and len(content) == 1 and not path.exists():
        content = content[0]
    if not isinstance(content, dict):
        raise UserError(f"{path}: not of a checkpoint: a dictionary is expected")
    return content


@contextlib.contextmanager
def _stream(path: Path) -> Iterator[BinaryIO]:
    """The file, or in its absence the entry of that name among the tensors."""
    place = None if path.exists() else _entry(path.parent)
    with open(path.parent / place.relative_path if place else path, "rb") as stream:
        if place is None:
            yield stream
        else:
            stream.seek(place.offset)
            yield io.BytesIO(stream.read(place.length))


def _entry(directory: Path) -> Any:
    """Where the index says that the entry lies; None: it has none."""
    if not (directory / ".metadata").is_file():
        return None
    index = read_index(directory / ".metadata")
    check_index(index, directory)
    return (index.storage_data or {}).get(MetadataIndex(COMMON_ENTRY))
