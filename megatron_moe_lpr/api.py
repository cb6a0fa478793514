"""The Python API: seven functions, from a dense model to an exported MoE and its text (docs/python.md).

Each function takes the most important flags of a `moe-lpr` command as arguments and its other flags as keywords, with
underscores. Bad input raises `UserError`, whose text is the command's `error:` line.
"""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_moe_lpr.command_line import flag_words, read_flags
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.training.callbacks import Callback, check_callbacks

if TYPE_CHECKING:
    from megatron_moe_lpr.data.manifest import Manifest
    from megatron_moe_lpr.generation.output import Answer
    from megatron_moe_lpr.planning.search import Candidate
    from megatron_moe_lpr.training.configuration.config import TrainingConfig

__all__ = ["Callback", "UserError", "evaluate", "export", "generate", "plan", "preprocess", "train", "upcycle"]

# torch and Megatron take seconds to import: each function imports what it needs.


def upcycle(hf: str | Path, save: str | Path, num_experts: int = 6, **flags: Any) -> Path:
    """Turn a dense Hugging Face model into a MoE checkpoint that computes the same (paper, section 3.1).

    Args:
        hf: directory of the model, or its name on the Hugging Face hub.
        save: checkpoint directory to write.
        num_experts: experts of a layer, the original one included; 1: the model stays dense. Not used with
            `add_experts`, the number of experts that a mixture gets (docs/mixture.md).
        flags: further flags of `moe-lpr import`.

    Returns:
        `save`.

    Raises:
        UserError: the model, a flag or a directory does not fit.
    """
    from megatron_moe_lpr.commands.convert import Import

    given = {} if "add_experts" in flags else {"num_experts": num_experts}
    command = _read(Import, "upcycle", hf=hf, save=save, **given, **flags)
    for note in command.convert():
        warnings.warn(note, stacklevel=2)
    return Path(save)


def preprocess(
    input: str | Path | Sequence[str | Path],
    output_prefix: str | Path,
    tokenizer: str | Path,
    language: str | None = None,
    **flags: Any,
) -> "dict[str, Manifest]":
    """Turn text into indexed datasets of one language each.

    Args:
        input: files or globs: .jsonl, .jsonl.gz, .jsonl.zst, .txt or .parquet.
        output_prefix: where to write: PREFIX.bin, PREFIX.idx and PREFIX.json.
        tokenizer: a directory with a tokenizer, such as the dense model's.
        language: language of the whole input; None: `language_key` names the field that holds it.
        flags: further flags of `moe-lpr preprocess`.

    Returns:
        The manifest of each dataset by its prefix.

    Raises:
        UserError: text, a tokenizer or a flag that does not fit.
    """
    from megatron_moe_lpr.commands import preprocess as command

    inputs = [input] if isinstance(input, str | Path) else list(input)
    places = {"input": inputs, "output_prefix": output_prefix, "tokenizer": tokenizer}
    return command.preprocess(command.plan(_read(command.Flags, "preprocess", **places, language=language, **flags)))


def train(config: "TrainingConfig | Mapping[str, Any] | str | Path", callbacks: Sequence[Callback] = ()) -> bool:
    """Run a stage of training, as one rank; torchrun or `moe-lpr launch` start a program that calls this on several.

    Args:
        config: the flags of `moe-lpr train` in a mapping, or a YAML or JSON file of them, or a TrainingConfig.
        callbacks: called at the start, each step, evaluation and save, and the end, on every rank that passes them.

    Returns:
        True: the run is finished; False: a signal stopped it and it has saved; called again it resumes.

    Raises:
        UserError: a flag, checkpoint, dataset or layout that does not fit.
        Exception: what a callback raised; on ranks where none did, a CallbackError that contains its traceback.
    """
    check_callbacks(callbacks)
    from megatron_moe_lpr.training.configuration.config_file import training_config

    read = training_config(config)
    from megatron_moe_lpr.parallel.groups import destroy_parallel
    from megatron_moe_lpr.pretrain import pretrain

    finished = pretrain(read, callbacks)
    destroy_parallel()
    return finished


def evaluate(load: str | Path, valid_data_path: Sequence[str | Path], **flags: Any) -> dict[str, Any]:
    """Measure loss, bits per byte and routing of a checkpoint on each dataset, as one rank (see `train`).

    Args:
        load: checkpoint directory, dense or MoE.
        valid_data_path: prefixes of datasets, each evaluated whole.
        flags: further flags of `moe-lpr evaluate`.

    Returns:
        The record that `moe-lpr evaluate --output` writes, with `datasets` and `averages` among its keys.

    Raises:
        UserError: a checkpoint, dataset or layout that does not fit.
    """
    from megatron_moe_lpr.commands import evaluate as command

    return command.evaluate(_read(command.Flags, "evaluate", load=load, valid_data_path=valid_data_path, **flags))


def export(load: str | Path, hf: str | Path, **flags: Any) -> Path:
    """Write a stock Hugging Face model from a checkpoint: Mixtral, Qwen2-MoE or Qwen3-MoE.

    Args:
        load: checkpoint directory.
        hf: directory to write.
        flags: further flags of `moe-lpr export`.

    Returns:
        `hf`.

    Raises:
        UserError: a checkpoint that no stock architecture can hold, or a directory that does not fit.
    """
    from megatron_moe_lpr.commands.convert import Export

    for warning in _read(Export, "export", load=load, hf=hf, **flags).convert():
        warnings.warn(warning, stacklevel=2)
    return Path(hf)


def generate(
    prompt: str | None = None, load: str | Path | None = None, hf: str | Path | None = None, **flags: Any
) -> "list[Answer]":
    """Continue a prompt, or those of a file, with a checkpoint (at any layout, see `train`) or an export.

    Args:
        prompt: text to continue, with `chat=True` what a user says; None: `prompts` or `messages` names a file.
        load: checkpoint directory; or
        hf: directory of an export, run by transformers.
        flags: further flags of `moe-lpr generate`.

    Returns:
        An answer for each prompt, with `text`, `tokens` and `finish_reason` (stop or length).

    Raises:
        UserError: a model, prompt or layout that does not fit.
    """
    from megatron_moe_lpr.commands import generate as command

    return command.generate(_read(command.Flags, "generate", prompt=prompt, load=load, hf=hf, **flags))


def plan(gpus: int, hf: str | Path | None = None, load: str | Path | None = None, **flags: Any) -> "list[Candidate]":
    """Find the parallel layouts of a run that fit into GPU memory, best first. Computed, never measured on a GPU.

    Args:
        gpus: GPUs of the run.
        hf: the dense model that would be upcycled: a directory, its config.json, or a name on the hub; or
        load: a converted checkpoint.
        flags: further flags of `moe-lpr plan`.

    Raises:
        UserError: no layout splits the model, or none fits.
    """
    from megatron_moe_lpr.commands import plan as command

    return command.find(_read(command.Flags, "plan", gpus=gpus, hf=hf, load=load, **flags))[2]


def _read(kind: Any, place: str, **values: Any) -> Any:
    return read_flags(kind, flag_words(values, place))
