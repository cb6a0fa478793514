"""The record that a Hugging Face directory carries if it was made from a GGUF file."""

import dataclasses
from pathlib import Path

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.files.json_files import read_json

RECORD_FILE = "gguf.json"
"""Its presence says that the directory is complete."""
UNQUANTISED = ("F32", "F16", "BF16")
"""GGUF's types that hold weights as they were trained."""


@dataclasses.dataclass(frozen=True)
class GGUFRecord:
    """The GGUF file that a directory was made from."""

    file: str
    """Its name."""
    sha256: str
    types: dict[str, int]
    """Number of tensors of each of GGUF's types."""

    @property
    def quantised(self) -> list[str]:
        """Types that hold rounded weights, the most frequent one first."""
        return [kind for kind in sorted(self.types, key=lambda kind: -self.types[kind]) if kind not in UNQUANTISED]


def read_gguf_record(directory: Path) -> GGUFRecord | None:
    """Read what `dequantised_directory` wrote about the file; None: the directory has another origin.

    Raises:
        UserError: the record is damaged.
    """
    path = directory / RECORD_FILE
    if not path.is_file():
        return None
    try:
        return GGUFRecord(**read_json(path))
    except TypeError:
        raise UserError(f"{path}: not the record of a GGUF file; remove {directory} to have it written again") from None
