"""Flags of commands that add experts to a mixture: text by which they choose the experts that new ones copy."""

import dataclasses

from megatron_moe_lpr.conversion.import_options import FROM_FLAG, USED_MOST
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.flag_ranges import PositiveInt


@dataclasses.dataclass(frozen=True)
class SampleOptions:
    """Text of the languages that new experts are for."""

    sample: list[str] = dataclasses.field(default_factory=list)
    """With a mixture as base model: datasets of the new languages, one each; new experts copy those that they use
    most."""
    sample_tokens: PositiveInt = 20_000
    """Tokens of each language of --sample."""

    def decides(self, new_experts_from: str | None) -> bool:
        """Whether the sample chooses the experts to copy.

        Args:
            new_experts_from: value of --new-experts-from; None: not given.

        Raises:
            UserError: one of the two flags lacks the other.
        """
        if not self.sample and new_experts_from != USED_MOST:
            return False
        if not self.sample or new_experts_from not in (None, USED_MOST):
            raise UserError(f"--sample goes with {FROM_FLAG} {USED_MOST}, and that needs --sample")
        return True
