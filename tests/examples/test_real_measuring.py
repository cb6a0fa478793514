"""The measuring of `make real`: its numbers are those of transformers' own loss and of `moe-lpr evaluate`."""

import dataclasses
import itertools
import json
import math
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import zstandard
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from examples.real import figures, goals, inputs, likelihood, measure, report, speed, writing
from megatron_moe_lpr.errors import UserError
from tests.conversion.tiny_models import COMMON
from tests.data.builders import corpus_texts, make_hf_tokenizer
from tests.evaluation.test_report import Balance

TEXTS = ["Ο κέρσορας.", "The cursor moves to the next cell of the table. " * 6, "a", "Az egér bal gombja " * 9]
PAIRS = [("These cats sleep.", "These cats sleeps."), ("A dog barks.", "A dog bark."), ("No one left.", "Left one no.")]
TEMPLATE = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}{% if add_generation_prompt %}:{% endif %}"


def tiny(kind: str, seed: int, **fields: object) -> torch.nn.Module:
    """A model of random weights, whose logits differ enough to write different things."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, **{**COMMON, "vocab_size": 800, "eos_token_id": 0, **fields})
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(make_hf_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def dense() -> torch.nn.Module:
    return tiny("llama", 0)


def reference_bits(model: torch.nn.Module, start: list[int], ids: list[int], window: int) -> float:
    """Bits of a text by transformers' own loss, one window after the other, without padding."""
    bits, before = 0.0, start
    for first in range(0, len(ids), window):
        part = ids[first : first + window]
        tokens = torch.tensor([before + part])
        labels = tokens.clone()
        labels[0, : len(before)] = -100
        with torch.no_grad():
            loss = model(tokens, labels=labels).loss.item()
        bits += loss * len(part) / math.log(2)
        before = part[-1:]
    return bits


def test_bits_are_those_of_transformers_own_loss(dense, words):
    """Of short and long texts side by side: neither padding nor the end of a window costs or saves anything."""
    for window in (16, 512):
        found = likelihood.text_bits(dense, words, TEXTS, window)
        start = words("\n").input_ids
        for text, bits in zip(TEXTS, found, strict=True):
            expected = reference_bits(dense, start, words(text).input_ids, window)
            assert bits == pytest.approx(expected, rel=1e-5), text
    total = sum(likelihood.text_bits(dense, words, TEXTS))
    assert likelihood.bits_per_byte(dense, words, TEXTS) == total / sum(len(text.encode()) for text in TEXTS)


def test_a_bit_per_byte_is_a_closed_form_where_all_tokens_are_equally_likely(words):
    flat = tiny("llama", 0, tie_word_embeddings=False)
    torch.nn.init.zeros_(flat.lm_head.weight)
    tokens = sum(len(words(text).input_ids) for text in TEXTS)
    expected = tokens * math.log2(800) / sum(len(text.encode()) for text in TEXTS)
    assert likelihood.bits_per_byte(flat, words, TEXTS) == pytest.approx(expected, rel=1e-6)


def test_windows_hold_every_token_once():
    for length in (1, 15, 16, 17, 40):
        ids = list(range(100, 100 + length))
        windows = list(likelihood.cut(7, [1, 2], ids, 16))
        assert [token for one in windows for token in one.ids[one.context :]] == ids
        assert {one.text for one in windows} == {7} and windows[0].ids[:2] == [1, 2]
        assert all(after.ids[0] == before.ids[-1] for before, after in itertools.pairwise(windows))
    some = [likelihood.Window(number, [0] * length, 1) for number, length in enumerate((900, 5, 40, 2000, 7))]
    batched = list(likelihood.batches(some))
    assert sorted(one.text for batch in batched for one in batch) == [0, 1, 2, 3, 4]
    assert all(len(b) == 1 or len(b) * max(len(one.ids) for one in b) <= likelihood.BATCH_TOKENS for b in batched)


