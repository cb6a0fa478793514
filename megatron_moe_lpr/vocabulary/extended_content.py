"""The tokenizer.json of an extended tokenizer: its base's, with new tokens and merges behind the old ones."""

from collections.abc import Sequence
from typing import Any

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.vocabulary.base_tokenizer import BaseTokenizer, rust_tokenizer


def reserved_token(number: int) -> str:
    """Return the name of an id without a token. Its space keeps it out of texts: before the merges none is left."""
    return f"<reserved {number}>"


def extend_content(base: BaseTokenizer, tokens: Sequence[str], merges: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Return the fields of the extended tokenizer.json; the new tokens have the ids from `base.rows` on.

    Ids below that no token has get reserved ones: `add_tokens` of Hugging Face's library counts tokens to find a free
    id, and would give out an id twice if there were holes. For the same reason the library reads the old ids of added
    tokens only if these stand in the model's vocabulary too.
    """
    vocabulary = dict(base.vocabulary)
    taken = set(vocabulary.values())
    vocabulary |= {reserved_token(number): number for number in range(base.rows) if number not in taken}
    vocabulary |= {token: base.rows + place for place, token in enumerate(tokens)}
    model = base.content["model"]
    model = {**model, "vocab": vocabulary, "merges": [*model["merges"], *map(list, merges)]}
    return {**base.content, "model": model}


def expand(ids: Sequence[int], pieces: Sequence[Sequence[int]], rows: int) -> list[int]:
    """Return ids with each new one, from `rows` on, replaced by its pieces."""
    return [one for number in ids for one in (pieces[number - rows] if number >= rows else (number,))]


def check_content(
    base: BaseTokenizer, content: dict[str, Any], tokens: Sequence[str], pieces: Sequence[Sequence[int]]
) -> None:
    """Check that all ids are as they should be, and that added and reserved tokens are still found where they were.

    Args:
        base: the tokenizer before.
        content: the extended tokenizer.json.
        tokens: the new tokens.
        pieces: the base ids that each of them replaces.

    Raises:
        UserError: the library reads another id, or the tokenizer finds an added token in a text as it did not before.
    """
    old, new = base.rust(), rust_tokenizer(content, base.path)
    expected = {**base.vocabulary, **{token: base.rows + place for place, token in enumerate(tokens)}}
    found = new.get_vocab(with_added_tokens=True)
    wrong = next((token for token, number in expected.items() if found.get(token) != number), None)
    if wrong is not None:
        raise UserError(
            f"{base.path}: cannot be extended: the token {wrong!r} would get the id {found.get(wrong)} instead of "
            f"{expected[wrong]}"
        )
    added = [token["content"] for token in base.content.get("added_tokens") or []]
    names = [*added, *(name for name in found if name not in expected)]
    for as_text in (True, False):
        old.encode_special_tokens = new.encode_special_tokens = as_text
        before, after = (each.encode_batch(names, add_special_tokens=False) for each in (old, new))
        for name, one, two in zip(names, before, after, strict=True):
            if one.ids != expand(two.ids, pieces, base.rows):
                raise UserError(f"{base.path}: cannot be extended: the text {name!r} would be split otherwise")
