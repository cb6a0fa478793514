"""The report's charts of one run or model: loss over tokens, and heat maps by layer and language."""

from collections.abc import Sequence

from markupsafe import Markup

from megatron_moe_lpr.evaluation.report.inputs import TrainingLog
from megatron_moe_lpr.svg import Frame, element, ticks

COLORS = ("#2563eb", "#0d9488", "#7c3aed", "#ea580c", "#dc2626", "#ca8a04", "#475569", "#db2777")
LOW, HIGH = (247, 250, 252), (30, 64, 175)
"""Colours of 0 and 1 in heat maps: red, green, blue."""
CELL_WIDTH, CELL_HEIGHT, LABELS_WIDTH, HEADER_HEIGHT = 58, 30, 56, 26
"""Pixels of a heat map."""


def line_chart(log: TrainingLog, languages: Sequence[str]) -> Markup:
    """Draw the loss per token over tokens seen: one line for each language, with its name at the end.

    Args:
        languages: languages of all charts, so that a language has the same colour everywhere.
    """
    points = [point for line in log.losses.values() for point in line]
    if not points:
        return element("p", "The log has no losses.")
    colors = {language: COLORS[index % len(COLORS)] for index, language in enumerate(sorted(languages))}
    frame = Frame.around([y for _, y in points], max(x for x, _ in points))
    label_heights = spread({language: frame.place(*line[-1])[1] for language, line in log.losses.items()})
    parts = [frame.grid("{:g}".format), frame.x_axis([(x, short(x)) for x in ticks(0, frame.end)], "tokens seen")]
    for language, line in log.losses.items():
        color, (x, _) = colors[language], frame.place(*line[-1])
        parts.append(frame.line(line, color))
        parts.append(element("text", language, class_="name", x=x + 5, y=label_heights[language] + 4, fill=color))
    return frame.draw(*parts, role="img", aria_label=f"{log.title}: training loss")


def heat_map(title: str, rows: Sequence[tuple[str, Sequence[float | None]]]) -> Markup:
    """Draw fractions from 0 to 1: a row for each language, a column for each layer; None is an empty cell."""
    columns = max(len(values) for _, values in rows)
    width, height = LABELS_WIDTH + columns * CELL_WIDTH, HEADER_HEIGHT + len(rows) * CELL_HEIGHT
    parts = []
    for column in range(columns):
        x = LABELS_WIDTH + (column + 0.5) * CELL_WIDTH
        parts.append(element("text", f"layer {column}", class_="tick", x=x, y=HEADER_HEIGHT - 9, text_anchor="middle"))
    for row, (name, values) in enumerate(rows):
        y = HEADER_HEIGHT + row * CELL_HEIGHT
        parts.append(element("text", name, class_="label", x=LABELS_WIDTH - 10, y=y + 20, text_anchor="end"))
        parts += [_cell(LABELS_WIDTH + column * CELL_WIDTH, y, value) for column, value in enumerate(values)]
    size = {"viewBox": f"0 0 {width} {height}", "style": f"max-width:{width}px"}
    return element("svg", *parts, **size, role="img", aria_label=title)


def _cell(x: int, y: int, value: float | None) -> Markup:
    place = {"x": x + 1, "y": y + 1, "width": CELL_WIDTH - 2, "height": CELL_HEIGHT - 2}
    if value is None:
        return element("rect", **place, class_="empty")
    red, green, blue = (round(low + (high - low) * value) for low, high in zip(LOW, HIGH, strict=True))
    ink = "#fff" if value > 0.5 else "#1e293b"
    middle = {"x": x + CELL_WIDTH / 2, "y": y + CELL_HEIGHT / 2 + 4, "text_anchor": "middle"}
    return element("rect", **place, rx=3, fill=f"rgb({red},{green},{blue})") + element(
        "text", f"{value * 100:.0f}%", class_="value", **middle, fill=ink
    )


def spread(heights: dict[str, float], distance: float = 13) -> dict[str, float]:
    """Move labels down until none covers another; in pixels."""
    moved: dict[str, float] = {}
    last = float("-inf")
    for name, height in sorted(heights.items(), key=lambda item: item[1]):
        last = max(height, last + distance)
        moved[name] = last
    return moved


def short(number: float) -> str:
    """Format 12000 as 12K."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:g}{unit}"
    return f"{number:g}"
