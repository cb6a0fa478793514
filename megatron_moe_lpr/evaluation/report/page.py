"""The report's HTML: words for a reader who never saw the paper, the table, curves and heat maps."""

from html import escape

from megatron_moe_lpr.evaluation.report.charts import heat_map, line_chart
from megatron_moe_lpr.evaluation.report.curves import curve_figure
from megatron_moe_lpr.evaluation.report.inputs import ReportInputs
from megatron_moe_lpr.evaluation.report.style import STYLE
from megatron_moe_lpr.evaluation.report.tables import html_table, percent, share
from megatron_moe_lpr.model.moe.language_groups import LANGUAGE_GROUPS


def build_page(inputs: ReportInputs) -> str:
    """The whole file; it refers to nothing outside itself."""
    title = "New languages without losing the old ones"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head><body><main><header><p class='kicker'>MoE-LPR on Megatron-Core</p>"
        f"<h1>{title}</h1>{_introduction(inputs)}</header>{_tiles(inputs)}{_results(inputs)}"
        f"{_scaling(inputs)}{_routing(inputs)}{_training(inputs)}{_samples(inputs)}{_method(inputs)}</main></body></html>\n"
    )


def _introduction(inputs: ReportInputs) -> str:
    known, new = (", ".join(map(escape, inputs.languages(group))) for group in LANGUAGE_GROUPS)
    return (
        f"<p class='lead'>A language model that knew <b>{known}</b> was taught <b>{new}</b>. Its own weights stayed "
        "frozen: new experts beside its feed-forward layers learned the new languages, then a short review taught "
        "the routers to send text of the old languages back to the original weights.</p>"
    )


def _tiles(inputs: ReportInputs) -> str:
    first, last = inputs.evaluations[0], inputs.subject
    if last is first:
        return ""
    expanded, original = (percent(last.change(group, first)) for group in ("expanded", "original"))
    tiles = [
        (expanded, "bits per byte, new languages", "lower is better"),
        (original, "bits per byte, old languages", "near 0: nothing was forgotten"),
    ]
    chosen = last.average("original", "expert0_top_k_share")
    if chosen is not None:
        tiles.append((share(chosen), "of old-language tokens choose the original expert", "mean over layers"))
    return (
        "<section class='tiles'>"
        + "".join(
            f"<div><strong>{value}</strong><span>{what}</span><small>{note}</small></div>"
            for value, what, note in tiles
        )
        + "</section>"
    )


def _results(inputs: ReportInputs) -> str:
    length = inputs.evaluations[0].record["sequence_length"]
    return (
        "<section><h2>Results</h2><p>Bits per byte of held-out text: how many bits the model needs to store one byte "
        "of it. Lower is better, and unlike perplexity it does not depend on the tokenizer. Changes are relative to "
        f"the first line. Contexts of up to {length} tokens.{_words_on_runs(inputs)}{_words_on_costs(inputs)}</p>"
        f"{html_table(inputs)}</section>"
    )


def _words_on_runs(inputs: ReportInputs) -> str:
    runs = max(len(one.records) for one in inputs.evaluations)
    if runs == 1:
        return ""
    return (
        f" Of models trained {runs} times, with different seeds, the figures are means; behind ± stands half the "
        "distance between the lowest and the highest."
    )


def _words_on_costs(inputs: ReportInputs) -> str:
    if not inputs.costs:
        return ""
    return (
        " Of a mixture's parameters a token uses only those of the experts it chooses: they are <i>active</i>. The "
        "last column is how fast the exported model writes, token by token, in Hugging Face transformers on a CPU."
    )


def _scaling(inputs: ReportInputs) -> str:
    if not inputs.curves:
        return ""
    figures = "".join(curve_figure(curve, inputs.evaluations[0]) for curve in inputs.curves)
    return (
        "<section><h2>What decides the outcome</h2><p>One setting changes along each line, all others stay. Each dot "
        "is a trained model; its height is the change of bits per byte against the base model, lower is better.</p>"
        f"{figures}</section>"
    )


def _routing(inputs: ReportInputs) -> str:
    models = [one for one in inputs.evaluations if one.is_moe]
    if not models:
        return ""
    top_k = models[0].record["top_k"]
    has_dense_layers = min(models[0].record["experts_per_layer"]) == 1
    caption = f"expert 0 among the top {top_k}" + ("; empty: a layer without experts" if has_dense_layers else "")
    maps = "".join(
        heat_map(
            one.title,
            [
                (label, data["routing"]["expert0_top_k_share"])
                for label, data in zip(one.labels(), one.record["datasets"], strict=True)
            ],
            caption,
        )
        for one in models
    )
    return (
        "<section><h2>Who uses the original expert?</h2><p>Expert 0 is the model's own feed-forward layer, frozen. "
        f"Every token chooses {top_k} experts in each layer that has any. A cell is the share of a language's tokens "
        "for which expert 0 is one of them. After the review the old languages should be dark (they use what they were "
        f"trained with) and the new languages free to go elsewhere.</p><div class='maps'>{maps}</div></section>"
    )


def _training(inputs: ReportInputs) -> str:
    if not inputs.logs:
        return ""
    languages = {language for log in inputs.logs for language in log.losses}
    charts = "".join(
        f"<figure><h4>{escape(log.title)}</h4>{line_chart(log, sorted(languages))}</figure>" for log in inputs.logs
    )
    return (
        "<section><h2>Training</h2><p>Loss per token of the text trained on, by language, from the first step to the "
        "last. In stage 1 only new languages are read; in the review the old ones come beside them.</p>"
        f"<div class='charts'>{charts}</div></section>"
    )


def _samples(inputs: ReportInputs) -> str:
    if not inputs.samples:
        return ""
    items = "".join(
        f"<div><b>{escape(one['language'])}</b><p lang='{escape(one['language'])}'>"
        f"<span class='prompt'>{escape(one['prompt'])}</span>{escape(one['text'])}</p></div>"
        for one in inputs.samples
    )
    return (
        "<section><h2>What it writes</h2><p>Grey is the prompt, from held-out text; the rest is generated from the "
        "exported model by the stock class of Hugging Face transformers. A model this small writes fragments of the "
        f"right language and subject, not sense.</p><div class='samples'>{items}</div></section>"
    )


def _method(inputs: ReportInputs) -> str:
    per_layer = inputs.subject.record["experts_per_layer"]
    counts = sorted({experts for experts in per_layer if experts > 1})
    count = f"{' to '.join(map(str, dict.fromkeys((counts[0], counts[-1]))))} experts" if counts else "several experts"
    chosen = sum(experts > 1 for experts in per_layer)
    which = f"{chosen} of the {len(per_layer)} layers" if 0 < chosen < len(per_layer) else "each layer"
    return (
        "<section><h2>How it works</h2><ol>"
        f"<li><b>Upcycling.</b> The feed-forward network of {which} becomes {count}, at first all copies of it, "
        "with a router that picks some for each token. The model still computes exactly what it did.</li>"
        "<li><b>Stage 1, post-pretraining.</b> Text of the new languages only. New experts and routers train, "
        "everything else is frozen, so nothing is lost; but the routers now send old languages to new experts too.</li>"
        "<li><b>Stage 2, review.</b> Only the routers train, on a little text of the old languages beside the new. "
        "Language Priors Routing adds a loss that pulls tokens of the old languages to expert 0.</li></ol></section>"
    )
