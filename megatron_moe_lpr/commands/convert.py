"""Convert between Hugging Face directories and Megatron checkpoints; import upcycles dense models to MoE."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from megatron_moe_lpr.allocation.sample_options import SampleOptions
from megatron_moe_lpr.command_line import parse_flags
from megatron_moe_lpr.conversion.expand_options import ExpandOptions
from megatron_moe_lpr.conversion.graft_options import GraftOptions
from megatron_moe_lpr.conversion.hugging_face.engine import Engine
from megatron_moe_lpr.conversion.import_options import ImportOptions
from megatron_moe_lpr.errors import UserError, run_command
from megatron_moe_lpr.flag_ranges import NonNegativeFloat, PositiveInt
from megatron_moe_lpr.platform import PlatformName, TransformerImpl, select_platform

# torch, Megatron and transformers take seconds to import: each sub-command imports those that it needs.


@dataclasses.dataclass(frozen=True)
class Import:
    """Hugging Face -> Megatron: a dense model (upcycled unless --num-experts 1), a mixture that gets more experts
    (--add-experts), or an exported MoE."""

    upcycling: tyro.conf.OmitArgPrefixes[ImportOptions]
    save: Path
    """Checkpoint directory to write."""
    sample: tyro.conf.OmitArgPrefixes[SampleOptions] = dataclasses.field(default_factory=SampleOptions)
    revision: str | None = None
    """For a name on the hub: branch, tag or commit. Default: its main branch."""
    overwrite: bool = False
    """Replace what is at --save."""

    def run(self) -> None:
        """Convert, then print a summary of the checkpoint."""
        for note in self.convert():
            print(f"note: {note}")
        show(self.save)

    def convert(self) -> list[str]:
        """Convert. Return notes about the model, a line each. Raises UserError."""
        from megatron_moe_lpr.conversion.hugging_face.hub import model_directory

        options = dataclasses.replace(self.upcycling, hf=model_directory(self.upcycling.hf, self.revision))
        if self.sample.decides(options.new_experts_from):
            options = dataclasses.replace(options, new_experts_from=self.experts_used_most(options))
        from megatron_moe_lpr.conversion.importer import import_hf
        from megatron_moe_lpr.conversion.notes import import_notes

        card = import_hf(options, self.save, self.overwrite)
        return list(import_notes(options, card))

    def experts_used_most(self, options: ImportOptions) -> str:
        """Return the numbers of the mixture's experts that --sample uses most, by layer. Raises UserError."""
        if options.add_experts is None:
            raise UserError("--sample: chooses which experts new ones copy; give --add-experts too, or leave it out")
        from megatron_moe_lpr.allocation.expert_usage import experts_used_most
        from megatron_moe_lpr.allocation.mixture_source import open_mixture_source
        from megatron_moe_lpr.conversion.added_experts import added_counts

        source = open_mixture_source(Path(options.hf))
        return experts_used_most(source, added_counts(options.add_experts, source.mixture.experts), self.sample)


@dataclasses.dataclass(frozen=True)
class Expand:
    """Add experts for a second group of languages; the experts that the checkpoint has stay frozen."""

    expansion: tyro.conf.OmitArgPrefixes[ExpandOptions]
    save: Path
    """Checkpoint directory to write."""
    sample: tyro.conf.OmitArgPrefixes[SampleOptions] = dataclasses.field(default_factory=SampleOptions)
    overwrite: bool = False
    """Replace what is at --save."""

    def run(self) -> None:
        """Expand, then print a summary of the checkpoint."""
        from megatron_moe_lpr.conversion.expand import expand

        options = self.expansion
        if self.sample.decides(options.new_experts_from):
            options = dataclasses.replace(options, new_experts_from=self.experts_used_most())
        expand(options, self.save, self.overwrite)
        show(self.save)

    def experts_used_most(self) -> str:
        """Return the numbers of the base model's experts that --sample uses most, by layer. Raises UserError."""
        from megatron_moe_lpr.allocation.expert_usage import experts_used_most
        from megatron_moe_lpr.allocation.mixture_source import open_mixture_in_checkpoint
        from megatron_moe_lpr.conversion.expand import check_expansion

        options = self.expansion
        counts = check_expansion(options)
        source = open_mixture_in_checkpoint(options.load, options.base_checkpoint, options.verify)
        return experts_used_most(source, counts, self.sample)


