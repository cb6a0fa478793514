"""More experts for a second group of languages; those that the model has are frozen from then on."""

import contextlib
import dataclasses
import math
from pathlib import Path

import torch

from megatron_moe_lpr.checkpoint.format.card import CheckpointCard, check_experts
from megatron_moe_lpr.checkpoint.format.directory import (
    CARD_FILE,
    LATEST_FILE,
    RELEASE,
    SIDE_DIRECTORY,
    resolve_checkpoint,
    write_latest,
)
from megatron_moe_lpr.checkpoint.format.trainable_only import TensorReader, kept_for_reading, layers_of, open_reader
from megatron_moe_lpr.checkpoint.format.writer import CheckpointWriter
from megatron_moe_lpr.checkpoint.loading.verification import open_checkpoint, verify_all
from megatron_moe_lpr.conversion.exporter import check_model_tensors
from megatron_moe_lpr.conversion.hugging_face.hf_directory import carry_files
from megatron_moe_lpr.conversion.imported_languages import EXPANDED_FLAG, ORIGINAL_FLAG
from megatron_moe_lpr.conversion.side_files import check_disk_space, check_separate
from megatron_moe_lpr.conversion.tensors.upcycling import initial_router
from megatron_moe_lpr.data.language_groups import EXPANSION, learned_languages
from megatron_moe_lpr.errors import UserError, naming
from megatron_moe_lpr.files.checksums import MANIFEST, write_manifest
from megatron_moe_lpr.files.links import tree_inside
from megatron_moe_lpr.files.output_directory import atomic_directory
from megatron_moe_lpr.model.tensors import MOE_LAYOUTS, VOCABULARY_KEYS, Role, Row, model_rows
from megatron_moe_lpr.parallel.experts import check_expert_parallel
from megatron_moe_lpr.progress import ProgressReport

# Any layout tells apart the tensors of a model; nothing is read or written in it.
NAMES = MOE_LAYOUTS["qwen3_moe"]


@dataclasses.dataclass(frozen=True)
class ExpandOptions:
    """What the user asked for."""

    load: Path
    added: list[int]
    """New experts of each layer."""
    seed: int = 1234
    expert_parallel_size: int = 1
    """Only checked."""
    base: Path | None = None
    """For a checkpoint with only trained weights: where the others are; None: where it says."""
    verified: bool = True
    """Compare the checkpoint's files with their checksums first."""


def expand(options: ExpandOptions, save: Path, overwrite: bool = False) -> CheckpointCard:
    """Write the checkpoint `save`, that of `load` with more experts, and return its card.

    New experts are copies of the original one. Routers keep their rows; the rows below them are fresh and weigh
    nothing yet (openness 0), so that the model computes exactly what it did.

    Raises:
        UserError: `load` cannot be expanded so; nothing is left at `save`.
        OSError: the disk is full; nothing is left at `save`.
    """
    check_separate(options.load, "--load", save, "--save")
    with contextlib.ExitStack() as lock:
        iteration = lock.enter_context(kept_for_reading(options.load, options.base))
        return _write_expanded(dataclasses.replace(options, load=iteration), save, overwrite, lock)


def _write_expanded(options: ExpandOptions, save: Path, overwrite: bool, lock: contextlib.ExitStack) -> CheckpointCard:
    """Plan and write. `lock` ends before the output gets its name: its end tells whether all was there to read."""
    checkpoint = open_checkpoint(options.load, options.verified, options.base)
    for layer in layers_of(checkpoint):
        check_separate(layer.path, "the checkpoint", save, "--save")
    before, architecture = checkpoint.card(), checkpoint.architecture()
    after = _card(before, options)
    reader = open_reader(checkpoint)
    had = model_rows(architecture, before.experts_per_layer, NAMES, before.expansions)
    check_model_tensors(had, reader)
    rows = model_rows(architecture, after.experts_per_layer, NAMES, after.expansions)
    sources = _sources(had, rows)
    total = sum(math.prod(row.shape) * reader.tensors[sources[row.key] or had[0].key].dtype.itemsize for row in rows)
    for layer in layers_of(checkpoint) if options.verified else ():
        verify_all(layer.path)
    files = tree_inside(checkpoint.side_directory, checkpoint.path)
    with naming(save), atomic_directory(save, overwrite, (LATEST_FILE,)) as partial:
        check_disk_space(partial, total, save)
        iteration = partial / RELEASE
        with CheckpointWriter(iteration, {"iteration": 0}) as writer, ProgressReport("expanding", total) as progress:
            for row in rows:
                tensor = _tensor(row, sources[row.key], reader, options.seed)
                writer.write(row.key, tensor)
                progress.advance(tensor.nbytes, {"MB": tensor.nbytes / 1e6})
        carry_files({name: file for name, file in files.items() if name != MANIFEST.name}, iteration / SIDE_DIRECTORY)
        after.write(iteration / SIDE_DIRECTORY / CARD_FILE)
        write_manifest(iteration, writer.checksums)
        write_latest(partial, None)
        lock.close()
    return after


