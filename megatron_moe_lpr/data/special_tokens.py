"""Special tokens that a text mentions: `<|endoftext|>` in a page about tokenizers is text, and ends no document."""

import re
from collections.abc import Collection


class SpecialTokenSearch:
    """Finds mentions of special tokens in texts."""

    def __init__(self, tokens: Collection[str]) -> None:
        ordered = sorted(filter(None, tokens), key=lambda token: (-len(token), token))
        self._pattern = re.compile("|".join(map(re.escape, ordered))) if ordered else None
        self._beginnings = {token[:2] for token in ordered}

    def first(self, text: str) -> str | None:
        """The first special token that the text mentions."""
        # Most texts hold no beginning of one, and looking for that is much faster than the pattern.
        if self._pattern is None or not any(beginning in text for beginning in self._beginnings):
            return None
        match = self._pattern.search(text)
        return match[0] if match else None
