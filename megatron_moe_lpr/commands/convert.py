"""Convert between Hugging Face directories and Megatron checkpoints; import upcycles dense models to MoE."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from megatron_moe_lpr.command_line import parse_flags
from megatron_moe_lpr.conversion.hugging_face.engine import Engine
from megatron_moe_lpr.errors import UserError, run_command
from megatron_moe_lpr.flag_ranges import NonNegativeFloat, PositiveInt, Seed
from megatron_moe_lpr.platform import PlatformName, select_platform

# torch, and for some of the sub-commands Megatron and transformers, take seconds: each imports what it needs.


@dataclasses.dataclass(frozen=True)
class Import:
    """Hugging Face -> Megatron: a dense model (upcycled unless --num-experts 1), or an exported MoE."""

    hf: str
    """Directory with config.json and safetensors weights, or a name on the hub such as Qwen/Qwen1.5-1.8B."""
    save: Path
    """Checkpoint directory to write."""
    revision: str | None = None
    """For a name on the hub: branch, tag or commit. Default: its main branch."""
    num_experts: PositiveInt | None = None
    """Experts per layer, with the original one; 1: stay dense. Default: 6 (paper), or what a MoE or adapter has."""
    top_k: PositiveInt | None = None
    """Experts per token. Default: the paper's 2."""
    moe_layer_freq: str | None = None
    """Layers with experts: N for every N-th from layer 0 on, or a pattern: "[0]+[1]*31". Default: 1, every layer."""
    experts_per_layer: str | None = None
    """Instead: experts of each layer (1: dense), as 5,4,3,... or as the JSON file of tools/allocate_experts.py."""
    expand_blocks: PositiveInt | None = None
    """Stay dense and insert N copied blocks, one after each of N groups, for --stage blocks (LLaMA-Pro)."""
    seed: Seed = 1234
    """Seed of the routers' initial values."""
    adapter: Path | None = None
    """Take experts and routers from an adapter of the authors' implementation (peft_type MOE); --hf is its base."""
    original_languages: list[str] = dataclasses.field(default_factory=list)
    """For experts that were trained elsewhere (--adapter, a stock MoE): the dense model's languages, as in en es zh."""
    expanded_languages: list[str] = dataclasses.field(default_factory=list)
    """For experts that were trained elsewhere: languages that they were trained on, as in el hu tr."""
    allow_top_1: bool = False
    """Accept --top-k 1, although the upcycled model then differs from the dense one."""
    expert_model_parallel_size: PositiveInt = 1
    """Only a check: does this EP size divide the number of new experts?"""
    overwrite: bool = False
    """Replace what is at --save."""

    def run(self) -> None:
        """Convert, then print what came out."""
        for note in self.convert():
            print(f"note: {note}")
        show(self.save)

    def convert(self) -> list[str]:
        """Convert. Returns what the person should know of the model, a line each. Raises UserError."""
        from megatron_moe_lpr.conversion.hugging_face.hub import model_directory

        hf = model_directory(self.hf, self.revision)
        from megatron_moe_lpr.conversion.import_options import ImportOptions
        from megatron_moe_lpr.conversion.importer import import_hf
        from megatron_moe_lpr.conversion.notes import import_notes

        options = ImportOptions(
            hf=hf,
            num_experts=self.num_experts,
            top_k=self.top_k,
            moe_layer_freq=self.moe_layer_freq,
            experts_per_layer=self.experts_per_layer,
            expand_blocks=self.expand_blocks,
            seed=self.seed,
            adapter=self.adapter,
            allow_top_1=self.allow_top_1,
            expert_parallel_size=self.expert_model_parallel_size,
            original_languages=self.original_languages,
            expanded_languages=self.expanded_languages,
        )
        card = import_hf(options, self.save, self.overwrite)
        return list(import_notes(options, card))


@dataclasses.dataclass(frozen=True)
class Expand:
    """Add experts for a second group of languages; the experts that the checkpoint has stay frozen."""

    load: Path
    """Checkpoint directory after stage 2, or one iteration in it."""
    save: Path
    """Checkpoint directory to write."""
    add_experts: str
    """New experts: one number for every layer that has experts, or one for each layer (0: none), as in 0,2,2,1."""
    seed: Seed = 1234
    """Seed of the routers' new rows."""
    expert_model_parallel_size: PositiveInt = 1
    """Only a check: does this EP size divide the number of experts of each expansion?"""
    base_checkpoint: Path | None = None
    """For a --load of --save-trainable-only: directory of the checkpoint that its run started from, if it has moved."""
    overwrite: bool = False
    """Replace what is at --save."""
    verify: bool = True
    """Compare the checkpoint's files with their checksums before use."""

    def run(self) -> None:
        """Expand, then print what came out."""
        from megatron_moe_lpr.conversion.expand import ExpandOptions, expand, read_added

        added = read_added(self.add_experts, self.load)
        options = ExpandOptions(
            self.load, added, self.seed, self.expert_model_parallel_size, self.base_checkpoint, self.verify
        )
        expand(options, self.save, self.overwrite)
        show(self.save)


