"""Build the index maps of a training run beforehand, on a machine without GPUs.

Pass the flags of the training: --data-path, --split, --data-cache-path, --seed, sequence length and number of samples.
The training then finds the index maps and starts at once.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from megatron_moe_lpr.checkpoint.format.card import EarlierTokenizer
from megatron_moe_lpr.checkpoint.format.directory import resolve_checkpoint
from megatron_moe_lpr.command_line import parse_flags
from megatron_moe_lpr.data.reading.config import DataConfig, cache_directory, read_data_sources
from megatron_moe_lpr.data.tokenizer import load_tokenizer
from megatron_moe_lpr.flag_ranges import PositiveInt, Range


@dataclasses.dataclass
class Flags:
    """Build the index maps of a training run beforehand."""

    data: Annotated[DataConfig, tyro.conf.OmitArgPrefixes]
    seq_length: PositiveInt
    """Tokens of a sample: the training's --seq-length."""
    train_samples: Annotated[int, Range(1, 2**53)]
    """Samples of the whole run: --train-iters times --global-batch-size of the training."""
    load: Path | None = None
    """The training's --load: its datasets are compared with this checkpoint's tokenizer, not only with each other."""


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    flags = parse_flags(Flags, arguments, __doc__)
    sources = read_data_sources(flags.data, *_tokenizers(flags.load))
    for one in sources.tokens_by_language(flags.train_samples * flags.seq_length):
        kind = "original" if one.is_original else "expanded"
        print(
            f"{one.language} ({kind}): {one.fraction:.2%} of the samples, {one.tokens:,} tokens in the data, "
            f"{one.tokens_drawn:,.0f} drawn, {one.epochs:.2f} epochs"
        )
    # megatron-core takes seconds to import, which the checks above do not need.
    from megatron_moe_lpr.data.reading.training_dataset import build_training_dataset

    dataset = build_training_dataset(sources, flags.data, flags.seq_length, flags.train_samples)
    print(f"{len(dataset):,} samples; index maps in {cache_directory(flags.data)}")


def _tokenizers(load: Path | None) -> tuple[str | None, tuple[str, ...], Sequence[EarlierTokenizer]]:
    """Arguments of `read_data_sources` that a checkpoint determines: its tokenizer, and those from before it."""
    card = resolve_checkpoint(load).card() if load else None
    if load is None or card is None or not card.tokenizer_files:
        return None, (), ()
    return load_tokenizer(resolve_checkpoint(load).side_directory).fingerprint, (), card.earlier_tokenizers
