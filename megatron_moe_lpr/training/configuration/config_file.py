"""A run's flags as a file: SAVE/config.json, which every run writes, and YAML recipes of the same keys."""

import dataclasses
import itertools
import json
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_moe_lpr import __version__
from megatron_moe_lpr.checkpoint.format.card import tool_versions
from megatron_moe_lpr.command_line import flag_words, parse_flags, read_flags
from megatron_moe_lpr.errors import UserError, fail
from megatron_moe_lpr.files.json_files import write_json
from megatron_moe_lpr.training.configuration.config import TrainingConfig
from megatron_moe_lpr.training.configuration.megatron_flags import refuse_megatron_flags
from megatron_moe_lpr.training.configuration.stages import STAGES

CONFIG_FILE = "config.json"
"""In --save."""
FLAG = "--config"
PACKAGES = ("torch", "megatron-core", "transformer-engine", "transformers", "tokenizers", "numpy")


def parse_training_flags(arguments: Sequence[str] | None = None, description: str | None = None) -> TrainingConfig:
    """Parse the flags of a training run; those of a file that --config names come first, so that others override them.

    Args:
        arguments: by default those of this process.
        description: for --help.

    Raises:
        SystemExit: --help, or a mistake in the flags or in the file, reported in one line.
    """
    return parse_flags(TrainingConfig, training_words(arguments), description)


def training_words(arguments: Sequence[str] | None = None, own: Collection[str] = ()) -> list[str]:
    """Return a command line with the flags of the file that --config names, and those that the stage sets, in front.

    Args:
        arguments: by default those of this process.
        own: flags of Megatron's that the command takes beside those of training.

    Raises:
        SystemExit: a mistake in the file, or a flag of Megatron's that has another name here, reported in one line.
    """
    try:
        words = with_stage_defaults(_expand(sys.argv[1:] if arguments is None else arguments))
        refuse_megatron_flags(words, own)
    except UserError as error:
        fail(str(error), code=2)
    return words


def training_config(source: TrainingConfig | Mapping[str, Any] | Path | str) -> TrainingConfig:
    """Return a run's configuration from a mapping or a file of its flags.

    Args:
        source: a mapping from flags (with underscores or hyphens) to values, or the path of a file as for --config; a
            configuration is returned unchanged.

    Raises:
        UserError: a flag that is unknown, missing or no value of its type; a file that cannot be read.
    """
    if isinstance(source, TrainingConfig):
        return source
    if isinstance(source, Mapping):
        words = flag_words(source, "configuration")
    else:
        path = Path(source)
        words = flag_words(read_config_file(path), f"{FLAG} {path}")
    refuse_megatron_flags(words)
    return read_flags(TrainingConfig, with_stage_defaults(words))


def with_stage_defaults(words: Sequence[str]) -> list[str]:
    """Put the flags that the words' --stage gives other defaults before all others, so that given ones override them.

    Without --stage, or with one that does not exist, the words stay as they are: parsing them says what is wrong.
    """
    given = None
    for word, following in itertools.pairwise([*words, ""]):
        if word == "--stage":
            given = following
        elif word.startswith("--stage="):
            given = word.removeprefix("--stage=")
    flags = next((stage.flags for name, stage in STAGES.items() if name == given), {})
    return [*flag_words(flags, "stage"), *words]


def config_values(config: TrainingConfig) -> dict[str, Any]:
    """Return every flag of a run by its name with underscores, in JSON's types; None: the run chooses a default."""
    return {name: _plain(value) for name, value in _flags(config) if name != FLAG.removeprefix("--")}


def _flags(options: Any) -> Iterator[tuple[str, Any]]:
    """Yield name and value of each flag of a dataclass and of the dataclasses that it holds."""
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if dataclasses.is_dataclass(value):
            yield from _flags(value)
        else:
            yield field.name, value


def read_config_file(path: Path) -> dict[str, Any]:
    """Read the flags in a file, by their names with underscores.

    Args:
        path: SAVE/config.json of a run, or a YAML or JSON file of one mapping from flags to values.

    Raises:
        UserError: no such file, or no such mapping.
    """
    import yaml

    try:
        # YAML's parser reads JSON too, except for tabs between its parts.
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except FileNotFoundError:
        raise UserError(f"{FLAG} {path}: no such file") from None
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"{FLAG} {path}: cannot be read: {str(error).splitlines()[0]}") from None
    values = content.get("config", content) if isinstance(content, dict) else None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UserError(f"{FLAG} {path}: one mapping from flags to values is expected, as `train_iters: 1000`")
    return {key.replace("-", "_"): value for key, value in values.items()}


def write_run_config(config: TrainingConfig, world_size: int, data_parallel_size: int) -> None:
    """Write SAVE/config.json: the flags, layout, versions and command line of the run. Call it on one rank."""
    record = {
        "config": config_values(config),
        "world_size": world_size,
        "data_parallel_size": data_parallel_size,
        "versions": versions(),
        "command_line": sys.argv,
        "directory": str(Path.cwd()),
    }
    write_json(record, config.checkpoint.save / CONFIG_FILE)


def versions() -> dict[str, str]:
    """Return the versions of Python, of this package and of the libraries that decide a run's numbers."""
    return tool_versions(PACKAGES) | {"megatron-moe-lpr": __version__}


def _expand(words: Sequence[str]) -> list[str]:
    """Replace --config FILE by the flags in the file, put before all others, so that others override them."""
    rest: list[str] = []
    path: str | None = None
    position = 0
    while position < len(words):
        word = words[position]
        if word == FLAG and position + 1 < len(words):
            path, position = words[position + 1], position + 1
        elif word.startswith(f"{FLAG}="):
            path = word.partition("=")[2]
        else:
            rest.append(word)
        position += 1
    if path is None:
        return rest
    return [*flag_words(read_config_file(Path(path)), f"{FLAG} {path}"), *rest]


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value
