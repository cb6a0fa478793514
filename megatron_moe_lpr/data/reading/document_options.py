"""Flags that keep the documents of a sample apart. Imports no torch, for a fast --help."""

import dataclasses

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.flag_marks import Acceptable


@dataclasses.dataclass(frozen=True)
class DocumentOptions:
    """Whether the documents that are packed into a sample see each other."""

    reset_attention_mask: Acceptable[bool] = False
    """Attend within each document: no token of a sample sees another document."""
    reset_position_ids: Acceptable[bool] = False
    """Count positions from 0 in each document. Needs --reset-attention-mask."""

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
