"""Evaluates the demo's models on text of another source, and on multiple-choice questions by lm_eval."""

from method import DEMO_ROWS, finished_demo
from scaling import gnome_text


def other_text() -> None:
    """Evaluate the demo's models on GNOME's desktop help, downloaded as a Debian package. It has hardly any Turkish."""
    flow = finished_demo()
    settings, models = flow.settings, flow.settings.runs
    other = models / "other_text"
    flow = flow.change(expanded=("el", "hu"), runs=other, data=other / "data")
    gnome_text(flow, other, flow.settings.languages)
    for language in flow.settings.languages:
        source, documents = other / "text" / f"{language}.jsonl", settings.validation_documents
        flow.dataset("valid", language, source, f"tokens of {language}", "--max-documents", documents)
    for name in ("base", "stage1", "stage2"):
        flow.evaluate(name, models / name, share_experts=name != "base")
    rows = {title: flow.evaluation(name) for title, name in list(DEMO_ROWS.items())[:3]}
    flow.report(other / "report.html", rows)


def choices() -> None:
    """Run lm_eval on the base model and the exported one: which of four endings continues a held-out passage?"""
    flow = finished_demo()
    settings, output = flow.settings, flow.settings.runs / "choices"
    flags = ("--corpus", settings.corpus / "valid", "--languages", *settings.languages, "--output", output)
    title = "a multiple-choice task for each language"
    flow.step(output / ".done", title, lambda: flow.demo("make_choices", *flags))
    dtype = "bfloat16" if settings.precision == "--bf16" else "float32"
    tasks = ",".join(f"continuation_{language}" for language in settings.languages)
    for name, model in (("base", settings.base), ("final", settings.runs / "hf")):
        words = (
            *("-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={model},dtype={dtype}"),
            *("--device", "cpu", "--batch_size", 16, "--include_path", output, "--tasks", tasks),
            *("--output_path", output / name),
        )
        run = lambda words=words: flow.python(*words, HF_DATASETS_OFFLINE="1", **flow.all_cores)  # noqa: E731
        flow.step(output / name / ".done", f"lm_eval of {model}", run)
    results = (f"base model={output / 'base'}", f"after stage 2={output / 'final'}")
    flow.demo("compare_choices", "--languages", *settings.languages, "--results", *results)
