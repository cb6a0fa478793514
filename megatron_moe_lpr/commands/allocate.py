"""Find how many experts each layer should get: more where the dense model treats the languages differently."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from megatron_moe_lpr.allocation.arithmetic import AllocationOptions, allocate
from megatron_moe_lpr.allocation.report import Measurement
from megatron_moe_lpr.command_line import parse_flags
from megatron_moe_lpr.conversion.experts_per_layer import FLAG, write_experts_per_layer
from megatron_moe_lpr.data.language_names import canonical_language, covered, split_names
from megatron_moe_lpr.data.manifest import dataset_files
from megatron_moe_lpr.errors import UserError, naming
from megatron_moe_lpr.files.filesystem import atomic_file, check_output_file, real_target
from megatron_moe_lpr.flag_ranges import NonNegativeInt, PositiveInt

if TYPE_CHECKING:
    import torch


@dataclasses.dataclass(frozen=True)
class Flags:
    """How many experts each layer should get."""

    load: Path
    """The dense model: a Hugging Face directory, or a checkpoint written at any layout."""
    data_path: list[str]
    """A dataset for each language, original and expanded."""
    original_languages: list[str]
    """Languages that the dense model already knows, by code or name, for example en es zh."""
    budget: PositiveInt | None = None
    """Most new experts in all layers together. Default: 2 for each layer, as in the published allocations."""
    multiple_of: PositiveInt = 1
    """New experts of a layer come in multiples of this: the --expert-model-parallel-size of the run."""
    uniform_count: PositiveInt | None = None
    """Give each layer this many experts, the original one included, or none. Needed for an export."""
    dense_layers: tuple[NonNegativeInt, ...] = ()
    """Numbers of layers that get no experts, for example those marked poor."""
    tokens_per_language: PositiveInt = 20_000
    """Tokens of each language to measure with."""
    seq_length: PositiveInt = 256
    """Tokens of a sequence in that sample."""
    output: Path | None = None
    """JSON file to write, for --experts-per-layer of convert_hf.py and plan.py."""
    plot: Path | None = None
    """SVG file to draw."""
    device: str | None = None
    """Where the layers run. Default: cuda if PyTorch sees a device, else cpu."""


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    flags = parse_flags(Flags, arguments, __doc__)
    measured = measure(flags)
    Console().print(measured.table())
    print(f"{FLAG} {write_experts_per_layer(measured.experts)}")
    if flags.output:
        write(flags.output, json.dumps(measured.record(), indent=2) + "\n")
    if flags.plot:
        write(flags.plot, measured.plot())


def measure(flags: Flags) -> Measurement:
    """Check the flags, run the sample through the dense model and allocate. Raises UserError."""
    check_outputs(flags)
    # torch and transformers take seconds to import.
    from megatron_moe_lpr.allocation.dense_source import open_dense_source
    from megatron_moe_lpr.allocation.ffn_inputs import ffn_inputs
    from megatron_moe_lpr.allocation.probe import separability
    from megatron_moe_lpr.allocation.similarity import layer_similarity, mean_unit_vector
    from megatron_moe_lpr.platform.devices import usable_device, visible_device

    device = usable_device(flags.device) if flags.device else visible_device()
    source = open_dense_source(flags.load)
    options = AllocationOptions(flags.budget, flags.multiple_of, flags.uniform_count, flags.dense_layers)
    allocate([1.0] * source.architecture.num_layers, options)  # what is wrong with the flags shows before the work
    windows = read_windows(flags, source.architecture)
    original = sorted(covered(windows, map(canonical_language, split_names(flags.original_languages))))
    similarity, separable = [], []
    for inputs in ffn_inputs(source, windows, device):
        means = {name: mean_unit_vector(part) for name, part in inputs.items()}
        similarity.append(layer_similarity(means, original))
        separable.append(separability(inputs, original))
    return Measurement(similarity, separable, allocate(similarity, options))


def check_outputs(flags: Flags) -> None:
    """Before the work. Raises UserError where a file could not be written, or both would be the same one."""
    files = {"--output": flags.output, "--plot": flags.plot}
    for flag, path in files.items():
        if path:
            check_output_file(path, flag, dataset_files(flags.data_path))
    if flags.output and flags.plot and real_target(flags.output, True) == real_target(flags.plot, True):
        raise UserError(f"--output and --plot {flags.plot}: name two files")


def read_windows(flags: Flags, architecture) -> "dict[str, torch.Tensor]":
    """The sample, with languages of both groups in it. Raises UserError."""
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
    if largest >= architecture.vocab_size:
        raise UserError(f"--data-path: has token {largest}, the model {architecture.vocab_size}; is it its tokenizer?")
    return windows


def write(path: Path, text: str) -> None:
    """Whole or not at all."""
    with naming(path), atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")
