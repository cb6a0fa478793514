"""Flags of how documents share a sample: packing, and keeping them apart. Imports no torch, for a fast --help."""

import dataclasses
from typing import Annotated, Literal

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.flag_marks import Acceptable, RecordedAs

Packing = Literal["best-fit", "concatenate"]


@dataclasses.dataclass(frozen=True)
class DocumentOptions:
    """How documents are packed into samples, and whether those of a sample see each other."""

    reset_attention_mask: Acceptable[bool] = False
    """Attend within each document: no token of a sample sees another document."""
    reset_position_ids: Acceptable[bool] = False
    """Count positions from 0 in each document. Needs --reset-attention-mask."""
    pack: Annotated[Packing | None, RecordedAs("data", acceptable=True)] = None
    """best-fit: whole documents, then padding. concatenate: one after the other, cut anywhere. Default: best-fit for
    conversations (preprocess --chat), concatenate for text."""
    pack_apart: Acceptable[bool] = True
    """Where documents are packed best-fit, turn on --reset-attention-mask and --reset-position-ids."""

    def packs(self, chat: bool) -> bool:
        """Whether a dataset is packed best-fit."""
        return chat if self.pack is None else self.pack == "best-fit"

    def apart(self, is_packed: bool) -> "DocumentOptions":
        """Return the flags as they apply to data, some of which is packed best-fit or none."""
        if not (is_packed and self.pack_apart):
            return self
        return dataclasses.replace(self, reset_attention_mask=True, reset_position_ids=True)

    def check(self) -> None:
        """Check that the flags fit together.

        Raises:
            UserError: positions start anew where attention does not.
        """
        if self.reset_position_ids and not self.reset_attention_mask:
            raise UserError(
                "--reset-position-ids: tokens would attend to other documents, whose positions are counted from "
                "another beginning; give --reset-attention-mask too"
            )
