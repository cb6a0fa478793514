"""Which group each language belongs to: 0, the original ones, and one for each expansion, as the history tells."""

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_moe_lpr.data.language_names import canonical_language, covered

EXPANSION = "expansion"
"""The `stage` of an expansion's entry in a checkpoint's history."""
IMPORTED_ADAPTER, IMPORTED_MIXTURE = "imported adapter", "imported mixture"
"""The `stage` of an import's entry, of experts that were trained elsewhere."""


def original_languages(history: Sequence[Mapping[str, Any]]) -> set[str]:
    """All that any run called original."""
    return {canonical_language(name) for entry in history for name in entry.get("original_languages") or ()}


def trained_languages(entry: Mapping[str, Any]) -> set[str]:
    """Languages of the training data of one run."""
    return set(map(canonical_language, entry.get("languages") or ()))


def learned_languages(history: Sequence[Mapping[str, Any]]) -> list[set[str]]:
    """Languages that were first trained on after the first expansion, after the second, and so on.

    Learned in a stage 1, here or before the experts were imported: what `--stage full` trained on belongs to the dense
    model. The last group may be empty, of an expansion that nothing was trained after.
    """
    original = original_languages(history)
    seen: set[str] = set()
    groups: list[set[str]] = [set()]
    for entry in history:
        if entry.get("stage") == EXPANSION:
            groups.append(set())
        elif entry.get("stage") in ("1", IMPORTED_ADAPTER, IMPORTED_MIXTURE):
            trained = trained_languages(entry)
            new = trained - covered(trained, original) - seen
            groups[-1] |= new
            seen |= new
    return groups if any(groups) else []


def groups_with_prior(
    history: Sequence[Mapping[str, Any]], original: Sequence[str], num_groups: int
) -> list[list[str]]:
    """Languages known before the latest expansion: the original ones, then those of each expansion before it.

    Args:
        original: what this run calls original, beside what the history does.
        num_groups: of the model, the original and the latest one counted.
    """
    known = original_languages(history) | set(original)
    earlier = learned_languages(history)[: num_groups - 2]
    return [
        sorted(known if num_groups > 2 else original),
        *(sorted(group - covered(group, known)) for group in earlier),
    ]


def group_name(group: int) -> str:
    """`original`, `expanded`, `expanded 2`, ..."""
    return ("original", "expanded")[group] if group < 2 else f"expanded {group}"
