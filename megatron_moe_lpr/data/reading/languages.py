"""Numbers of languages: the tag that every token of a batch carries."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from megatron_moe_lpr.data.language_names import covered

if TYPE_CHECKING:  # tools that only count languages run without torch, which takes a second to import
    import torch

PADDING_LANGUAGE = -1
"""Tag of padding tokens, which belong to no language and enter no loss or statistic."""


class LanguageRegistry:
    """Languages of a run's data, sorted and numbered from 0; the same on every rank."""

    def __init__(self, languages: Iterable[str]) -> None:
        self.names: tuple[str, ...] = tuple(sorted(set(languages)))
        self._ids = {name: index for index, name in enumerate(self.names)}

    def __len__(self) -> int:
        return len(self.names)

    def id(self, name: str) -> int:
        """Return the number of a language; raises KeyError if the data does not contain it."""
        return self._ids[name]

    def original_ids(self, names: Iterable[str]) -> frozenset[int]:
        """Return the numbers of those languages in the data that one of `names` covers."""
        return frozenset(self._ids[name] for name in covered(self.names, names))

    def group_table(self, groups: Sequence[Sequence[str]]) -> "torch.Tensor":
        """Return int64 [languages + 1]: each language's index in `groups`, -1 for other languages and (last) padding.

        Args:
            groups: original languages, then those of each expansion except the latest; may name languages without data.
        """
        import torch

        table = torch.full((len(self) + 1,), -1)
        for index, names in enumerate(groups):
            for language in self.original_ids(names):
                table[language] = index
        return table
