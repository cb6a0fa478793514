"""Charts as SVG: escaped elements, and a frame that converts data to pixels."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence

from markupsafe import Markup


def element(name: str, *content: str, **attributes: object) -> Markup:
    """Return an SVG element; text and attributes are escaped, floats rounded to one digit.

    Args:
        content: text, or elements of this function.
        attributes: a name's underscores become hyphens; one at its end is left out (`class_`).
    """
    pairs = Markup("").join(
        Markup(' {}="{}"').format(
            key.removesuffix("_").replace("_", "-"), f"{value:.1f}" if isinstance(value, float) else value
        )
        for key, value in attributes.items()
    )
    return Markup("<{0}{1}>{2}</{0}>").format(name, pairs, Markup("").join(content))


@dataclasses.dataclass(frozen=True)
class Frame:
    """The area of a chart: x from 0 to `end`, y from `low` to `high`, size and margins in pixels."""

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
        """Return a frame with a margin of 5% above and below the given y values."""
        low, high = min(heights), max(heights)
        margin = 0.05 * (high - low) or 1e-3
        return cls(end or 1, low - margin, high + margin, **sizes)

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Return the pixels of a point."""
        across = (self.width - self.left - self.right) * x / self.end
        down = (self.height - self.top - self.bottom) * (self.high - y) / (self.high - self.low)
        return self.left + across, self.top + down

    def draw(self, *elements: str, **attributes: object) -> Markup:
        """Return the SVG picture of these elements."""
        return element("svg", *elements, viewBox=f"0 0 {self.width} {self.height}", **attributes)

    def line(self, points: Iterable[tuple[float, float]], color: str) -> Markup:
        """Return a line through points of the data."""
        pixels = " ".join(f"{x:.1f},{y:.1f}" for x, y in (self.place(*point) for point in points))
        return element("polyline", points=pixels, stroke=color, fill="none", stroke_width=2)

    def grid(self, text: Callable[[float], str]) -> Markup:
        """Return horizontal lines at round y values, each with its value as `text` formats it."""
        right, parts = self.width - self.right, []
        for value in ticks(self.low, self.high):
            _, y = self.place(0, value)
            parts.append(element("line", class_="grid", x1=self.left, x2=right, y1=y, y2=y))
            parts.append(element("text", text(value), class_="tick", x=self.left - 6, y=y + 4, text_anchor="end"))
        return Markup("").join(parts)

    def x_axis(self, values: Iterable[tuple[float, str]], name: str) -> Markup:
        """Return the texts below the chart: a label at each x value, and the name of the axis at the right."""
        _, base = self.place(0, self.low)
        labels = [
            element("text", label, class_="tick", x=self.place(x, 0)[0], y=base + 16, text_anchor="middle")
            for x, label in values
        ]
        right, below = self.width - self.right, self.height - 4
        return Markup("").join([*labels, element("text", name, class_="tick", x=right, y=below, text_anchor="end")])


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about `count` round numbers from `low` to `high`."""
    span = (high - low) / count
    power = 10.0 ** math.floor(math.log10(span))
    step = next(step * power for step in (1, 2, 5, 10) if step * power >= span)
    first = int(-(-low // step))
    return [round(index * step, 9) for index in range(first, int(high // step) + 1)]
