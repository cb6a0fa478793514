"""Find special tokens that occur as plain text, such as `<|endoftext|>` in an article about tokenizers."""

import re
from collections.abc import Collection


class SpecialTokenSearch:
    """Finds special tokens that occur in texts."""

    def __init__(self, tokens: Collection[str]) -> None:
        ordered = sorted(filter(None, tokens), key=lambda token: (-len(token), token))
        self._pattern = re.compile("|".join(map(re.escape, ordered))) if ordered else None
        self._beginnings = {token[:2] for token in ordered}

    def first(self, text: str) -> str | None:
        """Return the first special token that occurs in the text; None if there is none."""
        # Fast path: most texts do not even contain the first characters of a special token.
        if self._pattern is None or not any(beginning in text for beginning in self._beginnings):
            return None
        match = self._pattern.search(text)
        return match[0] if match else None

    def surround(self, text: str, before: str, after: str) -> str:
        """Return the text with `before` and `after` around each special token that occurs in it."""
        if self._pattern is None or self.first(text) is None:
            return text
        return self._pattern.sub(lambda match: f"{before}{match[0]}{after}", text)
