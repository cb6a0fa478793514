"""Languages of experts that were trained by another program; import records them for stage 2, evaluation, expansion."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_moe_lpr.data.language_groups import learned_languages
from megatron_moe_lpr.data.language_names import covered
from megatron_moe_lpr.data.original_languages import parse_languages
from megatron_moe_lpr.errors import UserError

ORIGINAL_FLAG = "--original-languages"
EXPANDED_FLAG = "--expanded-languages"


@dataclasses.dataclass(frozen=True)
class ImportedLanguages:
    """Languages of a source with experts, as the user gives them, each in its one spelling."""

    original: list[str]
    """Languages that the dense model knows."""
    expanded: list[str]
    """Languages that the experts were trained on."""

    def history_fields(self) -> dict[str, list[str]]:
        """The fields under which training records languages in a card's history."""
        return {"languages": self.expanded, "original_languages": self.original}


def read_imported_languages(
    original: Sequence[str],
    expanded: Sequence[str],
    has_experts: bool,
    history: Sequence[Mapping[str, Any]],
    place: str,
) -> ImportedLanguages | None:
    """Check the two flags and return their languages; None where neither is given.

    Args:
        original: arguments of the flag `ORIGINAL_FLAG`: codes or names, also several in one, separated by commas.
        expanded: arguments of the flag `EXPANDED_FLAG`.
        has_experts: the source is an adapter or a stock MoE.
        history: what the source records about its training.
        place: the source, for messages.

    Raises:
        UserError: one flag without the other, a language in both, a misspelled one, or a source that has no experts or
            records their languages itself.
    """
    if not original and not expanded:
        return None
    flag = EXPANDED_FLAG if expanded else ORIGINAL_FLAG
    if not has_experts:
        raise UserError(f"{flag}: {place} is dense and gets new experts; training records their languages")
    if learned_languages(history):
        raise UserError(f"{flag}: {place} knows its languages; leave the flag out")
    if not original or not expanded:
        raise UserError(f"{ORIGINAL_FLAG} and {EXPANDED_FLAG}: give both or neither")
    known, _ = parse_languages(original, ORIGINAL_FLAG)
    learned, _ = parse_languages(expanded, EXPANDED_FLAG)
    twice = sorted(covered(learned, known))
    if twice:
        raise UserError(f"{EXPANDED_FLAG}: {', '.join(twice)} is among {ORIGINAL_FLAG} too; leave it out of one")
    return ImportedLanguages(known, learned)