@dataclasses.dataclass(frozen=True)
class Graft:
    """Put an instruct model in place of the base model that a checkpoint was upcycled from, without training."""

    grafting: tyro.conf.OmitArgPrefixes[GraftOptions]
    save: Path
    """Checkpoint directory to write."""
    overwrite: bool = False
    """Replace what is at --save."""

    def run(self) -> None:
        """Graft, then print a summary of the checkpoint."""
        from megatron_moe_lpr.conversion.hugging_face.hub import model_directory

        base = model_directory(self.grafting.base, flag="--base")
        instruct = model_directory(self.grafting.instruct, flag="--instruct")
        from megatron_moe_lpr.conversion.graft import graft

        graft(dataclasses.replace(self.grafting, base=base, instruct=instruct), self.save, self.overwrite)
        show(self.save)


@dataclasses.dataclass(frozen=True)
class Export:
    """Megatron -> Hugging Face: a stock mixture, as Mixtral; a dense checkpoint becomes its own family."""

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
    """For the model card: the base model's name on the hub. Default: read from the path, if import read a hub cache."""
    licence: str | None = None
    """For the model card: the base model's licence in the hub's spelling. Default: read from its README.md."""
    evaluation: Path | None = None
    """For the model card: the file that evaluate --output wrote."""
    overwrite: bool = False
    """Replace what is at --hf."""
    verify: bool = True
    """Compare the checkpoint's files with their checksums before use."""

    def run(self) -> None:
        """Convert, then print a summary of the export."""
        for warning in self.convert():
            print(f"warning: {warning}")
        # Some forms for llama.cpp are no Hugging Face model and cannot be inspected.
        show(self.hf, self.hf if self.engine == "transformers" else self.load)

    def convert(self) -> list[str]:
        """Convert. Return warnings, a line each. Raises UserError."""
        from megatron_moe_lpr.conversion.exporter import export_hf
        from megatron_moe_lpr.conversion.hugging_face.model_card import ModelCardOptions
        from megatron_moe_lpr.conversion.hugging_face.safetensors_writer import parse_size

        options = ModelCardOptions(self.base_model, self.licence, self.evaluation)
        size = parse_size(self.max_shard_size)
        export = export_hf(
            self.load,
            self.hf,
            size,
            overwrite=self.overwrite,
            verified=self.verify,
            base=self.base_checkpoint,
            engine=self.engine,
            model_card_options=options,
        )
        return list(export.warnings)


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
    """Dtype in which both models compute; bfloat16 halves the memory and needs a tolerance of some tenths."""
    seq_length: PositiveInt = 64
    """Tokens in each of the two sequences."""
    platform: PlatformName = "auto"
    """Where to compute."""
    transformer_impl: TransformerImpl | None = None
    """Whose layers compute. local: PyTorch's alone. Default: Transformer Engine's on GPUs where it is installed, else
    local."""
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
            select_platform(self.platform, transformer_impl=self.transformer_impl),
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
        """Print the summary."""
        show(self.directory, verified=self.verify)


def show(path: Path, read_from: Path | None = None, verified: bool = False) -> None:
    """Print one screen about `path`, read from `read_from` (default: `path` itself). Raises UserError."""
    from megatron_moe_lpr.conversion.verification.inspection import inspect_directory, print_inspection

    print_inspection(path, inspect_directory(read_from or path, verified))


Command = (
    Annotated[Import, tyro.conf.subcommand("import")]
    | Annotated[Expand, tyro.conf.subcommand("expand")]
    | Annotated[Graft, tyro.conf.subcommand("graft")]
    | Annotated[Export, tyro.conf.subcommand("export")]
    | Annotated[Verify, tyro.conf.subcommand("verify")]
    | Annotated[Inspect, tyro.conf.subcommand("inspect")]
)


def main(arguments: list[str] | None = None) -> None:
    """Run one sub-command; bad input ends in one line and exit code 1."""
    command = parse_flags(Command, arguments, __doc__)
    run_command(command.run)
