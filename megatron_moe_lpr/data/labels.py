"""Labels of datasets in curves and tables: the language, plus a part of the path if several share it."""

from collections.abc import Sequence
from pathlib import PurePath


def dataset_labels(datasets: Sequence[tuple[str, str]]) -> list[str]:
    """Return a unique label for each dataset.

    Args:
        datasets: (name or path, language) of each.

    Returns:
        The language, if it has one dataset. Otherwise `language/name` with as many trailing parts of the path as are
        needed to distinguish them, or a number if none do: `el/news`, `el/books`.
    """
    labels = []
    for position, (name, language) in enumerate(datasets):
        rivals = [other for index, (other, its) in enumerate(datasets) if its == language and index != position]
        labels.append(f"{language}/{_distinct(name, rivals)}" if rivals else language)
    return [
        label if labels.count(label) == 1 else f"{label.rstrip('/')}/{labels[:position].count(label) + 1}"
        for position, label in enumerate(labels)
    ]


def _distinct(name: str, rivals: Sequence[str]) -> str:
    parts = PurePath(name).parts
    others = [PurePath(rival).parts for rival in rivals]
    for count in range(1, len(parts) + 1):
        if all(other[-count:] != parts[-count:] for other in others):
            return "/".join(parts[-count:]).lstrip("/")
    return "/".join(parts[-1:])
