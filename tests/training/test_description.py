"""What a checkpoint records of its run: every flag that decides numbers, so that a resume notices a change."""

import dataclasses
import typing
from types import SimpleNamespace

import pytest
import torch

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.training.config import TrainingConfig
from megatron_moe_lpr.training.description import ACCEPTABLE, describe_run, differences, refuse_differences
from tests.training.runs import LANGUAGES, training_config

# Flags that may change in a resume without a word, each with its reason. A new one belongs into `describe_run` or here.
NOT_RECORDED = {
    "stage.allow_original_languages": "only checked against the data, which are recorded",
    "batch.micro_batch_size": "cuts the same global batch otherwise: rounding alone",
    "data.data_path": "recorded by content (`data`), as the data are read",
    "data.valid_data_path": "validation changes no weight",
    "data.split": "recorded as the documents of each dataset (`data`), as the data are read",
    "data.original_languages": "recorded as the data are read",
    "data.data_cache_path": "a place",
    "data.num_workers": "who loads, not what",
    "optimizer.use_distributed_optimizer": "where states lie: rounding alone",
    "optimizer.overlap_grad_reduce": "when, not what",
    "optimizer.overlap_param_gather": "when, not what",
    "optimizer.overlap_on_gpus": "when, not what",
    "precision.fp16": "refused",
    "precision.bf16": "recorded as the dtype that comes of it",
    "precision.fp32": "recorded as the dtype that comes of it",
    "precision.moe_token_dispatcher_type": "how tokens travel: rounding alone",
    "precision.original_expert_overlap": "when, not what",
    "precision.recompute_granularity": "computes the same twice",
    "precision.recompute_method": "computes the same twice",
    "precision.recompute_num_layers": "computes the same twice",
    "precision.recompute_modules": "computes the same twice",
    "guards.on_nonfinite": "what happens in a step that is not finite, which the log tells",
    "guards.max_consecutive_skips": "how long a run goes on, not what it computes",
    "platform": "rounding alone",
    "distributed_timeout_minutes": "when a run ends by force",
}
PARTS_WITHOUT_NUMBERS = ("checkpoint", "layout", "logging")
CHOICES = {"lr_decay_style": "linear", "lpr_loss_form": "reference", "stage": "full"}


@pytest.fixture
def config(tmp_path):
    base = training_config(tmp_path / "load", tmp_path / "save", dict.fromkeys(LANGUAGES, "prefix"))
    # Fields that count only beside others must count.
    fp8 = dataclasses.replace(base.fp8, fp8_format="hybrid", fp8_recipe="tensorwise", first_last_layers_bf16=True)
    return dataclasses.replace(base, fp8=fp8)


def described(config: TrainingConfig) -> dict:
    sources = SimpleNamespace(train=[], original_languages=())
    return describe_run(config, config.stage.resolve(), sources, torch.bfloat16)


def changed(config: TrainingConfig, part: str, name: str) -> TrainingConfig:
    """The configuration with another value in one field, fit for `describe_run` or not."""
    options = getattr(config, part)
    value = CHOICES.get(name) or another(getattr(options, name), typing.get_type_hints(type(options))[name])
    # Whether the value goes with others is not asked here.
    return unchecked(config, **{part: unchecked(options, **{name: value})})


def unchecked(options, **values):
    """`dataclasses.replace` without its checks."""
    copied = object.__new__(type(options))
    vars(copied).update(vars(options) | values)
    return copied


def another(value, kind):
    """A value of the field's type that is not `value`."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    literals = [one for part in (kind, *typing.get_args(kind)) for one in typing.get_args(part) if one != value]
    if any(isinstance(one, str) for one in literals):
        return next(one for one in literals if isinstance(one, str))
    return 7


def fields():
    """(part, field) of every flag; a flag of the run itself has no part."""
    for field in dataclasses.fields(TrainingConfig):
        kind = typing.get_type_hints(TrainingConfig)[field.name]
        if dataclasses.is_dataclass(kind):
            yield from ((field.name, inner.name) for inner in dataclasses.fields(kind))
        else:
            yield "", field.name


@pytest.mark.parametrize(("part", "name"), [pair for pair in fields() if pair[0] not in PARTS_WITHOUT_NUMBERS])
def test_every_flag_is_recorded_or_exempt_for_a_reason(part, name, config):
    exempt = f"{part}.{name}".strip(".") in NOT_RECORDED
    if not part:
        assert exempt, f"{name}: record it in describe_run, or say here why it decides no number"
        return
    found = differences(described(config), described(changed(config, part, name)))
    assert bool(found) != exempt, f"{part}.{name}: record it in describe_run, or say here why it decides no number"


def test_no_exemption_is_stale():
    assert NOT_RECORDED.keys() <= {f"{part}.{name}".strip(".") for part, name in fields()}


@pytest.mark.parametrize(
    ("name", "value"),
    [("first_last_layers_bf16", False), ("num_layers_at_start_in_bf16", 2), ("num_layers_at_end_in_bf16", 0)],
)
def test_the_layers_in_bf16_change_only_with_a_word(name, value, config):
    before = described(config)
    now = described(dataclasses.replace(config, fp8=dataclasses.replace(config.fp8, **{name: value})))
    with pytest.raises(UserError, match=f"{name} .* there and .* here.*--accept-changes .*{name.replace('_', '-')}"):
        refuse_differences(before, now, set(), "run")
    refuse_differences(before, now, set(ACCEPTABLE), "run")


def test_layers_in_bf16_count_only_where_there_are_some(config):
    """Without the flag, or without FP8, their numbers decide nothing."""
    off = dataclasses.replace(config, fp8=dataclasses.replace(config.fp8, first_last_layers_bf16=False))
    more = dataclasses.replace(off, fp8=dataclasses.replace(off.fp8, num_layers_at_start_in_bf16=3))
    assert described(off) == described(more)
