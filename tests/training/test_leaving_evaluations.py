"""A signal during an evaluation: saved before it, left between two micro-batches by all ranks, done again later."""

import functools
import signal

import pytest

from megatron_moe_lpr.training import loop
from megatron_moe_lpr.training.signals import stop_request
from tests.distributed import rank_pool
from tests.training.runs import make_checkpoint, make_data, metrics, train

RANKS = 2
STEPS = 4
OPTIONS = {"train_iters": STEPS, "micro_batch_size": 4, "save_interval": 2, "expert_model_parallel_size": 2}
PASSES = 19
"""Micro-batches a rank of a validation set: 4,799 tokens to predict in samples of 32, four a micro-batch, two ranks."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("evaluations")
    checkpoint, data = make_checkpoint(root), make_data(root)
    return checkpoint, data, OPTIONS | {"valid_data_path": [data["el"], data["hu"]]}


@pytest.fixture(scope="module")
def undisturbed(inputs, tmp_path_factory):
    """Of a run that evaluates after every step."""
    save = tmp_path_factory.mktemp("undisturbed") / "run"
    run(inputs, save, eval_interval=1)
    return save


def run(inputs, save, job=train, **changes):
    checkpoint, data, options = inputs
    return rank_pool(RANKS).run(functools.partial(job, checkpoint, save, data, **options | changes))


def train_until(looks: int, *arguments, **changes) -> tuple[bool, int]:
    """The last rank gets a signal before it is asked for the `looks`-th time in evaluations: whether the run is
    finished, and how often this rank was asked."""
    import torch.distributed as dist

    stop, original, asked = stop_request(), loop.Trainer._after_pass, 0

    def after_pass(trainer) -> bool:
        nonlocal asked
        asked += 1
        if asked == looks and dist.get_rank() == RANKS - 1:
            stop.received = signal.SIGTERM
        return original(trainer)

    loop.Trainer._after_pass = after_pass
    try:
        return train(*arguments, **changes), asked
    finally:
        loop.Trainer._after_pass, stop.received = original, None


def latest(save) -> int:
    return int((save / "latest_checkpointed_iteration.txt").read_text())


def evaluations(save) -> dict:
    """Every record of an evaluation: by language and step, how often and the loss."""
    return {
        (language, step): record["lm_loss"]
        for language in ("el", "hu")
        for step, record in metrics(save, f"valid/{language}").items()
    }


@pytest.mark.parametrize(
    ("interval", "looks", "step"),
    [
        pytest.param(2, 3, 2, id="where a save is due"),
        pytest.param(1, PASSES + 3, 1, id="where none is, in the second dataset"),
        pytest.param(2, 2 * PASSES + 1, 4, id="after the last step"),
        pytest.param(None, PASSES + 1, 4, id="only after the last step"),
    ],
)
def test_all_leave_at_once_and_the_evaluation_is_done_again(interval, looks, step, inputs, undisturbed, tmp_path):
    save = tmp_path / "run"
    found = run(inputs, save, functools.partial(train_until, looks), eval_interval=interval)
    assert found == [(False, looks)] * RANKS
    assert latest(save) == step
    expected = evaluations(undisturbed)
    before = evaluations(save)
    assert all(expected[key] == value for key, value in before.items()), "a mean over a part"
    done = (looks - 1) // PASSES
    assert len(before) == done
    assert run(inputs, save, eval_interval=interval) == [True] * RANKS
    steps = range(interval, STEPS + 1, interval) if interval else [STEPS]
    assert evaluations(save) == {key: value for key, value in expected.items() if key[1] in steps}
    assert len((save / "metrics.jsonl").read_text().splitlines()) == STEPS + 2 * len(steps)
    same = ("lm_loss", "grad_norm", "lr", "load_balancing_loss")
    for number, record in metrics(save).items():
        assert {name: record[name] for name in same} == {name: metrics(undisturbed)[number][name] for name in same}


def test_a_finished_run_is_not_evaluated_again(inputs, undisturbed):
    before = (undisturbed / "metrics.jsonl").read_bytes()
    assert run(inputs, undisturbed, functools.partial(train_until, 1), eval_interval=1) == [(True, 0)] * RANKS
    assert (undisturbed / "metrics.jsonl").read_bytes() == before


def order(*arguments, **changes) -> list[str]:
    """What a run says was done, in order."""
    from megatron_moe_lpr.training.logs.metrics import MetricsWriter

    original, words = MetricsWriter.say, []
    MetricsWriter.say = lambda writer, text: words.append(text)
    try:
        train(*arguments, **changes)
    finally:
        MetricsWriter.say = original
    return [word for word in words if word.startswith("saved") or "validation" in word]


def test_a_checkpoint_is_complete_before_a_long_evaluation_ends(inputs, tmp_path):
    """Also where it is written beside training: nobody asked about it before the evaluation was over."""
    words = run(inputs, tmp_path / "run", order, eval_interval=2)[0]
    assert words[0].startswith("saved step 2") and words[1].startswith("step 2 validation")
    assert words[3].startswith("saved step 4") and len(words) == 6
