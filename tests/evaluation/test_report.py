"""The report of tiny inputs: its figures are those of the files, and it refers to no other file."""

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.evaluation.report.inputs import read_training_log
from megatron_moe_lpr.svg import ticks
from tests.evaluation.tools import load_tool

report = load_tool("report")


def evaluation(bits: dict[str, float], share: float | None) -> dict:
    """The content of an evaluation file, as far as the report reads it."""
    groups = {"en": "original", "el": "expanded"}
    routing = None if share is None else {"expert0_top_k_share": [share, None]}
    datasets = [
        {"language": name, "group": groups[name], "tokens": 10, "bits_per_byte": value, "routing": routing}
        for name, value in bits.items()
    ]
    averages = {groups[one["language"]]: {"bits_per_byte": one["bits_per_byte"]} for one in datasets}
    if share is not None:
        averages["original"]["expert0_top_k_share"] = share
    return {
        "datasets": datasets,
        "averages": averages,
        "experts_per_layer": [3, 1],
        "top_k": 2,
        "sequence_length": 8,
    }


@pytest.fixture
def files(tmp_path):
    records = {
        "base": evaluation({"en": 2.0, "el": 4.0}, None),
        "one": evaluation({"en": 2.5, "el": 2.0}, 0.4),
        "two": evaluation({"en": 2.01, "el": 2.02}, 0.97),
    }
    for name, record in records.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(record))
    lines = [
        {"kind": "train", "iteration": step, "consumed_tokens": 8 * step, "lm_loss/el": 5 - step} for step in (1, 2)
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "samples.json").write_text(json.dumps([{"language": "el", "prompt": "<b>", "text": "ναι & όχι"}]))
    return tmp_path


def write_report(files: Path, evaluations=("Base=base", "One=one", "Two=two"), **changes: str) -> str:
    evaluations = [f"{title}={files / name}.json" for title, name in (one.split("=") for one in evaluations)]
    options = {
        "--metrics": f"Stage 1={files / 'metrics.jsonl'}",
        "--samples": str(files / "samples.json"),
        "--output": str(files / "report.html"),
    } | changes
    report.main(["--evaluation", *evaluations, *(word for pair in options.items() for word in pair)])
    return (files / "report.html").read_text(encoding="utf-8")


