"""The report as one HTML file, for a reader who does not know the paper: `page.html` filled with figures and charts."""

from pathlib import Path

from markupsafe import Markup

from megatron_moe_lpr.evaluation.report.charts import heat_map, line_chart
from megatron_moe_lpr.evaluation.report.curves import curve_charts
from megatron_moe_lpr.evaluation.report.inputs import NamedEvaluation, ReportInputs
from megatron_moe_lpr.evaluation.report.tables import COSTS, fraction, percent, rows
from megatron_moe_lpr.model.moe.language_groups import LANGUAGE_GROUPS
from megatron_moe_lpr.templates import render


def build_page(inputs: ReportInputs) -> str:
    """Return the HTML of the whole page; it refers to no other file or address."""
    first, languages = inputs.evaluations[0], {language for log in inputs.logs for language in log.losses}
    mixtures = [one for one in inputs.evaluations if one.is_moe]
    return render(
        Path(__file__).with_name("page.html"),
        inputs=inputs,
        groups=LANGUAGE_GROUPS,
        tiles=_tiles(inputs),
        runs=max(len(one.records) for one in inputs.evaluations),
        rows=list(rows(inputs)),
        cost_columns=COSTS if inputs.costs else (),
        curves=[(curve, curve_charts(curve, first)) for curve in inputs.curves],
        heat_maps={one.title: _heat_map(one) for one in mixtures},
        mixture=mixtures[0].record if mixtures else None,
        logs=[(log.title, line_chart(log, sorted(languages))) for log in inputs.logs],
        **_upcycled_layers(inputs.subject.record.experts_per_layer),
    )


def _tiles(inputs: ReportInputs) -> list[tuple[str, str, str]]:
    """Return the figures at the top, each with its meaning and a note; none if there is nothing to compare."""
    first, last = inputs.evaluations[0], inputs.subject
    if last is first:
        return []
    tiles = [
        (percent(last.change("expanded", first)), "bits per byte, new languages", "lower is better"),
        (percent(last.change("original", first)), "bits per byte, old languages", "near 0: nothing was forgotten"),
    ]
    chosen = last.average("original", "expert0_top_k_share")
    if chosen is not None:
        what = "of old-language tokens choose the original expert"
        if last.record.has_mixture_base:
            what = "of old-language tokens' experts are the base model's"
        tiles.append((fraction(chosen), what, "mean over layers"))
    return tiles


def _heat_map(one: NamedEvaluation) -> Markup:
    layers = len(one.record.experts_per_layer)
    values = [data.routing.expert0_top_k_share if data.routing else [None] * layers for data in one.record.datasets]
    return heat_map(one.title, list(zip(one.labels(), values, strict=True)))


def _upcycled_layers(experts_per_layer: list[int]) -> dict[str, str]:
    """Return the words of the page for which layers became mixtures, and of how many experts."""
    counts = sorted({experts for experts in experts_per_layer if experts > 1})
    count = f"{' to '.join(map(str, dict.fromkeys((counts[0], counts[-1]))))} experts" if counts else "several experts"
    upcycled = sum(experts > 1 for experts in experts_per_layer)
    is_part = 0 < upcycled < len(experts_per_layer)
    return {
        "upcycled_layers": f"{upcycled} of the {len(experts_per_layer)} layers" if is_part else "each layer",
        "expert_count": count,
    }
