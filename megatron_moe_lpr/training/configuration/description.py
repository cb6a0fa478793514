"""The description of a run, which its checkpoints record, and the differences from it that a resume may have."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from megatron_moe_lpr.data.language_names import canonical_language, covered
from megatron_moe_lpr.data.reading.blend import BlendEntry
from megatron_moe_lpr.data.reading.config import DataSources
from megatron_moe_lpr.engine.options import OptimizerOptions
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.flag_marks import Change, marked_flags
from megatron_moe_lpr.model.configuration.fp8 import FP8Options
from megatron_moe_lpr.training.configuration.config import TrainingConfig
from megatron_moe_lpr.training.configuration.config_file import config_values
from megatron_moe_lpr.training.configuration.stages import Stage

FLAGS = tuple(marked_flags(TrainingConfig))
SCHEDULE = tuple(flag.name for flag in FLAGS if flag.mark is Change.SCHEDULE)
"""Flags of Megatron's optimizer_param_scheduler, which --override-opt-param-scheduler accepts."""
ACCEPTABLE = tuple(dict.fromkeys(flag.recorded_as for flag in FLAGS if flag.recorded_as and flag.acceptable))
"""Flags that --accept-changes accepts. Another value of any other makes it another run: the optimizer's state or the
place in the data would mean nothing."""

ALWAYS_BEFORE = {"reset_attention_mask": False, "reset_position_ids": False, "new_token_loss_coeff": 0.0}
"""Values of runs of older versions, which had no flag for them."""


def describe_run(
    config: TrainingConfig, stage: Stage, sources: DataSources, dtype: torch.dtype, has_new_rows: bool
) -> dict[str, Any]:
    """Return everything that decides a run's numbers besides its layout, in JSON's types.

    That is each flag that is marked as deciding numbers (`flag_marks`), by its name, and values that the run derives
    from other flags: coefficients of losses, dtype, languages and datasets.

    Args:
        has_new_rows: `ModelShape.has_new_rows`.
    """
    values = config_values(config)
    return {
        **{flag.name: values[flag.name] for flag in FLAGS if isinstance(flag.mark, Change)},
        **_apart(config, sources),
        **stage.coefficients,
        **_fp8(config.compute.fp8),
        **_new_rows(stage, has_new_rows),
        "languages": sorted({entry.language for entry in sources.train}),
        "original_languages": list(sources.original_languages),
        "dtype": str(dtype).removeprefix("torch."),
        "data": [_dataset(entry) for entry in sources.train],
    }


def _apart(config: TrainingConfig, sources: DataSources) -> dict[str, Any]:
    """Whether documents are kept apart, by a flag or by packing."""
    documents = config.data.documents.apart(any(entry.is_packed for entry in sources.train))
    return {name: getattr(documents, name) for name in ("reset_attention_mask", "reset_position_ids")}


def _fp8(options: FP8Options) -> dict[str, Any]:
    """None (False for a switch) for each flag of FP8 that has no effect beside the other flags."""
    recorded: dict[str, Any] = {}
    if not options.enabled:
        recorded |= {"fp8_recipe": None, "first_last_layers_bf16": False}
    if not (options.enabled and options.first_last_layers_bf16):
        recorded |= {"num_layers_at_start_in_bf16": None, "num_layers_at_end_in_bf16": None}
    return recorded


def _new_rows(stage: Stage, has_new_rows: bool) -> dict[str, Any]:
    """--train-new-rows counts only in the review of a model that has new rows. Elsewhere it is recorded as off, its
    default in older versions, whose runs so resume."""
    return {} if has_new_rows and stage.name == "2" else {"train_new_rows": False}


def _dataset(entry: BlendEntry) -> str:
    """A dataset's language, weight, documents and checksums, without its path, which may change."""
    manifest = entry.manifest
    content = f"index {manifest.index_sha256[:16]} text {(manifest.bin_xxh3_128 or 'unknown')[:16]}"
    if manifest.chat:
        content += f" loss mask {(manifest.loss_mask_xxh3_128 or 'unknown')[:16]}"
    content += " packed best-fit" if entry.is_packed else ""
    return f"{entry.language} {entry.weight:.6g} documents {entry.first_document}-{entry.end_document} {content}"


def differences(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return (recorded, now) of each value that differs. Values that an older version did not record are not compared.

    Of original languages only those in the training data are compared: others change no number of the run, and older
    versions recorded those that the validation data had.
    """
    recorded, now = _comparable(recorded), _comparable(now)
    return {
        name: (recorded[name], value) for name, value in now.items() if name in recorded and recorded[name] != value
    }


def _comparable(description: Mapping[str, Any]) -> dict[str, Any]:
    """The description with canonical names of languages, which older versions did not use, and with what they always
    did and did not record."""
    compared = ALWAYS_BEFORE | dict(description)
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
    """A line of `_dataset`, which begins with a language, with its canonical name."""
    language, space, rest = line.partition(" ")
    return f"{canonical_language(language)}{space}{rest}"


def accepted_names(names: Iterable[str], override_scheduler: bool) -> set[str]:
    """Return the fields that --accept-changes and --override-opt-param-scheduler accept.

    Raises:
        UserError: a name that is no flag, or a flag that must not change.
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
    """Check that a resumed run differs from the recorded one only in flags whose change was accepted.

    Raises:
        UserError: naming each other difference and what to do.
    """
    found = differences(recorded, now)
    refused = {name: pair for name, pair in found.items() if name not in accepted}
    foreign = {name: pair for name, pair in refused.items() if name not in ACCEPTABLE}
    if foreign:
        raise UserError(
            f"{place}: holds a checkpoint of another run ({_listed(foreign)}); give what it was started with, or "
            "choose another directory; --load takes a checkpoint's weights into a new run"
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
    """Return the optimizer's options with the checkpoint's schedule (--use-checkpoint-opt-param-scheduler).

    Where the schedule ended with the run by default, it still ends at the same step in a run that was lengthened.
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
