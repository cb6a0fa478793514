"""Measure how many experts each layer should get: more where the dense model treats the languages differently."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import tyro
from rich.console import Console

from megatron_moe_lpr.allocation.arithmetic import AllocationOptions, allocate
from megatron_moe_lpr.allocation.report import Measurement
from megatron_moe_lpr.command_line import parse_flags
from megatron_moe_lpr.conversion.experts_per_layer import FLAG, format_experts_per_layer
from megatron_moe_lpr.conversion.hugging_face.hub import model_directory
from megatron_moe_lpr.data.language_names import canonical_language, covered, split_names
from megatron_moe_lpr.data.manifest import dataset_files
from megatron_moe_lpr.errors import UserError, name_file_in_oserror
from megatron_moe_lpr.files.atomic_file import atomic_file, check_output_file, real_target
from megatron_moe_lpr.files.json_files import write_json
from megatron_moe_lpr.flag_ranges import PositiveInt

if TYPE_CHECKING:
    import torch


@dataclasses.dataclass(frozen=True)
class Flags:
    """Measure how many experts each layer should get."""

    data_path: list[str]
    """A dataset for each language, original and expanded."""
    original_languages: list[str]
    """Languages that the dense model already knows, by code or name, for example en es zh."""
    hf: str | None = None
    """The dense model: a Hugging Face directory, or a name on the hub such as Qwen/Qwen1.5-1.8B."""
    revision: str | None = None
    """For a name on the hub: branch, tag or commit. Default: its main branch."""
    load: Path | None = None
    """Instead of --hf: a checkpoint written at any layout, or a Hugging Face directory."""
    allocation: tyro.conf.OmitArgPrefixes[AllocationOptions] = dataclasses.field(default_factory=AllocationOptions)
    tokens_per_language: PositiveInt = 20_000
    """Tokens of each language to measure with."""
    seq_length: PositiveInt = 256
    """Tokens of a sequence in that sample."""
    output: Path | None = None
    """JSON file to write, for --experts-per-layer of import and plan."""
    plot: Path | None = None
    """SVG file to draw."""
    device: str | None = None
    """Where the layers run. Default: cuda if PyTorch sees a device, else cpu."""


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    flags = parse_flags(Flags, arguments, __doc__)
    measured = measure(flags)
    Console().print(measured.table())
    print(f"{FLAG} {format_experts_per_layer(measured.experts)}")
    if flags.output:
        with name_file_in_oserror(flags.output):
            write_json(measured.record(), flags.output)
    if flags.plot:
        with name_file_in_oserror(flags.plot), atomic_file(flags.plot) as partial:
            partial.write_text(measured.plot(), encoding="utf-8")


def measure(flags: Flags) -> Measurement:
    """Check the flags, run a sample of the data through the dense model and allocate. Raises UserError."""
    check_outputs(flags)
    directory = find_model(flags)
    # torch and transformers take seconds to import.
    from megatron_moe_lpr.allocation.dense_source import open_dense_source
    from megatron_moe_lpr.allocation.ffn_inputs import ffn_inputs
    from megatron_moe_lpr.allocation.probe import separability
    from megatron_moe_lpr.allocation.similarity import layer_similarity, mean_unit_vector
    from megatron_moe_lpr.platform.devices import usable_device, visible_device

    device = usable_device(flags.device) if flags.device else visible_device()
    source = open_dense_source(directory)
    # Errors in the flags must show before the work.
    allocate([1.0] * source.architecture.num_layers, flags.allocation)
    windows = read_windows(flags, source.architecture, source.vocab_size)
    original = sorted(covered(windows, map(canonical_language, split_names(flags.original_languages))))
    similarity, separable = [], []
    for inputs in ffn_inputs(source, windows, device):
        means = {name: mean_unit_vector(part) for name, part in inputs.items()}
        similarity.append(layer_similarity(means, original))
        separable.append(separability(inputs, original))
    return Measurement(similarity, separable, allocate(similarity, flags.allocation))


def find_model(flags: Flags) -> Path:
    """Return the directory of the dense model, downloaded where --hf names one of the hub. Raises UserError."""
    if (flags.hf is None) == (flags.load is None):
        raise UserError("give either --hf, a dense Hugging Face model, or --load, a checkpoint")
    if flags.load is None:
        return model_directory(flags.hf or "", flags.revision)
    if flags.revision is not None:
        raise UserError("--revision: is for a name on the hub, given by --hf; leave the flag out")
    return flags.load


def check_outputs(flags: Flags) -> None:
    """Check the output files before the work. Raises UserError: one cannot be written, or both are the same file."""
    files = {"--output": flags.output, "--plot": flags.plot}
    for flag, path in files.items():
        if path:
            check_output_file(path, flag, dataset_files(flags.data_path))
    if flags.output and flags.plot and real_target(flags.output, True) == real_target(flags.plot, True):
        raise UserError(f"--output and --plot {flags.plot}: name two files")


def read_windows(flags: Flags, architecture, vocab_size: int) -> "dict[str, torch.Tensor]":
    """Return the sample of each language, [sequences, tokens] token ids. Raises UserError.

    Original and expanded languages must both be in it.
    """
    from megatron_moe_lpr.allocation.samples import sample_windows
    from megatron_moe_lpr.data.original_languages import read_original_languages
    from megatron_moe_lpr.data.reading.blend import read_blend
    from megatron_moe_lpr.data.reading.languages import LanguageRegistry

    if flags.seq_length > architecture.max_position_embeddings:
        longest = architecture.max_position_embeddings
        raise UserError(f"--seq-length {flags.seq_length}: the model has only {longest} positions")
    if not flags.data_path:
        raise UserError("--data-path: give a dataset for each language")
    entries = read_blend(flags.data_path)
    languages = LanguageRegistry(entry.language for entry in entries)
    known = read_original_languages(flags.original_languages, languages.names)
    print(*(f"note: {note}" for note in known.notes), sep="\n", end="\n" if known.notes else "")
    original = languages.original_ids(known.names)
    if not original or len(original) == len(languages):
        raise UserError("--original-languages: --data-path must hold original languages and expanded ones")
    windows = sample_windows(entries, flags.tokens_per_language, flags.seq_length)
    largest = max(int(ids.max()) for ids in windows.values())
    if largest >= vocab_size:
        raise UserError(f"--data-path: has token {largest}, the model {vocab_size}; is it its tokenizer?")
    return windows
