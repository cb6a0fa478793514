"""What a vocabulary extension means for datasets: those of earlier tokenizers that stay valid."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from megatron_moe_lpr.checkpoint.format.card import EarlierTokenizer
from megatron_moe_lpr.data.language_names import canonical_language, covered
from megatron_moe_lpr.data.tokenizer import load_tokenizer
from megatron_moe_lpr.data.tokenizer_extension import EXTENSION_FILE, TokenizerExtension, read_extension
from megatron_moe_lpr.errors import UserError


def open_extension(directory: Path, base: Path, rows: int, place: str) -> TokenizerExtension:
    """Read the record of an extended tokenizer and check that it extends a model's own tokenizer.

    Args:
        directory: the extended tokenizer with its `extension.json`.
        base: directory with the model's tokenizer.
        rows: token ids that the model has.
        place: the model, for messages.

    Raises:
        UserError: no such record, or the tokenizer beside it or the model's own is another one.
    """
    extension = read_extension(directory)
    if extension is None:
        raise UserError(f"{directory / EXTENSION_FILE}: no such file; give the directory of an extended tokenizer")
    extended = load_tokenizer(directory)
    if (extended.fingerprint, extended.vocab_size) != (extension.tokenizer_fingerprint, extension.vocab_size):
        raise UserError(
            f"{directory / EXTENSION_FILE}: records another tokenizer than {extended.path.name} beside it; copy the "
            "directory again"
        )
    if extension.base_vocab_size != rows:
        raise UserError(
            f"{directory}: extends a vocabulary of {extension.base_vocab_size:,} ids, and {place} has {rows:,}; extend "
            "that model's own tokenizer"
        )
    own = load_tokenizer(base).fingerprint
    if own != extension.base_tokenizer_fingerprint:
        raise UserError(
            f"{directory}: extends another tokenizer than {place} has ({extension.base_tokenizer_fingerprint[:12]} is "
            f"not {own[:12]}); extend that model's own tokenizer"
        )
    return extension


def unchanged_languages(extension: TokenizerExtension) -> list[str]:
    """Guarded languages of which no document changed, by their canonical names, sorted."""
    sure = {canonical_language(name): True for name in extension.guarded}
    for name, one in extension.guarded.items():
        sure[canonical_language(name)] &= one.documents > 0 and one.changed == 0
    return sorted(name for name, is_unchanged in sure.items() if is_unchanged)


def tokenizers_before(extension: TokenizerExtension, earlier: Sequence[EarlierTokenizer]) -> list[EarlierTokenizer]:
    """Tokenizers whose datasets a model accepts after an extension, in some languages.

    Args:
        extension: the latest extension.
        earlier: those that the model accepted before it.
    """
    unchanged = unchanged_languages(extension)
    still = [
        dataclasses.replace(one, unchanged=[name for name in one.unchanged if covered([name], unchanged)])
        for one in earlier
    ]
    return [*still, EarlierTokenizer(extension.base_tokenizer_fingerprint, unchanged)]
