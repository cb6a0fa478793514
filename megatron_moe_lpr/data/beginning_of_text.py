"""Tokens that a tokenizer's settings add before every text (mostly BOS) and training data does not have."""

from pathlib import Path

from megatron_moe_lpr.data.tokenizer import load_tokenizer
from megatron_moe_lpr.files.json_files import read_json


def begin_tokens(tokenizer: str | Path) -> list[str]:
    """Return the tokens that transformers (and so lm_eval) adds before a text; empty for Qwen's tokenizers.

    Read from the post-processor of `tokenizer.json`. For a SentencePiece model, from `add_bos_token` in
    tokenizer_config.json, which defaults to true.

    Args:
        tokenizer: a directory or a file, as for `load_tokenizer`.

    Raises:
        UserError: not a tokenizer.
    """
    path = load_tokenizer(tokenizer).path
    if path.suffix == ".json":
        return _before("a", path)
    settings = path.with_name("tokenizer_config.json")
    adds = read_json(settings).get("add_bos_token", True) if settings.is_file() else True
    return _sentencepiece_bos(path) if adds else []


def begin_note(tokenizer: str | Path) -> str | None:
    """Return a note for the user about tokens that documents begin without; None if the tokenizer adds none."""
    tokens = begin_tokens(tokenizer)
    if not tokens:
        return None
    return (
        f"documents begin without {' '.join(tokens)}, which transformers and lm_eval put before every text with this "
        "tokenizer; a sample crosses documents, and the end-of-document token is what separates them, as in Megatron"
    )


def _before(text: str, path: Path) -> list[str]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    with_special = tokenizer.encode(text, add_special_tokens=True)
    mask = list(with_special.special_tokens_mask)
    return with_special.tokens[: mask.index(0)] if 0 in mask else []


def _sentencepiece_bos(path: Path) -> list[str]:
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    return [model.id_to_piece(model.bos_id())] if model.bos_id() >= 0 else []
