"""Rehearse a run: be single ranks of a large world, one after the other, in this process without GPUs.

Every flag of `train` is taken; --config names the run's file. Nothing is computed or sent, and nothing is written but
--output: what is printed is simulated.
"""

import dataclasses
import gc
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from megatron_moe_lpr.command_line import parse_flags
from megatron_moe_lpr.commands import plan
from megatron_moe_lpr.conversion.hugging_face.hub import model_config_file
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.files.atomic_file import check_output_file
from megatron_moe_lpr.files.json_files import read_json, write_json
from megatron_moe_lpr.flag_ranges import PositiveInt
from megatron_moe_lpr.training.configuration.config import TrainingConfig
from megatron_moe_lpr.training.configuration.config_file import training_words

if TYPE_CHECKING:
    from megatron_moe_lpr.rehearsal.comparison import Part
    from megatron_moe_lpr.rehearsal.rank import Rehearsed
    from megatron_moe_lpr.rehearsal.record import RankRecord

SAMPLE = "sample"
FLAGS_OF_MODEL = ("--num-experts", "--moe-layer-freq")
"""What `train` refuses, since a checkpoint knows it."""


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """A model that is not converted yet, in the place of --load."""

    hf: str | None = None
    """A Hugging Face directory, its config.json, or a name on the hub, of which only config.json is read: the model as
    `import` would make it. Default: the checkpoint --load."""
    revision: str | None = None
    """For a name on the hub: branch, tag or commit. Default: its main branch."""
    num_experts: PositiveInt = 6
    """With --hf: experts per layer, the original one included."""
    top_k: PositiveInt | None = None
    """With --hf: experts per token. Default: the paper's 2; a mixture has its own."""
    moe_layer_freq: str = "1"
    """With --hf: which layers have experts, as in `plan`."""
    experts_per_layer: str | None = None
    """With --hf: experts of each layer, as in `plan`."""
    add_experts: str | None = None
    """With --hf of a mixture: new experts of every layer, or of each, as in `import`."""
    new_tokens: PositiveInt | None = None
    """With --hf: tokens that an extended tokenizer adds."""


@dataclasses.dataclass(frozen=True)
class Flags:
    """Rehearse a run."""

    world_size: PositiveInt
    """Ranks of the run."""
    run: tyro.conf.OmitArgPrefixes[TrainingConfig]
    model: tyro.conf.OmitArgPrefixes[ModelOptions] = dataclasses.field(default_factory=ModelOptions)
    ranks: str = SAMPLE
    """Ranks to rehearse: numbers such as 0,8,511, or `sample`, one of each kind (of the first, a middle and the last
    pipeline rank the first, and the last of its TP, EP and DP groups). Rank 0 always is, since all others hear from
    it."""
    compute_values: bool = False
    """Compute everything, from random weights, instead of sizes alone: for tiny models."""
    output: Path | None = None
    """Write everything that was recorded, each collective of each rank, to this file as JSON."""


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    flags = parse_flags(Flags, training_words(arguments, FLAGS_OF_MODEL), __doc__)
    if flags.output:
        check_output_file(flags.output, "--output", [])
    if flags.model.hf is None and flags.model.revision is not None:
        raise UserError("--revision: is for a name on the hub, given by --hf; leave the flag out")
    directory = Path(tempfile.mkdtemp(prefix="moe-lpr-rehearsal-"))
    try:
        _rehearse(flags, directory)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _rehearse(flags: Flags, directory: Path) -> None:
    """Rehearse the ranks and print what was recorded."""
    # torch and Megatron take seconds to import, which checking the flags does not need.
    from megatron_moe_lpr.platform.simulated import reserve_without_writing, select_simulated

    select_simulated()
    reserve_without_writing()
    from megatron_moe_lpr.rehearsal.comparison import compare
    from megatron_moe_lpr.rehearsal.rank import Rehearsal
    from megatron_moe_lpr.rehearsal.report import as_json, print_results
    from megatron_moe_lpr.rehearsal.simulated_run import simulate
    from megatron_moe_lpr.rehearsal.world import sample_ranks

    simulated = simulate(flags.run, flags.world_size)
    numbers = sample_ranks(flags.run.layout, flags.world_size) if flags.ranks == SAMPLE else _numbers(flags)
    config, notes = _with_files(flags, simulated.config, directory)
    notes = [*simulated.notes, *notes]
    for note in notes:
        print(f"simulated: {note}", flush=True)
    # Each rank's tensors are collected before the next: not beside all objects of the libraries.
    gc.freeze()
    rehearsal = Rehearsal(config, flags.world_size, directory, flags.compute_values)
    results: list[tuple[Rehearsed, list[Part]]] = []
    for number in sorted({0, *numbers}):
        print(f"simulated: rank {number:,} of {flags.world_size:,}", flush=True)
        rehearsed = rehearsal.rehearse(number)
        results.append((rehearsed, compare(config, rehearsed, flags.world_size)))
    print_results(results)
    if flags.output:
        write_json(as_json(results, flags.world_size, notes), flags.output)
    _check([rehearsed.record for rehearsed, _ in results], config, flags.world_size)


