"""What tests of extended vocabularies share: tokenizers, made once, and models with the base one."""

from pathlib import Path

import torch

from tests.conversion.tiny_models import save_model
from tests.data.extended_tokenizers import FIRST_MERGES, ROWS, SECOND_MERGES, extend, give_tokenizer, make_base


def make_tokenizers(root: Path) -> Path:
    """Write `base`, `first` (an extension of it by 7 tokens) and `second` (an extension of that by 3) below `root`."""
    extend(make_base(root / "base"), root / "first")
    extend(root / "first", root / "second", SECOND_MERGES, ROWS + len(FIRST_MERGES), {"en": (20, 0)})
    return root


def save_with_tokenizer(name: str, directory: Path, tokenizers: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Save a tiny model with the base tokenizer."""
    return give_tokenizer(save_model(name, directory, dtype), tokenizers / "base")
