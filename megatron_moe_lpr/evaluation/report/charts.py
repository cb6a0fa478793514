"""Charts as inline SVG: lines over tokens, and heat maps by layer and language."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from html import escape

from megatron_moe_lpr.evaluation.report.inputs import TrainingLog

COLORS = ("#2563eb", "#0d9488", "#7c3aed", "#ea580c", "#dc2626", "#ca8a04", "#475569", "#db2777")
LOW, HIGH = (247, 250, 252), (30, 64, 175)
"""Colours of 0 and 1 in heat maps."""


@dataclasses.dataclass(frozen=True)
class Frame:
    """A chart's area: what is shown from `low` to `high` upwards and from 0 to `end` to the right, in pixels."""

    end: float
    low: float
    high: float
    width: int = 520
    height: int = 280
    left: int = 48
    right: int = 44
    top: int = 14
    bottom: int = 38

    @classmethod
    def around(cls, heights: Sequence[float], end: float, **sizes: int) -> "Frame":
        """With a little room above and below what is drawn."""
        low, high = min(heights), max(heights)
        room = 0.05 * (high - low) or 1e-3
        return cls(end or 1, low - room, high + room, **sizes)

    def place(self, x: float, y: float) -> tuple[float, float]:
        """A point's pixels."""
        across = (self.width - self.left - self.right) * x / self.end
        down = (self.height - self.top - self.bottom) * (self.high - y) / (self.high - self.low)
        return self.left + across, self.top + down

    def open(self, title: str) -> str:
        """The picture's beginning."""
        return f'<svg viewBox="0 0 {self.width} {self.height}" role="img" aria-label="{escape(title)}">'

    def rules(self, text: Callable[[float], str]) -> str:
        """Horizontal lines at round heights, each with its number."""
        parts = []
        for y in ticks(self.low, self.high):
            _, at = self.place(0, y)
            parts.append(f'<line class="grid" x1="{self.left}" x2="{self.width - self.right}" ')
            parts.append(f'y1="{at:.1f}" y2="{at:.1f}"/>')
            parts.append(f'<text class="tick" x="{self.left - 6}" y="{at + 4:.1f}" text-anchor="end">{text(y)}</text>')
        return "".join(parts)

    def marks(self, values: Sequence[tuple[float, str]], name: str) -> str:
        """Values below the chart, and what they are."""
        parts = []
        for x, text in values:
            at, base = self.place(x, self.low)
            parts.append(
                f'<text class="tick" x="{at:.1f}" y="{base + 16:.1f}" text-anchor="middle">{escape(text)}</text>'
            )
        right, below = self.width - self.right, self.height - 4
        return "".join([*parts, f'<text class="tick" x="{right}" y="{below}" text-anchor="end">{escape(name)}</text>'])


def line_chart(log: TrainingLog, languages: Sequence[str]) -> str:
    """Loss per token over tokens seen, a line per language, named at its end.

    Args:
        languages: of all charts, so that a language has one colour everywhere.
    """
    colors = {language: COLORS[index % len(COLORS)] for index, language in enumerate(sorted(languages))}
    points = [point for line in log.losses.values() for point in line]
    if not points:
        return "<p>The log has no losses.</p>"
    frame = Frame.around([y for _, y in points], max(x for x, _ in points))
    parts = [frame.open(f"{log.title}: training loss"), frame.rules("{:g}".format)]
    parts.append(frame.marks([(x, short(x)) for x in ticks(0, frame.end)], "tokens seen"))
    ends = spread({language: frame.place(*line[-1])[1] for language, line in log.losses.items()})
    for language, line in log.losses.items():
        color = colors[language]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (frame.place(*point) for point in line))
        parts.append(f'<polyline points="{path}" stroke="{color}" fill="none" stroke-width="2"/>')
        at, _ = frame.place(*line[-1])
        parts.append(f'<text class="name" x="{at + 5:.1f}" y="{ends[language] + 4:.1f}" fill="{color}">')
        parts.append(f"{escape(language)}</text>")
    return "".join([*parts, "</svg>"])


def heat_map(title: str, rows: Sequence[tuple[str, Sequence[float | None]]], caption: str) -> str:
    """Shares from 0 to 1: a row per language, a column per layer; None stays empty."""
    columns = max(len(values) for _, values in rows)
    cell, row_height, left, top = 58, 30, 56, 26
    width, height = left + columns * cell, top + len(rows) * row_height
    parts = [
        f'<svg viewBox="0 0 {width} {height}" style="max-width:{width}px" role="img" aria-label="{escape(title)}">'
    ]
    for column in range(columns):
        at = left + column * cell + cell / 2
        parts.append(f'<text class="tick" x="{at}" y="{top - 9}" text-anchor="middle">layer {column}</text>')
    for row, (name, values) in enumerate(rows):
        y = top + row * row_height
        parts.append(f'<text class="label" x="{left - 10}" y="{y + 20}" text-anchor="end">{escape(name)}</text>')
        for column, value in enumerate(values):
            parts.append(_cell(left + column * cell, y, cell, row_height, value))
    return f"<figure><h4>{escape(title)}</h4>{''.join(parts)}</svg><figcaption>{escape(caption)}</figcaption></figure>"


def _cell(x: float, y: float, width: float, height: float, value: float | None) -> str:
    if value is None:
        return f'<rect x="{x + 1}" y="{y + 1}" width="{width - 2}" height="{height - 2}" class="empty"/>'
    red, green, blue = (round(low + (high - low) * value) for low, high in zip(LOW, HIGH, strict=True))
    ink = "#fff" if value > 0.5 else "#1e293b"
    return (
        f'<rect x="{x + 1}" y="{y + 1}" width="{width - 2}" height="{height - 2}" rx="3" '
        f'fill="rgb({red},{green},{blue})"/>'
        f'<text class="value" x="{x + width / 2}" y="{y + height / 2 + 4}" text-anchor="middle" fill="{ink}">'
        f"{value * 100:.0f}%</text>"
    )


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers from `low` to `high`."""
    span = (high - low) / count
    power = 10.0 ** math.floor(math.log10(span))
    step = next(step * power for step in (1, 2, 5, 10) if step * power >= span)
    first = int(-(-low // step))
    return [round(index * step, 9) for index in range(first, int(high // step) + 1)]


def spread(heights: dict[str, float], distance: float = 13) -> dict[str, float]:
    """Move labels down until none covers another."""
    moved: dict[str, float] = {}
    last = float("-inf")
    for name, height in sorted(heights.items(), key=lambda item: item[1]):
        last = max(height, last + distance)
        moved[name] = last
    return moved


def short(number: float) -> str:
    """12000 as 12K."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:g}{unit}"
    return f"{number:g}"
