"""What `make real` set out to reach, and whether it did: numbers chosen before the first run."""

from collections.abc import Iterator

from examples.real.figures import Figures
from examples.real.tables import Grid

EXPANDED = -0.35
"""Change of bits per byte of the new languages' validation text, at most."""
ORIGINAL = 0.01
"""Change of bits per byte of the original languages, at most, of either text."""
GRAMMAR = 0.01
"""Loss in the share of right pairs, at most."""
TIMES = 5
"""How many times as much as the extended model full fine-tuning loses of the original languages, at least."""
FULL = "full fine-tuning"


def goals(figures: Figures, subject: str) -> Grid:
    """Return each goal with what was found."""
    rows = [
        [what, "reached" if is_reached else "missed", found, wanted]
        for what, wanted, found, is_reached in _all(figures, subject)
    ]
    note = f"Chosen before the first run; of {subject}, against {figures.base}."
    return Grid("What was to be reached", note, ["goal", "outcome", "found", "wanted"], rows)


def _all(figures: Figures, subject: str) -> Iterator[tuple[str, str, str, bool]]:
    learned, lost = (figures.change(subject, "text", group) for group in ("expanded", "original"))
    yield "bits per byte, new languages", f"{EXPANDED:+.0%} or less", f"{learned:+.1%}", learned <= EXPANDED
    yield "bits per byte, original languages", f"{ORIGINAL:+.0%} at most", f"{lost:+.1%}", lost <= ORIGINAL
    if FULL in figures.models:
        full = figures.change(FULL, "text", "original")
        wanted, found = f"{TIMES} times as much lost", f"{full:+.1%} against {lost:+.1%}"
        yield f"original languages after {FULL}", wanted, found, full > 0 and full >= TIMES * lost
    if figures.accuracy(subject) is not None:
        points = (figures.accuracy(subject) or 0) - (figures.accuracy(figures.base) or 0)
        yield "grammar", f"{GRAMMAR * 100:.0f} point lost at most", f"{points * 100:+.1f}", points >= -GRAMMAR
    if figures.models[figures.base]["other_text"]:
        places = figures.columns("other_text")
        if "expanded" in places:
            change = figures.change(subject, "other_text", "expanded")
            yield "text of another kind, new languages", "fewer bits per byte", f"{change:+.1%}", change < 0
        if "original" in places:
            change = figures.change(subject, "other_text", "original")
            wanted = f"{ORIGINAL:+.0%} at most"
            yield "text of another kind, original languages", wanted, f"{change:+.1%}", change <= ORIGINAL