class Balance(HTMLParser):
    """Checks that every tag is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "br", "link", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs): ...

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page_holds_the_figures_and_nothing_external(files, capsys):
    page = write_report(files)
    for figure in ("2.010", "2.020", "+0.5%", "-49.5%", "97.0%", "+25.0%"):
        assert f">{figure}<" in page, figure
    assert "network of 1 of the 2 layers becomes 3 experts" in page and "empty: a layer without" in page
    assert "&lt;b&gt;" in page and "ναι &amp; όχι" in page
    assert not re.search(r"(src|href)\s*=|url\(|https?:", page)
    parser = Balance()
    parser.feed(page)
    assert parser.open == []
    printed = capsys.readouterr().out
    assert "-49.5%" in printed and "97.0%" in printed


def test_heat_maps_before_and_after(files):
    page = write_report(files)
    assert page.count("<figcaption>") == 2
    assert ">40%</text>" in page and ">97%</text>" in page and 'class="empty"' in page


def test_steps_that_a_resume_went_back_from_are_not_drawn(files):
    with open(files / "metrics.jsonl", "a") as stream:
        stream.write('\n{"kind": "resume", "iteration": 1}\n')
    assert read_training_log("run", files / "metrics.jsonl").losses == {"el": [(8, 4)]}
    with open(files / "metrics.jsonl", "a") as stream:
        stream.write('{"kind": "resume", "iteration": 0}\n')
    assert "The log has no losses." in write_report(files)


def test_runs_of_one_title_become_mean_and_spread(files):
    (files / "again.json").write_text(json.dumps(evaluation({"en": 2.03, "el": 2.06}, 0.95)))
    page = write_report(files, evaluations=["Base=base", "Ours=two", "Ours=again"], **{"--subject": "Ours"})
    # 2.01 and 2.03 against 2.0 are +0.5% and +1.5%; 2.02 and 2.06 against 4.0 are -49.5% and -48.5%.
    for figure in ("2.020 ±0.010", "+1.0% ±0.5", "2.040 ±0.020", "-49.0% ±0.5", "96.0% ±1.0"):
        assert f">{figure}<" in page, figure
    assert "trained 2 times" in page and page.count("<tr class=subject>") == 1
    assert page.index("<tr class=subject>") < page.index("2.020 ±0.010")


def test_two_datasets_of_a_language_are_two_columns(files):
    """Each column has the figure of its dataset, not the mean of both."""
    record = evaluation({"en": 2.0, "el": 4.0}, 0.4)
    record["datasets"].append({**record["datasets"][1], "name": "books", "bits_per_byte": 3.25, "tokens": 11})
    record["datasets"][1]["name"] = "news"
    (files / "base.json").write_text(json.dumps(record))
    page = write_report(files, evaluations=["Base=base"], **{"--subject": "Base"})
    assert "<th>el/news</th><th>el/books</th>" in page and "<th>en</th>" in page
    assert "<td>4.000</td><td>3.250</td>" in page
    assert "el/books" in page.partition("<figcaption>")[0]


def test_costs_are_columns(files):
    sizes = {"parameters": 4_000_000, "active_parameters": 3_000_000, "generated_tokens_per_second": 50.0}
    costs = {"Base": {**sizes, "generated_tokens_per_second": 100.0}, "Two": sizes}
    (files / "costs.json").write_text(json.dumps(costs))
    page = write_report(files, **{"--costs": str(files / "costs.json")})
    assert "<td>4.00M</td><td>3.00M</td><td>50 (0.50x)</td>" in page and "<td>100</td>" in page
    assert "<td>–</td><td>–</td><td>–</td>" in page  # the model without costs
    (files / "costs.json").write_text(json.dumps({"Nobody": sizes}))
    with pytest.raises(UserError, match="no evaluation is called 'Nobody'"):
        write_report(files, **{"--costs": str(files / "costs.json")})


def test_mass_on_new_tokens_is_a_column_where_some_model_has_them(files, capsys):
    assert "mass on new tokens" not in write_report(files).lower()
    record = json.loads((files / "two.json").read_text())
    record["averages"]["original"]["new_token_mass"] = 0.0341
    (files / "two.json").write_text(json.dumps(record))
    page = write_report(files)
    assert "<td>97.0%</td><td>3.4%</td>" in page and "<td>40.0%</td><td>–</td>" in page
    assert "mass on new tokens<br>(original)</th>" in page and "3.4%" in capsys.readouterr().out
    assert "Only the routers and rows of new tokens train" in page


def test_how_it_works_is_that_of_the_base_model(files):
    assert "at first all copies of" in write_report(files) and "Only the routers train" in write_report(files)
    record = json.loads((files / "two.json").read_text())
    record["base_experts"] = [2] * len(record["experts_per_layer"])
    (files / "two.json").write_text(json.dumps(record))
    page = write_report(files)
    assert "The model is a mixture already." in page and "at first all copies of" not in page


def test_curves_are_drawn_for_both_groups(files):
    points = [
        {"value": value, "evaluations": [str(files / f"{name}.json")]} for value, name in (("3", "one"), ("5", "two"))
    ]
    curve = {"title": "Experts", "caption": "More <experts>.", "setting": "experts", "points": points}
    (files / "curves.json").write_text(json.dumps([curve]))
    page = write_report(files, **{"--curves": str(files / "curves.json")})
    figure = page[page.index("<h3>Experts") :]
    # 2.5 and 2.01 against 2.0; 2.0 and 2.02 against 4.0.
    for label in ("+25.0%", "+0.5%", "-50.0%", "-49.5%"):
        assert f">{label}</text>" in figure, label
    assert "More &lt;experts&gt;." in figure and figure.count("<circle") == 4
    # A digit of the ticks' font has 8 pixels at most: what begins left of the picture is cut off, sign first.
    ticks = re.findall(r'<text class="tick" x="(\d+)" [^>]*text-anchor="end">([+-][^<]*)<', figure)
    assert any(len(text) == len("+10.0%") for _, text in ticks) and all(int(x) >= 8 * len(text) for x, text in ticks)
    curve["points"] = []
    (files / "curves.json").write_text(json.dumps([curve]))
    with pytest.raises(UserError, match="points"):
        write_report(files, **{"--curves": str(files / "curves.json")})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--metrics": "no-title"}, "write TITLE=FILE"),
        ({"--metrics": "Stage 1=gone.jsonl"}, "no such file"),
        ({"--output": "no/such/place.html"}, "there is no directory"),
        ({"--subject": "Three"}, "no evaluation has this title"),
        ({"--costs": "gone.json"}, "no such file"),
    ],
)
def test_bad_input_is_one_line(files, change, message):
    with pytest.raises(UserError, match=message):
        write_report(files, **change)


def test_names_from_files_and_flags_are_escaped(files):
    hostile = """<script>"'&"""
    record = evaluation({"en": 2.0, "el": 4.0}, 0.4)
    for one in record["datasets"]:
        one |= {"language": hostile + one["language"], "name": hostile}
    (files / "base.json").write_text(json.dumps(record))
    log = {"kind": "train", "iteration": 1, "consumed_tokens": 8, f"lm_loss/{hostile}": 5.0}
    (files / "metrics.jsonl").write_text(json.dumps(log) + "\n")
    sample = {"language": hostile, "prompt": hostile, "text": hostile}
    (files / "samples.json").write_text(json.dumps([sample]))
    point = {"value": hostile, "evaluations": [str(files / "base.json")]}
    curve = {"title": hostile, "caption": hostile, "setting": hostile, "points": [point]}
    (files / "curves.json").write_text(json.dumps([curve]))
    flags = {"--metrics": f"{hostile}={files / 'metrics.jsonl'}", "--curves": str(files / "curves.json")}
    page = write_report(files, evaluations=[f"{hostile}=base"], **flags)
    assert hostile not in page and "<script" not in page and page.count("&lt;script&gt;&#34;&#39;&amp;") > 15
    parser = Balance()
    parser.feed(page)
    assert parser.open == []


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("datasets", 1, "tokens"), "ten", "datasets.1.tokens: Input should be a valid integer"),
        (("datasets", 0, "bits_per_byte"), float("nan"), "datasets.0.bits_per_byte: Input should be a finite number"),
        (("datasets", 0, "group"), "new", "datasets.0.group is neither original nor expanded"),
        (("datasets", 0, "routing", "expert0_top_k_share"), [0.5], "differ in the number of layers"),
        (("experts_per_layer",), [], "experts_per_layer: List should have at least 1 item"),
        (("top_k",), True, "top_k: Input should be a valid integer"),
        (("averages",), {"original": {"bits_per_byte": None}}, "averages has no 'expanded'"),
    ],
)
def test_the_field_of_an_evaluation_that_is_wrong_is_named(files, path, value, message):
    record = json.loads((files / "two.json").read_text())
    *parents, last = path
    place = record
    for name in parents:
        place = place[name]
    place[last] = value
    (files / "two.json").write_text(json.dumps(record))
    with pytest.raises(UserError) as error:
        write_report(files)
    line = str(error.value)
    assert line.startswith(f"--evaluation {files / 'two.json'}: a file of") and message in line and "\n" not in line


