"""The learning rate over the steps: any settings make a schedule, or a line that says why not."""

import itertools
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.training.configuration.config import TrainingConfig
from megatron_moe_lpr.training.configuration.description import recorded_schedule
from megatron_moe_lpr.training.configuration.schedule_notes import schedule_notes
from megatron_moe_lpr.training.optimizer import build_schedule
from tests.training.runs import training_config

PLACE = Path("unused")
DATA = {"el": "el", "hu": "hu"}


def config(**changes) -> TrainingConfig:
    return training_config(PLACE, PLACE, DATA, **changes)


def rates(run: TrainingConfig) -> list[float]:
    """Of each step, by Megatron's schedule."""
    optimizer = SimpleNamespace(param_groups=[{}])
    schedule = build_schedule(optimizer, run.optimizer, run.batch)
    found = []
    for _ in range(run.batch.train_iters):
        found.append(optimizer.param_groups[0]["lr"])
        schedule.step(increment=run.batch.global_batch_size)
    return found


numbers = st.sampled_from([-1.0, 0.0, 1e-300, 1e-5, 1e-2, 1.0, 1e300, math.nan, math.inf]) | st.floats()
counts = st.integers(-2, 40)
SETTINGS = {
    "lr": numbers,
    "min_lr": numbers,
    "weight_decay": numbers,
    "train_iters": counts,
    "lr_decay_iters": st.none() | counts,
    "lr_warmup_iters": counts,
    "lr_wsd_decay_iters": st.none() | counts,
    "lr_decay_style": st.sampled_from(["cosine", "linear", "WSD", "constant"]),
    "lr_wsd_decay_style": st.sampled_from(["cosine", "linear", "exponential", "minus_sqrt"]),
}


@given(st.fixed_dictionaries({}, optional=SETTINGS))
@settings(max_examples=400, deadline=None)
def test_any_settings_make_a_schedule_or_are_refused_by_name(changes):
    try:
        run = config(**changes)
    except UserError as error:
        named = [name for name in changes if f"--{name.replace('_', '-')}" in str(error)]
        assert named and "\n" not in str(error)
        return
    options, found = run.optimizer, rates(run)
    assert all(0 <= rate <= options.lr * (1 + 1e-9) for rate in found)
    assert all(rate >= options.min_lr for rate in found[options.lr_warmup_iters :])
    after = options.iters_after_decay(run.batch.train_iters)
    assert not after or found[-after:] == [options.min_lr] * after
    # The rate never rises again, whatever the shape of the decay.
    decaying = found[options.lr_warmup_iters :]
    assert all(later <= earlier * (1 + 1e-9) for earlier, later in itertools.pairwise(decaying))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lr_warmup_iters": 6}, "--lr-warmup-iters 6: must be below --train-iters 6"),
        ({"lr_warmup_iters": 4, "lr_decay_iters": 4}, "--lr-warmup-iters 4: must be below --lr-decay-iters 4"),
        ({"min_lr": 1.0}, "--min-lr 1.0: must be at most --lr 0.01"),
        ({"lr": -1.0}, "--lr -1.0: must be at least 0"),
        ({"weight_decay": -0.1}, "--weight-decay -0.1: must be at least 0"),
        ({"adam_eps": 0.0}, "--adam-eps 0.0: must be at least 1e-37"),
        ({"adam_beta2": 1.0}, "--adam-beta2 1.0: must be at least 0 and below 1"),
        ({"log_interval": 0}, "--log-interval 0: must be at least 1"),
        ({"eval_iters": -2}, "--eval-iters -2: must be at least -1"),
        ({"num_workers": -1}, "--num-workers -1: must be at least 0"),
        ({"seed": -1}, "--seed -1: must be at least 0"),
        ({"save_interval": -1}, "--save-interval -1: must be at least 0"),
        ({"micro_batch_size": 16}, "--global-batch-size 8 is not a multiple of --micro-batch-size 16"),
        ({"tensor_model_parallel_size": 0}, "--tensor-model-parallel-size 0: must be at least 1"),
        (
            {"lr_decay_style": "WSD", "lr_warmup_iters": 4, "lr_wsd_decay_iters": 3},
            "--lr-wsd-decay-iters 3: must be at most 2, what --lr-warmup-iters 4 leaves of --train-iters 6",
        ),
    ],
)
def test_what_does_not_go_together_is_named(changes, words):
    with pytest.raises(UserError) as refused:
        config(**changes)
    assert str(refused.value).startswith(words)


def test_the_default_of_wsd_leaves_the_warm_up_alone():
    """A tenth of 100 would begin before the warm-up of 95 ends, and the rate would jump."""
    found = rates(config(train_iters=100, lr_warmup_iters=95, lr_decay_style="WSD"))
    assert found[95] == 0.01 and found[96:] == sorted(found[96:], reverse=True) and found[96] == pytest.approx(0.008)


def test_steps_after_the_decay_are_counted():
    run = config(train_iters=10, lr_decay_iters=4)
    assert rates(run).count(0.0) == 6 and rates(run)[3] > 0
    (note,) = schedule_notes(run)
    assert "warning: steps 5 to 10 (6 steps)" in note and "--lr-decay-iters 4" in note and "--min-lr 0" in note
    (note,) = schedule_notes(run, begun=7)
    assert "steps 8 to 10 (3 steps)" in note
    (note,) = schedule_notes(config(train_iters=10, lr_decay_iters=4, min_lr=1e-4))
    assert note.startswith("steps 5 to 10 (6 steps)") and "--min-lr 0.0001" in note


@pytest.mark.parametrize("changes", [{}, {"lr_decay_iters": 6}, {"lr_decay_iters": 4, "lr_decay_style": "constant"}])
def test_nothing_is_said_of_a_schedule_that_takes_the_whole_run(changes):
    assert schedule_notes(config(**changes)) == []


def test_a_rate_of_zero_is_said():
    (note,) = schedule_notes(config(lr=0.0), begun=2)
    assert note.startswith("warning: --lr 0: all 4 steps")


def test_a_lengthened_run_says_that_its_schedule_is_stretched():
    (note,) = schedule_notes(config(train_iters=9), 3, {"train_iters": 6, "lr_decay_iters": None})
    assert "until step 9, no longer until step 6" in note and "--use-checkpoint-opt-param-scheduler" in note
    assert schedule_notes(config(train_iters=6), 3, {"train_iters": 6, "lr_decay_iters": None}) == []


@pytest.mark.parametrize(("recorded", "expected"), [(None, 6), (4, 4)])
def test_the_checkpoints_schedule_ends_where_it_did(recorded, expected):
    run = config(train_iters=9, lr=1.0)
    kept = recorded_schedule({"train_iters": 6, "lr": 1e-2, "lr_decay_iters": recorded}, run)
    assert (kept.lr, kept.lr_decay_iters) == (1e-2, expected)


def test_the_checkpoints_schedule_of_a_run_of_the_same_length_stays_without_an_end_of_its_own():
    assert recorded_schedule({"train_iters": 6, "lr_decay_iters": None}, config()).lr_decay_iters is None
