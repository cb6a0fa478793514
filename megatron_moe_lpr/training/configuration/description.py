"""What a run is, as the history in its checkpoints records it, and what may differ when it goes on."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from megatron_moe_lpr.data.language_names import canonical_language, covered
from megatron_moe_lpr.data.reading.blend import BlendEntry
from megatron_moe_lpr.data.reading.config import DataSources
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.flag_marks import Change, marked_flags
from megatron_moe_lpr.model.configuration.fp8 import FP8Options
from megatron_moe_lpr.training.configuration.config import OptimizerOptions, TrainingConfig
from megatron_moe_lpr.training.configuration.config_file import config_values
from megatron_moe_lpr.training.configuration.stages import Stage

FLAGS = tuple(marked_flags(TrainingConfig))
SCHEDULE = tuple(flag.name for flag in FLAGS if flag.mark is Change.SCHEDULE)
"""What Megatron's optimizer_param_scheduler decides, and --override-opt-param-scheduler accepts."""
ACCEPTABLE = tuple(dict.fromkeys(flag.recorded_as for flag in FLAGS if flag.recorded_as and flag.acceptable))
"""What --accept-changes takes, by flag. All else makes it another run: its optimizer's state or its place in the data
would mean nothing."""


def describe_run(config: TrainingConfig, stage: Stage, sources: DataSources, dtype: torch.dtype) -> dict[str, Any]:
    """Everything that decides a run's numbers besides its layout, in JSON's types.

    Each flag that is marked as deciding them (`flag_marks`), by its name; and what the run made of other flags.
    """
    values = config_values(config)
    return {
        **{flag.name: values[flag.name] for flag in FLAGS if isinstance(flag.mark, Change)},
        **stage.coefficients,
        **_fp8(config.fp8),
        "languages": sorted({entry.language for entry in sources.train}),
        "original_languages": list(sources.original_languages),
        "dtype": str(dtype).removeprefix("torch."),
        "data": [_dataset(entry) for entry in sources.train],
    }


def _fp8(options: FP8Options) -> dict[str, Any]:
    """None (of a switch: off) for what decides nothing beside the other choices."""
    recorded: dict[str, Any] = {}
    if not options.enabled:
        recorded |= {"fp8_recipe": None, "first_last_layers_bf16": False}
    if not (options.enabled and options.first_last_layers_bf16):
        recorded |= {"num_layers_at_start_in_bf16": None, "num_layers_at_end_in_bf16": None}
    return recorded


def _dataset(entry: BlendEntry) -> str:
    """A dataset's language, weight, documents and checksums; not its path, which may change."""
    manifest = entry.manifest
    content = f"index {manifest.index_sha256[:16]} text {(manifest.bin_xxh3_128 or 'unknown')[:16]}"
    return f"{entry.language} {entry.weight:.6g} documents {entry.first_document}-{entry.end_document} {content}"


def differences(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """(recorded, now) of what differs. What an older version did not record is not compared.

    Of original languages only those of the training data are: no others change a number of the run, and older versions
    recorded some of them, as the validation data happened to have them.
    """
    recorded, now = _comparable(recorded), _comparable(now)
    return {
        name: (recorded[name], value) for name, value in now.items() if name in recorded and recorded[name] != value
    }


def _comparable(description: Mapping[str, Any]) -> dict[str, Any]:
    """The description with languages in their one spelling, which an older version did not have."""
    compared = dict(description)
    if isinstance(compared.get("data"), list):
        compared["data"] = [_with_canonical_language(str(line)) for line in compared["data"]]
    if "languages" in compared:
        languages = {canonical_language(name) for name in compared["languages"]}
        compared["languages"] = sorted(languages)
        if "original_languages" in compared:
            names = [canonical_language(name) for name in compared["original_languages"]]
            compared["original_languages"] = sorted(covered(languages, names))
    return compared


def _with_canonical_language(line: str) -> str:
    """A line of `_dataset`, which begins with its language."""
    language, space, rest = line.partition(" ")
    return f"{canonical_language(language)}{space}{rest}"


def accepted_names(names: Iterable[str], override_scheduler: bool) -> set[str]:
    """Fields behind --accept-changes and --override-opt-param-scheduler.

    Raises:
        UserError: a name that is no flag, or none that may change.
    """
    fields = {name.removeprefix("--").replace("-", "_") for name in names}
    unknown = sorted(fields - set(ACCEPTABLE))
    if unknown:
        known = " ".join(_flag(name) for name in ACCEPTABLE)
        raise UserError(
            f"--accept-changes {' '.join(map(_flag, unknown))}: can't change within a run; these can: {known}"
        )
    return fields | set(SCHEDULE if override_scheduler else ())


def refuse_differences(recorded: Mapping[str, Any], now: Mapping[str, Any], accepted: set[str], place: str) -> None:
    """Check that a run goes on as what it was, or with changes that were accepted.

    Raises:
        UserError: naming each difference and what to do.
    """
    found = differences(recorded, now)
    refused = {name: pair for name, pair in found.items() if name not in accepted}
    foreign = {name: pair for name, pair in refused.items() if name not in ACCEPTABLE}
    if foreign:
        raise UserError(
            f"{place}: holds a checkpoint of another run ({_listed(foreign)}); choose another "
            "directory; --load takes a checkpoint's weights into a new run"
        )
    if refused:
        names = " ".join(_flag(name) for name in refused)
        raise UserError(
            f"{place}: its run was started differently ({_listed(refused)}); give what it was started with, or take "
            f"the change with --accept-changes {names}"
        )
    if "train_iters" in found and found["train_iters"][1] < found["train_iters"][0]:
        raise UserError(f"{place}: a run can be lengthened, not shortened ({_listed(found)}); stop it where you want")


def recorded_schedule(recorded: Mapping[str, Any], config: TrainingConfig) -> OptimizerOptions:
    """The options with the checkpoint's schedule in place of the flags' (--use-checkpoint-opt-param-scheduler).

    A schedule that was left to end with the run ends where it did, also in a run that was lengthened.
    """
    schedule = {name: recorded[name] for name in SCHEDULE if name in recorded}
    if schedule.get("lr_decay_iters") is None and recorded.get("train_iters") != config.batch.train_iters:
        schedule["lr_decay_iters"] = recorded.get("train_iters")
    return dataclasses.replace(config.optimizer, **schedule)


def _listed(found: Mapping[str, tuple[Any, Any]]) -> str:
    return ", ".join(f"{name} {_shown(old)} there and {_shown(new)} here" for name, (old, new) in found.items())


def _shown(value: Any) -> str:
    return f"[{'; '.join(map(str, value))}]" if isinstance(value, list) else repr(value)


def _flag(name: str) -> str:
    return name.replace("_", "-")
