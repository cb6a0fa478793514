"""What a checkpoint records of its run: every flag that decides numbers, so that a resume notices a change."""

import dataclasses
import typing
from types import SimpleNamespace

import pytest
import torch

from megatron_moe_lpr.engine.options import OptimizerOptions
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.flag_marks import Change, Free, RecordedAs
from megatron_moe_lpr.model.configuration.config import MoELPRConfig
from megatron_moe_lpr.training.configuration.config import TrainingConfig
from megatron_moe_lpr.training.configuration.description import (
    ACCEPTABLE,
    FLAGS,
    SCHEDULE,
    describe_run,
    differences,
    refuse_differences,
)
from megatron_moe_lpr.training.configuration.stages import STAGES, StageOptions
from tests.training.runs import LANGUAGES, training_config

CHOICES = {"lr_decay_style": "linear", "lpr_loss_form": "reference", "stage": "full"}


@pytest.fixture
def config(tmp_path):
    # Fields that count only beside others must count.
    fp8 = {"fp8_format": "hybrid", "fp8_recipe": "tensorwise", "first_last_layers_bf16": True}
    return training_config(tmp_path / "load", tmp_path / "save", dict.fromkeys(LANGUAGES, "prefix"), **fp8)


def with_fp8(config: TrainingConfig, **changes) -> TrainingConfig:
    fp8 = dataclasses.replace(config.compute.fp8, **changes)
    return dataclasses.replace(config, compute=dataclasses.replace(config.compute, fp8=fp8))


def described(config: TrainingConfig, has_new_rows: bool = True) -> dict:
    sources = SimpleNamespace(train=[], original_languages=())
    return describe_run(config, config.stage.resolve(), sources, torch.bfloat16, has_new_rows)


def changed(options: typing.Any, path: str) -> typing.Any:
    """The configuration with another value in the field at `path`, whether it goes with the other fields or not."""
    name, _, rest = path.partition(".")
    if rest:
        return unchecked(options, **{name: changed(getattr(options, name), rest)})
    value = CHOICES.get(name) or another(getattr(options, name), typing.get_type_hints(type(options))[name])
    return unchecked(options, **{name: value})


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


@pytest.mark.parametrize("flag", [flag for flag in FLAGS if "." in flag.path], ids=lambda flag: flag.path)
def test_every_flag_that_is_marked_as_deciding_numbers_is_recorded_and_no_other(flag, config):
    if flag.path == "stage.train_new_rows":  # of the review alone
        config = dataclasses.replace(config, stage=dataclasses.replace(config.stage, stage="2"))
    found = differences(described(config), described(changed(config, flag.path)))
    assert bool(found) == isinstance(flag.mark, Change), f"{flag.path}: {flag.mark} and recorded as {found}"
    assert not found or flag.recorded_as in found


def test_flags_of_the_run_itself_are_free():
    assert [flag.path for flag in FLAGS if "." not in flag.path and not isinstance(flag.mark, Free)] == []


def test_what_comes_of_other_flags_is_recorded_under_the_name_that_they_say(config):
    entry = SimpleNamespace(language="el", weight=1.0, first_document=0, end_document=9, is_packed=False)
    entry.manifest = SimpleNamespace(index_sha256="ab" * 32, bin_xxh3_128=None, chat=False)
    sources = SimpleNamespace(train=[entry], original_languages=("el",))
    other = describe_run(config, config.stage.resolve(), sources, torch.float32, True)
    elsewhere = {flag.recorded_as for flag in FLAGS if isinstance(flag.mark, RecordedAs)}
    assert elsewhere | {"languages"} == differences(described(config), other).keys()


def test_packing_and_loss_masks_are_recorded(config):
    """Also what packing implies; data that has neither is described as before there were conversations."""
    manifest = SimpleNamespace(index_sha256="ab" * 32, bin_xxh3_128="cd" * 16, chat=True, loss_mask_xxh3_128="ef" * 16)
    entry = SimpleNamespace(language="el", weight=1.0, first_document=0, end_document=9, manifest=manifest)

    def description(chat, is_packed):
        manifest.chat, entry.is_packed = chat, is_packed
        sources = SimpleNamespace(train=[entry], original_languages=("el",))
        return describe_run(config, config.stage.resolve(), sources, torch.float32, False)

    plain, chat, packed = (description(*kind) for kind in ((False, False), (True, False), (True, True)))
    assert plain["data"] == ["el 1 documents 0-9 index abababababababab text cdcdcdcdcdcdcdcd"]
    assert chat["data"] == [f"{plain['data'][0]} loss mask efefefefefefefef"]
    assert packed["data"] == [f"{chat['data'][0]} packed best-fit"]
    assert set(differences(chat, packed)) == {"data", "reset_attention_mask", "reset_position_ids"}


