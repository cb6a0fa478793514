"""Warns of losses that jump or climb; the user decides whether to go back to an earlier checkpoint."""

import math

WINDOW = 20
"""Steps over which mean and deviation are averaged (exponentially)."""
WARM_UP_STEPS = 20
"""Steps before a loss can be a spike."""
SPIKE_SIGMAS = 6.0
"""A loss is a spike that many standard deviations above the mean."""
MIN_DEVIATION = 0.02
"""Least standard deviation in nats that spikes are measured by."""
CLIMB_NATS = 0.5
"""Climb of the mean above its lowest value, in nats, that is warned of: a perplexity 1.65 times as high."""
NOISE_SIGMAS = 3.0
"""Ignore a climb within so many standard errors of the mean: with few sequences in different languages a step, the mean
changes by chance."""
WARNING_INTERVAL = 100
"""Least number of steps between two warnings of one kind."""


class LossWatch:
    """Watches the running mean of the loss for spikes and climbs, from each start of the run anew.

    A spike is a loss more than 6 standard deviations above the mean, after 20 steps. The loss climbs when the mean,
    less its standard errors, is 0.5 nats above the lowest mean so far plus its standard errors.
    """

    def __init__(self) -> None:
        self.seen, self.mean, self.variance, self.lowest = 0, 0.0, 0.0, math.inf
        self.warned: dict[str, int] = {}

    def add(self, loss: float) -> str | None:
        """Add the loss of a step, in nats per token; return a warning or None. A loss that is not finite is ignored."""
        if not math.isfinite(loss):
            return None
        deviation = max(math.sqrt(self.variance), MIN_DEVIATION)
        spike = self.seen >= WARM_UP_STEPS and loss > self.mean + SPIKE_SIGMAS * deviation
        before = self.mean
        self._update(loss)
        if spike:
            return self._once("spike", f"loss {loss:.3f} is a spike: mean {before:.3f}, deviation {deviation:.3f}")
        if self.mean - self._mean_noise() > self.lowest + CLIMB_NATS:
            words = f"the mean loss has climbed from {self.lowest:.3f} to {self.mean:.3f}; is --lr too high?"
            return self._once("climb", words)
        return None

    def _update(self, loss: float) -> None:
        # A plain mean over the first steps: an exponential one would give the first loss too much weight.
        self.seen += 1
        weight = 1 / min(self.seen, WINDOW)
        difference = loss - self.mean
        self.mean += weight * difference
        self.variance = (1 - weight) * (self.variance + weight * difference * difference)
        self.lowest = min(self.lowest, self.mean + self._mean_noise())

    def _mean_noise(self) -> float:
        # As if there had been one more loss, 1 nat from the mean: the variance of few losses may be far too small.
        variance = (self.seen * self.variance + 1) / (self.seen + 1)
        return NOISE_SIGMAS * math.sqrt(variance / min(self.seen, WINDOW))

    def _once(self, kind: str, words: str) -> str | None:
        last = self.warned.get(kind)
        if last is not None and self.seen - last < WARNING_INTERVAL:
            return None
        self.warned[kind] = self.seen
        return words
