"""Which tasks a language gets: against the names of lm_eval 0.4.13, recorded here; equal to those installed."""

import importlib.metadata
import importlib.util
from pathlib import Path

import pytest

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.evaluation.lm_eval.harness import known_tasks
from megatron_moe_lpr.evaluation.lm_eval.languages import CODES, flores_code, two_letters
from megatron_moe_lpr.evaluation.lm_eval.tasks import BENCHMARKS, choose_tasks

VERSION = "0.4.13"
RECORDED = set((Path(__file__).parent / f"lm_eval_{VERSION}_tasks.txt").read_text().split())
PAPER = ["en", "es", "zh", "el", "hu", "tr"]


def chosen(name: str, *languages: str, known=RECORDED):
    """The one benchmark."""
    return choose_tasks([name], languages or PAPER, known)[0]


@pytest.mark.parametrize(
    ("name", "tasks", "absent"),
    [
        ("arc", "arc_challenge arc_es arc_zh arc_challenge_mt_el arc_hu", ["tr"]),
        ("hellaswag", "hellaswag hellaswag_es hellaswag_hu", ["zh", "el", "tr"]),
        ("mmlu", "m_mmlu_en m_mmlu_es m_mmlu_zh global_mmlu_full_el m_mmlu_hu global_mmlu_full_tr", []),
        (
            "belebele",
            "belebele_eng_Latn belebele_spa_Latn belebele_zho_Hans belebele_ell_Grek belebele_hun_Latn "
            "belebele_tur_Latn",
            [],
        ),
        ("flores", "spanish_bench_flores_en-es spanish_bench_flores_es-en", ["zh", "el", "hu", "tr"]),
    ],
)
def test_the_papers_languages(name, tasks, absent):
    one = chosen(name)
    assert list(one.tasks.values()) == tasks.split() and one.absent == absent
    said = " ".join(one.lines())
    assert all(task in said for task in one.tasks.values())
    assert not absent or f"lm_eval has no task for {', '.join(absent)}; left out there" in said


def test_codes_of_languages_outside_the_table():
    codes = {"ceb": "ceb_Latn", "arz_Arab": "arz_Arab", "ast_Latn": "ast_Latn", "zh-Hant": "zho_Hant", "zh": "zho_Hans"}
    assert {language: flores_code(language) for language in codes} == codes
    assert flores_code("own-tag") == "own-tag"


def test_languages_in_other_spellings():
    assert chosen("mmlu", "hun", "es-MX", "zho_Hans").tasks == {
        "hun": "m_mmlu_hu",
        "es-MX": "m_mmlu_es",
        "zho_Hans": "m_mmlu_zh",
    }
    assert chosen("belebele", "ceb_Latn").tasks == {"ceb_Latn": "belebele_ceb_Latn"}
    assert two_letters("el") == two_letters("ell_Grek") == "el" and flores_code("EL") == "ell_Grek"


def test_every_code_of_the_table_is_one_of_belebeles():
    assert {f"belebele_{code}" for code in CODES.values()} <= RECORDED


@pytest.mark.parametrize(
    ("names", "languages", "message"),
    [
        (["arc", "mlmu"], PAPER, "--benchmarks mlmu: choose among arc"),
        (["arc"], ["el", "el"], "el is named twice"),
        (["hellaswag"], ["el", "tr"], "lm_eval has none of hellaswag for el, tr"),
    ],
)
def test_mistakes(names, languages, message):
    with pytest.raises(UserError, match=message):
        choose_tasks(names, languages, RECORDED)


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs lm_eval: make test-eval")
def test_the_recorded_names_are_the_installed_harness_s():
    """Both ways: nothing recorded that is not there, and no language absent that has become available."""
    assert importlib.metadata.version("lm_eval") == VERSION
    installed = known_tasks()
    assert installed >= RECORDED and len(RECORDED) > 300
    for name in BENCHMARKS:
        assert chosen(name) == chosen(name, known=installed)


def test_without_the_harness(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(UserError, match="lm_eval is not installed; pip install"):
        known_tasks()
