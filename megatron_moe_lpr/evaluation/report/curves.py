"""How the outcome depends on one setting: two charts side by side, one for each group of languages."""

from collections.abc import Iterable
from html import escape

from megatron_moe_lpr.evaluation.report.charts import COLORS, Frame
from megatron_moe_lpr.evaluation.report.inputs import Curve, NamedEvaluation
from megatron_moe_lpr.evaluation.report.summary import Summary
from megatron_moe_lpr.model.moe.language_groups import LANGUAGE_GROUPS

PERCENT_WIDTH = 68
"""Pixels left of a chart that hold a number such as +174.7%."""


def curve_figure(curve: Curve, reference: NamedEvaluation) -> str:
    """Changes of bits per byte against `reference`, a dot for each value of the setting, at equal distances."""
    charts = "".join(
        f"<div><h4>{group} languages</h4>{_chart(curve, group, reference, color)}</div>"
        for group, color in zip(LANGUAGE_GROUPS, COLORS, strict=False)
    )
    return (
        f"<figure><h3>{escape(curve.title)}</h3><div class='charts'>{charts}</div>"
        f"<figcaption>{escape(curve.caption)}</figcaption></figure>"
    )


def _chart(curve: Curve, group: str, reference: NamedEvaluation, color: str) -> str:
    found = [(value, one.change(group, reference)) for value, one in curve.points]
    points = [(index, value, summary) for index, (value, summary) in enumerate(found, 1) if summary]
    if not points:
        return "<p>Not evaluated.</p>"
    # Equal distances: the values of a setting often grow by factors.
    heights = [*_extent(summary for _, _, summary in points), 0.0]
    frame = Frame.around(heights, len(curve.points) + 0.5, left=PERCENT_WIDTH)
    parts = [
        frame.open(f"{curve.title}: {group} languages"),
        frame.rules("{:+.1%}".format),
        frame.marks([(index, value) for index, value, _ in points], curve.setting),
    ]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in (frame.place(index, one.mean) for index, _, one in points))
    parts.append(f'<polyline points="{line}" stroke="{color}" fill="none" stroke-width="2"/>')
    parts += [_dot(frame, index, summary, color) for index, _, summary in points]
    return "".join([*parts, "</svg>"])


def _extent(summaries: Iterable[Summary]) -> list[float]:
    return [one.mean + sign * (one.spread or 0) for one in summaries for sign in (-1, 1)]


def _dot(frame: Frame, index: int, summary: Summary, color: str) -> str:
    x, y = frame.place(index, summary.mean)
    (_, top), (_, bottom) = (frame.place(index, edge) for edge in reversed(_extent([summary])))
    return (
        f'<line class="bar" stroke="{color}" x1="{x:.1f}" x2="{x:.1f}" y1="{top:.1f}" y2="{bottom:.1f}"/>'
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{color}"/>'
        f'<text class="value" x="{x:.1f}" y="{top - 10:.1f}" text-anchor="middle" fill="{color}">'
        f"{summary.mean:+.1%}</text>"
    )