def read_added(text: str, load: Path) -> list[int]:
    """`--add-experts`: M for every layer of the checkpoint that has experts, or a number for each layer.

    Raises:
        UserError: neither of them.
    """
    card = resolve_checkpoint(load).card()
    parts = text.split(",")
    if not all(part.strip().isdecimal() and len(part) < 10 for part in parts):
        raise UserError(f"--add-experts {text}: a number, or one for each layer as in 0,2,2,1")
    numbers = [int(part) for part in parts]
    if len(numbers) == 1:
        return [numbers[0] if experts > 1 else 0 for experts in card.experts_per_layer]
    return numbers


def _card(before: CheckpointCard, options: ExpandOptions) -> CheckpointCard:
    """The card of the expanded checkpoint. Raises UserError where it cannot be expanded so."""
    if not before.is_moe:
        raise UserError(f"--load {options.load}: is dense; export it, then upcycle what export wrote by import")
    if before.openness < 1:
        raise UserError(f"--load {options.load}: its latest experts are not trained in yet; finish stage 1 first")
    if not learned_languages(before.history):
        raise UserError(
            f"--load {options.load}: no stage 1 in its history, so the languages of its experts are not known: train "
            f"it first, or, if they were trained elsewhere, import it again with {ORIGINAL_FLAG} and {EXPANDED_FLAG}"
        )
    if len(options.added) != len(before.experts_per_layer) or min(options.added) < 0 or not any(options.added):
        raise UserError(
            f"--add-experts: numbers of 0 or more for {len(before.experts_per_layer)} layers are expected, not all 0"
        )
    earlier = [experts - 1 for experts in before.experts_per_layer]
    for count in sorted({*earlier, *options.added} - {0}):
        check_expert_parallel(count, options.expert_parallel_size)
    experts = [one + more for one, more in zip(before.experts_per_layer, options.added, strict=True)]
    check_experts(experts, "--add-experts")
    return dataclasses.replace(
        before,
        format_version=CheckpointCard.format_version,
        base=None,
        experts_per_layer=experts,
        expansions=[*(before.expansions or [earlier]), options.added],
        openness=0.0,
        history=[*before.history, {"stage": EXPANSION, "new_experts": options.added, "router_seed": options.seed}],
    )


def _sources(had: list[Row], rows: list[Row]) -> dict[str, str | None]:
    """The key before of each tensor after; of new experts that of the original one's, of a new router None."""
    keys = {row.dense_names or row.names: row.key for row in had}
    originals = {(row.layer, _matrix(row)): keys[row.dense_names] for row in rows if row.role is Role.ORIGINAL_EXPERT}
    return {row.key: keys.get(row.dense_names or row.names, originals.get((row.layer, _matrix(row)))) for row in rows}


def _matrix(row: Row) -> str:
    """`linear_fc1.weight_w`, for example."""
    return ".".join(row.key.split(".")[-2:])


def _tensor(row: Row, source: str | None, reader: TensorReader, seed: int) -> torch.Tensor:
    if row.role is Role.ROUTER and row.layer is not None:
        num_experts, hidden_size = row.shape
        weight = initial_router(num_experts, hidden_size, seed, row.layer)
        if source:
            rows = reader.read(source)
            weight[: len(rows)] = rows
        return weight
    if source is None:
        raise UserError(f"{reader.directory}: the checkpoint has nothing to make {row.key} of")
    tensor = reader.read(source)
    # Training pads the vocabulary.
    return tensor[: row.shape[0]].clone() if row.key in VOCABULARY_KEYS else tensor
