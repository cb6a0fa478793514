"""What an extension of a tokenizer brings, as a table, as JSON and as an SVG picture."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from markupsafe import Markup
from rich.table import Table

from megatron_moe_lpr.svg import Frame, element
from megatron_moe_lpr.vocabulary.measurement import Fertility

COLOURS = ("#2563eb", "#ea580c", "#16a34a", "#9333ea", "#0891b2", "#be123c")
MARGIN = 56
"""Pixels on all sides of the picture."""


@dataclasses.dataclass(frozen=True)
class LanguageFigures:
    """Figures of one language, on the held-out part of its text.

    Attributes:
        guarded: otherwise learned.
        before: with the base tokenizer.
        after: with the extended one.
        documents: documents held out.
        changed: of these, how many get a new token. Merges were learned without these documents.
    """

    guarded: bool
    before: Fertility
    after: Fertility
    documents: int
    changed: int


@dataclasses.dataclass(frozen=True)
class ExtensionFigures:
    """Figures of an extension: by language, and bytes a token of learned languages by the number of new tokens."""

    languages: Mapping[str, LanguageFigures]
    steps: Mapping[int, Mapping[str, float]]

    def share_of_gain(self, tokens: int) -> float:
        """Return the mean share of the saved tokens that the first `tokens` new ones save, over the languages."""
        shares = []
        for language, reached in self.steps[tokens].items():
            before, after = (getattr(self.languages[language], name).bytes_per_token for name in ("before", "after"))
            saved = 1 / before - 1 / after
            shares.append((1 / before - 1 / reached) / saved if saved else 1.0)
        return sum(shares) / max(len(shares), 1)

    def record(self) -> dict[str, Any]:
        """Return the figures as a JSON object."""
        steps = [
            {"new_tokens": tokens, "share_of_gain": self.share_of_gain(tokens), "bytes_per_token": dict(languages)}
            for tokens, languages in self.steps.items()
        ]
        languages = {language: dataclasses.asdict(figures) for language, figures in self.languages.items()}
        return {"held_out": languages, "steps": steps}

    def tables(self) -> list[Table]:
        """Return a table of the languages and one of the numbers of new tokens."""
        names = ("bytes a token", "extended", "tokens a word", "extended", "tokens", "documents split otherwise")
        first = Table("", *names, title="held-out text", title_justify="left")
        for language, one in self.languages.items():
            before, after = one.before.bytes_per_token, one.after.bytes_per_token
            first.add_row(
                f"{language} ({'guarded' if one.guarded else 'learned'})",
                f"{before:.2f}",
                f"{after:.2f}",
                _words(one.before),
                _words(one.after),
                f"{before / after - 1:+.1%}",
                f"{one.changed:,} of {one.documents:,}" if one.guarded else "",
            )
        learned = list(next(iter(self.steps.values()), {}))
        second = Table("new tokens", "share of the gain", *learned, title="bytes a token", title_justify="left")
        for tokens, languages in self.steps.items():
            values = (f"{value:.2f}" for value in languages.values())
            second.add_row(f"{tokens:,}", f"{self.share_of_gain(tokens):.1%}", *values)
        return [first, second]

    def plot(self) -> str:
        """Draw bytes a token of each learned language by the number of new tokens."""
        curves = {
            language: [(0.0, one.before.bytes_per_token)]
            + [(float(tokens), values[language]) for tokens, values in self.steps.items()]
            for language, one in self.languages.items()
            if not one.guarded
        }
        heights = [y for points in curves.values() for _, y in points]
        sizes = dict.fromkeys(("left", "right", "top", "bottom"), MARGIN)
        frame = Frame.around(heights, max(self.steps, default=1), width=720, height=360, **sizes)
        parts: list[Markup] = [frame.grid(lambda value: f"{value:g}")]
        for (language, points), colour in zip(curves.items(), COLOURS * len(curves), strict=False):
            x, y = frame.place(*points[-1])
            parts += [frame.line(points, colour), element("text", language, x=x + 6, y=y + 4, fill=colour)]
        parts.append(frame.x_axis([(float(tokens), f"{tokens:,}") for tokens in self.steps], "new tokens"))
        parts.append(element("text", "bytes a token, held-out text", x=MARGIN, y=24))
        look = {"xmlns": "http://www.w3.org/2000/svg", "font_family": "sans-serif", "font_size": 12, "stroke_width": 1}
        return frame.draw(element("style", ".grid { stroke: #cbd5e1 }"), *parts, **look) + "\n"


def _words(fertility: Fertility) -> str:
    return "-" if fertility.tokens_per_word is None else f"{fertility.tokens_per_word:.2f}"
