#!/usr/bin/env python3
"""Convert between Hugging Face directories and Megatron checkpoints, upcycling dense models on the way in."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from megatron_moe_lpr.conversion.exporter import export_hf
from megatron_moe_lpr.conversion.importer import import_hf
from megatron_moe_lpr.conversion.inspection import inspect_directory, print_inspection
from megatron_moe_lpr.conversion.plan import ImportOptions
from megatron_moe_lpr.conversion.safetensors_writer import parse_size
from megatron_moe_lpr.errors import run_command


@dataclasses.dataclass(frozen=True)
class Import:
    """Hugging Face -> Megatron: a dense model (upcycled unless --num-experts 1), or an exported MoE."""

    hf: Path
    """Directory with config.json and safetensors weights."""
    save: Path
    """Checkpoint directory to write."""
    num_experts: int | None = None
    """Experts per layer, the original one included; 1 keeps the model dense. Default: the paper's 6; a stock MoE
    directory or an adapter decides by itself."""
    top_k: int | None = None
    """Experts per token. Default: the paper's 2."""
    moe_layer_frequency: int | None = None
    """Give experts to every F-th layer only, from layer 0 on. Default: 1, every layer."""
    seed: int = 1234
    """Seed of the routers' initial values."""
    adapter: Path | None = None
    """Take experts and routers from an adapter of the authors' Hugging Face implementation (peft_type MOE), with its
    base model given by --hf."""
    allow_top_1: bool = False
    """Accept --top-k 1, although the upcycled model then differs from the dense one from the start."""
    expert_model_parallel_size: int = 1
    """Only check that this many ranks could share the new experts evenly."""
    overwrite: bool = False
    """Replace what is at --save."""

    def run(self) -> None:
        """Convert, then print what came out."""
        options = ImportOptions(
            hf=self.hf,
            num_experts=self.num_experts,
            top_k=self.top_k,
            moe_layer_frequency=self.moe_layer_frequency,
            seed=self.seed,
            adapter=self.adapter,
            allow_top_1=self.allow_top_1,
            expert_parallel_size=self.expert_model_parallel_size,
        )
        import_hf(options, self.save, self.overwrite)
        print_inspection(self.save, inspect_directory(self.save))


@dataclasses.dataclass(frozen=True)
class Export:
    """Megatron -> Hugging Face: stock Mixtral, Qwen2-MoE or Qwen3-MoE; a dense checkpoint becomes its own family."""

    load: Path
    """Checkpoint directory, or one iteration in it."""
    hf: Path
    """Hugging Face directory to write."""
    max_shard_size: str = "5GB"
    """Largest size of one safetensors file, for example 500MB or 2GiB."""
    overwrite: bool = False
    """Replace what is at --hf."""

    def run(self) -> None:
        """Convert, then print what came out."""
        export_hf(self.load, self.hf, parse_size(self.max_shard_size), self.overwrite)
        print_inspection(self.hf, inspect_directory(self.hf))


@dataclasses.dataclass(frozen=True)
class Inspect:
    """One screen about a checkpoint or a Hugging Face directory."""

    directory: tyro.conf.Positional[Path]
    """Checkpoint directory, one iteration in it, or a Hugging Face directory."""

    def run(self) -> None:
        """Print it."""
        print_inspection(self.directory, inspect_directory(self.directory))


Command = (
    Annotated[Import, tyro.conf.subcommand("import")]
    | Annotated[Export, tyro.conf.subcommand("export")]
    | Annotated[Inspect, tyro.conf.subcommand("inspect")]
)


def main(arguments: list[str] | None = None) -> None:
    """Run one sub-command; bad input ends in one line and exit code 1."""
    command = tyro.cli(Command, args=arguments, description=__doc__)
    run_command(command.run)


if __name__ == "__main__":
    main()
