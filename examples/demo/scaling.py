"""The target `scaling`: other numbers of experts, lengths of the replay, and a fourth new language."""

import shutil
from collections.abc import Iterable
from pathlib import Path

from paper_table import paper_table
from settings import read_settings
from workflow import Training, Workflow

VALIDATION_PAGES = 40


def scaling() -> None:
    """Train with 3, 5 or 9 experts, with a replay of 0.03% to 3% of stage 1, and with Czech beside el, hu and tr.

    It starts from the runs of `paper-table` and `full`, and adds its curves to the report of `paper-table`.
    """
    flow = Workflow(read_settings(runs=Path("runs/paper"), ranks=1, replay_documents=4))
    settings, table = flow.settings, flow.settings.runs
    if not all((runs / "report.html").exists() for runs in (table, settings.full)):
        raise SystemExit(
            f"error: run `make paper-table` and `make demo-full` first: {table} and {settings.full} are not complete"
        )
    runs = table / "scaling"
    flow = flow.change(runs=runs, data=settings.datasets)
    flow.beside({"experts": _experts, "replay and cs": lambda one: (_replays(one), _czech(one))})
    one_language = flow.change(original=("en",), expanded=("cs",))
    one_language.evaluate("on-cs-base", table / "base")
    one_language.evaluate("on-cs-without", table / f"seed-{settings.seed}" / "stage2")
    one_language.evaluate("on-cs-with", runs / "cs-stage2")
    flow.say("Czech, before and after it was learned:")
    rows = {"Base model": "base", "el, hu, tr learned": "without", "el, hu, tr, cs learned": "with"}
    flow.report(runs / "cs.html", {title: flow.evaluation(f"on-cs-{name}") for title, name in rows.items()})
    words = ("--table", table, "--full", settings.full, "--seed", settings.seed, "--replays", *settings.replays)
    flow.demo("curves", *words, "--output", runs / "curves.json")
    paper_table()


def _both_stages(flow: Workflow, name: str, experts: int) -> None:
    """Train both stages with so many experts per layer."""
    seed = ("--seed", flow.settings.seed)
    flags = ("--num-experts", experts, "--moe-layer-freq", flow.settings.moe_layers, *seed)
    flow.checkpoint(name, f"{name}: a mixture of {experts} experts", *flags)
    flow.train(Training(f"{name}-stage1", f"{name}: stage 1", "1", name))
    flow.train(Training(f"{name}-stage2", f"{name}: stage 2", "2", f"{name}-stage1"))


def _experts(flow: Workflow) -> None:
    for count in (3, 9):
        _both_stages(flow, f"experts-{count}", count)
        flow.evaluate(f"experts-{count}", flow.settings.runs / f"experts-{count}-stage2")


def _replays(flow: Workflow) -> None:
    """Train reviews, each with another number of documents of each original language, after stage 1 of `full`."""
    for documents in flow.settings.replays:
        one = flow.change(replay=f"replay-{documents}", replay_documents=int(documents))
        one.replay_tokens()
        title = f"a review with {documents} documents of each original language"
        one.train(Training(f"replay-{documents}", title, "2", str(flow.settings.full / "stage1")))
        one.evaluate(f"replay-{documents}")


def _czech(flow: Workflow) -> None:
    """Train with Czech and a third more tokens in both stages, so that each language has as many as before."""
    settings, gnome = flow.settings, flow.settings.runs / "gnome"
    gnome_text(flow, gnome, ("cs", "en"))
    pages = (gnome / "text" / "cs.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    for split, part in (("train", pages[VALIDATION_PAGES:]), ("valid", pages[:VALIDATION_PAGES])):
        source = gnome / f"{split}-cs.jsonl"
        source.write_text("".join(part), encoding="utf-8")
        flow.dataset(split, "cs", source, f"tokens of {split} cs")
    longer = {name: getattr(settings, name) * 4 // 3 for name in ("stage1_iters", "stage2_iters")}
    _both_stages(flow.change(expanded=(*settings.expanded, "cs"), **longer), "cs", settings.experts)
    flow.evaluate("cs", settings.runs / "cs-stage2")


def gnome_text(flow: Workflow, directory: Path, languages: Iterable[str]) -> None:
    """Write GNOME's desktop help as DIRECTORY/text/LANGUAGE.jsonl.

    It is downloaded as Debian's or Ubuntu's package gnome-user-docs (8 MB, CC BY-SA 3.0).
    """
    for program in ("apt-get", "dpkg"):
        if shutil.which(program) is None:
            raise SystemExit(f"error: {program} is not here; the text comes from the Debian package gnome-user-docs")
    package, languages = directory / "package", tuple(languages)

    def unpack() -> None:
        package.mkdir(parents=True, exist_ok=True)
        fetch = 'cd "$1" && apt-get download -q gnome-user-docs && dpkg -x gnome-user-docs_*.deb .'
        flow.run("bash", "-c", fetch, "bash", package)

    flow.step(directory / ".unpacked", "the package gnome-user-docs", unpack)
    pages = ("--pages", package / "usr" / "share" / "help", "--languages", *languages, "--output", directory / "text")
    title = f"its pages in {' '.join(languages)}"
    flow.step(directory / "text" / ".done", title, lambda: flow.demo("gnome_help", *pages))
