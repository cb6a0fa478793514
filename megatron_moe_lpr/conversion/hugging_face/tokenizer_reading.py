"""What the installed transformers makes of a directory's tokenizer."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Reading:
    """A tokenizer as AutoTokenizer reads it, and its ids of some texts, without tokens around them."""

    version: str
    texts: list[str]
    ids: list[list[int]]
    ids_as_text: list[list[int]]
    """With split_special_tokens: special tokens in a text are text."""
    is_fast: bool
    content: str
    """As tokenizer.json; empty where it is not a fast one."""


def read_by_transformers(directory: Path, texts: Sequence[str], name: str = "AutoTokenizer") -> Reading | None:
    """Read the tokenizer and encode the texts; None where transformers cannot.

    No code of the directory is run.

    Args:
        name: of the class.
    """
    import transformers

    with _quiet():
        try:
            kind = getattr(transformers, name)
            found = kind.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
            ids, split = (
                [list(found(text, add_special_tokens=False, split_special_tokens=split)["input_ids"]) for text in texts]
                for split in (False, True)
            )
        except Exception:  # Whatever is wrong with foreign files; it has no common base class.
            return None
    fast = getattr(found, "backend_tokenizer", None)
    content = fast.to_str() if fast is not None else ""
    return Reading(transformers.__version__, list(texts), ids, split, fast is not None, content)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