def test_a_pair_is_right_if_its_first_sentence_is_likelier_in_transformers(dense, words):
    start = words("\n").input_ids
    bits = [[reference_bits(dense, start, words(text).input_ids, 512) for text in pair] for pair in PAIRS]
    expected = [good < bad for good, bad in bits]
    assert likelihood.pair_accuracy(dense, words, PAIRS) == expected
    turned = [pair[::-1] for pair in PAIRS]
    assert likelihood.pair_accuracy(dense, words, turned) == [not one for one in expected]


def test_answers_beside_each_other_are_those_of_each_alone(dense, words, tmp_path, monkeypatch):
    """Through the chat template or without one, padded on the left."""
    monkeypatch.setattr(writing, "ANSWER_TOKENS", 12)
    (tmp_path / "config.json").write_text('{"eos_token_id": 0}')
    for template in (None, TEMPLATE):
        words.chat_template = template
        together = writing.answers(dense, words, tmp_path, writing.QUESTIONS[:3])
        alone = [text for one in writing.QUESTIONS[:3] for text in writing.answers(dense, words, tmp_path, [one])]
        assert together == alone and any(together)
    assert words.decode(writing.question_ids(words, "Why?")) == "<Why?>:"
    words.chat_template = None


@pytest.fixture(scope="module")
def directory(tmp_path_factory, dense, words) -> tuple[Path, SimpleNamespace]:
    """A directory with two models, and settings with a small corpus, texts and pairs."""
    root = tmp_path_factory.mktemp("real")
    words.chat_template = TEMPLATE
    models = {"base": dense, "MoE-LPR": tiny("mixtral", 1, num_local_experts=4)}
    for name, model in models.items():
        model.save_pretrained(root / "hf" / name)
        words.save_pretrained(root / "hf" / name)
    words.chat_template = None
    listed = [{"name": name, "hf": str(root / "hf" / name), "megatron": None, "kind": "x"} for name in models]
    (root / "models.json").write_text(json.dumps(listed))
    (root / "corpus" / "valid").mkdir(parents=True)
    for language in ("en", "el", "zh"):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in corpus_texts("valid", language)[:6])
        (root / "corpus" / "valid" / f"{language}.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    (root / "text").mkdir()
    for language in ("en", "el"):
        (root / "text" / f"wiki.{language}.jsonl").write_text(json.dumps({"text": f"{language} <b>"}) + "\n")
    names = [("sentence_good", "sentence_bad"), ("good", "bad"), ("good", "bad")]
    lines = [json.dumps(dict(zip(keys, pair, strict=True))) for keys, pair in zip(names, PAIRS, strict=True)]
    (root / "text" / "pairs.en.jsonl").write_text("\n".join(lines) + "\n")
    return root, SimpleNamespace(
        text=root / "text",
        pairs=root / "text" / "pairs.en.jsonl",
        corpus=root / "corpus",
        expanded=("el",),
        validation_bytes=3000,
    )


@pytest.fixture(scope="module")
def measured(directory) -> tuple[Path, SimpleNamespace]:
    """The same after measuring, with the steps of the stages before."""
    root, settings = directory
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM", "")
        patch.setattr(torch, "set_num_threads", lambda _: None)
        for module, name in ((speed, "NEW_TOKENS"), (writing, "CONTINUATION_TOKENS"), (writing, "ANSWER_TOKENS")):
            patch.setattr(module, name, 6)
        measure.run(root, settings)
    step = {"name": "stage 1", "seconds": 200.4, "peak_memory_bytes": 2.04e9, "tokens_per_second": 123.4}
    (root / "steps.json").write_text(json.dumps({"steps": [step, {"name": "export", "seconds": 9.0}]}))
    return root, settings


def test_measured_figures_are_those_of_the_documents(measured, dense, words):
    root, _ = measured
    found = json.loads((root / "measured" / "moe-lpr.json").read_text())
    (en, zh, el) = found["text"]
    assert [one["language"] for one in (en, zh, el)] == ["en", "zh", "el"]
    documents = inputs.whole_documents(corpus_texts("valid", "el")[:6], 3000)
    base = json.loads((root / "measured" / "base.json").read_text())
    assert base["text"][2]["bits_per_byte"] == pytest.approx(
        likelihood.bits_per_byte(dense, words, documents), rel=1e-6
    )
    assert el["bytes"] == sum(len(text.encode()) for text in documents)
    assert el["tokens"] == sum(len(words(text).input_ids) for text in documents)
    assert [(one["name"], one["language"], one["bytes"]) for one in found["other_text"]] == [
        ("wiki", "en", len("en <b>")),
        ("wiki", "el", len("el <b>")),
    ]
    assert len(found["pairs"]) == 3 and len(found["answers"]) == 10
    costs = json.loads((root / "measured" / "costs.json").read_text())
    assert costs["engine"] == "transformers"
    sizes = costs["models"]["MoE-LPR"]
    expert = 3 * COMMON["hidden_size"] * COMMON["intermediate_size"] * COMMON["num_hidden_layers"]
    assert sizes["parameters"] - sizes["active_parameters"] == 2 * expert  # of four experts two are active


def test_what_is_measured_is_not_measured_again(measured, monkeypatch):
    root, settings = measured
    file = root / "measured" / "base.json"
    before = file.read_bytes()
    loaded: list[Path] = []
    real = measure.load
    monkeypatch.setattr(measure, "load", lambda hf: loaded.append(hf) or real(hf))
    monkeypatch.setattr(measure, "measure_costs", lambda *_: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    measure.run(root, settings)
    assert not loaded and file.read_bytes() == before
    # Fewer pairs: they alone are measured again.
    measure.run(root, {**vars(settings), "max_pairs": 2})
    assert [one.name for one in loaded] == ["base", "MoE-LPR"]
    after = json.loads(file.read_text())
    assert len(after["pairs"]) == 2
    assert {name: value for name, value in after.items() if name not in ("pairs", "inputs")} == {
        name: value for name, value in json.loads(before).items() if name not in ("pairs", "inputs")
    }
    measure.run(root, settings)
    assert file.read_bytes() == before


def test_the_page_and_the_markdown_hold_the_figures(measured, capsys):
    root, settings = measured
    report.run(root, settings)
    page, table = (root / "report.html").read_text(), (root / "table.md").read_text()
    found = figures.read_figures(root, settings)
    change = f"{found.change('MoE-LPR', 'text', 'expanded'):+.1%}"
    bits = f"{found.mean_bits('MoE-LPR', 'text', 'expanded'):.3f}"
    identical = f"{found.identical('MoE-LPR')} of 10"
    for text in (f"{bits} ({change})", identical, "3 min 20 s", "2.0 GB", "123", "3 min 29 s"):
        assert f">{text}<" in page and f" {text} |" in table, text
    assert "&lt;What is the capital" not in page and "en &lt;b&gt;" not in page
    assert not re.search(r"(src|href)\s*=|url\(|https?:", page)
    parser = Balance()
    parser.feed(page)
    assert parser.open == [] and page.count("<tr class=subject>") == 5
    assert table.split("\n\n")[2].splitlines()[0] in capsys.readouterr().out
    for line in table.splitlines():
        assert not line.startswith("|") or line.endswith("|")


def test_goals_are_reached_or_missed_by_their_numbers(measured):
    """A model that is worse than the base in everything, then one that is what was wanted."""
    root, settings = measured
    found = figures.read_figures(root, settings)
    base = found.models["base"]

    def outcome(expanded: float, original: float, full: float, pairs: list[bool]) -> list[str]:
        def model(new: float, old: float) -> dict:
            factors = {"el": new, "en": old, "zh": 1}
            texts = {
                kind: [{**one, "bits_per_byte": one["bits_per_byte"] * factors[one["language"]]} for one in base[kind]]
                for kind in ("text", "other_text")
            }
            return {**base, **texts, "pairs": pairs}

        models = {"base": base, goals.FULL: model(1, full), "MoE-LPR": model(expanded, original)}
        changed = dataclasses.replace(found, models=models)
        return [row[1] for row in goals.goals(changed, "MoE-LPR").rows]

    assert outcome(0.64, 1.009, 1.05, base["pairs"]) == ["reached"] * 6
    assert outcome(0.66, 1.011, 1.05, [False] * 3)[:3] == ["missed"] * 3
    assert outcome(1.01, 1.02, 1.3, [False] * 3) == [
        *("missed", "missed", "reached"),
        "missed" if any(base["pairs"]) else "reached",
        *("missed", "missed"),
    ]


def test_what_a_model_wrote_is_escaped(measured):
    root, settings = measured
    file = root / "measured" / "moe-lpr.json"
    content = json.loads(file.read_text())
    text = file.read_text()
    content["answers"][0] = "<script>1</script>"
    file.write_text(json.dumps(content))
    try:
        report.run(root, settings)
        page = (root / "report.html").read_text()
        assert "&lt;script&gt;" in page and "<script>" not in page
    finally:
        file.write_text(text)


def test_pairs_are_taken_evenly_over_the_file(tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps({"good": f"g{n}", "bad": f"b{n}"}) + "\n" for n in range(10)))
    read = inputs.sentence_pairs(inputs.Inputs(pairs=file, max_pairs=4))
    assert read == [(f"g{n}", f"b{n}") for n in (0, 2, 5, 7)]
    assert len(inputs.sentence_pairs(inputs.Inputs(pairs=file))) == 10


def test_documents_are_whole_and_within_the_bytes():
    documents = ["αβ", "x" * 10, "yy", "zzz"]
    assert inputs.whole_documents(documents, 8) == ("αβ", "yy")
    assert inputs.whole_documents(documents, 9) == ("αβ", "yy", "zzz")
    assert inputs.whole_documents(documents, 1) == ("yy",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"good": "a"}', "line 1: sentence_good and sentence_bad"),
        ('{"good": "a", "bad": ""}', "line 1: sentence_good and sentence_bad"),
        ("[1]", "line 1: a JSON object"),
        ("good, bad", "not JSON lines"),
        ("", "no line in it"),
        (None, "cannot be read"),
    ],
)
def test_pairs_of_another_form_are_refused(tmp_path, content, message):
    file = tmp_path / "pairs.jsonl"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UserError, match=message) as failure:
        inputs.sentence_pairs(inputs.Inputs(pairs=file))
    assert str(file) in str(failure.value)


