"""Which losses are warned of."""

import math
import random

from megatron_moe_lpr.training.logs.loss_watch import REPEAT, LossWatch


def warnings(losses) -> dict[int, str]:
    watch = LossWatch()
    told = {step: watch.add(loss) for step, loss in enumerate(losses)}
    return {step: words for step, words in told.items() if words}


def falling(steps: int, noise: float = 0.1) -> list[float]:
    generator = random.Random(1)
    return [2 + 5 * math.exp(-step / 200) + generator.gauss(0, noise) for step in range(steps)]


def test_a_run_that_learns_is_left_alone():
    assert warnings(falling(2000)) == {}


def test_steps_of_a_few_windows_in_different_languages_are_left_alone():
    generator = random.Random(2)
    by_language = [2.37, 3.5, 3.7, 2.5, 1.6]
    for _ in range(20):
        assert warnings([generator.choice(by_language) + generator.gauss(0, 0.1) for _ in range(500)]) == {}


def test_a_spike_is_told_once():
    losses = falling(400)
    losses[300] += 2
    found = warnings(losses)
    assert list(found) == [300] and "spike" in found[300]


def test_a_learning_rate_that_is_far_too_high_is_told_within_a_few_steps_and_not_at_each():
    found = warnings([7.0] + [30.0 + step % 3 for step in range(3 * REPEAT)])
    assert min(found) < 5 and "--lr" in found[min(found)]
    assert 2 <= len(found) <= 6


def test_a_slow_climb_is_told():
    found = warnings(falling(500) + [2.5 + step / 400 for step in range(800)])
    assert found and all("climbed" in words for words in found.values())


def test_what_is_not_finite_is_left_out():
    assert warnings([3.0, math.nan, math.inf] * 50) == {}
