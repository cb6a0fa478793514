"""The language group of each language, from a checkpoint's history: 0 original, then one for each expansion."""

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_moe_lpr.data.language_names import canonical_language, covered

EXPANSION = "expansion"
"""Value of `stage` in the history entry of an expansion."""
ADDED_EXPERTS = "added experts"
"""Value of `stage` in the history entry of an import that adds experts to a mixture."""
IMPORTED_ADAPTER, IMPORTED_MIXTURE = "imported adapter", "imported mixture"
"""Values of `stage` in the history entry of an import of experts that were trained elsewhere."""


def original_languages(history: Sequence[Mapping[str, Any]]) -> set[str]:
    """Return all languages that any run of the history named as original."""
    return {canonical_language(name) for entry in history for name in entry.get("original_languages") or ()}


def trained_languages(entry: Mapping[str, Any]) -> set[str]:
    """Return the languages of the training data of one run."""
    return set(map(canonical_language, entry.get("languages") or ()))


def learned_languages(history: Sequence[Mapping[str, Any]]) -> list[set[str]]:
    """Return the languages added by the first upcycling, by the second expansion, and so on.

    A language is added by the first run that trains new experts on it: stage 1 or sft, here or before trained experts
    were imported. `--stage full` trains the dense model, so its languages do not count. The last set is empty if
    nothing was trained after the expansion.
    """
    original = original_languages(history)
    seen: set[str] = set()
    groups: list[set[str]] = [set()]
    for entry in history:
        if entry.get("stage") == EXPANSION:
            groups.append(set())
        elif entry.get("stage") in ("1", "sft", IMPORTED_ADAPTER, IMPORTED_MIXTURE):
            trained = trained_languages(entry)
            new = trained - covered(trained, original) - seen
            groups[-1] |= new
            seen |= new
    return groups if any(groups) else []


def groups_with_prior(
    history: Sequence[Mapping[str, Any]], original: Sequence[str], num_groups: int
) -> list[list[str]]:
    """Return the language groups before the latest expansion: original languages, then those of earlier expansions.

    Args:
        history: history entries of the checkpoint.
        original: languages that this run names as original, in addition to the history.
        num_groups: language groups of the model, including the original and the latest.
    """
    known = original_languages(history) | set(original)
    earlier = learned_languages(history)[: num_groups - 2]
    return [
        sorted(known if num_groups > 2 else original),
        *(sorted(group - covered(group, known)) for group in earlier),
    ]


def group_name(group: int) -> str:
    """Return the name of a language group: `original`, `expanded`, `expanded 2`, ..."""
    return ("original", "expanded")[group] if group < 2 else f"expanded {group}"