def test_inputs_that_are_missing_are_named(directory, tmp_path, monkeypatch):
    root, settings = directory
    with pytest.raises(UserError, match=f"TEXT={tmp_path}: no file NAME.LANGUAGE.jsonl"):
        inputs.other_texts(inputs.Inputs(text=tmp_path))
    with pytest.raises(UserError, match=r"no file hu\.jsonl"):
        inputs.validation_texts(inputs.Inputs(corpus=settings.corpus, expanded=("el", "hu")))
    with pytest.raises(UserError, match=r"models\.json: no such file"):
        measure.run(tmp_path, settings)
    shutil.copy(root / "models.json", tmp_path)
    with pytest.raises(UserError, match="the stage that measures writes it"):
        report.run(tmp_path, settings)
    (tmp_path / "models.json").write_text('[{"name": "base", "hf": "/no/such"}]')
    with pytest.raises(UserError, match="'base': no Hugging Face directory /no/such"):
        measure.run(tmp_path, settings)
    monkeypatch.setenv("VLLM", str(tmp_path))
    with pytest.raises(UserError, match="no virtual environment with vLLM"):
        speed.vllm_python()


def test_vllm_measures_where_it_is_installed(tmp_path, monkeypatch):
    """A stand-in of the environment: its Python gets the model and writes the speed; a failure is one line."""
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    script = f"#!{sys.executable}\nimport sys\nif 'import vllm' == sys.argv[2]: sys.exit()\n"
    python.write_text(script + "assert sys.argv[3] == 'model'\nopen(sys.argv[7], 'w').write('12.5')\n")
    python.chmod(0o755)
    monkeypatch.setenv("VLLM", str(tmp_path))
    assert speed.vllm_python() == python and speed.in_vllm(python, Path("model")) == 12.5
    with pytest.raises(UserError, match="other: vLLM fails: AssertionError"):
        speed.in_vllm(python, Path("other"))