def test_evaluations_of_different_text_are_refused(files):
    record = json.loads((files / "two.json").read_text())
    record["datasets"][0]["tokens"] += 1
    (files / "two.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="different texts"):
        write_report(files)


def test_an_evaluation_with_documents_apart_is_compared_with_such_alone(files):
    for names, refused in ((("two",), True), (("base", "one"), False)):
        for name in names:
            record = json.loads((files / f"{name}.json").read_text()) | {"reset_attention_mask": True}
            (files / f"{name}.json").write_text(json.dumps(record))
        if refused:
            with pytest.raises(UserError, match="--pack-apart and --reset-attention-mask"):
                write_report(files)
    assert "8 tokens within a document." in " ".join(write_report(files).split())


@pytest.mark.parametrize("field", ["is_packed", "documents_apart"])
def test_evaluations_of_the_same_bytes_in_other_samples_are_refused(files, field):
    record = json.loads((files / "two.json").read_text())
    record["datasets"][0] |= {field: True}
    (files / "two.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="other flags of --pack, --pack-apart"):
        write_report(files)


def test_the_same_text_in_fewer_tokens_of_another_tokenizer_is_compared(files):
    for name in ("base", "one", "two"):
        record = json.loads((files / f"{name}.json").read_text())
        data = record["datasets"][0]
        data |= {"tokens": data["tokens"] // (2 if name == "two" else 1), "bits_per_byte": 1.5}
        data["loss"] = 3.0 * 1000 / data["tokens"]
        (files / f"{name}.json").write_text(json.dumps(record))
    write_report(files)


@pytest.mark.parametrize(("low", "high"), [(0, 512000), (3.9, 6.2), (0.011, 0.012)])
def test_ticks_are_round_and_inside(low, high):
    found = ticks(low, high)
    assert 2 <= len(found) <= 7
    assert low <= found[0] and found[-1] <= high + sys.float_info.epsilon