@dataclasses.dataclass(frozen=True)
class Export:
    """Megatron -> Hugging Face: stock Mixtral, Qwen2-MoE or Qwen3-MoE; a dense checkpoint becomes its own family."""

    load: Path
    """Checkpoint directory, or one iteration in it."""
    hf: Path
    """Hugging Face directory to write."""
    base_checkpoint: Path | None = None
    """For a --load of --save-trainable-only: directory of the checkpoint that its run started from, if it has moved."""
    max_shard_size: str = "5GB"
    """Largest size of one safetensors file, for example 500MB or 2GiB."""
    engine: Annotated[Engine, tyro.conf.arg(name="for")] = "transformers"
    """Program that will load it. transformers: also for vLLM; llama.cpp needs a form of its own."""
    base_model: str | None = None
    """For the model card: the base model's name on the hub. Default: what import read from the path of a hub cache."""
    licence: str | None = None
    """For the model card: the base model's licence in the hub's spelling. Default: what its README.md says."""
    evaluation: Path | None = None
    """For the model card: the file that tools/evaluate.py --output wrote."""
    overwrite: bool = False
    """Replace what is at --hf."""
    verify: bool = True
    """Compare the checkpoint's files with their checksums before use."""

    def run(self) -> None:
        """Convert, then print what came out."""
        for warning in self.convert():
            print(f"warning: {warning}")
        # Not every form for llama.cpp is a Hugging Face model.
        show(self.hf, self.hf if self.engine == "transformers" else self.load)

    def convert(self) -> list[str]:
        """Convert. Returns warnings, a line each. Raises UserError."""
        from megatron_moe_lpr.conversion.exporter import export_hf
        from megatron_moe_lpr.conversion.hugging_face.model_card import CardOptions
        from megatron_moe_lpr.conversion.hugging_face.safetensors_writer import parse_size

        options = CardOptions(self.base_model, self.licence, self.evaluation)
        size = parse_size(self.max_shard_size)
        plan = export_hf(
            self.load,
            self.hf,
            size,
            overwrite=self.overwrite,
            verified=self.verify,
            base=self.base_checkpoint,
            engine=self.engine,
            card_options=options,
        )
        return list(plan.warnings)


@dataclasses.dataclass(frozen=True)
class Verify:
    """Compare logits of a checkpoint and of a Hugging Face model (the dense one, or an export) on the same tokens."""

    load: Path
    """Checkpoint directory, or one iteration in it."""
    hf: str
    """Hugging Face directory to compare with, or a name on the hub, loaded by transformers' own class."""
    revision: str | None = None
    """For a name on the hub: branch, tag or commit. Default: its main branch."""
    base_checkpoint: Path | None = None
    """For a --load of --save-trainable-only: directory of the checkpoint that its run started from, if it has moved."""
    tolerance: NonNegativeFloat = 1e-3
    """Largest difference of any logit that still counts as equal."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What both models compute in; bfloat16 halves the memory and needs a tolerance of some tenths."""
    seq_length: PositiveInt = 64
    """Tokens in each of the two sequences."""
    platform: PlatformName = "auto"
    """Where to compute."""
    verify: bool = True
    """Compare the checkpoint's files with their checksums before use."""

    def run(self) -> None:
        """Compare; models that differ end in exit code 1."""
        from megatron_moe_lpr.conversion.hugging_face.hub import model_directory

        hf = model_directory(self.hf, self.revision)
        import torch

        from megatron_moe_lpr.conversion.verification.verify import print_comparison
        from megatron_moe_lpr.conversion.verification.verify_models import verify_checkpoint

        comparison = verify_checkpoint(
            self.load,
            hf,
            getattr(torch, self.dtype),
            select_platform(self.platform),
            self.seq_length,
            base=self.base_checkpoint,
            verified=self.verify,
        )
        print_comparison(comparison, self.tolerance)
        if not comparison.agrees(self.tolerance):
            raise UserError(f"{self.load} does not compute what {hf} does")


@dataclasses.dataclass(frozen=True)
class Inspect:
    """Summarise a checkpoint or a Hugging Face directory."""

    directory: tyro.conf.Positional[Path]
    """Checkpoint directory, one iteration in it, or a Hugging Face directory."""
    verify: bool = False
    """Compare every file of a checkpoint with its checksum. Default: only the small ones."""

    def run(self) -> None:
        """Print it."""
        show(self.directory, verified=self.verify)


def show(path: Path, read_from: Path | None = None, verified: bool = False) -> None:
    """One screen about `path`, as `read_from` (default: the same) tells it. Raises UserError."""
    from megatron_moe_lpr.conversion.verification.inspection import inspect_directory, print_inspection

    print_inspection(path, inspect_directory(read_from or path, verified))


Command = (
    Annotated[Import, tyro.conf.subcommand("import")]
    | Annotated[Expand, tyro.conf.subcommand("expand")]
    | Annotated[Export, tyro.conf.subcommand("export")]
    | Annotated[Verify, tyro.conf.subcommand("verify")]
    | Annotated[Inspect, tyro.conf.subcommand("inspect")]
)


def main(arguments: list[str] | None = None) -> None:
    """Run one sub-command; bad input ends in one line and exit code 1."""
    command = parse_flags(Command, arguments, __doc__)
    run_command(command.run)