def test_the_names_that_older_checkpoints_recorded_stay(config):
    """What is not recorded under the same name in both is not compared, so a lost name would be a silent change."""
    optimizer = {"adam_beta1", "adam_beta2", "adam_eps", "clip_grad"}
    stage = {"stage", "load_balancing_coeff", "lpr_loss_coeff", "lpr_loss_form", "train_embeddings"}
    fp8 = {"fp8_format", "fp8_recipe", "fp8_param_gather", "first_last_layers_bf16"}
    layers = {"num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"}
    schedule = {"lr", "min_lr", "lr_decay_style", "lr_decay_iters", "lr_warmup_iters", "weight_decay"}
    schedule |= {"lr_wsd_decay_iters", "lr_wsd_decay_style"}
    another_run = {"languages", "original_languages", "global_batch_size", "seq_length", "seed", "dtype"}
    another_run |= {"open_experts_iters", "stage", "train_embeddings", "fp8_param_gather"}
    names = optimizer | stage | fp8 | layers | schedule | another_run | {"train_iters", "eod_mask_loss", "data"}
    assert names <= described(config).keys()
    assert set(SCHEDULE) >= schedule
    assert names - set(ACCEPTABLE) == another_run


def test_runs_of_older_versions_attended_across_documents(config):
    """They recorded nothing of it, and do not begin to keep documents apart without a word."""
    before = {name: value for name, value in described(config).items() if not name.startswith("reset_")}
    refuse_differences(before, described(config), set(), "run")
    now = described(changed(config, "data.documents.reset_attention_mask"))
    with pytest.raises(UserError, match=r"reset_attention_mask False there and True here.*--accept-changes reset-att"):
        refuse_differences(before, now, set(), "run")
    refuse_differences(before, now, {"reset_attention_mask"}, "run")


def test_what_the_scheduler_decides_are_options_of_the_optimizer():
    """`recorded_schedule` puts them back there."""
    assert set(SCHEDULE) <= {field.name for field in dataclasses.fields(OptimizerOptions)}


def test_a_coefficient_has_one_name_as_flag_as_default_and_in_the_model(config):
    """Flags that are given take the place of each stage's default, and reach the model and the record."""
    names = config.stage.resolve().coefficients.keys()
    assert {"load_balancing_coeff", "lpr_loss_coeff"} <= names <= set(ACCEPTABLE)
    assert names <= {field.name for field in dataclasses.fields(MoELPRConfig)}
    for stage, values in STAGES.items():
        assert StageOptions(stage).resolve().coefficients == values.coefficients
        given = {name: 0.25 + number for number, name in enumerate(names)}
        options = StageOptions(stage, **given)
        assert options.resolve().coefficients == given
        assert described(dataclasses.replace(config, stage=options)).items() >= given.items()


def test_training_of_new_rows_is_recorded_where_it_counts(config):
    """In the review of a model that has new rows. Elsewhere runs of older versions resume, whose default was off and
    which had no new-token loss."""
    review = dataclasses.replace(config, stage=StageOptions("2"))
    older = {"train_new_rows": False}
    for stage, has_new_rows in ((config, True), (config, False), (review, False)):
        refuse_differences(older, described(stage, has_new_rows) | {"new_token_loss_coeff": 0.0}, set(), "run")
    with pytest.raises(UserError, match=r"train_new_rows False there and True here.* give what it was started with"):
        refuse_differences(older, described(review), set(), "run")
    given = dataclasses.replace(config, stage=StageOptions("2", train_new_rows=False, new_token_loss_coeff=0.5))
    with pytest.raises(UserError, match=r"new_token_loss_coeff 0.0 there and 0.5 here.* new-token-loss-coeff"):
        refuse_differences(older, described(given), set(), "run")


@pytest.mark.parametrize(
    ("name", "value"),
    [("first_last_layers_bf16", False), ("num_layers_at_start_in_bf16", 2), ("num_layers_at_end_in_bf16", 0)],
)
def test_the_layers_in_bf16_change_only_with_a_word(name, value, config):
    before = described(config)
    now = described(with_fp8(config, **{name: value}))
    with pytest.raises(UserError, match=f"{name} .* there and .* here.*--accept-changes .*{name.replace('_', '-')}"):
        refuse_differences(before, now, set(), "run")
    refuse_differences(before, now, set(ACCEPTABLE), "run")


def test_layers_in_bf16_count_only_where_there_are_some(config):
    """Without the flag, or without FP8, their numbers decide nothing."""
    off = with_fp8(config, first_last_layers_bf16=False)
    more = with_fp8(off, num_layers_at_start_in_bf16=3)
    assert described(off) == described(more)
