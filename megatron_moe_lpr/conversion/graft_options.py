"""Options of a graft, which turns an upcycled base model into an upcycled instruct model."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

from megatron_moe_lpr.flag_ranges import Range


@dataclasses.dataclass(frozen=True)
class GraftOptions:
    """What is grafted onto which checkpoint: flags of `moe-lpr graft`."""

    load: Path
    """Checkpoint directory, or one iteration in it, upcycled from --base and trained."""
    base: Path
    """The dense base model that --load was upcycled from: a Hugging Face directory, or a name on the hub."""
    instruct: Path
    """What post-training made of the base model: a Hugging Face directory, or a name on the hub."""
    scale: Annotated[float, Range(0, 2)] = 1.0
    """Part of the difference (instruct minus base) that the new experts get."""
    new_rows: Literal["difference", "unchanged"] = "difference"
    """Rows of tokens that a vocabulary extension added: they get the mean difference of the tokens that they replace,
    times --scale, or stay."""
    base_checkpoint: Path | None = None
    """For a --load of --save-trainable-only: directory of the checkpoint that its run started from, if it has moved."""
    verify: bool = True
    """Compare the checkpoint's files with their checksums before use."""