def _check(records: "list[RankRecord]", config: TrainingConfig, world_size: int) -> None:
    """Print whether the ranks agree; raise a UserError where they do not."""
    from megatron_moe_lpr.rehearsal.checks import check_records
    from megatron_moe_lpr.rehearsal.data_share import GlobalBatch
    from megatron_moe_lpr.rehearsal.findings import report
    from megatron_moe_lpr.rehearsal.symmetry import World

    batch = GlobalBatch(config.batch.global_batch_size, config.batch.micro_batch_size)
    found = check_records(records, World(config.layout, world_size), batch)
    print(report(found), end="")
    if found:
        raise UserError(f"{len(found):,} faults of this run, listed above: ranks would hang or do different things")
    print(
        f"simulated: all {world_size:,} ranks agree, {len(records):,} of them rehearsed: the same collectives in every "
        "group, no waiting in a ring, every sample once, files of their own"
    )


def _numbers(flags: Flags) -> list[int]:
    words = flags.ranks.split(",")
    if not all(word.strip().isdecimal() and int(word) < flags.world_size for word in words):
        raise UserError(
            f"--ranks {flags.ranks}: `{SAMPLE}`, or numbers below --world-size {flags.world_size} with commas"
        )
    return [int(word) for word in words]


def _with_files(flags: Flags, config: TrainingConfig, directory: Path) -> tuple[TrainingConfig, list[str]]:
    """Return the run with files of the right sizes in the place of a checkpoint and of datasets that are not there,
    and notes that say so."""
    from megatron_moe_lpr.checkpoint.format.directory import resolve_checkpoint
    from megatron_moe_lpr.checkpoint.loading.model import model_shape
    from megatron_moe_lpr.rehearsal.stand_ins import missing_data, with_datasets

    notes = []
    if flags.model.hf is not None:
        _write_checkpoint(flags, directory / "load")
        load = dataclasses.replace(config.checkpoint, load=directory / "load", base_checkpoint=None)
        config = dataclasses.replace(config, checkpoint=load)
        notes.append(f"the checkpoint that `import` would make of {flags.model.hf}, without weights")
    shape = model_shape(resolve_checkpoint(config.checkpoint.load, config.checkpoint.base_checkpoint))
    data = dataclasses.replace(config.data, data_cache_path=str(directory / "index"))
    if missing := missing_data(data):
        data = with_datasets(data, directory, shape.total_vocab_size, config.batch.seq_length)
        notes.append(f"datasets of random tokens, since {missing[0]} is not there")
    return dataclasses.replace(config, data=data), notes


def _write_checkpoint(flags: Flags, directory: Path) -> None:
    """Write a checkpoint without weights of the model that --hf and the flags beside it describe."""
    from megatron_moe_lpr.rehearsal.stand_ins import write_checkpoint

    path = model_config_file(flags.model.hf or "", flags.model.revision)
    options = dataclasses.asdict(flags.model) | {"hf": str(path), "revision": None}
    planned = plan.Flags(gpus=flags.world_size, **options)
    dtype = plan.read_sizes(planned).stored_dtype or "bfloat16"
    write_checkpoint(directory, plan.read_shape(planned), read_json(path), dtype)
