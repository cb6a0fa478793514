"""Warns of losses that jump or climb. It only tells: whether to go back is for a person to decide."""

import math

WINDOW = 20
"""Steps over which mean and deviation run (exponentially)."""
SEEN = 20
"""Steps before a single loss can be called a spike."""
DEVIATIONS = 6.0
LEAST_DEVIATION = 0.02
CLIMB = 0.5
"""Nats above the lowest running mean that are no longer noise: a perplexity 1.65 times as high."""
SURE = 3.0
"""Deviations of the running mean by which it may be off: with two windows of different languages a step it is mostly
chance."""
REPEAT = 100
"""Steps between two warnings of one kind."""


class LossWatch:
    """Two rules over the running mean of the loss:

    a spike is a loss more than 6 deviations above the mean, once 20 steps were seen; the run climbs when the mean is
    0.5 above its lowest so far, even with each of the two as far off as chance may have it. It starts anew with each
    start of the run.
    """

    def __init__(self) -> None:
        self.seen, self.mean, self.variance, self.lowest = 0, 0.0, 0.0, math.inf
        self.warned: dict[str, int] = {}

    def add(self, loss: float) -> str | None:
        """Take the loss of a step, in nats per token; what to warn of. Losses that are not finite are left out."""
        if not math.isfinite(loss):
            return None
        deviation = max(math.sqrt(self.variance), LEAST_DEVIATION)
        spike = self.seen >= SEEN and loss > self.mean + DEVIATIONS * deviation
        before = self.mean
        self._update(loss)
        if spike:
            return self._once("spike", f"loss {loss:.3f} is a spike: mean {before:.3f}, deviation {deviation:.3f}")
        if self.mean - self._chance() > self.lowest + CLIMB:
            words = f"the mean loss has climbed from {self.lowest:.3f} to {self.mean:.3f}; is --lr too high?"
            return self._once("climb", words)
        return None

    def _update(self, loss: float) -> None:
        # A plain mean at first: an exponential one would hang on the first loss.
        self.seen += 1
        share = 1 / min(self.seen, WINDOW)
        difference = loss - self.mean
        self.mean += share * difference
        self.variance = (1 - share) * (self.variance + share * difference * difference)
        self.lowest = min(self.lowest, self.mean + self._chance())

    def _chance(self) -> float:
        # As if one more loss, a nat off, had been seen: the variance of two alike is no measure.
        variance = (self.seen * self.variance + 1) / (self.seen + 1)
        return SURE * math.sqrt(variance / min(self.seen, WINDOW))

    def _once(self, kind: str, words: str) -> str | None:
        last = self.warned.get(kind)
        if last is not None and self.seen - last < REPEAT:
            return None
        self.warned[kind] = self.seen
        return words
