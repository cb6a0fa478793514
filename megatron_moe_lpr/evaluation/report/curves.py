"""How results depend on one setting: for each language group a chart of bits per byte against the setting."""

from markupsafe import Markup

from megatron_moe_lpr.evaluation.report.charts import COLORS
from megatron_moe_lpr.evaluation.report.inputs import Curve, NamedEvaluation
from megatron_moe_lpr.evaluation.report.summary import Summary
from megatron_moe_lpr.model.moe.language_groups import LANGUAGE_GROUPS
from megatron_moe_lpr.svg import Frame, element

PERCENT_WIDTH = 68
"""Pixels left of a chart for a number such as +174.7%."""


def curve_charts(curve: Curve, reference: NamedEvaluation) -> dict[str, Markup]:
    """Draw relative changes of bits per byte against `reference`: a chart for each language group, by its name."""
    return {
        group: _chart(curve, group, reference, color) for group, color in zip(LANGUAGE_GROUPS, COLORS, strict=False)
    }


def _chart(curve: Curve, group: str, reference: NamedEvaluation, color: str) -> Markup:
    changes = [(value, one.change(group, reference)) for value, one in curve.points]
    # Equal distances between the dots: the values of a setting often grow by factors.
    points = [(x, value, change) for x, (value, change) in enumerate(changes, 1) if change]
    if not points:
        return element("p", "Not evaluated.")
    heights = [edge for _, _, change in points for edge in _extent(change)]
    frame = Frame.around([*heights, 0.0], len(curve.points) + 0.5, left=PERCENT_WIDTH)
    return frame.draw(
        frame.grid("{:+.1%}".format),
        frame.x_axis([(x, value) for x, value, _ in points], curve.setting),
        frame.line([(x, change.mean) for x, _, change in points], color),
        *(_dot(frame, x, change, color) for x, _, change in points),
        role="img",
        aria_label=f"{curve.title}: {group} languages",
    )


def _extent(change: Summary) -> tuple[float, float]:
    half = change.spread or 0
    return change.mean - half, change.mean + half


def _dot(frame: Frame, index: int, change: Summary, color: str) -> Markup:
    """Draw a dot at the mean, a bar from the lowest to the highest run, and the mean as text above."""
    x, y = frame.place(index, change.mean)
    (_, bottom), (_, top) = (frame.place(index, edge) for edge in _extent(change))
    return (
        element("line", class_="bar", stroke=color, x1=x, x2=x, y1=top, y2=bottom)
        + element("circle", cx=x, cy=y, r=4.5, fill=color)
        + element("text", f"{change.mean:+.1%}", class_="value", x=x, y=top - 10, text_anchor="middle", fill=color)
    )
