"""A directory's tokenizer as the installed transformers loads it."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from megatron_moe_lpr.conversion.hugging_face.quiet import quiet_transformers


@dataclasses.dataclass(frozen=True)
class TransformersTokenizer:
    """A tokenizer loaded by transformers, and its token ids of some texts, without tokens added around them."""

    version: str
    """Version of transformers."""
    texts: list[str]
    ids: list[list[int]]
    ids_as_text: list[list[int]]
    """Ids with split_special_tokens: special tokens that occur in a text are encoded as text."""
    content: str
    """The tokenizer in the form of tokenizer.json; empty for a tokenizer without a fast backend."""


def load_with_transformers(
    directory: Path, texts: Sequence[str], class_name: str = "AutoTokenizer"
) -> TransformersTokenizer | None:
    """Load the tokenizer by a class of transformers and encode `texts`; None if transformers fails.

    No code of the directory is run.
    """
    import transformers

    with quiet_transformers():
        try:
            tokenizer = getattr(transformers, class_name).from_pretrained(
                str(directory), local_files_only=True, trust_remote_code=False
            )
            ids, ids_as_text = (
                [
                    list(tokenizer(text, add_special_tokens=False, split_special_tokens=split).input_ids)
                    for text in texts
                ]
                for split in (False, True)
            )
        except Exception:  # Errors about foreign files have no common base class.
            return None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else ""
    return TransformersTokenizer(transformers.__version__, list(texts), ids, ids_as_text, content)
