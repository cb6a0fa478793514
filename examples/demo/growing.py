"""The target `growing`: fewer experts, allocated by layer, and languages added later by a second expansion."""

from pathlib import Path

from settings import read_settings
from workflow import Training, Workflow


def growing() -> None:
    """Fewer experts, and languages added later, with fewer steps than the demo's. Described in docs/growing.md."""
    flow = Workflow(read_settings(runs=Path("runs/demo-growing"), ranks=1, stage1_iters=140, stage2_iters=400))
    settings, runs = flow.settings, flow.settings.runs
    flow.demo_tokens()
    for language in settings.original:
        flow.tokens("sample", "train", language, "--max-documents", 60)
    flow.dense()
    allocation = runs / "allocation.json"
    data = (*flow.prefixes("train", settings.expanded), *flow.prefixes("sample", settings.original))
    flags = ("--load", settings.base, "--original-languages", *settings.original, "--budget", 6, "--dense-layers", 0)
    flags = (*flags, "--data-path", *data, "--output", allocation, "--plot", runs / "allocation.svg")
    flow.step(allocation, "how many experts each layer gets", lambda: flow.tool("allocate_experts", *flags))
    # Half of the new experts against all of them.
    for name, experts in (("half", allocation), ("full", "1,5,5,5")):
        flow.checkpoint(name, f"{name}: a mixture of experts", "--experts-per-layer", experts)
        both_stages(flow, name, name)
        flow.evaluate(f"{name}-stage1")
        flow.evaluate(f"{name}-stage2")
    flow.evaluate("base")
    # Two thirds of the tokens and of the experts for el and hu, then a third for tr; a review after each.
    first_iters = settings.stage1_iters * 2 // 3
    flow.checkpoint("first", "el and hu first: a mixture of experts", "--experts-per-layer", "1,3,3,3")
    both_stages(flow.change(expanded=("el", "hu"), stage1_iters=first_iters), "first", "el and hu")
    more = ("--load", runs / "first-stage2", "--save", runs / "second", "--add-experts", "0,2,2,2")
    done = runs / "second" / "latest_checkpointed_iteration.txt"
    flow.step(done, "tr afterwards: two more experts in each layer", lambda: flow.tool("expand", *more))
    later = flow.change(expanded=("tr",), stage1_iters=settings.stage1_iters - first_iters)
    later.train(Training("second-stage1", "tr: stage 1", "1", "second"))
    flow.train(Training("second-stage2", "tr: stage 2", "2", "second-stage1"))
    for name in ("first-stage2", "second-stage1", "second-stage2"):
        flow.evaluate(name)
    flow.say("half of the new experts against all of them:")
    evaluations = {"Base model": flow.evaluation("base")}
    for count, name in ((6, "half"), (12, "full")):
        for stage in (1, 2):
            evaluations[f"{count} new experts, stage {stage}"] = flow.evaluation(f"{name}-stage{stage}")
    flow.report(runs / "report.html", evaluations)
    flow.say("el and hu first, tr afterwards, against all three at once:")
    rows = {
        "Base model": "base",
        "all at once, stage 2": "full-stage2",
        "el and hu first, stage 2": "first-stage2",
        "tr afterwards, stage 1": "second-stage1",
        "tr afterwards, stage 2": "second-stage2",
    }
    flow.report(runs / "later.html", {title: flow.evaluation(name) for title, name in rows.items()})


def both_stages(flow: Workflow, name: str, title: str) -> None:
    """Train stage 1 from the checkpoint NAME, then stage 2."""
    flow.train(Training(f"{name}-stage1", f"{title}: stage 1", "1", name))
    flow.train(Training(f"{name}-stage2", f"{title}: stage 2", "2", f"{name}-stage1"))
